"""A storage around a server's that keeps what never changes on this host as well.

    <folder>/<2 hex>/<32 hex>   content ‖ digest(16) of each piece of 64 KiB ‖ content's size u64

The name is a digest of the object's key. A digest is BLAKE3 of key, number of the piece and its bytes: what
is damaged, or another object's, is as if it were not there. So is whatever goes wrong with the cache
itself: it changes speed only. Listings and times always come from the server.

Whole objects are kept. Of one that is read in parts, the fifth part that is not here fetches all of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from stillframe.storage.model import Content, Storage, check_key, check_range, readable_bytes
from stillframe.storage.wrappers import Wrapper
from stillframe.units import GIB, KIB

#: What a cache takes at most, and what it leaves free on its file system.
LIMIT_BYTES = 1 * GIB
_LEFT_FREE_BYTES = 1 * GIB
_PIECE_BYTES = 64 * KIB
_DIGEST_BYTES = 16
_SIZE = struct.Struct("<Q")
#: Parts of one object that are fetched on their own: below that a request costs less than the whole object.
_PARTS_MAX = 4
#: Where the limit is passed, the least recently used objects go until so much of it is taken.
_SWEPT_TO = 0.8


class Cached(Wrapper):
    """See above. Objects whose keys begin with one of *prefixes* never change; nobody else uses *folder*.

    Those that begin with *listed* are believed only if they are in a listing, with that size, which is made
    once, when the first one is wanted. The others somebody found in a listing just now. What *is_whole* says
    no to (a key and what the storage gave for it) is not kept: the storage may give it whole the next time.
    For several threads and processes.
    """

    def __init__(self, inner: Storage, folder: Path, prefixes: Sequence[str], *, listed: str,
                 is_whole: Callable[[str, bytes], bool] = lambda _key, _content: True,
                 limit_bytes: int = LIMIT_BYTES) -> None:
        super().__init__(inner)
        self._prefixes = tuple(prefixes)
        self._listed = listed
        self._is_whole = is_whole
        self._sizes: dict[str, int] | None = None
        self._kept = _Folder(folder, limit_bytes)
        self._parts = Counter[str]()
        self._lock = threading.Lock()

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        check_key(key)
        check_range(offset_bytes, length_bytes)
        if not key.startswith(self._prefixes):
            return self._inner.get(key, offset_bytes, length_bytes)
        found = self._kept.read(key, offset_bytes, length_bytes)
        if found is not None and self._is_there(key, found.object_bytes):
            return found.content
        if (offset_bytes or length_bytes is not None) and not self._wants_whole(key):
            return self._inner.get(key, offset_bytes, length_bytes)
        content = self._inner.get(key)
        if self._is_whole(key, content):
            self._kept.write(key, content)
        wanted = readable_bytes(f"{self.address}/{key}", len(content), offset_bytes, length_bytes)
        return content[offset_bytes : offset_bytes + wanted]

    def create(self, key: str, content: Content) -> None:
        """See Storage. What is stored for certain is kept."""
        self._inner.create(key, content)
        if key.startswith(self._prefixes):
            self._kept.write(key, content)
            with self._lock:
                if self._sizes is not None:
                    self._sizes[key] = memoryview(content).nbytes

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        self._kept.drop(key)
        self._inner.replace(key, content)

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage."""
        for key in keys:
            self._kept.drop(key)
        with self._lock:
            self._sizes = None
        self._inner.delete(keys)

    def _is_there(self, key: str, size_bytes: int) -> bool:
        """Return whether the storage has an object that is kept here, as far as that must be asked."""
        if not key.startswith(self._listed):
            return True
        with self._lock:
            if self._sizes is None:
                self._sizes = {listed.key: listed.size_bytes for listed in self._inner.list(self._listed)}
            return self._sizes.get(key) == size_bytes

    def _wants_whole(self, key: str) -> bool:
        """Count a part that is not here; return whether this is the one that fetches the object."""
        with self._lock:
            self._parts[key] += 1
            return self._parts[key] == _PARTS_MAX + 1


@dataclass(frozen=True, slots=True)
class _Found:
    content: bytes
    object_bytes: int


