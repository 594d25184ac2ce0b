"""The storages that the contract in test_storage.py is for. A new driver adds a line to DRIVERS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stillframe.clock import SystemClock
from stillframe.storage.local import LocalStorage
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.model import Storage
from stillframe.storage.publish import rename_without_replacing
from stillframe.storage.wrappers import Counted, RateLimited, Retried

#: Returns one more client of the same storage, as another host would have it.
Connect = Callable[[], Storage]


def _local(folder: Path) -> Connect:
    LocalStorage(folder / "repository", make=True)
    return lambda: LocalStorage(folder / "repository")


def _local_without_links(folder: Path) -> Connect:
    LocalStorage(folder / "repository", make=True)
    return lambda: LocalStorage(folder / "repository", ways=(rename_without_replacing,))


def _memory(_folder: Path) -> Connect:
    storage = MemoryStorage()
    return lambda: storage


def _retried(folder: Path) -> Connect:
    connect = _local(folder)
    return lambda: Retried(connect(), SystemClock())


def _counted(folder: Path) -> Connect:
    connect = _local(folder)
    return lambda: Counted(connect(), SystemClock())


def _limited(folder: Path) -> Connect:
    connect = _local(folder)
    return lambda: RateLimited(connect(), SystemClock(), write_bytes_per_s=1e12, read_bytes_per_s=1e12)


#: Given an empty folder for whatever it needs, makes a storage without objects.
DRIVERS: dict[str, Callable[[Path], Connect]] = {
    "local": _local,
    "local-without-links": _local_without_links,
    "memory": _memory,
    "retried": _retried,
    "counted": _counted,
    "limited": _limited,
}
