"""What a storage is: named objects, written once and whole, and seven verbs.

An object is a run of bytes (at least one) under a key. A key is `part/part/...`; a part is
letters, digits and `._%-`, at most 255 of them, and does not begin with a dot. A key is
never the folder of another key: the layout of a repository sees to that.

A driver may be used by several threads and several hosts at once. Whatever dies, and
wherever, an object is there whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from stillframe.errors import ObjectTruncated

#: What can be written. A memoryview must be contiguous.
Content = bytes | bytearray | memoryview

_KEY_CHARACTERS_MAX = 1024  # S3 takes no more
_PART = r"[A-Za-z0-9_%-][A-Za-z0-9._%-]{0,254}"
_IS_PART = re.compile(_PART)
_IS_KEY = re.compile(f"{_PART}(?:/{_PART})*")
_IS_PREFIX = re.compile(f"(?:{_PART}/)*(?:{_PART})?")


@dataclass(frozen=True, slots=True)
class Listed:
    """One object in a listing."""

    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Stat:
    """What the storage says of one object. `modified_at` is by the storage's own clock, in UTC."""

    size_bytes: int
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a driver can do; the repository refuses what it can't make safe.

    `create_if_absent`: of many that create one key, exactly one succeeds.
    `atomic_replace`: a reader sees the old object or the new one, never neither nor a mixture.
    `lists_sizes`: a listing needs no further request to know sizes (they are right anyway).
    `server_time`: `now` and `Stat.modified_at` are of one clock, the same for every host.
    `delete_many`: many objects are deleted with one request.
    """

    create_if_absent: bool
    atomic_replace: bool
    lists_sizes: bool
    server_time: bool
    delete_many: bool


class Storage(Protocol):
    """A place for objects. Every verb may raise StorageLost: whether it was carried out is then unknown.

    A key that is none is a mistake of the caller: ValueError.
    """

    @property
    def address(self) -> str:
        """Where it is, for people and messages."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can do, as far as is known without trying."""
        ...

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """Return *length_bytes* (None: all) of the object from *offset_bytes* on.

        Exactly as many as asked for: an object that is shorter raises ObjectTruncated, and so
        does an empty one. Raises ObjectMissing.
        """
        ...

    def create(self, key: str, content: Content) -> None:
        """Store an object that must not exist yet; durable when it returns.

        Raises ObjectExists (what exists is durable too), StorageFull.
        """
        ...

    def replace(self, key: str, content: Content) -> None:
        """Store an object, in place of what is there; durable when it returns. Raises StorageFull."""
        ...

    def list(self, prefix: str) -> Iterator[Listed]:
        """Yield the objects whose key begins with *prefix* (as text; "" is all), sorted by key.

        What was there before the call and stays until the end is listed; of what comes or goes
        meanwhile, anything. What is not whole yet is never listed.
        """
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove the objects, durably; absent ones are no error. If it fails, some may be gone."""
        ...

    def stat(self, key: str) -> Stat:
        """Return what the storage says of the object. Raises ObjectMissing."""
        ...

    def now(self) -> datetime:
        """Return the storage's own time, UTC: what an object created now would be modified at."""
        ...


def check_key(key: str) -> None:
    """Raise ValueError unless *key* can name an object on every kind of storage."""
    if len(key) > _KEY_CHARACTERS_MAX or _IS_KEY.fullmatch(key) is None:
        raise ValueError(f"not a key: {key!r}")


def check_prefix(prefix: str) -> None:
    """Raise ValueError unless some key could begin with *prefix*."""
    if len(prefix) > _KEY_CHARACTERS_MAX or _IS_PREFIX.fullmatch(prefix) is None:
        raise ValueError(f"not the beginning of a key: {prefix!r}")


def is_part(name: str) -> bool:
    """Return whether *name* can be a part of a key; other names in a folder are not objects."""
    return _IS_PART.fullmatch(name) is not None


def view_of(content: Content) -> memoryview:
    """Return *content* as a view of bytes. Raises ValueError if it is empty: no object is."""
    view = memoryview(content).cast("B")
    if not view:
        raise ValueError("an object has at least one byte")
    return view


def check_range(offset_bytes: int, length_bytes: int | None) -> None:
    """Raise ValueError for a range that no object can have."""
    if offset_bytes < 0 or (length_bytes is not None and length_bytes < 0):
        raise ValueError(f"not a range: {length_bytes} bytes from {offset_bytes}")


def readable_bytes(where: str, size_bytes: int, offset_bytes: int, length_bytes: int | None) -> int:
    """Return how many bytes that range of an object of *size_bytes* has. Raises ObjectTruncated.

    *where* names the object for the message.
    """
    end = max(offset_bytes, size_bytes) if length_bytes is None else offset_bytes + length_bytes
    if size_bytes == 0 or end > size_bytes:
        raise ObjectTruncated(
            f"The object {where} has {size_bytes} bytes; it should have at least {max(end, 1)}.")
    return end - offset_bytes