class _Folder:
    """The objects that are kept. Nothing here raises OSError: a cache that fails keeps nothing."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._used: set[Path] = set()
        self._taken_bytes: int | None = None
        self._lock = threading.Lock()

    def read(self, key: str, offset_bytes: int, length_bytes: int | None) -> _Found | None:
        """Return the range, None if it is not here or not what was kept."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                found = _range(file.fileno(), key, offset_bytes, length_bytes)
        except OSError:
            return None
        if found is not None:
            self._note_use(path)
        return found

    def write(self, key: str, content: Content) -> None:
        """Keep an object, if there is room for it."""
        view = memoryview(content).cast("B")
        path = self._path(key)
        temporary = path.with_name(f"{path.name}.{os.urandom(6).hex()}")
        tail = b"".join(_digest(key, number, view[at : at + _PIECE_BYTES])
                        for number, at in enumerate(range(0, len(view), _PIECE_BYTES)))
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (len(view) > self._limit_bytes // 4
                    or shutil.disk_usage(path.parent).free < _LEFT_FREE_BYTES + len(view)):
                return
            with open(temporary, "xb", opener=_private) as file:
                file.write(view)
                file.write(tail + _SIZE.pack(len(view)))
            temporary.replace(path)
            self._keep_to_limit(len(view) + len(tail) + _SIZE.size)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def drop(self, key: str) -> None:
        """Keep an object no more."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        name = blake3(key.encode()).hexdigest(_DIGEST_BYTES)
        return self._folder / name[:2] / name

    def _note_use(self, path: Path) -> None:
        """Let the file be one that was used last; once a process is enough."""
        if path not in self._used:
            self._used.add(path)
            with contextlib.suppress(OSError):
                os.utime(path)

    def _keep_to_limit(self, added_bytes: int) -> None:
        with self._lock:
            if self._taken_bytes is None:
                self._taken_bytes = sum(size for _, size, _ in self._all())
            else:
                self._taken_bytes += added_bytes
            if self._taken_bytes > self._limit_bytes:
                self._taken_bytes = self._sweep()

    def _sweep(self) -> int:
        """Remove what was used least recently; return what is left. Another process may do so, too."""
        files = sorted(self._all())
        left = sum(size for _, size, _ in files)
        for _, size, path in files:
            if left <= self._limit_bytes * _SWEPT_TO:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                left -= size
        return left

    def _all(self) -> list[tuple[int, int, Path]]:
        """Return (when it was used last, size, path) of each file, those that a killed process left, too."""
        found = []
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        return found


def _range(file: int, key: str, offset_bytes: int, length_bytes: int | None) -> _Found | None:
    """Return a range of what an open file keeps, None if it does not have it or it is damaged."""
    stored_bytes = os.fstat(file).st_size
    if stored_bytes < _SIZE.size:
        return None
    (size_bytes,) = _SIZE.unpack(os.pread(file, _SIZE.size, stored_bytes - _SIZE.size))
    pieces = -(-size_bytes // _PIECE_BYTES)
    end = size_bytes if length_bytes is None else offset_bytes + length_bytes
    whole = size_bytes + pieces * _DIGEST_BYTES + _SIZE.size == stored_bytes
    if not whole or not offset_bytes < end <= size_bytes:
        return None
    first, until = offset_bytes // _PIECE_BYTES, -(-end // _PIECE_BYTES)
    begin = first * _PIECE_BYTES
    content = memoryview(os.pread(file, min(until * _PIECE_BYTES, size_bytes) - begin, begin))
    digests = os.pread(file, (until - first) * _DIGEST_BYTES, size_bytes + first * _DIGEST_BYTES)
    right = b"".join(_digest(key, number, content[at : at + _PIECE_BYTES])
                     for number, at in enumerate(range(0, len(content), _PIECE_BYTES), first))
    if right != digests:
        return None
    return _Found(bytes(content[offset_bytes - begin : end - begin]), size_bytes)


def _digest(key: str, number: int, piece: memoryview) -> bytes:
    return blake3(f"{key}\0{number}\0".encode()).update(piece).digest(_DIGEST_BYTES)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
