"""Where a booted guest's disks are to land, decided before anything is done; what is in the way is named."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from stillframe.capture.growth import allocated_bytes, free_bytes
from stillframe.errors import (
    DestinationUnwritable,
    GuestShutOff,
    GuestState,
    TargetExists,
    TargetSmall,
)
from stillframe.restore.boot_decide import BootSight, BootStep, Stand, decide_boot
from stillframe.restore.boot_record import BootDisk, BootRecord, Copy
from stillframe.restore.boot_steps import BootTools, attention
from stillframe.restore.guest_plan import pool_folder
from stillframe.units import MIB, size_text

_RESERVE_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class LandWish:
    """What a user asked for. *pool*: a folder or a pool of libvirt, "" for where the disks are to be anyway.

    *format* is "raw" or "qcow2" with a pool, "" for that of the overlays.
    """

    pool: str = ""
    format: str = ""


@dataclass(frozen=True, slots=True)
class Landing:
    """One disk that has not landed yet: the image that it ends in, and how much of that is missing, at least.

    *copy* is that image, None if it is the overlay.
    """

    target: str
    path: str
    copy: Copy | None
    missing_bytes: int

    def words(self) -> str:
        """Return what would be done, in words."""
        how = "copied to" if self.copy is not None else "pulled into"
        return f"{self.target} would be {how} {self.path}: at least {size_text(self.missing_bytes)}"


def plan_landing(
    record: BootRecord, sight: BootSight, wish: LandWish, tools: BootTools,
) -> tuple[Landing, ...]:
    """Return how each disk lands that has not: first those that do so where they are. Changes nothing.

    Raises GuestShutOff, NeedsAttention, DestinationUnwritable, TargetExists, TargetSmall.
    """
    if not sight.power.has_qemu:
        raise GuestShutOff(f"{record.name} is {sight.power.value}; a guest lands while it runs.",
                           f"virsh start {record.name}")
    decision = decide_boot(record, sight)
    if decision.step is BootStep.ASK:
        raise attention(record, decision)
    folder = os.path.realpath(pool_folder(tools.connection, wish.pool)) if wish.pool else ""
    if folder and not os.path.isdir(folder):
        raise DestinationUnwritable(f"The folder {folder} does not exist.", f"mkdir -p {folder}")
    # One that landed can have been started on the snapshot again: by a definition that named it still.
    opened = {disk.target for disk in sight.disks if disk.running is Stand.SNAPSHOT}
    waiting = [disk for disk in record.disks if not disk.landed or disk.target in opened]
    landings = sorted((_landing(record, disk, folder, wish.format) for disk in waiting),
                      key=lambda each: each.copy is not None)
    _check_room(record.name, landings)
    return tuple(landings)


def _landing(record: BootRecord, disk: BootDisk, folder: str, image_format: str) -> Landing:
    copy = _wanted(record, disk, folder, image_format) if folder and not disk.landed else disk.copy
    held_bytes = allocated_bytes(disk.overlay_path)
    if copy is None:
        return Landing(disk.target, disk.overlay_path, None, max(0, disk.data_bytes - held_bytes))
    if not copy.is_ours() and os.path.lexists(copy.path):
        raise TargetExists(f"{copy.path} exists.", "choose another folder with --pool", GuestState.OVERLAID)
    there_bytes = allocated_bytes(copy.path) if copy.is_ours() else 0
    return Landing(
        disk.target, copy.path, copy, max(0, max(disk.data_bytes, held_bytes) - there_bytes))


def _wanted(record: BootRecord, disk: BootDisk, folder: str, image_format: str) -> Copy | None:
    """Return what a disk is copied to so that it ends in *folder*, None if its overlay is that image."""
    image_format = image_format or "qcow2"
    if folder == os.path.dirname(disk.overlay_path) and image_format == "qcow2":
        return None
    suffix = "qcow2" if image_format == "qcow2" else "img"
    path = os.path.join(folder, f"{record.name}-{disk.target}.{suffix}")
    if disk.copy is not None and (disk.copy.path, disk.copy.format) == (path, image_format):
        return disk.copy
    return Copy(path=path, format=image_format)


def _check_room(name: str, landings: Iterable[Landing]) -> None:
    needed: dict[int, int] = {}
    for landing in landings:
        folder = os.path.dirname(landing.path)
        device = os.stat(folder).st_dev
        needed[device] = needed.get(device, _RESERVE_BYTES) + landing.missing_bytes
        free = free_bytes(folder)
        if free < needed[device]:
            raise TargetSmall(
                f"{folder} has {size_text(free)} free, and {name} needs at least "
                f"{size_text(needed[device])} to land there.", f"df {folder}", GuestState.OVERLAID)
