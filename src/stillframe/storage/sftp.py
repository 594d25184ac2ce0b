"""A folder on an SFTP server, reached by asyncssh: sftp://USER@HOST:PORT/FOLDER.

Keys, agent, known hosts and ~/.ssh/config are OpenSSH's own. A host that is not in known_hosts, or has
another key than there, is refused. asyncssh lives in an event loop in a thread of its own, and nowhere else
in stillframe. A connection that broke is made anew by the next call.

Rename is that of version 3 of the protocol: it fails if the new name is taken (OpenSSH does it by link and
unlink), but says no more than "Failure": a look tells why. `init` tries whether a server keeps to that.

An account that may only add files (docs/TARGET-SFTP.md) may not rename, since that takes files away, too.
There, a file gets its name by a hard link; the temporary name stays for whoever may remove it. And files are
made read-only, whoever owns them: an account that may not change modes can't write to them any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import stat as stat_bits
import threading
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import asyncssh
import msgspec

from stillframe.errors import StorageFull, StorageLost, StorageRefused
from stillframe.storage.listing import Entry
from stillframe.storage.model import Stat
from stillframe.storage.open_files import FileFacts, OpenFile
from stillframe.storage.patience import CALL_TIMEOUT_S, call_timeout_s

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 20.0
_KEEPALIVE_S = 15
_KEEPALIVES_LOST = 4
#: The fastest first (FACTS 10); the others are asyncssh's own.
_CIPHERS = "aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,aes128-ctr,aes256-ctr"
_NOT_THERE = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath)
_NEW_FILE = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL
#: As far as the account's umask lets them.
_READ_ONLY, _FOLDER = asyncssh.SFTPAttrs(permissions=0o440), asyncssh.SFTPAttrs(permissions=0o770)
_CHANGED_FILE = asyncssh.FXF_READ | asyncssh.FXF_WRITE
_EMPTIED_FILE = _CHANGED_FILE | asyncssh.FXF_CREAT | asyncssh.FXF_TRUNC
#: What a mirror changes in place is for its account alone.
_PRIVATE = asyncssh.SFTPAttrs(permissions=0o600)
_BROKEN = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)
_WHY_REFUSED = (asyncssh.PermissionDenied, asyncssh.HostKeyNotVerifiable, asyncssh.KeyExchangeFailed,
                asyncssh.KeyImportError)


class _Run(Protocol):
    """See SftpServer._run."""

    def __call__(self, what: str, call: Callable[[asyncssh.SFTPClient], Coroutine[Any, Any, T]]) -> T:
        """See SftpServer._run."""
        ...


class SftpPlace(msgspec.Struct, frozen=True, kw_only=True):
    """The folder *path* ("" is where the user begins) at a host; "" and 0 are as ssh's configuration says."""

    host: str
    path: str
    port: int = 0
    user: str = ""
    identity: str = ""
    known_hosts: str = ""

    @property
    def address(self) -> str:
        """The address as a person writes it."""
        user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
        return f"sftp://{user}{self.host}{port}/{self.path.lstrip('/')}"


