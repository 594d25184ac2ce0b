"""What a disk is restored to: a new file, an existing one, or a block device.

A new file is written under a temporary name in its folder and gets its own when it is whole and
durable. An existing target is taken the way QEMU takes an image, so that no running guest can be on it,
for the whole restore. Everything that speaks against it is found before the first byte is written.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

from stillframe.errors import (
    DestinationFull,
    DestinationLost,
    DestinationUnwritable,
    GuestState,
    NotPermitted,
    StillframeError,
    TargetExists,
    TargetInUse,
    TargetSmall,
)
from stillframe.restore.bulk import BulkWriter
from stillframe.restore.files import (
    data_ranges,
    device_users,
    lock_as_qemu,
    make_zero,
    read_all,
    sync_folder,
)
from stillframe.units import size_text

_QCOW2_MAGIC = b"QFI\xfb"


@dataclass(frozen=True, slots=True)
class Wishes:
    """Where to and how. *path* is absolute. *force* overwrites, *delta* writes what differs.

    *format* is ``raw``, ``qcow2``, or "" to go by the name: qcow2 if it ends so.
    """

    path: str
    format: str = ""
    force: bool = False
    delta: bool = False

    @property
    def is_qcow2(self) -> bool:
        """Whether the target is to be a qcow2 image; by the name only, never by its content."""
        return (self.format or ("qcow2" if self.path.endswith(".qcow2") else "raw")) == "qcow2"


class Target(Protocol):
    """An open target, for one thread. Its methods raise DestinationLost and DestinationFull."""

    @property
    def is_blank(self) -> bool:
        """Whether all of it reads as zeroes as long as nothing is written."""
        ...

    @property
    def left_behind(self) -> str:
        """What to say of it when the restore is given up now, "" if nothing of it stays."""
        ...

    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """Fill the whole *buffer* with what is there."""
        ...

    def data_ranges(self, offset_bytes: int, end_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what may not be zero within a stretch."""
        ...

    def write(self, content: memoryview, offset_bytes: int) -> None:
        """Write content; it must not change afterwards."""
        ...

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a stretch read as zeroes."""
        ...

    def flush(self) -> None:
        """Make durable what was written so far."""
        ...

    def publish(self) -> None:
        """Make it durable and give it its name."""
        ...


class FileTarget:
    """A raw image in a file, or a block device, open as *fd*; a new file if *naming* is given.

    Valid within its block.
    """

    def __init__(self, fd: int, path: str, size_bytes: int, naming: Naming | None) -> None:
        self._fd = fd
        self._path = path
        self._size_bytes = size_bytes
        self._naming = naming
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self._bulk = BulkWriter(fd)
        self._touched = False
        self.is_blank = naming is not None

    def __enter__(self) -> Self:
        if self._naming is not None:
            with write_errors(self._path):
                os.ftruncate(self._fd, self._size_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        self._bulk.close()

    @property
    def left_behind(self) -> str:
        """See Target."""
        return f"{self._path} is incomplete: it is not to be used." if self._touched else ""

    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """See Target."""
        with write_errors(self._path):
            read_all(self._fd, buffer, offset_bytes)

    def data_ranges(self, offset_bytes: int, end_bytes: int) -> Iterator[tuple[int, int]]:
        """See Target."""
        if self._is_file:
            return data_ranges(self._fd, offset_bytes, end_bytes)
        return iter([(offset_bytes, end_bytes)])

    def write(self, content: memoryview, offset_bytes: int) -> None:
        """See Target."""
        self._touched = self._naming is None
        with write_errors(self._path):
            self._bulk.write(content, offset_bytes)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """See Target."""
        self._touched = self._naming is None
        with write_errors(self._path):
            make_zero(self._fd, offset_bytes, length_bytes)

    def flush(self) -> None:
        """See Target."""
        with write_errors(self._path):
            self._bulk.finish()
            os.fsync(self._fd)

    def publish(self) -> None:
        """See Target."""
        with write_errors(self._path):
            self._bulk.finish()
            if self._is_file and os.fstat(self._fd).st_size != self._size_bytes:
                self._touched = True
                os.ftruncate(self._fd, self._size_bytes)
            os.fsync(self._fd)
            if self._naming is not None:
                self._naming.publish()


class Naming:
    """A file that is made under a temporary name. Valid within its block; what is not published goes."""

    def __init__(self, path: str, *, replace: bool) -> None:
        self._path = path
        self._replace = replace
        folder, name = os.path.split(path)
        self.temporary = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(8)}.unfinished")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.temporary)

    def publish(self) -> None:
        """Give the durable file its name, durably. Raises TargetExists, OSError."""
        if self._replace:
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(self._path)
                os.chown(self.temporary, old.st_uid, old.st_gid)
                os.chmod(self.temporary, stat.S_IMODE(old.st_mode))
            os.rename(self.temporary, self._path)
        else:
            self._name_new()
        sync_folder(self._path)

    def _name_new(self) -> None:
        try:
            os.link(self.temporary, self._path)
        except FileExistsError as error:
            raise exists(self._path, "It appeared while the disk was being restored.") from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            if os.path.lexists(self._path):
                raise exists(self._path, "It appeared while the disk was being restored.") from error
            os.rename(self.temporary, self._path)


def unfinished(path: str) -> list[str]:
    """Return the files that were made under temporary names to become *path*; those of live runs, too."""
    folder, name = os.path.split(path)
    return glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(name[:200])}.*.unfinished"))


@contextlib.contextmanager
def open_existing_target(path: str, size_bytes: int) -> Iterator[Target]:
    """Open a raw image in a file, or a block device, that is there, for a disk of *size_bytes*.

    Raises TargetSmall, TargetInUse, NotPermitted, DestinationUnwritable.
    """
    with opened(path, os.O_RDWR) as fd:
        room = os.lseek(fd, 0, os.SEEK_END)
        if room < size_bytes:
            raise small(path, f"has {size_text(room)}", size_bytes)
        with FileTarget(fd, path, size_bytes, None) as target:
            yield target


@contextlib.contextmanager
def open_file_target(wishes: Wishes, size_bytes: int, data_bytes: int) -> Iterator[Target]:
    """Open a raw file or block device for a disk of *size_bytes*, *data_bytes* of which are not zero.

    Raises TargetExists, TargetSmall, TargetInUse, NotPermitted, DestinationUnwritable.
    """
    facts = look(wishes)
    if facts is not None and (stat.S_ISBLK(facts.st_mode) or wishes.delta):
        with open_existing_target(wishes.path, size_bytes) as target:
            yield target
        return
    with kept_away(wishes.path, facts), Naming(wishes.path, replace=facts is not None) as naming:
        check_room(wishes.path, data_bytes)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with write_errors(wishes.path, DestinationUnwritable):
            fd = os.open(naming.temporary, flags, 0o600)
        try:
            with FileTarget(fd, wishes.path, size_bytes, naming) as target:
                yield target
        finally:
            os.close(fd)


def refuse_hidden_qcow2(wishes: Wishes) -> None:
    """Raise TargetExists if raw data would be written over a qcow2 image that only its name hides."""
    if not wishes.delta or wishes.format or wishes.is_qcow2:
        return
    try:
        with open(wishes.path, "rb") as file:
            magic = file.read(len(_QCOW2_MAGIC))
    except OSError:
        return  # not there, or opening it for the restore will tell
    if magic == _QCOW2_MAGIC:
        raise TargetExists(
            f"{wishes.path} is a qcow2 image, although its name does not say so.",
            "name what it is: --format qcow2 (or --format raw, if a guest's raw disk just looks like one)")


def look(wishes: Wishes) -> os.stat_result | None:
    """Return what is at the path, None if nothing. Raises TargetExists unless it may be written to."""
    try:
        facts = os.stat(wishes.path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unwritable(wishes.path, error) from error
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISBLK(facts.st_mode)):
        raise exists(wishes.path, "It is neither a file nor a block device.")
    if stat.S_ISBLK(facts.st_mode) and not (wishes.force or wishes.delta):
        raise exists(wishes.path, "What is on the device would be overwritten.")
    if not (wishes.force or wishes.delta):
        raise exists(wishes.path)
    return facts


@contextlib.contextmanager
def kept_away(path: str, facts: os.stat_result | None) -> Iterator[None]:
    """Keep others off a file that will be replaced, for the length of the block. Raises TargetInUse."""
    if facts is None:
        yield
        return
    with opened(path, os.O_RDONLY):
        yield


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """Open an existing target, locked. Raises TargetInUse, NotPermitted, DestinationUnwritable."""
    is_device = stat.S_ISBLK(os.stat(path).st_mode)
    users = device_users(path) if is_device else []
    if users:
        raise in_use(path, "; ".join(users) + ".")
    try:
        # Of a device, O_EXCL makes sure that nobody mounts it meanwhile.
        fd = os.open(path, flags | os.O_CLOEXEC | (os.O_EXCL if is_device else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise in_use(path, "The kernel says that it is busy.") from error
        raise unwritable(path, error) from error
    try:
        if not lock_as_qemu(fd):
            raise in_use(path, "A guest or another program of QEMU has it open.")
        yield fd
    finally:
        os.close(fd)


def check_room(path: str, needed_bytes: int) -> None:
    """Raise TargetSmall if the file system of *path* has too little room, DestinationUnwritable."""
    try:
        facts = os.statvfs(os.path.dirname(path))
    except OSError as error:
        raise unwritable(path, error) from error
    free = facts.f_bavail * facts.f_frsize
    if free < needed_bytes:
        raise small(path, f"is on a file system with {size_text(free)} left", needed_bytes)


@contextlib.contextmanager
def write_errors(path: str, kind: type[StillframeError] = DestinationLost) -> Iterator[None]:
    """Raise OSErrors of the block as DestinationFull, or as *kind*."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DestinationFull(f"{path} ran out of space.", f"df -h {os.path.dirname(path)}",
                                  GuestState.UNTOUCHED) from error
        raise kind(f"Writing {path} failed: {error.strerror}.", f"ls -ld {os.path.dirname(path)}",
                   GuestState.UNTOUCHED) from error


def exists(path: str, why: str = "") -> TargetExists:
    """Return the error for a target that was not to be overwritten."""
    return TargetExists(
        f"{path} exists. {why}".strip(),
        "restore to another name, or run the command again with --force (overwrite it) or --delta "
        "(write what differs)")


def small(path: str, why: str, needed_bytes: int) -> TargetSmall:
    """Return the error for a target with too little room."""
    return TargetSmall(f"{path} {why}; the disk needs {size_text(needed_bytes)}.",
                       "choose a larger target")


def in_use(path: str, who: str) -> TargetInUse:
    """Return the error for a target that others use."""
    return TargetInUse(f"{path} is in use. {who}",
                       f"fuser -v {path}   # shut the guest down or unmount it, then run the command again")


def unwritable(path: str, error: OSError) -> StillframeError:
    """Return the error for a target that can't be opened."""
    kind = NotPermitted if isinstance(error, PermissionError) else DestinationUnwritable
    return kind(f"{path} can't be written to: {error.strerror}.", f"ls -ld {os.path.dirname(path)}")
