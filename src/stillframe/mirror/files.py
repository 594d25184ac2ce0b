"""The one door to a mirror folder: every read and write of the destination goes through it.

It is small so that a test can put a model in its place which fails at the n-th call
and forgets what was not fsynced. Names are plain file names inside the folder.
Everything raises OSError as it is; update.py and folder.py say what it means.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from stillframe.storage.open_files import FileFacts

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_SYNC_FILE_RANGE_WRITE = 2
_NOT_THERE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_ZEROES = bytes(1 << 20)
_libc = ctypes.CDLL(None, use_errno=True)


class Files(Protocol):
    """What a mirror folder must be able to do. Descriptors are small integers."""

    def names(self) -> list[str]:
        """Return the names in the folder. Raises FileNotFoundError if it does not exist."""
        ...

    def facts(self, name: str) -> FileFacts | None:
        """Return what stat says of *name*; None if there is no such file."""
        ...

    def open(self, name: str, *, write: bool = False, create: bool = False) -> int:
        """Open *name*; *create* makes it if needed and empties it."""
        ...

    def close(self, fd: int) -> None:
        """Close *fd*."""
        ...

    def size_bytes(self, fd: int) -> int:
        """Return the length of the open file."""
        ...

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read into *buffer* until it is full or the file ends; return how much was read."""
        ...

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> None:
        """Write all of *data*."""
        ...

    def truncate(self, fd: int, size_bytes: int) -> None:
        """Make the file so long; what is added reads as zeroes."""
        ...

    def reserve(self, fd: int, offset: int, length: int) -> None:
        """Allocate room for a stretch without changing what it reads, or do nothing."""
        ...

    def zero(self, fd: int, offset: int, length: int) -> None:
        """Make a stretch inside the file read as zeroes, as a hole where possible."""
        ...

    def data_ranges(self, fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what may hold data within the stretch; the rest is holes."""
        ...

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """Hint that the stretch may go to the disk now; gives no guarantee."""
        ...

    def fsync(self, fd: int) -> None:
        """Make the file's content and size durable."""
        ...

    def set_mtime(self, name: str, mtime_ns: int) -> None:
        """Set the time of the last change."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Rename, replacing what is there."""
        ...

    def unlink(self, name: str) -> None:
        """Remove *name*; no error if there is none."""
        ...

    def fsync_folder(self) -> None:
        """Make creations, renames and removals durable."""
        ...

    def free_bytes(self) -> int:
        """Return the room that is left for an ordinary user."""
        ...


class OsFiles:
    """Files in a real folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = os.fspath(folder)

    def names(self) -> list[str]:
        """See Files."""
        return os.listdir(self._folder)

    def facts(self, name: str) -> FileFacts | None:
        """See Files."""
        try:
            found = os.stat(self._path(name))
        except FileNotFoundError:
            return None
        return FileFacts(found.st_ino, found.st_size, found.st_mtime_ns)

    def open(self, name: str, *, write: bool = False, create: bool = False) -> int:
        """See Files."""
        flags = os.O_RDWR if write or create else os.O_RDONLY
        if create:
            flags |= os.O_CREAT | os.O_TRUNC
        # A mirror holds everything that the guest holds: nobody else may read it.
        return os.open(self._path(name), flags | os.O_NOFOLLOW, 0o600)

    def close(self, fd: int) -> None:
        """See Files."""
        os.close(fd)

    def size_bytes(self, fd: int) -> int:
        """See Files."""
        return os.fstat(fd).st_size

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """See Files."""
        done = 0
        while done < len(buffer):
            count = os.preadv(fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> None:
        """See Files."""
        view = memoryview(data)
        while view:
            count = os.pwrite(fd, view, offset)
            view = view[count:]
            offset += count

    def truncate(self, fd: int, size_bytes: int) -> None:
        """See Files."""
        os.ftruncate(fd, size_bytes)

    def reserve(self, fd: int, offset: int, length: int) -> None:
        """See Files."""
        _fallocate(fd, _KEEP_SIZE, offset, length)

    def zero(self, fd: int, offset: int, length: int) -> None:
        """See Files."""
        if _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
            return
        for at in range(offset, offset + length, len(_ZEROES)):
            self.pwrite(fd, _ZEROES[: offset + length - at], at)

    def data_ranges(self, fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """See Files."""
        while offset < end:
            try:
                start = os.lseek(fd, offset, os.SEEK_DATA)
                stop = os.lseek(fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                    return
                if error.errno not in _NOT_THERE:
                    raise
                start, stop = offset, end
            if start >= end:
                return
            yield start, min(stop, end)
            offset = stop

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """See Files."""
        _libc.sync_file_range(
            ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(length),
            ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))

    def fsync(self, fd: int) -> None:
        """See Files."""
        os.fsync(fd)

    def set_mtime(self, name: str, mtime_ns: int) -> None:
        """See Files."""
        os.utime(self._path(name), ns=(mtime_ns, mtime_ns))

    def rename(self, old: str, new: str) -> None:
        """See Files."""
        os.rename(self._path(old), self._path(new))

    def unlink(self, name: str) -> None:
        """See Files."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def fsync_folder(self) -> None:
        """See Files."""
        sync_folder(self._folder)

    def free_bytes(self) -> int:
        """See Files."""
        found = os.statvfs(self._folder)
        return found.f_bavail * found.f_frsize

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)


def sync_folder(folder: str) -> None:
    """Make the names in *folder* durable, where its file system has such a thing."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_THERE:  # CIFS and FUSE may not know fsync of a folder
            raise
    finally:
        os.close(fd)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Return whether the file system did it; False if it doesn't know how. Raises OSError."""
    call = getattr(_libc, "fallocate64", None) or _libc.fallocate
    while True:
        result = call(
            ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(length))
        if result == 0:
            return True
        number = ctypes.get_errno()
        if number in _NOT_THERE:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
