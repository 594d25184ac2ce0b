"""What a restore in place is going to do, and all that speaks against it, before anything is touched."""

from __future__ import annotations

import os
import random
import stat
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from stillframe.block.image import ImageKind, ImagePlace, block_place, file_place
from stillframe.block.tools import ImageInfo, image_info
from stillframe.capture.journal import DiskRecord, Journal
from stillframe.capture.offline_plan import make_offline_plan
from stillframe.capture.plan import Wishes
from stillframe.capture.restoring import RestorePhase, Restoring, RestoringDisk, attention
from stillframe.clock import Clock, utc_text
from stillframe.errors import (
    ForeignSnapshot,
    GuestBusy,
    GuestState,
    GuestUnfit,
    GuestUnknown,
    NeedsAttention,
    Refused,
    TargetInUse,
    TargetSmall,
)
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import DomainView, DomainXml, Power
from stillframe.repository.manifest import DiskEntry, Manifest
from stillframe.restore.definition_in_place import definition_in_place
from stillframe.restore.known import Known, known_disks
from stillframe.restore.protect import is_marked
from stillframe.units import size_text


@dataclass(frozen=True, slots=True)
class InPlaceWish:
    """What is to be restored: *disks* of *manifest*, all of them if *whole*, from the repository there.

    *name* is the snapshot's for people. *with_definition*: its definition takes the place of the guest's.
    """

    manifest: Manifest
    name: str
    repository: str
    disks: tuple[DiskEntry, ...]
    whole: bool
    with_definition: bool = False

    def again(self, target: str = "") -> str:
        """Return the command for this snapshot, or for one disk of it."""
        disk = target or ("" if self.whole else self.disks[0].target)
        name = self.manifest.sid[:12] + (f":{disk}" if disk else "")
        return f"stillframe restore {name} --in-place --repo REPO"


def refuse_busy(domain: Guest, journal: Journal, wish: InPlaceWish) -> None:
    """Raise what stands against a restore in place of the guest, be it on or off."""
    name = domain.name
    left = journal.open_runs(domain.uuid)
    if left:
        raise Refused(f"A run of {name} ended while {left[0].state.value} and was not recovered.",
                      f"stillframe recover {name}")
    if journal.standing(domain.uuid) is not None:
        raise GuestUnfit(f"{name} stands on overlays of stillframe, which hold what its images lack.",
                         f"stillframe settle {name}   # then run the command again")
    view = domain.view()
    if view.power is Power.GONE:
        raise GuestUnknown(f"There is no guest called {name} any more.", domain.advice.guests)
    if view.power is Power.HIDDEN:
        raise NeedsAttention(f"libvirt takes {name} for shut off, but its QEMU still runs.",
                             f"stillframe recover {name}", GuestState.UNKNOWN)
    if view.inactive is None:
        raise GuestUnfit(f"{name} is transient: it is gone once it is off.",
                         f"virsh dumpxml {name} > {name}.xml; virsh define {name}.xml")
    if view.managed_save:
        raise GuestUnfit(f"{name} is saved with its memory, which goes with the disks as they are.",
                         f"virsh managedsave-remove {name}   # or start it; then {wish.again()}")
    holders = domain.snapshot_holders()
    if holders:
        raise ForeignSnapshot(
            f"{name} stands on the external snapshot {', '.join(holders)}, which stillframe did not make.",
            f"virsh snapshot-list {name}; commit and delete it, then run again")
    if view.domain_job:
        raise GuestBusy(f"Another job runs on {name}.", f"virsh domjobinfo {name}")


def refuse_unfit(domain: Guest, wish: InPlaceWish) -> None:
    """Raise what would stand against a restore of a guest that runs yet, once it is off."""
    _fitting(domain, replace(domain.view(), power=Power.OFF), wish)


def begin(
    domain: Guest, wish: InPlaceWish, clock: Clock, before: str = "", newest: Manifest | None = None,
) -> tuple[Restoring, Mapping[str, Known]]:
    """Return the record of a restore that has not begun yet, of a guest that is off; and what is known of it.

    *newest* is the last snapshot of the guest, which its checkpoint counts from.

    Changes nothing. Raises a Refused error that names what is in the way.
    """
    view = domain.view()
    if view.power is not Power.OFF or view.inactive is None:
        raise TargetInUse(
            f"{domain.name} is {view.power.value}; its disks can be restored in place only while it is off.",
            f"{wish.again()} --shutdown   # asks it to shut down; --force cuts its power")
    plan, definition = _fitting(domain, view, wish)
    restoring = Restoring(
        uuid=domain.uuid, name=domain.name, sid=wish.manifest.sid, snapshot=wish.name,
        repository=wish.repository, began_at=utc_text(clock.now()), phase=RestorePhase.PROTECTING,
        disks=tuple(_disk(record) for record in plan), whole=wish.whole, before=before,
        definition=definition)
    return restoring, known_disks(plan, newest, clock)


def go_on(found: Restoring, domain: Guest, wish: InPlaceWish) -> Restoring:
    """Return the record to go on with, of a restore that was broken off while images were being written.

    Another snapshot may take the place of the first: then all is compared again. Raises NeedsAttention.
    """
    if {disk.target for disk in found.disks} != {disk.target for disk in wish.disks}:
        raise attention(found)
    same = found.sid == wish.manifest.sid
    disks = tuple(msgspec.structs.replace(
        disk, done_bytes=disk.done_bytes if same and _is_there(disk) else 0) for disk in found.disks)
    definition = found.definition if same and not wish.with_definition else _definition(
        domain.view().inactive, wish)
    return msgspec.structs.replace(
        found, sid=wish.manifest.sid, snapshot=wish.name, repository=wish.repository, disks=disks,
        whole=wish.whole, definition=definition)


