"""Storages that fail on purpose, for tests: each passes everything else on to the storage inside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from stillframe.errors import ObjectExists, StorageError, StorageFull, StorageLost
from stillframe.storage.model import Content, Listed, Stat, Storage, readable_bytes
from stillframe.storage.wrappers import Wrapper

#: Which operations are meant: called with (verb, key); delete is asked for its first key.
Match = Callable[[str, str], bool]


def verb_is(*verbs: str) -> Match:
    """Return a Match for these verbs, whatever the key."""
    return lambda verb, _key: verb in verbs


class BitFlip(Wrapper):
    """One bit of each object whose key *match* takes is read wrong: bit *bit* of the whole object."""

    def __init__(self, inner: Storage, match: Callable[[str], bool], bit: int = 0) -> None:
        super().__init__(inner)
        self._match = match
        self._bit = bit

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        content = bytearray(self._inner.get(key, offset_bytes, length_bytes))
        at = self._bit // 8 - offset_bytes
        if self._match(key) and 0 <= at < len(content):
            content[at] ^= 1 << self._bit % 8
        return bytes(content)


class Truncated(Wrapper):
    """Each object whose key *match* takes ends after *size_bytes*, for get, stat and list alike."""

    def __init__(self, inner: Storage, match: Callable[[str], bool], size_bytes: int) -> None:
        super().__init__(inner)
        self._match = match
        self._size_bytes = size_bytes

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        if self._match(key):
            size_bytes = min(self._size_bytes, self._inner.stat(key).size_bytes)
            length_bytes = readable_bytes(key, size_bytes, offset_bytes, length_bytes)
        return self._inner.get(key, offset_bytes, length_bytes)

    def list(self, prefix: str) -> Iterator[Listed]:
        for listed in self._inner.list(prefix):
            cut = min(self._size_bytes, listed.size_bytes) if self._match(listed.key) else listed.size_bytes
            yield Listed(listed.key, cut)

    def stat(self, key: str) -> Stat:
        found = self._inner.stat(key)
        return Stat(min(self._size_bytes, found.size_bytes), found.modified_at) if self._match(key) else found


class _Scripted(Wrapper):
    """The first *times* operations that *match* takes go wrong in the way that `_wrong` says."""

    def __init__(self, inner: Storage, match: Match, times: int = 1) -> None:
        super().__init__(inner)
        self._match = match
        self._lock = threading.Lock()
        self.left = times

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        found: list[bytes] = []
        self._do("get", key, lambda: found.append(self._inner.get(key, offset_bytes, length_bytes)))
        return found[0]

    def create(self, key: str, content: Content) -> None:
        self._do("create", key, lambda: self._inner.create(key, content))

    def replace(self, key: str, content: Content) -> None:
        self._do("replace", key, lambda: self._inner.replace(key, content))

    def delete(self, keys: Sequence[str]) -> None:
        self._do("delete", keys[0] if keys else "", lambda: self._inner.delete(keys))

    def list(self, prefix: str) -> Iterator[Listed]:
        found: list[Iterator[Listed]] = []
        self._do("list", prefix, lambda: found.append(self._inner.list(prefix)))
        return found[0]

    def _do(self, verb: str, key: str, call: Callable[[], None]) -> None:
        with self._lock:
            goes_wrong = self.left > 0 and self._match(verb, key)
            self.left -= goes_wrong
        if goes_wrong:
            self._wrong(verb, key, call)
        else:
            call()

    def _wrong(self, verb: str, key: str, call: Callable[[], None]) -> None:
        raise NotImplementedError(verb, key, call)


class Failing(_Scripted):
    """The operation fails and nothing was done."""

    def __init__(self, inner: Storage, match: Match, times: int = 1,
                 error: type[StorageError] = StorageLost) -> None:
        super().__init__(inner, match, times)
        self._error = error

    def _wrong(self, verb: str, key: str, call: Callable[[], None]) -> None:
        del call
        raise self._error(f"{verb} {key} fails as the test wants it")


class CarriedOutTwice(_Scripted):
    """The operation is carried out twice, and what comes of the second time is told."""

    def _wrong(self, verb: str, key: str, call: Callable[[], None]) -> None:
        del verb, key
        call()
        call()


class LostReply(_Scripted):
    """The operation is carried out, and StorageLost is raised all the same."""

    def _wrong(self, verb: str, key: str, call: Callable[[], None]) -> None:
        call()
        raise StorageLost(f"the reply to {verb} {key} is lost as the test wants it")


class Full(Wrapper):
    """There is room for *room_bytes* of new content, deletes give nothing back."""

    def __init__(self, inner: Storage, room_bytes: int) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self.room_bytes = room_bytes

    def create(self, key: str, content: Content) -> None:
        self._take(content)
        self._inner.create(key, content)

    def replace(self, key: str, content: Content) -> None:
        self._take(content)
        self._inner.replace(key, content)

    def _take(self, content: Content) -> None:
        size_bytes = memoryview(content).nbytes
        with self._lock:
            if size_bytes > self.room_bytes:
                raise StorageFull("No room is left, as the test wants it")
            self.room_bytes -= size_bytes


class Overwriting(Wrapper):
    """A server that ignores "only if absent": create replaces, and says that all is well."""

    def create(self, key: str, content: Content) -> None:
        self._inner.replace(key, content)


class CheckThenPut(Wrapper):
    """A server that looks first and writes later: racers overwrite one another. *racers* meet in between."""

    def __init__(self, inner: Storage, racers: int) -> None:
        super().__init__(inner)
        self._meet = threading.Barrier(racers)

    def create(self, key: str, content: Content) -> None:
        if any(listed.key == key for listed in self._inner.list(key)):
            raise ObjectExists(f"{key} is taken")
        if not key.endswith("/0"):  # the key that is not raced for
            self._meet.wait(10)
        self._inner.replace(key, content)
