"""What a boot is going to make, decided before anything is made; all that is in the way is named here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from stillframe.clock import utc_text
from stillframe.errors import TargetExists
from stillframe.repository.catalog import display_name
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import Content, DiskEntry, Manifest
from stillframe.repository.opened import Repository
from stillframe.restore.boot import BootPlan
from stillframe.restore.boot_record import PATIENCE_S, BootDisk, BootRecord, BootState
from stillframe.restore.boot_server import socket_of
from stillframe.restore.boot_steps import BootTools
from stillframe.restore.boot_xml import on_snapshot, policies_of


@dataclass(frozen=True, slots=True)
class BootWish:
    """What a user asked for. *pool* is the folder for the overlays. For the rest, see BootRecord."""

    name: str
    pool: Path | None
    pauses: bool = True
    patience_s: float = PATIENCE_S


def plan_boot(
    repository: Repository, snapshot: SnapshotName, manifest: Manifest, wish: BootWish, tools: BootTools,
) -> BootPlan:
    """Return the plan. Changes nothing."""
    uuid = str(uuid4())
    name = wish.name or f"{manifest.guest}-booted"
    definition = re.sub(r"<mac address=.*?/>", "", manifest.inactive_xml or manifest.live_xml)
    definition = re.sub(r"<uuid>.*?</uuid>", f"<uuid>{uuid}</uuid>", definition)
    definition = re.sub(r"<name>.*?</name>", f"<name>{name}</name>", definition)
    pool = wish.pool or Path("/var/lib/libvirt/images")
    disks = tuple(_disk(disk, uuid, definition, pool / f"{name}-{disk.target}.qcow2") for disk in manifest.disks)
    for disk in disks:
        if os.path.lexists(disk.overlay_path):
            raise TargetExists(f"{disk.overlay_path} exists.", "choose another name with --as, or --pool")
    record = BootRecord(
        uuid=uuid, name=name, uri=tools.connection.uri, address=repository.address,
        snapshot=display_name(snapshot), sid=snapshot.sid, origin=manifest.uuid, state=BootState.PLANNED,
        began_at=utc_text(tools.clock.now()), pauses=wish.pauses,
        patience_s=wish.patience_s, disks=disks)
    return BootPlan(record, on_snapshot(definition, disks, pauses=wish.pauses), repository, ())


def _disk(disk: DiskEntry, uuid: str, definition: str, path: Path) -> BootDisk:
    return BootDisk(
        target=disk.target, overlay_path=os.path.normpath(path), socket=socket_of(uuid, disk.target),
        content=Content(size_bytes=disk.size_bytes, root=disk.root), data_bytes=disk.data_bytes,
        policies=policies_of(definition, disk.target))
