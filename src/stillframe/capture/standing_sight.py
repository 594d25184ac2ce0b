"""Looking at the chains of a run whose overlays stay: base ← lower ← overlay."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from stillframe.block.image import file_place
from stillframe.block.tools import image_info
from stillframe.capture.decide import DiskSight, FileSeen, JobSeen
from stillframe.capture.journal import DiskRecord, RunRecord
from stillframe.capture.neighbours import other_users
from stillframe.capture.sight import (
    base_file,
    intact,
    overlay_file,
    qemu_job,
    same_file,
    seen_by_qemu,
    seen_file,
    seen_in,
)
from stillframe.capture.standing_decide import LowerSight, LowerView, Named
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import DomainView, DomainXml, QemuJob
from stillframe.process import boot_id


def look_lower(record: RunRecord, domain: Guest, complete: Mapping[str, bool]) -> LowerView:
    """Return what is to be seen of the run's domain, chains and files right now.

    *complete*: by target, what comparisons and offline commits have shown. Raises HypervisorError,
    NoHypervisor, ProgramFailed, ProgramTimedOut.
    """
    view = domain.view()
    same_boot = record.boot_id == boot_id()
    disks = tuple(_look_at(disk, same_boot, view, complete) for disk in record.disks)
    paths = {
        record.disk(disk.top.target).lower_path for disk in disks
        if disk.lower is FileSeen.OURS and record.disk(disk.top.target).lowered
    }
    users = other_users(domain, paths) if paths else {}
    disks = tuple(
        _with_user(disk, users.get(record.disk(disk.top.target).lower_path, "")) for disk in disks)
    return LowerView(view.power, disks, managed_save=view.managed_save, same_boot=same_boot)


def header_backing(known: DiskRecord) -> str:
    """Return the name of the image below the overlay, as the overlay's own header has it."""
    return image_info(file_place(known.overlay_path, "qcow2")).backing


def lower_job(view: DomainView, known: DiskRecord) -> QemuJob | None:
    """Return QEMU's job that commits the older overlay, None if it runs none."""
    if view.qemu is None or not known.lower_path:
        return None
    return qemu_job(view.qemu, known.target, _lower(known))


def _lower(known: DiskRecord) -> DiskRecord:
    return msgspec.structs.replace(
        known, overlay_path=known.lower_path, overlay_identity=known.lower_identity)


def _with_user(disk: LowerSight, user: str) -> LowerSight:
    return LowerSight(disk.top, disk.named, disk.lower, disk.complete, disk.leaked, user) if user else disk


def _look_at(
    known: DiskRecord, same_boot: bool, view: DomainView, complete: Mapping[str, bool]
) -> LowerSight:
    base_now, base_present = base_file(known, same_boot)
    named = _named(known, view)
    overlay_now = overlay_file(known)
    top = DiskSight(
        target=known.target,
        qemu=seen_by_qemu(known, view.qemu),
        live=seen_in(known, view.live),
        inactive=seen_in(known, view.inactive),
        job=_job(known, view),
        overlay=FileSeen.ABSENT if overlay_now is None else (
            FileSeen.OURS if known.overlay_identity is None
            or same_file(known.overlay_path, overlay_now, known.overlay_identity, same_boot)
            else FileSeen.OTHER),
        base_present=base_present,
        base_intact=intact(known, base_now),
    )
    lower = _lower(known)
    return LowerSight(
        top, named,
        lower=seen_file(lower, overlay_file(lower), same_boot) if known.lower_path else FileSeen.ABSENT,
        complete=complete.get(known.target),
        leaked=_leaked(known, view) if Named.QEMU not in named else (),
    )


def _named(known: DiskRecord, view: DomainView) -> frozenset[Named]:
    if not known.lower_path:
        return frozenset()
    found = set()
    in_qemu = None if view.qemu is None else view.qemu.disks.get(known.target)
    if in_qemu is not None and known.lower_path in in_qemu.files:
        found.add(Named.QEMU)
    if _in_chain(known, view.live):
        found.add(Named.LIVE)
    if _in_chain(known, view.inactive):
        found.add(Named.INACTIVE)
    if overlay_file(known) is not None and header_backing(known) == known.lower_path:
        found.add(Named.HEADER)
    return frozenset(found)


def _in_chain(known: DiskRecord, xml: DomainXml | None) -> bool:
    disk = None if xml is None else xml.disks.get(known.target)
    return disk is not None and known.lower_path in (source.place for source in disk.chain)


def _job(known: DiskRecord, view: DomainView) -> JobSeen:
    disk = None if view.live is None else view.live.disks.get(known.target)
    if disk is None or view.qemu is None:
        return JobSeen.NONE
    job = lower_job(view, known)
    if disk.mirror is not None:
        return JobSeen.FOREIGN
    in_libvirt = known.target in (view.jobs or {})
    if job is not None:
        return JobSeen.COMMITTING if in_libvirt else JobSeen.STRAY
    # A job on the disk that QEMU shows no more is over, and libvirt is about to notice.
    return JobSeen.COMMITTING if in_libvirt else JobSeen.NONE


def _leaked(known: DiskRecord, view: DomainView) -> tuple[str, ...]:
    if view.qemu is None or not known.lower_path or lower_job(view, known) is not None:
        return ()
    return tuple(node.name for node in view.qemu.nodes if node.file == known.lower_path)
