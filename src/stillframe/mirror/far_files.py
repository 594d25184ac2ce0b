"""Files on a server (SFTP, SMB) as a mirror's files. See Files.

What differs from a local folder:

- There are no holes to punch: zeroes over data are written as zeroes. A new image is made as long as the disk
  at once and only data is written into it, so it is sparse where the server's file system is. All of an image
  that is read is read, holes too.
- Room can't be reserved: a full server shows while the update is applied, which then waits as a redo file.
- No protocol makes a name durable. A small file is written and made durable after it: a file system that
  journals (ext4, XFS, Btrfs, NTFS) brings the names before it along.
- A map is looked into and changed in pieces of a few bytes. It is held in a local temporary file: read once,
  written once. Other small reads (the heads of a redo file) are read ahead.

Each call is one request that is waited for, of 4 MiB at most: what is in flight is bounded by the threads.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from stillframe.clock import Clock
from stillframe.errors import StorageError
from stillframe.mirror.layout import LOCK
from stillframe.mirror.trouble import StorageTrouble
from stillframe.storage.open_files import FileFacts, OpenFile, RangeServer
from stillframe.storage.wrappers import Turns
from stillframe.units import KIB, MIB

_ZEROES = bytes(MIB)
_MAPS = (".map", ".map.new")
_PIECE_BYTES = MIB
_AHEAD_BYTES = 128 * KIB
_SMALL_BYTES = 4 * KIB
#: An fsync must not find so much left to write that it takes longer than a call may.
_SYNC_EVERY_BYTES = 256 * MIB
_ANY_ROOM_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class Moved:
    """What crossed the network, contents only."""

    read_bytes: int = 0
    written_bytes: int = 0


class FarFiles:
    """See Files. No more than *bytes_per_s* are moved each way (None: no limit)."""

    def __init__(self, server: RangeServer, clock: Clock, bytes_per_s: float | None = None) -> None:
        self._server = server
        self._line = _Line(clock, bytes_per_s)
        self._open: dict[int, _Opened] = {}
        self._numbers = itertools.count(1)

    @property
    def moved(self) -> Moved:
        """What was read and written so far."""
        return self._line.moved

    def names(self) -> list[str]:
        """See Files."""
        with _trouble():
            return [entry.name for entry in self._server.scan("")]

    def facts(self, name: str) -> FileFacts | None:
        """See Files."""
        with _trouble():
            try:
                return self._server.facts(name)
            except FileNotFoundError:
                return None

    def open(self, name: str, *, write: bool = False, create: bool = False) -> int:
        """See Files."""
        with _trouble():
            file = self._server.open(name, write=write, create=create)
            opened: _Opened = _Piecewise(file, self._line)
            if name.endswith(_MAPS):
                opened = _Held(file, self._line)
        fd = next(self._numbers)
        self._open[fd] = opened
        return fd

    def close(self, fd: int) -> None:
        """See Files."""
        with _trouble():
            self._open.pop(fd).close()

    def size_bytes(self, fd: int) -> int:
        """See Files."""
        with _trouble():
            return self._open[fd].size_bytes()

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """See Files."""
        with _trouble():
            return self._open[fd].read_into(buffer, offset)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> None:
        """See Files."""
        with _trouble():
            self._open[fd].write(data, offset)

    def truncate(self, fd: int, size_bytes: int) -> None:
        """See Files."""
        with _trouble():
            self._open[fd].truncate(size_bytes)

    def reserve(self, fd: int, offset: int, length: int) -> None:
        """See Files."""

    def zero(self, fd: int, offset: int, length: int) -> None:
        """See Files."""
        for at in range(offset, offset + length, len(_ZEROES)):
            self.pwrite(fd, memoryview(_ZEROES)[: offset + length - at], at)

    def data_ranges(self, fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:  # noqa: ARG002
        """See Files."""
        if offset < end:
            yield offset, end

    def start_writeback(self, fd: int, offset: int, length: int) -> None:  # noqa: ARG002
        """See Files."""
        with _trouble():
            self._open[fd].written_back(length)

    def fsync(self, fd: int) -> None:
        """See Files."""
        with _trouble():
            self._open[fd].sync()

    def set_mtime(self, name: str, mtime_ns: int) -> None:
        """See Files."""
        with _trouble():
            self._server.set_mtime(name, mtime_ns // 10**9)

    def rename(self, old: str, new: str) -> None:
        """See Files."""
        with _trouble():
            self._server.replace(old, new)

    def unlink(self, name: str) -> None:
        """See Files."""
        with _trouble(), contextlib.suppress(FileNotFoundError):
            self._server.remove(name)

    def fsync_folder(self) -> None:
        """See Files."""
        with _trouble():
            file = self._server.open(LOCK, create=True)
            try:
                file.write(b"names\n", 0)
                file.sync()
            finally:
                file.close()

    def free_bytes(self) -> int:
        """See Files."""
        with _trouble():
            free = self._server.free_bytes()
        return _ANY_ROOM_BYTES if free is None else free


class _Line:
    """What is moved, at what rate. For several threads."""

    def __init__(self, clock: Clock, bytes_per_s: float | None) -> None:
        self._reading, self._writing = Turns(clock, bytes_per_s), Turns(clock, bytes_per_s)
        self._lock = threading.Lock()
        self.moved = Moved()

    def read(self, file: OpenFile, buffer: memoryview, offset: int) -> int:
        self._reading.wait(len(buffer))
        count = file.read_into(buffer, offset)
        with self._lock:
            self.moved = Moved(self.moved.read_bytes + count, self.moved.written_bytes)
        return count

    def write(self, file: OpenFile, data: memoryview | bytes, offset: int) -> None:
        self._writing.wait(len(data))
        file.write(data, offset)
        with self._lock:
            self.moved = Moved(self.moved.read_bytes, self.moved.written_bytes + len(data))


class _Opened(OpenFile, Protocol):
    """An open file that is told what need not wait for the fsync."""

    def written_back(self, length: int) -> None:
        """Be told that so much was written."""
        ...


class _Piecewise:
    """Read and written where it is; small reads are read ahead, until something is written."""

    def __init__(self, file: OpenFile, line: _Line) -> None:
        self._file = file
        self._line = line
        self._lock = threading.Lock()
        self._ahead = memoryview(b"")
        self._ahead_from = 0
        self._unsynced_bytes = 0

    def size_bytes(self) -> int:
        return self._file.size_bytes()

    def read_into(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            if not self._has(offset, len(buffer)):
                if len(buffer) > _SMALL_BYTES:
                    return self._line.read(self._file, buffer, offset)
                ahead = memoryview(bytearray(_AHEAD_BYTES))
                self._ahead, self._ahead_from = ahead[: self._line.read(self._file, ahead, offset)], offset
            at = offset - self._ahead_from
            found = self._ahead[at : at + len(buffer)]
            buffer[: len(found)] = found
            return len(found)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        self._line.write(self._file, data, offset)
        self._forget()

    def truncate(self, size_bytes: int) -> None:
        self._file.truncate(size_bytes)
        self._forget()

    def written_back(self, length: int) -> None:
        with self._lock:
            self._unsynced_bytes += length
            due = self._unsynced_bytes >= _SYNC_EVERY_BYTES
            if due:
                self._unsynced_bytes = 0
        if due:
            self._file.sync()

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _forget(self) -> None:
        """Drop what was read ahead: after a change, since what is read during it may be the old."""
        with self._lock:
            self._ahead = memoryview(b"")

    def _has(self, offset: int, length: int) -> bool:
        at = offset - self._ahead_from
        return at >= 0 and at + length <= len(self._ahead)


class _Held:
    """Held in a local temporary file: read when it is first needed, written when it is made durable."""

    def __init__(self, file: OpenFile, line: _Line) -> None:
        self._file = file
        self._line = line
        self._held = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by close
        self._lock = threading.Lock()
        self._is_read = False
        self._is_changed = False

    def size_bytes(self) -> int:
        return os.fstat(self._here()).st_size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self._here(), [buffer], offset)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        os.pwrite(self._here(), data, offset)
        self._is_changed = True

    def truncate(self, size_bytes: int) -> None:
        os.ftruncate(self._here(), size_bytes)
        self._is_changed = True

    def written_back(self, length: int) -> None:
        pass

    def sync(self) -> None:
        if self._is_changed:
            size = self.size_bytes()
            self._file.truncate(size)
            for offset in range(0, size, _PIECE_BYTES):
                piece = os.pread(self._here(), _PIECE_BYTES, offset)
                if piece.count(0) != len(piece):  # of a new file, the rest reads as zeroes
                    self._line.write(self._file, piece, offset)
            self._is_changed = False
        self._file.sync()

    def close(self) -> None:
        self._held.close()
        self._file.close()

    def _here(self) -> int:
        with self._lock:
            if not self._is_read:
                buffer = memoryview(bytearray(_PIECE_BYTES))
                for offset in range(0, self._file.size_bytes(), _PIECE_BYTES):
                    count = self._line.read(self._file, buffer, offset)
                    os.pwrite(self._held.fileno(), buffer[:count], offset)
                self._is_read = True
        return self._held.fileno()


@contextlib.contextmanager
def _trouble() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise StorageTrouble(error) from error
