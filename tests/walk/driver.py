"""The `stillframe` command in a process of its own whose journal asks at each step before it goes on.

    python -m tests.walk.driver LINK MUTATION WORD...

LINK is the descriptor of a socket: "STATE PHASE" is written there as each step is in the journal, and one
byte that comes back lets the run go on. MUTATION is "-", or the name of a fault that is put into the readers,
so that a test can show that it would be noticed.
"""

from __future__ import annotations

import functools
import socket
import sys
from collections.abc import Callable, Iterator

from stillframe.block.reader import NbdReader
from stillframe.capture.journal import Journal
from stillframe.capture.states import State
from stillframe.cli import main, session
from stillframe.extent import Extent
from stillframe.repository import incremental
from stillframe.repository.audit import Audited


def asking(link: socket.socket) -> Callable[[State, str], None]:
    """Return the journal's hook that tells of a step and waits for the answer."""

    def hook(state: State, phase: str) -> None:
        link.sendall(f"{state.value} {phase}\n".encode())
        link.recv(1)

    return hook


def forget_a_change() -> None:
    """Let readers leave out the first data that changed, and nobody look whether they do."""
    honest = NbdReader.changed

    def changed(self: NbdReader) -> Iterator[Extent] | None:
        found = honest(self)
        return None if found is None else _without_first_data(found)

    NbdReader.changed = changed  # type: ignore[method-assign]
    vars(incremental)["audited"] = lambda *_given: Audited()


def _without_first_data(found: Iterator[Extent]) -> Iterator[Extent]:
    left_out = False
    for extent in found:
        if left_out or extent.kind.reads_as_zero:
            yield extent
        left_out = left_out or not extent.kind.reads_as_zero


MUTATIONS: dict[str, Callable[[], None]] = {"-": lambda: None, "forget-a-change": forget_a_change}


def run() -> None:
    """Do what the words say, and end with the command's exit code."""
    link, mutation = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    MUTATIONS[mutation]()
    vars(session)["Journal"] = functools.partial(Journal, hook=asking(link))
    sys.argv = ["stillframe", *sys.argv[3:]]
    main.main()


if __name__ == "__main__":
    run()
