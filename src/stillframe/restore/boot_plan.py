"""What a boot is going to make, decided before anything is made; all that is in the way is named here."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from stillframe.capture.growth import free_bytes
from stillframe.clock import utc_text
from stillframe.errors import NotPermitted, TargetSmall
from stillframe.repository.catalog import display_name
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import Content, Manifest
from stillframe.repository.opened import Repository
from stillframe.restore.boot import BootPlan
from stillframe.restore.boot_record import PATIENCE_S, BootDisk, BootRecord, BootState
from stillframe.restore.boot_server import socket_of
from stillframe.restore.boot_steps import BootTools
from stillframe.restore.boot_xml import policies_of, with_policies, with_snapshot
from stillframe.restore.guest_plan import GuestWish, PlannedDisk, plan_guest
from stillframe.units import MIB, size_text

#: What the file system of the overlays must have free: a guest that can't write is paused at once.
_LEAST_FREE_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True)
class BootWish:
    """What a user asked for. *guest* is as for a restore to a new guest, for the rest see BootRecord."""

    guest: GuestWish
    pauses: bool = True
    patience_s: float = PATIENCE_S


def plan_boot(
    repository: Repository, snapshot: SnapshotName, manifest: Manifest, wish: BootWish, tools: BootTools,
) -> BootPlan:
    """Return the plan. Changes nothing.

    Raises what plan_guest and GuestPlan.check do, GuestExists, TargetSmall.
    """
    if os.geteuid() != 0:
        raise NotPermitted(
            "Only root can hand sockets and images over to QEMU's user.", "run stillframe as root")
    name = wish.guest.name
    plan = plan_guest(manifest, wish.guest, tools.connection, None, random.SystemRandom())
    uuid = plan.claim.uuid
    tools.store.refuse_known(name, uuid)
    plan.check(room=False)
    disks = tuple(_disk(disk, uuid, plan.original) for disk in plan.disks)
    free = _check_room(disks)
    own = tuple(folder for folder in plan.claim.folders if uuid in Path(folder).parts)
    record = BootRecord(
        uuid=uuid, name=name, uri=tools.connection.uri, address=repository.address,
        snapshot=display_name(snapshot), sid=snapshot.sid, origin=manifest.uuid, state=BootState.PLANNED,
        began_at=utc_text(tools.clock.now()), pauses=wish.pauses, patience_s=wish.patience_s, disks=disks,
        files=tuple(target.path for target in plan.files), folders=own)
    definition = with_policies(with_snapshot(plan.definition, disks), disks, pauses=wish.pauses)
    warnings = (*plan.warnings, *(each.text for each in plan.findings))
    return BootPlan(record, definition, repository, plan.claim.folders, plan.files, free, warnings)


def _disk(disk: PlannedDisk, uuid: str, original: str) -> BootDisk:
    entry = disk.entry
    return BootDisk(
        target=entry.target, overlay_path=os.path.realpath(disk.wishes.path),
        socket=socket_of(uuid, entry.target), content=Content(size_bytes=entry.size_bytes, root=entry.root),
        data_bytes=entry.data_bytes, policies=policies_of(original, entry.target))


def _check_room(disks: tuple[BootDisk, ...]) -> int:
    """Return what is free where the overlays go. Raises TargetSmall."""
    least = 0
    for folder in {os.path.dirname(disk.overlay_path) for disk in disks}:
        there = folder if os.path.isdir(folder) else os.path.dirname(folder)
        free = free_bytes(there)
        if free < _LEAST_FREE_BYTES:
            raise TargetSmall(
                f"{folder} has {size_text(free)} free; what the guest writes goes there, and it needs at "
                f"least {size_text(_LEAST_FREE_BYTES)}.", "choose another folder: --pool DIR")
        least = min(least, free) if least else free
    return least
