"""Jobs that run on other threads and whose results come back in order; memory that is kept for them."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from functools import cache
from typing import Generic, TypeVar

from stillframe.units import GIB, MIB

T = TypeVar("T")
R = TypeVar("R")

_IDLE_S = 0.2

# <malloc.h>; glibc's numbers, which musl does not know (mallopt is missing there, and not needed).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


class InOrder(Generic[T, R]):
    """Up to *most* jobs at a time on a pool. For one thread, which puts jobs in and takes results out.

    So all memory that jobs hold is bounded by their number, and nothing ever waits for a
    free buffer: who puts in more than *most* takes out first. *idle* is called now and then while
    `take` waits; what it raises comes out of `take`.
    """

    def __init__(self, pool: Executor, most: int, idle: Callable[[], None] = lambda: None) -> None:
        self._pool = pool
        self._most = most
        self._idle = idle
        self._running: deque[tuple[T, Future[R]]] = deque()

    def __len__(self) -> int:
        return len(self._running)

    @property
    def full(self) -> bool:
        """Whether a result must be taken before the next job."""
        return len(self._running) >= self._most

    @property
    def ready(self) -> bool:
        """Whether `take` would not wait."""
        return bool(self._running) and self._running[0][1].done()

    def put(self, tag: T, job: Callable[[], R]) -> None:
        """Start a job; *tag* comes back with its result."""
        self._running.append((tag, self._pool.submit(job)))

    def take(self) -> tuple[T, R]:
        """Return the oldest job's tag and result; raises what the job raised."""
        tag, future = self._running[0]
        while not future.done():
            wait([future], _IDLE_S)
            self._idle()
        self._running.popleft()
        return tag, future.result()

    def drop(self, timeout_s: float | None = None) -> bool:
        """Forget all jobs; their errors are lost. Return whether none runs any more.

        Those that run are waited for, no longer than *timeout_s*; no other begins.
        """
        for _, future in self._running:
            future.cancel()
        left = wait([future for _, future in self._running], timeout_s).not_done
        self._running.clear()
        return not left


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for the whole process, instead of giving it back at once.

    Buffers of a mebibyte, as zstd and the storage return them by the thousand, would else be unmapped
    and faulted in again each time: a tenth of the run (measured).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        mallopt(_M_TRIM_THRESHOLD, 2 * GIB - 1)
        mallopt(_M_TOP_PAD, 16 * MIB)
