"""The one door to time: everything else takes a Clock as an argument."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Wall time for records, monotonic time for deadlines, and waiting."""

    def now(self) -> datetime:
        """Return the wall time, timezone-aware, in UTC. For records, never for deadlines."""
        ...

    def monotonic_s(self) -> float:
        """Return seconds on a clock that never goes back. For deadlines and rates."""
        ...

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Wait until *event* is set or *timeout_s* passed; return whether it is set."""
        ...

    def pause(self, seconds: float) -> None:
        """Let *seconds* pass. For polling between two looks, never as proof of anything."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> datetime:
        """See Clock."""
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        """See Clock."""
        return time.monotonic()

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """See Clock."""
        return event.wait(timeout_s)

    def pause(self, seconds: float) -> None:
        """See Clock."""
        time.sleep(seconds)


class Deadline:
    """A moment on the monotonic clock after which waiting is given up."""

    def __init__(self, clock: Clock, timeout_s: float) -> None:
        self._clock = clock
        self.timeout_s = timeout_s
        self._at_s = clock.monotonic_s() + timeout_s

    def remaining_s(self) -> float:
        """Return the seconds that are left, never below 0."""
        return max(0.0, self._at_s - self._clock.monotonic_s())

    def passed(self) -> bool:
        """Return whether the moment is behind us."""
        return self.remaining_s() == 0.0


def utc_text(moment: datetime) -> str:
    """Return *moment* as RFC 3339 in UTC, to the microsecond (sorts as text)."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
