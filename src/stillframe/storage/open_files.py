"""Files on a server that are read and written in ranges, as a mirror's images are (files.py: whole ones)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from stillframe.storage.files import FileServer


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What stat says of a file; *inode* is 0 where the protocol has no such thing."""

    inode: int
    size_bytes: int
    mtime_ns: int


class OpenFile(Protocol):
    """An open file. For several threads. It ends with the connection: each call raises StorageLost then."""

    def size_bytes(self) -> int:
        """Return how long the file is."""
        ...

    def read_into(self, buffer: memoryview, offset_bytes: int) -> int:
        """Read until *buffer* is full or the file ends; return how much was read."""
        ...

    def write(self, data: memoryview | bytes, offset_bytes: int) -> None:
        """Write all of *data*."""
        ...

    def truncate(self, size_bytes: int) -> None:
        """Make the file so long; what is added reads as zeroes and takes no room."""
        ...

    def sync(self) -> None:
        """Make what was written durable, if the server can."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class RangeServer(FileServer, Protocol):
    """A FileServer whose files can be changed in place."""

    def open(self, path: str, *, write: bool = False, create: bool = False) -> OpenFile:
        """Open a file; *create* makes it if needed and empties it. Raises FileNotFoundError."""
        ...

    def facts(self, path: str) -> FileFacts:
        """Return what the server says of a file. Raises FileNotFoundError."""
        ...

    def set_mtime(self, path: str, mtime_s: int) -> None:
        """Set the time of the last change. Raises FileNotFoundError."""
        ...

    def free_bytes(self) -> int | None:
        """Return the room that is left for us, None if the server does not say."""
        ...
