"""A restore in place that is killed at a step of its own, or whose server is.

    python -m tests.fault.in_place_driver STEP COMMAND...

STEP is ``name#number``: the number of times that the named step was reached. Steps are the phases that are
written down (`protecting`, `writing`, `written`, `removed`), `protected`, `renamed` (an image has its other
name, and nothing lies in its place), `unmarked` (an image was called back), `freed` (so was the definition),
`asked` (the guest, to shut down), `checked` (all can be read), and `wrote` (data is on its way to an image).
At STEP the process kills itself; at ``server:name#number`` it kills its qemu-nbd, and at
``term:name#number`` it sends itself a SIGTERM.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
from pathlib import Path
from typing import Any

from stillframe.capture import restoring
from stillframe.cli import restore_in_place as command
from stillframe.cli.main import app
from stillframe.hypervisor import domain
from stillframe.restore import in_place, protect


class Striker:
    """Strikes when a step is reached for the time that was asked for."""

    def __init__(self, text: str) -> None:
        self._whom, _, step = text.rpartition(":")
        self._step = step
        self._counts: collections.Counter[str] = collections.Counter()

    def __call__(self, name: str) -> None:
        self._counts[name] += 1
        if f"{name}#{self._counts[name]}" != self._step:
            return
        for victim in servers() if self._whom == "server" else [os.getpid()]:
            os.kill(victim, signal.SIGTERM if self._whom == "term" else signal.SIGKILL)


def servers() -> list[int]:
    """Return the qemu-nbd processes that this process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = stat.read_text().rpartition(")")[2].split()
        if int(fields[1]) == os.getpid() and b"qemu-nbd" in (stat.parent / "cmdline").read_bytes():
            found.append(int(stat.parent.name))
    return found


def install(strike: Striker) -> None:
    """Have *strike* told of every step."""

    class Store(restoring.RestoringStore):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder, strike)

    vars(command)["RestoringStore"] = Store
    # Few and small portions, so that there is a middle.
    vars(in_place)["_KEEP_BYTES"] = 256 * 1024
    _after(in_place._Run, "_put", strike, "wrote")
    _before(os, "symlink", strike, "renamed")
    _after(protect, "_unmark", strike, "unmarked")
    _after(in_place, "let_go", strike, "freed")
    _after(in_place._Run, "_check_readable", strike, "checked")
    _after(domain.Domain, "ask_to_shut_down", strike, "asked")


def _after(holder: Any, name: str, strike: Striker, step: str) -> None:
    original = getattr(holder, name)

    def call(*arguments: Any) -> Any:
        result = original(*arguments)
        strike(step)
        return result

    setattr(holder, name, call)


def _before(holder: Any, name: str, strike: Striker, step: str) -> None:
    original = getattr(holder, name)

    def call(*arguments: Any) -> Any:
        strike(step)
        return original(*arguments)

    setattr(holder, name, call)


if __name__ == "__main__":
    install(Striker(sys.argv[1]))
    app(sys.argv[2:])
