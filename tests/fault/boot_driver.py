"""The stillframe command, which stops itself (SIGSTOP) at a given step of a booted guest's record.

    python -m tests.fault.boot_driver STATE PHASE NUMBER WORDS...

WORDS is the command line. STATE and PHASE ("intent" or "done") say where, NUMBER the how maniest time.
`reached` is printed just before stopping.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import cached_property

from stillframe.cli.main import main
from stillframe.cli.session import Session
from stillframe.restore.boot_record import BootHook, BootState, BootStore


def stop_at(state: str, phase: str, number: str) -> BootHook:
    """Return the store's hook that stops this process at such a step."""
    seen = 0

    def hook(seen_state: BootState, seen_phase: str) -> None:
        nonlocal seen
        seen += (seen_state.value, seen_phase) == (state, phase)
        if seen == int(number) and (seen_state.value, seen_phase) == (state, phase):
            print("reached", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    return hook


if __name__ == "__main__":
    hook = stop_at(*sys.argv[1:4])
    store = cached_property(lambda session: BootStore(session.state_folder, hook))
    store.__set_name__(Session, "boot_store")
    Session.boot_store = store  # type: ignore[assignment]
    sys.argv = ["stillframe", *sys.argv[4:]]
    main()
