"""A guard: a small process of its own that ends what a dead run left a guest in.

It is started before what must not last (a freeze, a suspend) and says `ready` once it is connected to
libvirt. Its standard input is a pipe from the run: the line `done` there means that the run has undone
it itself. End of file without it means that the run died. Then, or when its time is up, the guard acts. It
has a session of its own, so that a Ctrl-C or a kill of the run's process group leaves it alone.
"""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Callable, Sequence

from stillframe import process
from stillframe.clock import Clock, Deadline
from stillframe.errors import StillframeError

#: How long a guard goes on trying: longer than any restart of libvirtd, or of an agent.
_PERSISTENCE_S = 3600.0
_PAUSE_S = 1.0
_READY_S = 20.0


class Guard:
    """The run's end of a guard."""

    def __init__(self, child: process.Helper) -> None:
        self._child = child

    def dismiss(self) -> None:
        """Tell the guard that nothing is left for it to do, and wait until it is gone."""
        if self._child.stdin is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.write(b"done\n")
                self._child.stdin.flush()
        process.stop(self._child)

    def leave(self) -> None:
        """Let the guard do its work. After dismiss() there is none left."""
        if self._child.stdin is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.close()


def start_guard(module: str, arguments: Sequence[str], clock: Clock) -> Guard | None:
    """Start *module*, which calls stand_by(), as a guard; None if it could not be started."""
    try:
        child = process.start_detached(process.own_module(module, *arguments))
    except (OSError, StillframeError):
        return None
    guard = Guard(child)
    if _is_ready(child, Deadline(clock, _READY_S)):
        return guard
    guard.dismiss()
    return None


def stand_by(deadline_s: float) -> str:
    """Tell the run that the guard is ready; return why it must act, "" when the run says that it need not."""
    print("ready", flush=True)  # noqa: T201 -- the run waits for this line on the pipe
    ready, _, _ = select.select([sys.stdin], [], [], deadline_s)
    if not ready:
        return f"the run did not do it within {deadline_s:.0f} s"
    return "" if sys.stdin.readline().strip() == "done" else "the run died"


def persist(clock: Clock, attempt: Callable[[Deadline], bool | None]) -> bool:
    """Call *attempt* until it says True (done) or False (nothing is to be done), for an hour at most.

    Errors do not end it: libvirtd may be away, a call of the dead run may still hold libvirt's lock on the
    guest, a file system may be full or not answer.
    """
    deadline = Deadline(clock, _PERSISTENCE_S)
    while not deadline.passed():
        with contextlib.suppress(StillframeError, OSError):
            outcome = attempt(deadline)
            if outcome is not None:
                return outcome
        clock.pause(_PAUSE_S)
    return False


def _is_ready(child: process.Helper, deadline: Deadline) -> bool:
    if child.stdout is None:
        return False
    ready, _, _ = select.select([child.stdout], [], [], deadline.remaining_s())
    return bool(ready) and child.stdout.readline().strip() == b"ready"