class SftpServer:
    """See FileServer."""

    def __init__(self, place: SftpPlace) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: asyncssh.SSHClientConnection | None = None
        self._client: asyncssh.SFTPClient | None = None
        self._connecting: asyncio.Lock | None = None
        self._may_rename = True

    @property
    def address(self) -> str:
        """See FileServer."""
        return self._place.address

    def read(self, path: str, offset_bytes: int, length_bytes: int | None) -> tuple[bytes, int]:
        """See FileServer."""
        async def call(client: asyncssh.SFTPClient) -> tuple[bytes, int]:
            async with client.open(self._path(path), asyncssh.FXF_READ, encoding=None) as file:
                facts = await file.stat()
                if not _is_file(facts):
                    raise FileNotFoundError(path)
                size = facts.size or 0
                end = size if length_bytes is None else min(size, offset_bytes + length_bytes)
                wanted = max(0, end - offset_bytes)
                return (await file.read(wanted, offset_bytes) if wanted else b""), size

        return self._run(f"reading {path}", call, length_bytes or 0)

    def write(self, path: str, content: memoryview) -> None:
        """See FileServer."""
        data = bytes(content)  # the buffer is the caller's again on return, whatever the loop still holds

        async def call(client: asyncssh.SFTPClient) -> None:
            async with client.open(self._path(path), _NEW_FILE, _READ_ONLY, encoding=None) as file:
                await file.write(data)
                with contextlib.suppress(asyncssh.SFTPOpUnsupported):
                    await file.fsync()

        self._run(f"writing {path}", call, len(data))

    def publish(self, temporary: str, path: str) -> None:
        """See FileServer."""
        async def call(client: asyncssh.SFTPClient) -> None:
            old, new = self._path(temporary), self._path(path)
            try:
                if self._may_rename:
                    with contextlib.suppress(asyncssh.SFTPPermissionDenied):
                        await client.rename(old, new)
                        return
                await client.link(old, new)
                self._may_rename = False  # not where both are refused: that is the place, not the account
            except asyncssh.SFTPOpUnsupported as error:
                raise asyncssh.SFTPPermissionDenied(f"renaming, and {error}") from error
            except asyncssh.SFTPFileAlreadyExists:
                raise FileExistsError(path) from None
            except asyncssh.SFTPFailure:
                if await client.lexists(self._path(path)):
                    raise FileExistsError(path) from None
                raise

        self._run(f"naming {path}", call)

    def replace(self, temporary: str, path: str) -> None:
        """See FileServer."""
        old, new = self._path(temporary), self._path(path)
        self._run(f"naming {path}", lambda client: client.posix_rename(old, new))

    def remove(self, path: str) -> None:
        """See FileServer."""
        async def call(client: asyncssh.SFTPClient) -> None:
            try:
                await client.remove(self._path(path))
            except asyncssh.SFTPFailure:
                if not await client.isdir(self._path(path)):
                    raise
                raise FileNotFoundError(path) from None

        self._run(f"removing {path}", call)

    def make_folder(self, path: str) -> None:
        """See FileServer."""
        async def call(client: asyncssh.SFTPClient) -> None:
            where = self._path(path)
            if path:
                try:
                    await client.mkdir(where, _FOLDER)
                except asyncssh.SFTPFailure:
                    facts = await client.lstat(where)  # it may be gone again: others remove what is empty
                    if not stat_bits.S_ISDIR(facts.permissions or 0):
                        raise
            else:
                await client.makedirs(where, _FOLDER, exist_ok=True)

        self._run(f"making the folder {path}", call)

    def remove_folder(self, path: str) -> None:
        """See FileServer."""
        async def call(client: asyncssh.SFTPClient) -> None:
            with contextlib.suppress(asyncssh.SFTPFailure, asyncssh.SFTPDirNotEmpty, *_NOT_THERE):
                await client.rmdir(self._path(path))

        self._run(f"removing the folder {path}", call)

    def scan(self, path: str) -> list[Entry]:
        """See FileServer."""
        async def call(client: asyncssh.SFTPClient) -> list[Entry]:
            return [
                Entry(str(entry.filename), bool(stat_bits.S_ISDIR(entry.attrs.permissions or 0)),
                      entry.attrs.size or 0)
                async for entry in client.scandir(self._path(path)) if entry.filename not in (".", "..")]

        return self._run(f"listing {path}", call)

    def stat(self, path: str) -> Stat:
        """See FileServer."""
        async def call(client: asyncssh.SFTPClient) -> Stat:
            facts = await client.lstat(self._path(path))
            if not _is_file(facts):
                raise FileNotFoundError(path)
            return Stat(facts.size or 0, datetime.fromtimestamp(facts.mtime or 0, UTC))

        return self._run(f"looking at {path}", call)

    def open(self, path: str, *, write: bool = False, create: bool = False) -> OpenFile:
        """See RangeServer."""
        flags = _EMPTIED_FILE if create else _CHANGED_FILE if write else asyncssh.FXF_READ

        async def call(client: asyncssh.SFTPClient) -> asyncssh.SFTPClientFile:
            return await client.open(self._path(path), flags, _PRIVATE, encoding=None)

        return _SftpFile(path, self._run(f"opening {path}", call), self._run)

    def facts(self, path: str) -> FileFacts:
        """See RangeServer."""
        facts = self._run(f"looking at {path}", lambda client: client.lstat(self._path(path)))
        return FileFacts(0, facts.size or 0, (facts.mtime or 0) * 10**9)

    def set_mtime(self, path: str, mtime_s: int) -> None:
        """See RangeServer."""
        times = (mtime_s, mtime_s)
        self._run(f"setting the time of {path}", lambda client: client.utime(self._path(path), times))

    def free_bytes(self) -> int | None:
        """See RangeServer."""
        async def call(client: asyncssh.SFTPClient) -> int | None:
            try:
                facts = await client.statvfs(self._path(""))
            except asyncssh.SFTPOpUnsupported:
                return None
            return (facts.bavail or 0) * (facts.frsize or 0)

        return self._run("looking how much room is left", call)

    def _path(self, path: str) -> str:
        return f"{self._place.path or '.'}/{path}" if path else self._place.path or "."

    def _run(
        self, what: str, call: Callable[[asyncssh.SFTPClient], Coroutine[Any, Any, T]], size_bytes: int = 0,
    ) -> T:
        """Run *call*, which moves *size_bytes*, in the loop's thread, on a connection.

        Its errors become those of a storage.
        """
        timeout_s = call_timeout_s(size_bytes)
        future = asyncio.run_coroutine_threadsafe(self._call(call, timeout_s), self._started())
        try:
            with self._errors(what):
                return future.result(_CONNECT_TIMEOUT_S + timeout_s + _KEEPALIVE_S)
        finally:
            future.cancel()
            del future  # it has the error, whose traceback has this frame: what callers hold would live on

    async def _call(
        self, call: Callable[[asyncssh.SFTPClient], Coroutine[Any, Any, T]], timeout_s: float,
    ) -> T:
        client = await self._connected()
        try:
            return await asyncio.wait_for(call(client), timeout_s)
        except _BROKEN:
            self._drop(client)
            raise
        except (asyncssh.SFTPError, FileNotFoundError, FileExistsError):
            raise  # the server answered
        except (asyncssh.Error, OSError, TimeoutError):
            self._drop(client)
            raise

    async def _connected(self) -> asyncssh.SFTPClient:
        assert self._connecting is not None
        async with self._connecting:
            if self._client is None:
                place = self._place
                given: dict[str, Any] = {
                    "port": place.port or None, "username": place.user or None,
                    "client_keys": [place.identity] if place.identity else None,
                    "known_hosts": place.known_hosts or None}
                with self._own_files():
                    connection = await asyncio.wait_for(asyncssh.connect(
                        place.host, encryption_algs=_CIPHERS, keepalive_interval=_KEEPALIVE_S,
                        keepalive_count_max=_KEEPALIVES_LOST, login_timeout=_CONNECT_TIMEOUT_S,
                        **{name: value for name, value in given.items() if value is not None},
                    ), _CONNECT_TIMEOUT_S)
                try:
                    self._client = await connection.start_sftp_client()
                except BaseException:
                    connection.abort()
                    raise
                self._connection = connection
            return self._client

    def _drop(self, client: asyncssh.SFTPClient) -> None:
        if client is self._client:
            if self._connection is not None:
                self._connection.abort()
            self._client = self._connection = None

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._connecting = asyncio.Lock()
                # A daemon: it must not keep a process alive whose work is done.
                threading.Thread(target=self._loop.run_forever, name="sftp", daemon=True).start()
            return self._loop

    @contextlib.contextmanager
    def _own_files(self) -> Iterator[None]:
        """Raise StorageRefused for a file of this host that connecting needs and that is missing or wrong.

        What the network and the server raise goes through: it has no file's name.
        """
        try:
            yield
        except asyncssh.KeyImportError:
            raise
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOENT and error.filename is None:
                raise
            known_hosts = self._place.known_hosts or "~/.ssh/known_hosts"
            raise StorageRefused(
                f"The storage {self.address} can't be reached as this host is set up ({error}).",
                f"put that right (~/.ssh/config, {known_hosts}, the key), then: {self._by_hand}") from error

    @property
    def _by_hand(self) -> str:
        return f"sftp {self._place.user or '$USER'}@{self._place.host}"

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except _NOT_THERE as error:
            raise FileNotFoundError(what) from error
        except (FileNotFoundError, FileExistsError):
            raise
        except (asyncssh.SFTPPermissionDenied, asyncssh.SFTPWriteProtect, *_WHY_REFUSED) as error:
            raise StorageRefused(
                f"The storage {self.address} refuses ({error}): {what}.",
                f"{self._by_hand}   # does it let you in?",
            ) from error
        except (asyncssh.SFTPNoSpaceOnFilesystem, asyncssh.SFTPQuotaExceeded) as error:
            raise self._full(what) from error
        except asyncssh.SFTPFailure as error:
            # Version 3 has no number for "no space left".
            if self._has_no_room():
                raise self._full(what) from error
            raise self._lost(what, str(error)) from error
        except (asyncssh.Error, OSError, TimeoutError) as error:
            raise self._lost(what, str(error) or type(error).__name__) from error

    def _has_no_room(self) -> bool:
        async def call(client: asyncssh.SFTPClient) -> bool:
            facts = await client.statvfs(self._path(""))
            return (facts.bavail or 0) == 0 or (facts.favail == 0 and (facts.files or 0) > 0)

        try:
            asked = self._call(call, CALL_TIMEOUT_S)
            return asyncio.run_coroutine_threadsafe(asked, self._started()).result(CALL_TIMEOUT_S)
        except (asyncssh.Error, OSError, TimeoutError, StorageRefused):
            return False

    def _full(self, what: str) -> StorageFull:
        return StorageFull(f"The storage {self.address} is full: {what}. What was stored before is whole.",
                           "free some space there, then run again")

    def _lost(self, what: str, why: str) -> StorageLost:
        return StorageLost(
            f"The storage {self.address} failed ({why}): {what}. What was stored before is whole.",
            f"{self._by_hand}   # then run again")


