"""Waiting for something to become true, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

#: For what happens at once on an idle machine. A wait ends when it happens, so patience costs nothing; too
#: little of it fails tests where many labs share few slow cores.
PATIENCE_S = 90.0
# What takes long is looked for less often: the looks take the processor that it needs.
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.2
_PAUSE_OF_WAITED = 0.05

T = TypeVar("T")


class TooLate(AssertionError):
    """What was waited for did not happen in time."""


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float) -> T:
    """Call *look* until it returns something true, and return that.

    Raises TooLate, which names *what* was waited for and what was seen last.
    """
    began_s = time.monotonic()
    while True:
        seen = look()
        if seen:
            return seen
        waited_s = time.monotonic() - began_s
        if waited_s > timeout_s:
            raise TooLate(f"{what}: not within {timeout_s:g} s (last seen: {seen!r})")
        time.sleep(min(max(_PAUSE_S, waited_s * _PAUSE_OF_WAITED), _LONGEST_PAUSE_S))