def _is_there(disk: RestoringDisk) -> bool:
    try:
        now = disk.meanwhile.identity()
    except OSError:
        return False
    return now is not None and disk.identity is not None and disk.identity.same_file(now)


def _fitting(domain: Guest, view: DomainView, wish: InPlaceWish) -> tuple[Sequence[DiskRecord], str]:
    """Return the guest's disks that fit the snapshot's, and the definition that it is to have, if any."""
    assert view.inactive is not None
    _refuse_other_disks(view.inactive, wish)
    plan = _planned(domain, view, {disk.target for disk in wish.disks}, wish)
    for record in plan:
        _refuse_size(domain, record, wish)
    return plan, _definition(view.inactive, wish)


def _refuse_other_disks(definition: DomainXml, wish: InPlaceWish) -> None:
    """Raise GuestUnfit if the guest has not got the disks, or would start without them."""
    missing = [disk.target for disk in wish.disks if disk.target not in definition.disks]
    if missing:
        there = ", ".join(definition.disks) or "none"
        raise GuestUnfit(
            f"{definition.name} has no disk {', '.join(missing)} that can be written to; it has {there}.",
            f"{wish.again('DISK')}   # one disk that both have; or virsh edit {definition.name}")
    chosen = [definition.disks[disk.target] for disk in wish.disks]
    for disk in chosen:
        if ET.fromstring(disk.top.xml).get("startupPolicy", "mandatory") != "mandatory":
            raise GuestUnfit(
                f"{definition.name} may start without {disk.target} (startupPolicy), so nothing would keep "
                "it from starting while that is restored.",
                f"virsh edit {definition.name}   # take startupPolicy out of the disk's source")
        if disk.top.kind == "file" and is_marked(os.path.realpath(disk.top.place)):
            raise NeedsAttention(
                f"{disk.top.place} is kept away for a restore in place that this state folder does not know.",
                f"ls -l {disk.top.place}*; run the command again with the --state-dir that it was begun with",
                GuestState.RESTORING)


def _planned(
    domain: Guest, view: DomainView, targets: set[str], wish: InPlaceWish
) -> Sequence[DiskRecord]:
    """Return the disks as an offline capture would read them, by the same refusals."""
    assert view.inactive is not None
    unsupported = (each.target for each in view.inactive.excluded if each.unsupported)
    others = tuple(each for each in (*view.inactive.disks, *unsupported) if each not in targets)
    try:
        return make_offline_plan(domain, view, Wishes(exclude=others)).disks
    except GuestUnfit as error:
        if "--exclude" in error.next_command:
            error.next_command = f"{wish.again('DISK')}   # the other disks, one at a time"
        raise


def _disk(record: DiskRecord) -> RestoringDisk:
    place = real_place(record.base)
    return RestoringDisk(
        target=record.target, place=place, source_xml=record.base_source_xml, source_kind=record.base_kind,
        source_format=record.base_format, identity=place.identity())


def real_place(place: ImagePlace) -> ImagePlace:
    """Return the place of a local image without links, as the file or device that it is. Raises OSError."""
    if place.kind is not ImageKind.FILE:
        return place
    path = os.path.realpath(place.path)
    make = block_place if stat.S_ISBLK(os.stat(path).st_mode) else file_place
    return replace(make(path, place.driver), beneath=place.beneath)


def _refuse_size(domain: Guest, record: DiskRecord, wish: InPlaceWish) -> None:
    """Raise TargetSmall, GuestUnfit if the image has another size and can't be given the snapshot's."""
    wanted = next(disk.size_bytes for disk in wish.disks if disk.target == record.target)
    if is_size(record.size_bytes, wanted):
        return
    sizes = (f"{record.target} of {domain.name} has {size_text(record.size_bytes)} ({record.size_bytes} "
             f"bytes), in the snapshot it has {size_text(wanted)} ({wanted} bytes)")
    if real_place(record.base).kind is not ImageKind.FILE:
        kind = TargetSmall if record.size_bytes < wanted else GuestUnfit
        raise kind(f"{sizes}; {record.base.text()} is no file that stillframe could resize.",
                   "give it that size (lvresize, rbd resize), then run the command again")
    problem = _why_not_resized(image_info(record.base))
    if problem:
        raise GuestUnfit(f"{sizes}, and its image can't be resized: {problem}.",
                         f"qemu-img info {record.base.text()}")


def is_size(image_bytes: int, disk_bytes: int) -> bool:
    """Return whether an image has the size of a disk: QEMU counts in sectors."""
    return image_bytes == -(-disk_bytes // 512) * 512


def _why_not_resized(image: ImageInfo) -> str:
    if image.internal_snapshots:
        return "it has internal snapshots"
    lost = [name for name, flags in image.bitmaps if "in-use" in flags]
    return f"its bitmap {lost[0]} was not closed well (qemu-img bitmap --remove)" if lost else ""


def _definition(now: DomainXml | None, wish: InPlaceWish) -> str:
    """Return the snapshot's definition for the guest that is defined as *now*, "" if it is not wanted.

    What names the images while they are restored is put right in the end.
    """
    if not wish.with_definition:
        return ""
    text = "" if now is None else definition_in_place(wish.manifest, now, random.SystemRandom())
    if not text:
        raise GuestUnfit(f"The snapshot {wish.name} has no definition.", f"{wish.again()}   # without it")
    return text
