"""Objects as files below one folder: a disk, an LV, a mounted share.

The object `main/g/000000000001` is the file of that name below the folder. Files are 0600
and folders 0700: a repository holds everything that the guests hold.

An object is written under a temporary name in `.unfinished` (no key begins with a dot),
made durable there, and only then given its name (publish.py); at last the name is made
durable. So a reader, and whoever comes after a crash, sees whole objects only. What a
killed writer leaves in `.unfinished` is removed by a later one when nothing was written to it for
an hour by the storage's own time. Were its writer alive after all, its create fails and nothing else.

`.unfinished` is made once, by `make=True`. A folder without any entry is therefore never a
storage: it is a mount point where nothing is mounted, and no object in it is called missing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_bits
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from stillframe.direct import write_new
from stillframe.errors import ObjectExists, ObjectMissing, RepositoryUnsafe
from stillframe.storage.listing import Entry, listed
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
from stillframe.storage.publish import CANNOT, WAYS, Way
from stillframe.storage.trouble import absent, storage_errors

UNFINISHED = ".unfinished"
_LEFTOVER_AGE_S = 3600
#: How often a folder may vanish under a create: others remove folders that they see empty.
_FOLDER_TRIES = 32
_NO_FOLDER_FSYNC = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalStorage:
    """See Storage. *make* makes the folder (for `init`); else one that is absent or empty is StorageLost.

    *ways* are the ways to publish a new object, the first that the file system knows is taken. If it
    knows none, create raises RepositoryUnsafe.
    """

    def __init__(self, folder: Path, *, make: bool = False, ways: Sequence[Way] = WAYS) -> None:
        self._root = os.path.abspath(folder)
        self._ways = tuple(ways)
        self._safe = True
        self._swept = False
        #: Folders known to be durable themselves, and their inode: one made anew is another folder.
        self._settled: dict[str, int] = {}
        if make:
            with storage_errors(self._root, "making the folder"):
                self._make_folder(os.path.join(self._root, UNFINISHED))

    @property
    def address(self) -> str:
        """See Storage."""
        return self._root

    @property
    def capabilities(self) -> Capabilities:
        """See Storage."""
        return Capabilities(
            create_if_absent=self._safe, atomic_replace=True, lists_sizes=True, server_time=True,
            delete_many=False)

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        check_key(key)
        check_range(offset_bytes, length_bytes)
        path = self._path(key)
        with storage_errors(self._root, f"reading {key}"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                raise self._missing(key) from None
            try:
                facts = os.fstat(fd)
                if not stat_bits.S_ISREG(facts.st_mode):
                    raise self._missing(key)
                length = readable_bytes(path, facts.st_size, offset_bytes, length_bytes)
                return _read(fd, path, offset_bytes, length)
            finally:
                os.close(fd)

    def create(self, key: str, content: Content) -> None:
        """See Storage. Also raises RepositoryUnsafe."""
        self._store(key, content, self._name_new)

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        self._store(key, content, _rename)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See Storage. The names of one folder at a time (and of those above it) are held in memory."""
        check_prefix(prefix)
        return self._list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage. Folders that are empty then are removed too."""
        for key in keys:
            check_key(key)
        touched: set[str] = set()
        with storage_errors(self._root, "deleting objects"):
            try:
                for key in keys:
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                        os.unlink(self._path(key))
                        touched.add(os.path.dirname(self._path(key)))
                if not touched:
                    self._check_root()
            finally:
                # An object that came back after a power cut could name others that are gone for good.
                for folder in touched:
                    with contextlib.suppress(FileNotFoundError):
                        _sync_folder(folder)
                self._remove_empty(touched)

    def stat(self, key: str) -> Stat:
        """See Storage."""
        check_key(key)
        with storage_errors(self._root, f"looking at {key}"):
            try:
                facts = os.stat(self._path(key), follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                raise self._missing(key) from None
            if not stat_bits.S_ISREG(facts.st_mode):
                raise self._missing(key)
        return Stat(facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC))

    def now(self) -> datetime:
        """See Storage. Needs to write: the time is the one a file server gives to a file that is touched."""
        with storage_errors(self._root, "asking for its time"), self._temporary() as (fd, _):
            return datetime.fromtimestamp(os.fstat(fd).st_mtime, UTC)

    def _store(self, key: str, content: Content, name: Callable[[str, str], None]) -> None:
        """Write a temporary file and let *name* give it the key's name, all durable."""
        check_key(key)
        view = view_of(content)
        path = self._path(key)
        folder = os.path.dirname(path)
        with storage_errors(self._root, f"writing {key}"), self._temporary() as (fd, temporary):
            self._sweep(fd)
            write_new(fd, view)
            os.fsync(fd)
            taken = not self._name_durably(fd, temporary, path, name)
            try:
                # For a taken name as well: what is said to exist must still exist after a power cut.
                _sync_folder(folder)
            except FileNotFoundError:
                self._check_root()  # else it was deleted already, with its folder
        if taken:
            raise ObjectExists(f"There is an object {key} in {self._root} already.")

    def _name_durably(self, fd: int, temporary: str, path: str, name: Callable[[str, str], None]) -> bool:
        """Return whether the file got the name *path*; False if that is taken. Makes the folder if needed."""
        folder = os.path.dirname(path)
        for attempt in range(_FOLDER_TRIES):
            try:
                self._make_folder(folder)
                name(temporary, path)
            except FileExistsError:
                return _is_same(fd, path)  # NFS: the first request was carried out, its repetition failed
            except FileNotFoundError:
                # The folder was removed as empty, or our own file was swept.
                if os.fstat(fd).st_nlink == 0 or attempt + 1 == _FOLDER_TRIES:
                    raise
                self._settled.pop(folder, None)
                continue
            break
        return True

    def _name_new(self, temporary: str, path: str) -> None:
        """Name the file in the first way that works here. Raises FileExistsError, RepositoryUnsafe."""
        refused = 0
        for way in self._ways:
            try:
                way(temporary, path)
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
                refused = error.errno
                continue
            self._ways = (way,)
            return
        if refused == errno.EPERM:  # of the last way, where it means what it says
            raise PermissionError(refused, os.strerror(refused), path)
        self._safe = False
        raise RepositoryUnsafe(
            f"The file system of {self._root} has neither hard links nor rename without replacing: "
            "two writers could overwrite each other.",
            f"findmnt -T {self._root}   # choose a folder on another file system")

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[int, str]]:
        """Give an empty file (descriptor, path) for the block; afterwards its temporary name is gone."""
        folder = os.path.join(self._root, UNFINISHED)
        path = os.path.join(folder, os.urandom(16).hex())
        try:
            fd = os.open(path, _NEW_FILE, 0o600)
        except FileNotFoundError:
            self._check_root()
            self._make_folder(folder)  # somebody copied the objects without it
            fd = os.open(path, _NEW_FILE, 0o600)
        try:
            yield fd, path
        finally:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _sweep(self, fresh: int) -> None:
        """Remove what killed writers left, once; *fresh* is a new file and tells the storage's time."""
        if self._swept:
            return
        self._swept = True
        old_s = os.fstat(fresh).st_mtime - _LEFTOVER_AGE_S
        with contextlib.suppress(OSError), os.scandir(os.path.join(self._root, UNFINISHED)) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < old_s:
                        os.unlink(entry.path)

    def _make_folder(self, folder: str) -> None:
        """Make *folder* and those above it if needed, and make them durable, whoever made them.

        Each folder's name is made durable once only, as long as it is the same folder.
        Raises FileNotFoundError if one of them was removed meanwhile.
        """
        above = os.path.dirname(folder)
        inode = _inode(folder)
        if inode is None:
            self._make_folder(above)
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            inode = os.stat(folder).st_ino
        elif self._settled.get(folder) == inode or not folder.startswith(f"{self._root}/"):
            return  # the storage's own folder, and what is above it, was there before
        else:
            self._make_folder(above)
        _sync_folder(above)
        self._settled[folder] = inode

    def _remove_empty(self, folders: set[str]) -> None:
        """Remove the *folders*, and those above them, as far as they are empty."""
        for start in folders:
            folder = start
            with contextlib.suppress(OSError):  # not empty, nearly always
                while folder != self._root:
                    os.rmdir(folder)
                    self._settled.pop(folder, None)  # its successor may get the same inode
                    folder = os.path.dirname(folder)

    def _list(self, prefix: str) -> Iterator[Listed]:
        with storage_errors(self._root, f"listing {prefix}"):
            self._check_root()
            yield from listed(self._scan, prefix)

    def _scan(self, folder: str) -> Iterable[Entry]:
        try:
            with os.scandir(self._path(folder)) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()  # a listing cut short by an unmount would pass for one of few objects
            return
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield Entry(entry.name, is_folder=True, size_bytes=0)
            elif entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    yield Entry(entry.name, is_folder=False,
                                size_bytes=entry.stat(follow_symlinks=False).st_size)

    def _missing(self, key: str) -> ObjectMissing:
        self._check_root()
        return ObjectMissing(f"There is no object {key} in {self._root}.", f"ls -l {self._path(key)}")

    def _check_root(self) -> None:
        """Raise StorageLost if the storage's folder is absent or empty."""
        try:
            with os.scandir(self._root) as entries:
                there = next(entries, None) is not None
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            there = False
        if not there:
            raise absent(self._root)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"


def _rename(temporary: str, path: str) -> None:
    os.rename(temporary, path)


def _inode(folder: str) -> int | None:
    try:
        return os.stat(folder).st_ino
    except FileNotFoundError:
        return None


def _is_same(fd: int, path: str) -> bool:
    """Return whether *path* is the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _read(fd: int, path: str, offset_bytes: int, length_bytes: int) -> bytes:
    """Return exactly so much of the file. Raises ObjectTruncated."""
    content = os.pread(fd, length_bytes, offset_bytes)
    if len(content) == length_bytes:
        return content
    parts = [content]  # the kernel gives at most 2 GiB at once
    done = len(content)
    while done < length_bytes:
        more = os.pread(fd, length_bytes - done, offset_bytes + done)
        if not more:
            readable_bytes(path, offset_bytes + done, offset_bytes, length_bytes)
        parts.append(more)
        done += len(more)
    return b"".join(parts)


def _sync_folder(folder: str) -> None:
    """Make the names in *folder* durable, where its file system has such a thing."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:  # CIFS and FUSE may not know fsync of a folder
            raise
    finally:
        os.close(fd)
