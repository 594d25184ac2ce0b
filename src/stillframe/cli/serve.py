"""`stillframe serve`: a snapshot's disks as NBD exports, until a signal comes."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import msgspec

from stillframe.cli.restore import chosen_disks, split_name
from stillframe.cli.session import Session
from stillframe.cli.snapshots import find, name_body
from stillframe.errors import EXIT_OK, ExportExposed, ExportFailed, TargetExists
from stillframe.repository.catalog import display_name
from stillframe.repository.held import held_snapshot
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import DiskEntry
from stillframe.restore.export import Export, Serving, Tcp, exported
from stillframe.restore.export_order import CACHE_BYTES, Order, order_for
from stillframe.units import size_text

_LOOK_EVERY_S = 0.2
#: <sys/un.h>: what fits into a socket's address, its last zero left out.
_SOCKET_CHARACTERS = 107


@dataclass(frozen=True)
class Wish:
    """What is to be served, and how. *name* is SNAPSHOT or SNAPSHOT:DISK; *cache_bytes* is for each disk."""

    name: str
    serving: Serving
    cache_bytes: int = CACHE_BYTES


def serve(session: Session, wish: Wish) -> int:
    """Serve until a signal comes; return the exit code."""
    _check_place(wish)
    text, target = split_name(wish.name)
    name = find(session, text)
    with held_snapshot(session.repository, name, session.clock, session.host) as manifest:
        return _served(session, wish, name, chosen_disks(manifest, target, display_name(name)))


def _served(session: Session, wish: Wish, name: SnapshotName, disks: Sequence[DiskEntry]) -> int:
    if len(disks) > 1 and (wish.serving.socket or wish.serving.tcp):
        raise ExportFailed(
            f"{display_name(name)} has {len(disks)} disks, and a socket or a port is for one of them.",
            f"stillframe serve {wish.name}:{disks[0].target} --repo REPO   # with the same options")
    with session.signals_as_stop("clients lose their connection"), contextlib.ExitStack() as stack:
        exports = [stack.enter_context(exported(_order(session, disk, wish), session.clock, wish.serving))
                   for disk in disks]
        _tell(session, disks, exports)
        session.screen.json({
            "snapshot": name_body(name), "writable": wish.serving.writable,
            "exports": [{"target": export.name, "size_bytes": disk.size_bytes, **asdict(export)}
                        for disk, export in zip(disks, exports, strict=True)],
        })
        _stay(session, exports)
    return EXIT_OK


def _order(session: Session, disk: DiskEntry, wish: Wish) -> Order:
    return msgspec.structs.replace(
        order_for(session.repository, disk.target, disk), cache_bytes=wish.cache_bytes)


def _tell(session: Session, disks: Sequence[DiskEntry], exports: Sequence[Export]) -> None:
    for disk, export in zip(disks, exports, strict=True):
        session.screen.result(f"{disk.target}: {export.uri}")
        session.screen.say(f"{disk.target} ({size_text(disk.size_bytes)}) is served until Ctrl-C")


def _stay(session: Session, exports: Sequence[Export]) -> None:
    """Show what servers say, until a signal comes. Raises ExportFailed if one ends by itself."""
    seen = dict.fromkeys((export.log for export in exports), 0)
    while session.stop() is None:
        session.clock.pause(_LOOK_EVERY_S)
        for export in exports:
            running = export.is_running
            lines, seen[export.log] = export.said_since(seen[export.log])
            for line in lines:
                session.screen.warn(line)
            if not running and session.stop() is None:
                raise ExportFailed(f"The server for {export.name} ended by itself. {export.said()}".strip(),
                                   "dmesg | tail   # was it killed? Then run the same command again")


def _check_place(wish: Wish) -> None:
    """Refuse a place where a disk must not or can't be served. Raises ExportExposed, TargetExists."""
    tcp, socket = wish.serving.tcp, wish.serving.socket
    if tcp is not None and not tcp.is_encrypted and not _is_loopback(tcp.address):
        raise ExportExposed(
            f"Whoever reaches port {tcp.port} could read the disk: "
            + (f"{tcp.address} is no loopback address" if tcp.address else "it listens at all addresses")
            + ", and there is no TLS.",
            "add --address 127.0.0.1, or --tls-certificates DIR, or --tls-psk FILE")
    if socket and os.path.lexists(socket):
        raise TargetExists(f"{socket} exists.", f"fuser -v {socket}   # choose another path, or remove it")
    if len(os.fsencode(socket)) > _SOCKET_CHARACTERS:
        raise ExportFailed(f"The path of the socket is longer than {_SOCKET_CHARACTERS} bytes: {socket}",
                           "choose a shorter one: --socket /run/disk.sock")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def tcp_place(port: int | None, address: str | None, certificates: str | None, psk: str | None) -> Tcp | None:
    """Return the port to listen at, None if none was named. Raises ValueError if options contradict."""
    if port is None:
        if address or certificates or psk:
            raise ValueError("--address, --tls-certificates and --tls-psk go with --port")
        return None
    if certificates and psk:
        raise ValueError("choose one: --tls-certificates or --tls-psk")
    return Tcp(port, address or "", os.path.abspath(certificates) if certificates else "",
               os.path.abspath(psk) if psk else "")
