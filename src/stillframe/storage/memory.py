"""Objects in memory: a whole storage for tests and models, that keeps every promise but durability."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from stillframe.clock import Clock, SystemClock
from stillframe.errors import ObjectExists, ObjectMissing
from stillframe.storage.model import (
    Capabilities,
    Content,
    Listed,
    Stat,
    check_key,
    check_prefix,
    check_range,
    readable_bytes,
    view_of,
)

#: Called with (verb, key) before each operation: a model's scheduling point, and where it crashes by raising.
Before = Callable[[str, str], None]

_ADDRESS = "memory"


class MemoryStorage:
    """See Storage.

    *before* is called with the verb and the key (the prefix for list, "" for now; delete once
    for each key) before the storage is looked at or changed, with no lock held. What it raises
    comes out of the verb, and nothing was done. Each operation is a single step; a listing is of one moment.
    """

    def __init__(self, clock: Clock | None = None, before: Before | None = None) -> None:
        self._clock: Clock = SystemClock() if clock is None else clock
        self.before = before
        self._objects: dict[str, tuple[bytes, datetime]] = {}
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """See Storage."""
        return _ADDRESS

    @property
    def capabilities(self) -> Capabilities:
        """See Storage."""
        return Capabilities(
            create_if_absent=True, atomic_replace=True, lists_sizes=True, server_time=True, delete_many=True)

    def copy(self) -> MemoryStorage:
        """Return another storage with the same objects and clock, and without *before*."""
        other = MemoryStorage(self._clock)
        with self._lock:
            other._objects = dict(self._objects)
        return other

    def contents(self) -> dict[str, bytes]:
        """Return all objects, sorted by key. It is no operation: *before* is not called."""
        with self._lock:
            return {key: self._objects[key][0] for key in sorted(self._objects)}

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        check_key(key)
        check_range(offset_bytes, length_bytes)
        content = self._found("get", key)[0]
        length = readable_bytes(key, len(content), offset_bytes, length_bytes)
        return content[offset_bytes:offset_bytes + length]

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        check_key(key)
        kept = bytes(view_of(content))
        self._step("create", key)
        with self._lock:
            if key in self._objects:
                raise ObjectExists(f"There is an object {key} in memory already.")
            self._objects[key] = (kept, self._clock.now())

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        check_key(key)
        kept = bytes(view_of(content))
        self._step("replace", key)
        with self._lock:
            self._objects[key] = (kept, self._clock.now())

    def list(self, prefix: str) -> Iterator[Listed]:
        """See Storage."""
        check_prefix(prefix)
        self._step("list", prefix)
        with self._lock:
            found = [Listed(key, len(content)) for key, (content, _) in self._objects.items()
                     if key.startswith(prefix)]
        return iter(sorted(found, key=lambda listed: listed.key))

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage."""
        for key in keys:
            check_key(key)
        for key in keys:
            self._step("delete", key)
            with self._lock:
                self._objects.pop(key, None)

    def stat(self, key: str) -> Stat:
        """See Storage."""
        check_key(key)
        content, modified_at = self._found("stat", key)
        return Stat(len(content), modified_at)

    def now(self) -> datetime:
        """See Storage."""
        self._step("now", "")
        return self._clock.now()

    def _found(self, verb: str, key: str) -> tuple[bytes, datetime]:
        self._step(verb, key)
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise ObjectMissing(f"There is no object {key} in memory.")
        return found

    def _step(self, verb: str, key: str) -> None:
        if self.before is not None:
            self.before(verb, key)
