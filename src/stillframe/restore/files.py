"""What restoring needs of the kernel beyond reading and writing: QEMU's locks, holes, who uses a device."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from stillframe.units import MIB

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_SYNC_FILE_RANGE_WRITE = 2
_NOT_THERE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_ZEROES = bytes(MIB)
_libc = ctypes.CDLL(None, use_errno=True)

# block/file-posix.c: an opener holds a read lock on the byte of each permission that it has, and on
# that of each which it grants nobody else; then it looks whether anybody has the counterpart.
_HAS_FROM, _GRANTS_NOT_FROM, _PERMISSIONS = 100, 200, 5
_FLOCK = struct.Struct("@hhqqi4x")


def lock_as_qemu(fd: int) -> bool:
    """Take an image for this process alone, in the way in which QEMU does; False if somebody has it open.

    No QEMU opens it then, until *fd* is closed, neither for writing nor for reading (but by force). A
    file system without such locks can't be locked by QEMU either: that counts as taken.
    """
    places = [first + number for first in (_HAS_FROM, _GRANTS_NOT_FROM) for number in range(_PERMISSIONS)]
    try:
        for at in places:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, at, 1, 0))
        for at in places:
            found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
            if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
                return False
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in (*_NOT_THERE, errno.ENOLCK):
            raise
    return True


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Have what was written to the page cache go to the disk soon, instead of all at the end."""
    _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def read_all(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill *buffer*; behind the end of a file it is zeroes."""
    while buffer:
        done = os.preadv(fd, [buffer], offset)
        if done == 0:
            buffer[:] = bytes(len(buffer))
            return
        buffer, offset = buffer[done:], offset + done


def make_zero(fd: int, offset: int, length: int) -> None:
    """Make a stretch read as zeroes, without taking room where that is possible."""
    for mode in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE):
        if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0:
            return
        if ctypes.get_errno() not in _NOT_THERE:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    end = offset + length
    while offset < end:
        offset += os.pwrite(fd, _ZEROES[: end - offset], offset)


def data_ranges(fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of what is not a hole in a stretch of a file; the whole stretch of anything else."""
    at = offset
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            until = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            start, until = at, end
        if start >= end:
            return
        yield start, min(until, end)
        at = until


def sync_folder(path: str) -> None:
    """Make the names in the folder of *path* durable."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    finally:
        os.close(fd)


def device_users(path: str) -> list[str]:
    """Return who uses a block device or a partition of it.

    That is mounts, swap, devices built upon it, and programs that have it open for writing.
    """
    number = os.stat(path).st_rdev
    own = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    parts = [own]
    with contextlib.suppress(OSError):
        parts += [entry for entry in own.iterdir() if (entry / "partition").exists()]
    users: list[str] = _writers({number, *_numbers_around(own, parts)})
    for part in parts:
        with contextlib.suppress(OSError):
            users += [f"{part.name} is part of {holder.name}" for holder in (part / "holders").iterdir()]
        with contextlib.suppress(OSError):
            device = (part / "dev").read_text(encoding="ascii").strip()
            users += [f"{part.name} is mounted on {folder}" for folder in _mounts(device)]
            users += [f"{part.name} is used for swapping" for used in _swaps() if used == device]
    return users


def _numbers_around(own: Path, parts: list[Path]) -> Iterator[int]:
    """Yield the device numbers of *parts*, and of the whole disk if the device is a partition of it."""
    for part in (*parts, *([own.parent] if (own / "partition").exists() else [])):
        with contextlib.suppress(OSError, ValueError):
            major, minor = (part / "dev").read_text(encoding="ascii").strip().split(":")
            yield os.makedev(int(major), int(minor))


def _writers(numbers: set[int]) -> list[str]:
    """Return which other programs have one of these block devices open for writing.

    libvirt gives each QEMU a /dev with nodes of its own. A lock lies on the node, not on the device, so
    QEMU's locks are not seen through another node: only this tells of a running guest.
    """
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            if any(_writes_to(process, fd, numbers) for fd in os.listdir(process / "fd")):
                name = (process / "comm").read_text(errors="replace").strip()
                found.append(f"{name} (process {process.name}) has it open for writing")
    return found


def _writes_to(process: Path, fd: str, numbers: set[int]) -> bool:
    with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
        # No other file is looked at: one on a dead share would hang.
        if not os.readlink(process / "fd" / fd).startswith("/dev/"):
            return False
        facts = os.stat(process / "fd" / fd)
        if not stat.S_ISBLK(facts.st_mode) or facts.st_rdev not in numbers:
            return False
        for line in (process / "fdinfo" / fd).read_text(encoding="ascii").splitlines():
            if line.startswith("flags:"):
                return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _mounts(device: str) -> Iterator[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.split()
            if fields[2] == device:
                yield fields[4]


def _swaps() -> Iterator[str]:
    with open("/proc/swaps", encoding="utf-8", errors="replace") as file:
        for line in file.readlines()[1:]:
            with contextlib.suppress(OSError):
                number = os.stat(line.split()[0]).st_rdev
                yield f"{os.major(number)}:{os.minor(number)}"
