"""Storages around a storage: one that tries again, one that counts, one that keeps to a rate or a time.

Each keeps all promises of Storage. Put them so: Counted(Retried(RateLimited(driver))); what is
tried again is then held to the rate too, and what is counted is what the caller waited for.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

from stillframe.clock import Clock
from stillframe.errors import StorageLost
from stillframe.storage.model import Capabilities, Content, Listed, Stat, Storage
from stillframe.storage.own import create_own
from stillframe.units import duration_text

T = TypeVar("T")
_CALLS_AT_ONCE = 16
#: How long a call is waited for while another has come to no end.
_OVERDUE_S = 1.0
#: Told of each failure that is tried again: verb, key, what failed, the pause in seconds that follows.
OnRetry = Callable[[str, str, StorageLost, float], None]


class Wrapper:
    """A storage that passes everything on to *inner*; to be derived from."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner

    @property
    def address(self) -> str:
        """See Storage."""
        return self._inner.address

    @property
    def capabilities(self) -> Capabilities:
        """See Storage."""
        return self._inner.capabilities

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        return self._inner.get(key, offset_bytes, length_bytes)

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        self._inner.create(key, content)

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        self._inner.replace(key, content)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See Storage."""
        return self._inner.list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage."""
        self._inner.delete(keys)

    def stat(self, key: str) -> Stat:
        """See Storage."""
        return self._inner.stat(key)

    def now(self) -> datetime:
        """See Storage."""
        return self._inner.now()