class _SftpFile:
    """See OpenFile."""

    def __init__(self, path: str, file: asyncssh.SFTPClientFile, run: _Run) -> None:
        self._path = path
        self._file = file
        self._run = run

    def size_bytes(self) -> int:
        """See OpenFile."""
        return self._run(f"looking at {self._path}", lambda _: self._file.stat()).size or 0

    def read_into(self, buffer: memoryview, offset_bytes: int) -> int:
        """See OpenFile."""
        wanted = len(buffer)
        content = bytes(self._run(
            f"reading {self._path}", lambda _: self._file.read(wanted, offset_bytes)))  # type: ignore[arg-type]
        buffer[: len(content)] = content
        return len(content)

    def write(self, data: memoryview | bytes, offset_bytes: int) -> None:
        """See OpenFile."""
        kept = bytes(data)  # the buffer is the caller's again on return, whatever the loop still holds
        self._run(f"writing {self._path}", lambda _: self._file.write(kept, offset_bytes))

    def truncate(self, size_bytes: int) -> None:
        """See OpenFile."""
        self._run(f"writing {self._path}", lambda _: self._file.truncate(size_bytes))

    def sync(self) -> None:
        """See OpenFile."""
        async def call(_client: asyncssh.SFTPClient) -> None:
            with contextlib.suppress(asyncssh.SFTPOpUnsupported):
                await self._file.fsync()

        self._run(f"making {self._path} durable", call)

    def close(self) -> None:
        """See OpenFile."""
        with contextlib.suppress(StorageLost):  # it is closed then, too
            self._run(f"closing {self._path}", lambda _: self._file.close())


def _is_file(facts: asyncssh.SFTPAttrs) -> bool:
    return facts.permissions is None or stat_bits.S_ISREG(facts.permissions)
