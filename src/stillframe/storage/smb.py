"""A folder on a share of Windows or Samba, reached by smbprotocol: smb://HOST:PORT/SHARE/FOLDER.

Nothing is mounted and no root is needed. Packets are signed, or encrypted if the server wants that.

Shares don't tell upper case from lower, and Windows drops a dot at the end of a name and keeps names of old
devices for itself (`aux`, `com1`). So a name is written in lower case with `^` before each letter that is
upper case, a `^` behind a dot at its end, and a `^` before a device's name: no key has that character. A
repository that was made here is therefore none for a host that mounts the share, and the other way round.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import stat as stat_bits
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import msgspec
import smbclient
from smbprotocol.exceptions import (
    AccessDenied,
    BadNetworkName,
    LogonFailure,
    SMBAuthenticationError,
    SMBException,
    SMBOSError,
    SMBResponseException,
)

from stillframe.clock import Clock, Deadline
from stillframe.errors import StorageFull, StorageLost, StorageRefused
from stillframe.storage.access import Access
from stillframe.storage.listing import Entry
from stillframe.storage.model import Stat
from stillframe.storage.open_files import FileFacts, OpenFile
from stillframe.storage.patience import call_timeout_s
from stillframe.units import MIB, duration_text

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 20
_PORT = 445
_WRITE_BYTES = MIB
#: Calls at a time; those beyond it wait.
_THREADS = 16
_OPEN_PATIENCE_S = 30.0
_OPEN_PAUSE_S = 0.01
_REFUSED = (AccessDenied, BadNetworkName, LogonFailure, SMBAuthenticationError)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_UPPER = re.compile(r"[A-Z]")
_MARKED = re.compile(r"\^([a-z])")
_DEVICE = re.compile(r"(?:aux|con|nul|prn|com[0-9]|lpt[0-9])(?:\.|$)")
_IN_USE_STATUS = (0xC0000022, 0xC0000043)  # STATUS_ACCESS_DENIED, STATUS_SHARING_VIOLATION
_GOING_STATUS = (0xC0000056,)  # STATUS_DELETE_PENDING
#: STATUS_DISK_FULL and STATUS_QUOTA_EXCEEDED of [MS-ERREF], which have no errno of their own in smbprotocol.
_FULL_STATUS = (0xC000007F, 0xC0000044)


class _Run(Protocol):
    """See SmbServer._run."""

    def __call__(self, what: str, call: Callable[[], T]) -> T:
        """See SmbServer._run."""
        ...


class SmbPlace(msgspec.Struct, frozen=True, kw_only=True):
    """A folder ("" for all of it) of a share."""

    host: str
    share: str
    folder: str = ""
    port: int = _PORT

    @property
    def address(self) -> str:
        """The address as a person writes it."""
        port = "" if self.port == _PORT else f":{self.port}"
        return f"smb://{self.host}{port}/{self.share}{'/' if self.folder else ''}{self.folder}"


class SmbServer:
    """See FileServer."""

    def __init__(self, place: SmbPlace, access: Access, clock: Clock) -> None:
        self._place = place
        self._clock = clock
        self._access = access
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "smb")
        # Of this storage alone: a connection that broke is thrown away without touching another's.
        self._connections: dict[str, Any] = {}
        self._is_in = False

    @property
    def address(self) -> str:
        """See FileServer."""
        return self._place.address

    def read(self, path: str, offset_bytes: int, length_bytes: int | None) -> tuple[bytes, int]:
        """See FileServer."""
        def call() -> tuple[bytes, int]:
            with self._open(path, "rb") as file:
                size = int(file.fd.end_of_file)
                end = size if length_bytes is None else min(size, offset_bytes + length_bytes)
                file.seek(offset_bytes)
                return _read(file, max(0, end - offset_bytes)), size

        return self._run(f"reading {path}", call, length_bytes or 0)

    def write(self, path: str, content: memoryview) -> None:
        """See FileServer."""
        data = bytes(content)

        def call() -> None:
            with self._open(path, "xb") as file:
                _write(file, data)
                file.flush()

        self._run(f"writing {path}", call, len(data))

    def publish(self, temporary: str, path: str) -> None:
        """See FileServer."""
        old, new = self._path(temporary), self._path(path)
        self._run(f"naming {path}", lambda: smbclient.rename(old, new, **self._options()))

    def replace(self, temporary: str, path: str) -> None:
        """See FileServer."""
        old, new = self._path(temporary), self._path(path)

        # No file is replaced while somebody has it open. Readers are done soon.
        self._run(f"naming {path}", lambda: self._patiently(
            _IN_USE_STATUS, lambda: smbclient.replace(old, new, **self._options())))

    def remove(self, path: str) -> None:
        """See FileServer."""
        self._run(f"removing {path}", lambda: smbclient.remove(self._path(path), **self._options()))

    def make_folder(self, path: str) -> None:
        """See FileServer."""
        def call() -> None:
            if not path:
                smbclient.makedirs(self._path(path), exist_ok=True, **self._options())
                return
            try:
                smbclient.mkdir(self._path(path), **self._options())
            except SMBOSError as error:
                if error.errno != errno.EEXIST:
                    raise

        self._run(f"making the folder {path}", call)

    def remove_folder(self, path: str) -> None:
        """See FileServer."""
        def call() -> None:
            try:
                smbclient.rmdir(self._path(path), **self._options())
            except SMBOSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise

        self._run(f"removing the folder {path}", call)

    def scan(self, path: str) -> list[Entry]:
        """See FileServer."""
        return self._run(f"listing {path}", lambda: [
            Entry(_key_name(entry.name), entry.is_dir(), entry.smb_info.end_of_file)
            for entry in smbclient.scandir(self._path(path), **self._options())])

    def stat(self, path: str) -> Stat:
        """See FileServer."""
        def call() -> Stat:
            facts = smbclient.stat(self._path(path), **self._options())
            if not stat_bits.S_ISREG(facts.st_mode):
                raise FileNotFoundError(path)
            return Stat(facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC))

        return self._run(f"looking at {path}", call)

    def open(self, path: str, *, write: bool = False, create: bool = False) -> OpenFile:
        """See RangeServer."""
        def opened(mode: str) -> Callable[[], Any]:
            # What a run removed that was killed goes once the server sees that its connection is gone.
            return lambda: self._patiently(_GOING_STATUS, lambda: smbclient.open_file(
                self._path(path), mode=mode, buffering=0, share_access="rwd", **self._options()))

        first = self._run(f"opening {path}", opened("w+b" if create else "r+b" if write else "rb"))
        return _SmbFile(path, first, opened("r+b" if create or write else "rb"), opened("r+b"), self._run)

    def facts(self, path: str) -> FileFacts:
        """See RangeServer."""
        facts = self._run(
            f"looking at {path}", lambda: smbclient.stat(self._path(path), **self._options()))
        return FileFacts(facts.st_ino, facts.st_size, facts.st_mtime_ns)

    def set_mtime(self, path: str, mtime_s: int) -> None:
        """See RangeServer."""
        times = (mtime_s, mtime_s)
        self._run(f"setting the time of {path}",
                  lambda: smbclient.utime(self._path(path), times=times, **self._options()))

    def free_bytes(self) -> int | None:
        """See RangeServer."""
        return self._run("looking how much room is left", lambda: int(
            smbclient.stat_volume(self._path(""), **self._options()).caller_available_size))

    def _run(self, what: str, call: Callable[[], T], size_bytes: int = 0) -> T:
        """Run *call*, which moves *size_bytes*, in a thread of our own. Its errors become those of a storage.

        The library itself would wait for ten minutes, and as long again.
        smbclient keeps errors, and with them the frames of whoever called it: buffers would live on in there.
        """
        with self._errors(what):
            timeout_s = call_timeout_s(size_bytes)
            asked = self._threads.submit(call)
            wait([asked], timeout_s)
            if not asked.done():
                asked.cancel()
                raise TimeoutError(f"no answer within {duration_text(timeout_s)}")
            return asked.result()

    def _patiently(self, statuses: tuple[int, ...], call: Callable[[], T]) -> T:
        """Return what *call* does, tried again while the server says one of *statuses*."""
        deadline = Deadline(self._clock, _OPEN_PATIENCE_S)
        while True:
            try:
                return call()
            except SMBOSError as error:
                if error.ntstatus not in statuses or deadline.passed():
                    raise
            self._clock.pause(_OPEN_PAUSE_S)

    @contextlib.contextmanager
    def _open(self, path: str, mode: str) -> Iterator[Any]:
        with smbclient.open_file(
                self._path(path), mode=mode, buffering=0, share_access="rwd", **self._options()) as file:
            yield file

    def _path(self, path: str) -> str:
        parts = [_server_name(part) for part in path.split("/") if part]
        folder = [part for part in self._place.folder.split("/") if part]
        return "\\".join([rf"\\{self._place.host}\{self._place.share}", *folder, *parts])

    def _options(self) -> dict[str, Any]:
        """Return what each call needs, once somebody is logged in."""
        options: dict[str, Any] = {"port": self._place.port, "connection_cache": self._connections}
        with self._lock:
            if not self._is_in:
                access = self._access
                user = f"{access.domain}\\{access.user}" if access.domain else access.user
                smbclient.register_session(
                    self._place.host, username=user or None, password=access.secret or None,
                    connection_timeout=_CONNECT_TIMEOUT_S, **options)
                self._is_in = True
        return options

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except _REFUSED as error:
            raise self._refused(what, str(error)) from error
        except SMBOSError as error:
            error.__traceback__ = None  # see _run
            if error.errno in _NOT_THERE:
                raise FileNotFoundError(what) from error
            if error.errno == errno.EEXIST:
                raise FileExistsError(what) from error
            if error.ntstatus in _FULL_STATUS or error.errno in _FULL:
                raise self._full(what) from error
            if error.errno in _FORBIDDEN or error.ntstatus in _IN_USE_STATUS[:1]:
                raise self._refused(what, str(error)) from error
            raise self._lost(what, error) from error
        except FileNotFoundError:
            raise
        except (SMBException, OSError, ValueError) as error:
            if isinstance(error, SMBResponseException) and error.status in _FULL_STATUS:
                error.__traceback__ = None  # see _run
                raise self._full(what) from error  # a write says so; what else does raises an SMBOSError
            # A connection that broke raises whatever comes first; the next call makes another.
            self._drop()
            raise self._lost(what, error) from error

    def _full(self, what: str) -> StorageFull:
        return StorageFull(f"The storage {self.address} is full: {what}. What was stored before is whole.",
                           "free some space there, then run again")

    def _drop(self) -> None:
        _cut(self._connections)  # who waits there lets go of the lock
        with self._lock:
            self._is_in = False
            broken, self._connections = self._connections, {}
        _cut(broken)

    def _refused(self, what: str, why: str) -> StorageRefused:
        return StorageRefused(
            f"The storage {self.address} refuses ({why}): {what}.",
            f"smbclient -U {self._access.user or 'USER'} //{self._place.host}/{self._place.share} -c ls")

    def _lost(self, what: str, error: Exception) -> StorageLost:
        return StorageLost(
            f"The storage {self.address} failed ({str(error) or type(error).__name__}): {what}. "
            "What was stored before is whole.",
            f"smbclient -U {self._access.user or 'USER'} //{self._place.host}/{self._place.share} -c ls")


class _SmbFile:
    """See OpenFile. A handle of smbclient has a place of its own, so each call at a time has a handle.

    Handles know how long the file is from when they were opened: what is written here is told to all.
    """

    def __init__(
        self, path: str, first: Any, opened: Callable[[], Any], writable: Callable[[], Any], run: _Run,
    ) -> None:
        self._path = path
        self._opened = opened
        self._writable = writable
        self._run = run
        self._size_bytes = int(first.fd.end_of_file)
        self._lock = threading.Lock()
        self._idle = [first]

    def size_bytes(self) -> int:
        """See OpenFile."""
        return self._size_bytes

    def read_into(self, buffer: memoryview, offset_bytes: int) -> int:
        """See OpenFile."""
        def call(file: Any) -> bytes:
            file.fd.end_of_file = self._size_bytes
            file.seek(offset_bytes)
            return _read(file, len(buffer))  # into a buffer of the call's own, see SmbServer._run

        content = self._with_handle(f"reading {self._path}", call)
        buffer[: len(content)] = content
        return len(content)

    def write(self, data: memoryview | bytes, offset_bytes: int) -> None:
        """See OpenFile."""
        kept = bytes(data)

        def call(file: Any) -> None:
            file.seek(offset_bytes)
            _write(file, kept)

        self._with_handle(f"writing {self._path}", call)
        with self._lock:
            self._size_bytes = max(self._size_bytes, offset_bytes + len(kept))

    def truncate(self, size_bytes: int) -> None:
        """See OpenFile."""
        self._with_handle(f"writing {self._path}", lambda file: file.truncate(size_bytes))
        with self._lock:
            self._size_bytes = size_bytes

    def sync(self) -> None:
        """See OpenFile. The server makes durable what came by any handle, if one that may write asks."""
        def call() -> None:
            with self._writable() as file:
                file.fd.flush()

        self._run(f"making {self._path} durable", call)

    def close(self) -> None:
        """See OpenFile."""
        with self._lock:
            idle, self._idle = self._idle, []
        for file in idle:
            with contextlib.suppress(StorageLost):  # it is closed then, too
                self._run(f"closing {self._path}", file.close)

    def _with_handle(self, what: str, call: Callable[[Any], T]) -> T:
        with self._lock:
            idle = self._idle.pop() if self._idle else None
        handle = idle or self._run(f"opening {self._path}", self._opened)
        try:
            return self._run(what, lambda: call(handle))
        finally:
            with self._lock:
                self._idle.append(handle)


def _cut(connections: dict[str, Any]) -> None:
    """End connections, and with them what waits for a reply there. A farewell would wait for one, too."""
    for connection in list(connections.values()):
        with contextlib.suppress(SMBException, OSError, ValueError):
            if connection.transport.connected:
                # First, since closing waits for whoever is sending.
                connection.transport._sock.shutdown(socket.SHUT_RDWR)  # noqa: SLF001 -- it has no other door
            connection.disconnect(close=False)


def _read(file: Any, length_bytes: int) -> bytes:
    """Return what the file has from where it stands, at most so much."""
    content = bytearray(length_bytes)
    at = 0
    with memoryview(content) as rest:
        while at < length_bytes:
            done = file.readinto(rest[at:])
            if not done:
                break
            at += done
    return bytes(content[:at])


def _write(file: Any, data: bytes) -> None:
    """Write all of *data* from where the file stands."""
    at = 0
    while at < len(data):
        at += file.write(data[at:at + _WRITE_BYTES])


def _server_name(part: str) -> str:
    name = _UPPER.sub(lambda found: f"^{found[0].lower()}", part)
    if name.endswith("."):
        name += "^"
    return f"^{name}" if _DEVICE.match(name) else name


def _key_name(name: str) -> str:
    """Return the part of a key that `_server_name` made *name* of."""
    plain = name.removesuffix("^")
    if plain.startswith("^") and _DEVICE.match(plain[1:]):
        plain = plain[1:]
    return _MARKED.sub(lambda found: found[1].upper(), plain)
