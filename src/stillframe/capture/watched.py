"""Doing what may hang for ever in a thread of its own, and not waiting for ever for it.

A dead NFS server holds a thread in the kernel where nothing reaches it. The guest
must be committed back all the same, so nobody but such a thread touches the destination,
and whoever waits for it has a way out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from stillframe.clock import Clock, Deadline
from stillframe.errors import CopyFailed, DestinationLost, StillframeError
from stillframe.units import duration_text

_T = TypeVar("_T")
_LOOK_S = 0.1
#: Nothing moving for so long counts as dead. A slow share's flush may well take a minute.
STALL_TIMEOUT_S = 600.0
#: How long a thread is waited for that was told to stop.
GRACE_S = 10.0

Stop = Callable[[], StillframeError | None]


class Cancelled(RuntimeError):
    """Raised in a thread whose work is no longer wanted."""


class Watch:
    """What the working threads and the one that waits for them tell each other."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.moves = 0
        self.reading: set[int] = set()
        self.hung = False

    def tick(self) -> None:
        """Say that something moved. Raises Cancelled when the work is no longer wanted."""
        self.moves += 1  # threads may lose each other's count; that it changes is enough
        self.check()

    def check(self) -> None:
        """Raise Cancelled when the work is no longer wanted."""
        if self.cancelled.is_set():
            raise Cancelled

    @contextlib.contextmanager
    def reads_source(self) -> Iterator[None]:
        """Mark the block as waiting for the guest's disk, not for the destination."""
        me = threading.get_ident()
        self.reading.add(me)
        try:
            yield
        finally:
            self.reading.discard(me)


class Watched(Generic[_T]):
    """One piece of work in a daemon thread."""

    def __init__(self, work: Callable[[Watch], _T], clock: Clock, name: str) -> None:
        self._work = work
        self._clock = clock
        self._done = threading.Event()
        self._result: list[_T] = []
        self._error: BaseException | None = None
        self.watch = Watch()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def result(
        self, stop: Stop, *, each_look: Callable[[], None] | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S, grace_s: float = GRACE_S,
    ) -> _T:
        """Start the work, wait for its end and return what it gives, or raise what it raised.

        *stop* is asked all the while; the error that it returns is raised here, after at most
        *grace_s*. `watch.hung` is true if the thread was still not gone then.
        """
        self._thread.start()
        seen, deadline = self.watch.moves, Deadline(self._clock, stall_timeout_s)
        try:
            while not self._clock.wait(self._done, _LOOK_S):
                if each_look is not None:
                    each_look()
                if (error := stop()) is not None:
                    raise error
                if self.watch.moves != seen:
                    seen, deadline = self.watch.moves, Deadline(self._clock, stall_timeout_s)
                elif deadline.passed():
                    raise self._stalled(stall_timeout_s)
        except BaseException as error:
            self._cancel(grace_s, error)
            raise
        if self._error is not None:
            raise self._error
        return self._result[0]

    def _cancel(self, grace_s: float, error: BaseException) -> None:
        self.watch.cancelled.set()
        self.watch.hung = not self._clock.wait(self._done, grace_s)
        if self.watch.hung and isinstance(error, StillframeError):
            error.message += (
                f" The destination did not answer for {duration_text(grace_s)} more, so it was left as it is;"
                " the next run clears up there."
            )

    def _stalled(self, timeout_s: float) -> StillframeError:
        waited = duration_text(timeout_s)
        if self.watch.reading:
            return CopyFailed(
                f"The guest's disk gave no data for {waited}.",
                "check the storage of the guest (dmesg), then run the command again")
        return DestinationLost(
            f"The destination hangs: nothing could be read or written there for {waited}.",
            "check the share (dmesg, df DEST), then run the command again")

    def _run(self) -> None:
        try:
            self._result.append(self._work(self.watch))
        except BaseException as error:  # noqa: BLE001 -- handed to the thread that waits
            self._error = error
        finally:
            self._done.set()
