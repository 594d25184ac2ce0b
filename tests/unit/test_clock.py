"""Deadlines, and time as records carry it."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta, timezone

import pytest

from stillframe.clock import Clock, Deadline, SystemClock, utc_text


class StoppedClock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> datetime:
        """See Clock."""
        return datetime(2024, 5, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic_s(self) -> float:
        """See Clock."""
        return self.seconds

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """See Clock."""
        self.seconds += timeout_s
        return event.is_set()

    def pause(self, seconds: float) -> None:
        """See Clock."""
        self.seconds += seconds


def test_a_deadline_passes_at_its_moment_and_not_before() -> None:
    clock = StoppedClock()
    deadline = Deadline(clock, 10)
    assert deadline.timeout_s == 10
    assert deadline.remaining_s() == 10
    clock.pause(9.5)
    assert deadline.remaining_s() == 0.5
    assert not deadline.passed()
    clock.pause(0.5)
    assert deadline.passed()


def test_what_is_left_is_never_below_zero() -> None:
    clock = StoppedClock()
    deadline = Deadline(clock, 1)
    clock.pause(100)
    assert deadline.remaining_s() == 0


def test_a_deadline_of_nothing_has_passed() -> None:
    assert Deadline(StoppedClock(), 0).passed()


def test_the_system_clock_is_in_utc_and_goes_forward() -> None:
    clock: Clock = SystemClock()
    assert clock.now().tzinfo is UTC
    before = clock.monotonic_s()
    clock.pause(0.02)
    assert clock.monotonic_s() - before >= 0.02


def test_waiting_ends_early_when_the_event_comes() -> None:
    clock = SystemClock()
    event = threading.Event()
    assert not clock.wait(event, 0.01)
    threading.Timer(0.05, event.set).start()
    before = clock.monotonic_s()
    assert clock.wait(event, 30)
    assert clock.monotonic_s() - before < 10


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (datetime(2024, 5, 1, 12, 0, 0, 42, tzinfo=UTC), "2024-05-01T12:00:00.000042Z"),
        (datetime(2024, 5, 1, 1, 0, tzinfo=timezone(timedelta(hours=2))), "2024-04-30T23:00:00.000000Z"),
    ],
)
def test_a_moment_is_written_in_utc(moment: datetime, text: str) -> None:
    assert utc_text(moment) == text
