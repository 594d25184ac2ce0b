"""Objects as files on a file server that is spoken to directly: the folders of SFTP and SMB.

As on a local disk (local.py): an object is written under a temporary name in `.unfinished`, made durable, and
only then given its name, which fails if somebody has it. What differs is who does it: a FileServer knows a
protocol's primitives, and this module makes the seven verbs of them. Names become durable when the server
makes them so: neither protocol can ask for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from stillframe.errors import ObjectExists, ObjectMissing, StorageError, StorageLost
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

UNFINISHED = ".unfinished"
_LEFTOVER_AGE = timedelta(hours=1)
#: How often a folder may vanish under a create: others remove folders that they see empty.
_FOLDER_TRIES = 32


class FileServer(Protocol):
    """A folder on a server. Paths are below it, "" is the folder itself. For several threads.

    Every call may raise StorageLost, StorageRefused and StorageFull besides what it names.
    """

    @property
    def address(self) -> str:
        """Where the folder is, for people."""
        ...

    def read(self, path: str, offset_bytes: int, length_bytes: int | None) -> tuple[bytes, int]:
        """Return what the range has, and the size of the file. Raises FileNotFoundError."""
        ...

    def write(self, path: str, content: memoryview) -> None:
        """Write a new file, durably. Raises FileNotFoundError if its folder is absent."""
        ...

    def publish(self, temporary: str, path: str) -> None:
        """Rename a file unless the new name is taken: FileExistsError. Raises FileNotFoundError."""
        ...

    def replace(self, temporary: str, path: str) -> None:
        """Rename a file over whatever has the name, at once. Raises FileNotFoundError."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file. Raises FileNotFoundError."""
        ...

    def make_folder(self, path: str) -> None:
        """Make a folder, if it is not there; the one above it must be: FileNotFoundError."""
        ...

    def remove_folder(self, path: str) -> None:
        """Remove a folder if it is there and empty."""
        ...

    def scan(self, path: str) -> list[Entry]:
        """Return what is in a folder. Raises FileNotFoundError."""
        ...

    def stat(self, path: str) -> Stat:
        """Return what the server says of a file, by its own clock. Raises FileNotFoundError."""
        ...


class FileStorage:
    """See Storage. *make* makes the folder (for `init`); *address* is how people write it."""

    def __init__(self, server: FileServer, *, make: bool = False, address: str = "") -> None:
        self._server = server
        self._address = address or server.address
        self._swept = False
        if make:
            for folder in ("", UNFINISHED):
                self._server.make_folder(folder)

    @property
    def address(self) -> str:
        """See Storage."""
        return self._address

    @property
    def capabilities(self) -> Capabilities:
        """See Storage."""
        return Capabilities(
            create_if_absent=True, atomic_replace=True, lists_sizes=True, server_time=True, delete_many=False)

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        check_key(key)
        check_range(offset_bytes, length_bytes)
        with self._missing_unless_there(key):
            content, size = self._server.read(key, offset_bytes, length_bytes)
        wanted = readable_bytes(f"{self.address}/{key}", size, offset_bytes, length_bytes)
        if len(content) != wanted:
            raise StorageLost(f"{self.address} gave {len(content)} bytes of {key} instead of {wanted}.",
                              "run the command again")
        return content

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        try:
            self._store(key, content, self._server.publish)
        except FileExistsError:
            raise ObjectExists(f"There is an object {key} in {self.address} already.") from None

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        self._store(key, content, self._server.replace)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See Storage. The names of one folder at a time (and of those above it) are held in memory."""
        check_prefix(prefix)
        return self._list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage. Folders that are empty then are removed too."""
        for key in keys:
            check_key(key)
        touched = set()
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self._server.remove(key)
                touched.add(key.rpartition("/")[0])
        if keys and not touched:
            self._check_there()
        for start in touched:
            folder = start
            while folder:
                self._server.remove_folder(folder)
                folder = folder.rpartition("/")[0]

    def stat(self, key: str) -> Stat:
        """See Storage."""
        check_key(key)
        with self._missing_unless_there(key):
            return self._server.stat(key)

    def now(self) -> datetime:
        """See Storage. Needs to write: the time is the one that the server gives to a file that is made."""
        path = self._write_temporary(memoryview(b"?"))
        try:
            return self._server.stat(path).modified_at
        finally:
            self._drop(path)

    def _store(self, key: str, content: Content, name: Callable[[str, str], None]) -> None:
        check_key(key)
        view = view_of(content)
        self._sweep()
        temporary = self._write_temporary(view)
        try:
            self._name(temporary, key, name)
        except BaseException:
            self._drop(temporary)
            raise

    def _name(self, temporary: str, key: str, name: Callable[[str, str], None]) -> None:
        for _ in range(_FOLDER_TRIES):
            try:
                name(temporary, key)
            except FileNotFoundError:
                # The folder is not there yet, or was removed as empty; or our own file was swept.
                self._make_folders(key)
            else:
                return
        raise self._gone()

    def _write_temporary(self, content: memoryview) -> str:
        """Return the path of a new file with that content."""
        path = f"{UNFINISHED}/{os.urandom(16).hex()}"
        try:
            self._server.write(path, content)
        except FileNotFoundError:
            raise self._gone() from None
        return path

    def _drop(self, temporary: str) -> None:
        """Remove a temporary file; one that can't be removed now is swept later."""
        with contextlib.suppress(FileNotFoundError, StorageError):
            self._server.remove(temporary)

    def _sweep(self) -> None:
        """Remove what killed writers left, once; the time is the server's."""
        if self._swept:
            return
        self._swept = True
        with contextlib.suppress(FileNotFoundError, StorageError):
            old = [entry.name for entry in self._server.scan(UNFINISHED) if not entry.is_folder]
            before = self.now() - _LEFTOVER_AGE if old else None
            for name in old:
                with contextlib.suppress(FileNotFoundError):
                    path = f"{UNFINISHED}/{name}"
                    if before is not None and self._server.stat(path).modified_at < before:
                        self._server.remove(path)

    def _make_folders(self, key: str) -> None:
        parts = key.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            with contextlib.suppress(FileNotFoundError):  # it was removed as empty: the next turn makes it
                self._server.make_folder("/".join(parts[:depth]))

    def _list(self, prefix: str) -> Iterator[Listed]:
        self._check_there()
        yield from listed(self._scan, prefix)

    def _scan(self, folder: str) -> Iterable[Entry]:
        try:
            return self._server.scan(folder.rstrip("/"))
        except FileNotFoundError:
            self._check_there()
            return ()

    @contextlib.contextmanager
    def _missing_unless_there(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            self._check_there()
            raise ObjectMissing(f"There is no object {key} in {self.address}.") from None

    def _check_there(self) -> None:
        """Raise StorageLost unless the folder is that of a storage: it may be an empty mount point."""
        try:
            self._server.scan(UNFINISHED)
        except FileNotFoundError:
            raise self._gone() from None

    def _gone(self) -> StorageLost:
        return StorageLost(
            f"There is no repository in {self.address}: none was made there, or its disk is not mounted.",
            "look at the folder on the server; stillframe init makes a repository")
