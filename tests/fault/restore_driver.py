"""A restore of a whole guest in a process of its own that kills itself at a step: ``STEP restore …``.

*STEP* is one that `whole_guest` tells of, or ``in TARGET``: with part of that disk written.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from typing import Any

from stillframe.cli import restore_guest
from stillframe.cli.main import app
from stillframe.restore.run import RestoreProgress
from stillframe.restore.whole_guest import GuestTools


def main() -> None:
    """Run the command."""
    step, *words = sys.argv[1:]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def reached(there: str) -> None:
        if there == step:
            die()

    def report(target: str, progress: RestoreProgress) -> None:
        if step == f"in {target}" and progress.written_bytes:
            die()

    def tools(*given: Any) -> GuestTools:
        return replace(GuestTools(*given), reached=reached, report=report)

    vars(restore_guest)["GuestTools"] = tools
    app(words)


if __name__ == "__main__":
    main()