class Retried(Wrapper):
    """Tries again what ended with StorageLost, *attempts* times in all, with pauses that double.

    A create that was lost may have been carried out. If the next attempt finds the key taken by
    exactly the same bytes, it has succeeded. So where creating a key is a vote (manifest,
    tombstone, generation), the content of two writers must differ.

    A create for which *sent_once* says so, given key and content, is not tried again: a first request whose
    reply was lost could else take effect long after the second one, when the object was deleted again.
    """

    def __init__(self, inner: Storage, clock: Clock, *, attempts: int = 6, first_pause_s: float = 0.5,
                 longest_pause_s: float = 30.0, on_retry: OnRetry | None = None,
                 sent_once: Callable[[str, Content], bool] = lambda _key, _content: False) -> None:
        super().__init__(inner)
        self._clock = clock
        self._attempts = attempts
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._on_retry = on_retry
        self._sent_once = sent_once

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        return self._try("get", key, lambda: self._inner.get(key, offset_bytes, length_bytes))

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        if self._sent_once(key, content):
            self._inner.create(key, content)
            return
        # Only what was tried before may be ours.
        again: Callable[[str, Content], None] = functools.partial(create_own, self._inner)
        creates = itertools.chain([self._inner.create], itertools.repeat(again))
        self._try("create", key, lambda: next(creates)(key, content))

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        self._try("replace", key, lambda: self._inner.replace(key, content))

    def list(self, prefix: str) -> Iterator[Listed]:
        """See Storage. Goes on behind the last object listed; each one listed sets the attempts back."""
        first = self._try("list", prefix, lambda: self._inner.list(prefix))
        return self._list(prefix, first)

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage."""
        self._try("delete", keys[0] if keys else "", lambda: self._inner.delete(keys))

    def stat(self, key: str) -> Stat:
        """See Storage."""
        return self._try("stat", key, lambda: self._inner.stat(key))

    def now(self) -> datetime:
        """See Storage."""
        return self._try("now", "", self._inner.now)

    def _try(self, verb: str, key: str, call: Callable[[], T]) -> T:
        failures = 0
        while True:
            try:
                return call()
            except StorageLost as error:
                failures += 1
                self._pause(verb, key, error, failures)

    def _pause(self, verb: str, key: str, error: StorageLost, failures: int) -> None:
        """Wait before the next attempt, or raise *error* if that was the last one, or no more will help."""
        if failures >= self._attempts or not error.retry:
            raise error
        pause_s = min(self._first_pause_s * 2 ** (failures - 1), self._longest_pause_s)
        if self._on_retry is not None:
            self._on_retry(verb, key, error, pause_s)
        self._clock.pause(pause_s)

    def _list(self, prefix: str, listing: Iterator[Listed]) -> Iterator[Listed]:
        last = ""
        failures = 0
        while True:
            try:
                for listed in listing:
                    if listed.key > last:
                        last, failures = listed.key, 0
                        yield listed
                return
            except StorageLost as error:
                failures += 1
                self._pause("list", prefix, error, failures)
                listing = self._try("list", prefix, lambda: self._inner.list(prefix))


@dataclass(frozen=True, slots=True)
class VerbCount:
    """What one verb did so far. `failed` of the `calls` raised; `size_bytes` are of contents only.

    `objects`: what list yielded, and how many keys were given to delete. `seconds` add up over
    threads; those of a listing are the storage's, without what was done between two objects.
    """

    calls: int = 0
    failed: int = 0
    objects: int = 0
    size_bytes: int = 0
    seconds: float = 0.0


class Counted(Wrapper):
    """Counts calls, bytes and seconds by verb."""

    def __init__(self, inner: Storage, clock: Clock) -> None:
        super().__init__(inner)
        self._clock = clock
        self._counts: dict[str, VerbCount] = {}
        self._lock = threading.Lock()

    def counts(self) -> dict[str, VerbCount]:
        """Return what each verb that was used did so far."""
        with self._lock:
            return dict(self._counts)

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        with self._timed("get"):
            content = self._inner.get(key, offset_bytes, length_bytes)
        self._add("get", size_bytes=len(content))
        return content

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        with self._timed("create"):
            self._inner.create(key, content)
        self._add("create", size_bytes=memoryview(content).nbytes)

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        with self._timed("replace"):
            self._inner.replace(key, content)
        self._add("replace", size_bytes=memoryview(content).nbytes)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See Storage."""
        with self._timed("list"):
            listing = self._inner.list(prefix)
        return self._list(listing)

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage."""
        with self._timed("delete"):
            self._inner.delete(keys)
        self._add("delete", objects=len(keys))

    def stat(self, key: str) -> Stat:
        """See Storage."""
        with self._timed("stat"):
            return self._inner.stat(key)

    def now(self) -> datetime:
        """See Storage."""
        with self._timed("now"):
            return self._inner.now()

    def _list(self, listing: Iterator[Listed]) -> Iterator[Listed]:
        while True:
            with self._timed("list", calls=0):
                listed = next(listing, None)
            if listed is None:
                return
            self._add("list", objects=1)
            yield listed

    @contextlib.contextmanager
    def _timed(self, verb: str, *, calls: int = 1) -> Iterator[None]:
        began_s = self._clock.monotonic_s()
        failed = 1
        try:
            yield
            failed = 0
        finally:
            self._add(verb, calls=calls, failed=failed, seconds=self._clock.monotonic_s() - began_s)

    def _add(self, verb: str, *, calls: int = 0, failed: int = 0, objects: int = 0, size_bytes: int = 0,
             seconds: float = 0.0) -> None:
        with self._lock:
            count = self._counts.get(verb, VerbCount())
            self._counts[verb] = replace(
                count, calls=count.calls + calls, failed=count.failed + failed,
                objects=count.objects + objects, size_bytes=count.size_bytes + size_bytes,
                seconds=count.seconds + seconds)


class RateLimited(Wrapper):
    """Moves no more than so many bytes a second, each way, on average and over all threads (None: no limit).

    An object is sent or read in one go; the next one waits until the rate is kept again.
    """

    def __init__(self, inner: Storage, clock: Clock, *, write_bytes_per_s: float | None = None,
                 read_bytes_per_s: float | None = None) -> None:
        super().__init__(inner)
        self._writing = Turns(clock, write_bytes_per_s)
        self._reading = Turns(clock, read_bytes_per_s)

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        self._reading.wait(length_bytes or 0)
        content = self._inner.get(key, offset_bytes, length_bytes)
        if length_bytes is None:
            self._reading.owe(len(content))
        return content

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        self._writing.wait(memoryview(content).nbytes)
        self._inner.create(key, content)

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        self._writing.wait(memoryview(content).nbytes)
        self._inner.replace(key, content)


class TimeLimited(Wrapper):
    """Gives up waiting for a storage that hangs without an error, as a dead NFS server makes it: StorageLost.

    What is given up goes on in a thread of its own until the storage comes back. As long as it does, other
    calls are waited for only shortly: each would hang, too.
    """

    def __init__(self, inner: Storage, timeout_s: float) -> None:
        super().__init__(inner)
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_CALLS_AT_ONCE, "storage")
        self._overdue = set[Future[Any]]()

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        return self._timely(lambda: self._inner.get(key, offset_bytes, length_bytes))

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        self._timely(lambda: self._inner.create(key, content))

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        self._timely(lambda: self._inner.replace(key, content))

    def list(self, prefix: str) -> Iterator[Listed]:
        """See Storage. It is listed as a whole before the first is given."""
        return self._timely(lambda: iter([*self._inner.list(prefix)]))

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage."""
        self._timely(lambda: self._inner.delete(keys))

    def stat(self, key: str) -> Stat:
        """See Storage."""
        return self._timely(lambda: self._inner.stat(key))

    def now(self) -> datetime:
        """See Storage."""
        return self._timely(self._inner.now)

    def _timely(self, call: Callable[[], T]) -> T:
        asked = self._threads.submit(call)
        timeout_s = min(self._timeout_s, _OVERDUE_S) if self._overdue else self._timeout_s
        wait([asked], timeout_s)
        if asked.done():
            return asked.result()
        if not asked.cancel():
            self._overdue.add(asked)
            asked.add_done_callback(self._overdue.discard)
        raise StorageLost(
            f"{self.address} gave no answer within {duration_text(timeout_s)}.",
            f"ls {self.address}   # does it hang, too? see dmesg, and the network")


class Turns:
    """Who may begin when, so that a rate is kept."""

    def __init__(self, clock: Clock, bytes_per_s: float | None) -> None:
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError(f"not a rate: {bytes_per_s} bytes a second")
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def wait(self, size_bytes: int) -> None:
        """Wait for a turn to move *size_bytes*."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now_s = self._clock.monotonic_s()
            turn_s = max(now_s, self._free_at_s)
            self._free_at_s = turn_s + size_bytes / self._bytes_per_s
        if turn_s > now_s:
            self._clock.pause(turn_s - now_s)

    def owe(self, size_bytes: int) -> None:
        """Let later turns wait for *size_bytes* that were moved."""
        if self._bytes_per_s is not None:
            with self._lock:
                turn_s = max(self._clock.monotonic_s(), self._free_at_s)
                self._free_at_s = turn_s + size_bytes / self._bytes_per_s
