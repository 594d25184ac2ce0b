"""The storages that the contract in test_storage.py is for. A new driver adds a line to DRIVERS."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from lab.s3 import BUCKET, S3Server
from lab.sftp import SftpDaemon
from lab.smb import SmbDaemon
from stillframe.clock import SystemClock
from stillframe.storage.files import FileStorage
from stillframe.storage.local import LocalStorage
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.model import Storage
from stillframe.storage.publish import rename_without_replacing
from stillframe.storage.s3 import S3Storage
from stillframe.storage.sftp import SftpServer
from stillframe.storage.smb import SmbServer
from stillframe.storage.wrappers import Counted, RateLimited, Retried, TimeLimited


class Servers:
    """Real servers on loopback, each started when it is first asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._numbers = itertools.count(1)

    @cached_property
    def s3(self) -> S3Server:
        return self._stack.enter_context(S3Server(self._folder / "s3"))

    @cached_property
    def sftp(self) -> SftpDaemon:
        return self._stack.enter_context(SftpDaemon(self._folder / "sftp"))

    @cached_property
    def smb(self) -> SmbDaemon:
        return self._stack.enter_context(SmbDaemon(self._folder / "smb"))

    @property
    def unused(self) -> str:
        """A name that no other test was given."""
        return f"test-{next(self._numbers)}"


#: Returns one more client of the same storage, as another host would have it.
Connect = Callable[[], Storage]
#: Given an empty folder for whatever it needs, and the servers, makes a storage without objects.
Make = Callable[[Path, Servers], Connect]


def _local(folder: Path, _servers: Servers) -> Connect:
    LocalStorage(folder / "repository", make=True)
    return lambda: LocalStorage(folder / "repository")


def _local_without_links(folder: Path, _servers: Servers) -> Connect:
    LocalStorage(folder / "repository", make=True)
    return lambda: LocalStorage(folder / "repository", ways=(rename_without_replacing,))


def _memory(_folder: Path, _servers: Servers) -> Connect:
    storage = MemoryStorage()
    return lambda: storage


def _retried(folder: Path, servers: Servers) -> Connect:
    connect = _local(folder, servers)
    return lambda: Retried(connect(), SystemClock())


def _counted(folder: Path, servers: Servers) -> Connect:
    connect = _local(folder, servers)
    return lambda: Counted(connect(), SystemClock())


def _limited(folder: Path, servers: Servers) -> Connect:
    connect = _local(folder, servers)
    return lambda: RateLimited(connect(), SystemClock(), write_bytes_per_s=1e12, read_bytes_per_s=1e12)


def _timed(folder: Path, servers: Servers) -> Connect:
    connect = _local(folder, servers)
    return lambda: TimeLimited(connect(), 60.0)


def _s3(_folder: Path, servers: Servers) -> Connect:
    access, prefix = servers.s3.access, servers.unused
    return lambda: S3Storage(BUCKET, prefix, access)


def _sftp(_folder: Path, servers: Servers) -> Connect:
    place = servers.sftp.place(servers.unused)
    FileStorage(SftpServer(place), make=True)
    return lambda: FileStorage(SftpServer(place))


def _smb(_folder: Path, servers: Servers) -> Connect:
    place, access = servers.smb.place(servers.unused), servers.smb.access
    FileStorage(SmbServer(place, access, SystemClock()), make=True)
    return lambda: FileStorage(SmbServer(place, access, SystemClock()))


DRIVERS: dict[str, Make] = {
    "local": _local,
    "local-without-links": _local_without_links,
    "memory": _memory,
    "retried": _retried,
    "counted": _counted,
    "timed": _timed,
    "limited": _limited,
    "s3": _s3,
    "sftp": _sftp,
    "smb": _smb,
}
