"""The servers of a booted guest's disks: where their sockets are, starting them, and finding those that run.

A server is known by its command line, which names a folder that only this guest's disk has. So nobody has to
have written down a process number, and none can be wrong.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stillframe import process
from stillframe.block.image import ImagePlace, nbd_place
from stillframe.clock import Clock
from stillframe.errors import BootFailed
from stillframe.hypervisor.model import BOOT_SOCKETS
from stillframe.repository.opened import Repository
from stillframe.restore.boot_record import BootDisk, BootRecord, BootStore
from stillframe.restore.export import Export, Serving, end_export, start_export
from stillframe.restore.export_order import CACHE_BYTES, Order, order_for
from stillframe.units import MIB

_LEAST_CACHE_BYTES = 64 * MIB
_FOLDER_MODE = 0o711  # passed through by QEMU's user, listed by nobody
_SOCKET_MODE = 0o600


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom QEMU runs as."""

    uid: int
    gid: int


def socket_of(uuid: str, target: str) -> str:
    """Return the path of a disk's socket. It is far shorter than the 107 bytes that a socket's may have."""
    return str(BOOT_SOCKETS / uuid / target)


def served_place(disk: BootDisk) -> ImagePlace:
    """Return the place of what is served for a disk."""
    return nbd_place("raw", socket=disk.socket, export=disk.target)


def find_server(store: BootStore, record: BootRecord, disk: BootDisk) -> Export | None:
    """Return the server of a disk that runs, None if none does."""
    folder = _folder(store, record, disk)
    pid_file = os.fsencode(folder / "pid")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue  # it ended just now
        if words[0].endswith(b"nbdkit") and pid_file in words:
            pid = int(path.parent.name)
            mark = process.start_mark(pid)
            if mark:
                return Export(disk.target, "", disk.socket, pid, mark, str(folder / "log"))
    return None


def serve(
    store: BootStore, record: BootRecord, disk: BootDisk, repository: Repository, owner: Owner | None,
    clock: Clock,
) -> Export:
    """Start a disk's server, which outlives this process. Raises ExportFailed, ProgramMissing, BootFailed."""
    folder = _folder(store, record, disk)
    socket = Path(disk.socket)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for each in (BOOT_SOCKETS, socket.parent):
            each.mkdir(exist_ok=True)
            each.chmod(_FOLDER_MODE)
    except OSError as error:
        raise BootFailed(f"The folder for the socket {socket} can't be made: {error}.",
                         f"ls -ld {BOOT_SOCKETS}") from error
    order = boot_order(store, record.origin, repository, disk, len(record.disks), record.patience_s)
    export = start_export(order, folder, clock, Serving(socket=disk.socket))
    hand_over(disk, owner)
    return export


def boot_order(
    store: BootStore, origin: str, repository: Repository, disk: BootDisk, disks: int, patience_s: float,
) -> Order:
    """Return what a server of one of so many disks is told: it learns what the guest *origin* reads first."""
    return msgspec.structs.replace(
        order_for(repository, disk.target, disk.content),
        cache_bytes=max(_LEAST_CACHE_BYTES, CACHE_BYTES // disks), patience_s=patience_s,
        trace=str(store.order_of_boot(origin, disk.target)))


def hand_over(disk: BootDisk, owner: Owner | None) -> None:
    """Let whom QEMU runs as, and nobody else, connect to a disk's server."""
    if owner is not None:
        os.chown(disk.socket, owner.uid, owner.gid)
    os.chmod(disk.socket, _SOCKET_MODE)


def end_servers(store: BootStore, record: BootRecord, clock: Clock) -> None:
    """End all of a guest's servers, and remove their sockets."""
    for disk in record.disks:
        found = find_server(store, record, disk)
        if found is not None:
            end_export(found, clock)
    shutil.rmtree(BOOT_SOCKETS / record.uuid, ignore_errors=True)


def log_of(store: BootStore, record: BootRecord, disk: BootDisk) -> list[str]:
    """Return what a disk's server said last: what it could not read, and why."""
    export = Export(disk.target, "", disk.socket, 0, "", str(_folder(store, record, disk) / "log"))
    return export.said().splitlines()


def _folder(store: BootStore, record: BootRecord, disk: BootDisk) -> Path:
    return store.folder(record.uuid) / disk.target
