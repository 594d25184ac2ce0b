"""Looking: from libvirt's two XMLs, QEMU's block graph and the files to a Sight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from stillframe.block.image import FileIdentity, file_identity, file_place
from stillframe.block.tools import holds_data, image_info
from stillframe.capture.decide import DiskSight, FileSeen, JobSeen, Seen, Sight, settled
from stillframe.capture.journal import DiskRecord, RunRecord, age_s
from stillframe.capture.neighbours import other_users
from stillframe.capture.states import DiskPhase, State
from stillframe.clock import Clock
from stillframe.errors import ProgramFailed, ProgramTimedOut
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import (
    ACTIVE_COMMIT,
    OWN_COMMIT,
    DomainView,
    DomainXml,
    QemuDisk,
    QemuJob,
    QemuView,
)
from stillframe.process import boot_id, start_mark


def look(
    record: RunRecord, domain: Guest, clock: Clock, compared: Mapping[str, bool],
    *, thaw_hopeless: bool = False,
) -> Sight:
    """Return what is to be seen of the run's domain, disks and files right now.

    *compared* holds the results of image comparisons made since the guest went off.
    Raises HypervisorError, NoHypervisor.
    """
    view = domain.view()
    disks = tuple(_look_at_disk(disk, record.boot_id == boot_id(), view, compared) for disk in record.disks)
    if not any(_in_use(disk) for disk in disks):
        disks = _with_other_users(record, domain, disks)
    pending = (
        record.state is State.SHUTTING_DOWN
        and age_s(clock, record.shutdown_begun_at) < record.shutdown_timeout_s
    )
    return Sight(
        view.power, disks, managed_save=view.managed_save, shutdown_pending=pending,
        same_qemu=record.qemu_mark in ("", qemu_mark(domain)),
        thaw_hopeless=thaw_hopeless,
    )


def drained(view: DomainView, record: RunRecord, targets: tuple[str, ...]) -> bool:
    """Return whether QEMU's commit of each target is ready and has nothing left to copy.

    Only while the CPUs stand still does this stay true. A commit that is over counts as drained.
    """
    if view.qemu is None:
        return False
    jobs = [qemu_job(view.qemu, target, record.disk(target)) for target in targets]
    return all(
        job is not None and (
            job.status == "concluded" or (job.status == "ready" and job.done == job.total))
        for job in jobs
    )


def ready_to_pivot(view: DomainView, record: RunRecord, targets: tuple[str, ...]) -> bool:
    """Return whether each target is drained, and libvirt, which is to pivot it, knows so."""
    disks = view.live.disks if view.live is not None else {}
    ready = all(
        target in disks and (mirror := disks[target].mirror) is not None and mirror.ready
        for target in targets
    )
    return ready and drained(view, record, targets)


def stray_job(view: DomainView, known: DiskRecord) -> str:
    """Return the name of QEMU's commit job on the disk's overlay, "" if there is none."""
    job = None if view.qemu is None else qemu_job(view.qemu, known.target, known)
    return "" if job is None else job.name


def qemu_mark(domain: Guest) -> str:
    """Return a text that tells the domain's QEMU process from any other; "" if none runs."""
    pid = domain.qemu_pid()
    return "" if pid is None else start_mark(pid)


def _look_at_disk(
    known: DiskRecord, same_boot: bool, view: DomainView, compared: Mapping[str, bool]
) -> DiskSight:
    base_now, base_present = base_file(known, same_boot)
    overlay_now = overlay_file(known)
    qemu, live, inactive = (
        seen_by_qemu(known, view.qemu), seen_in(known, view.live), seen_in(known, view.inactive)
    )
    if inactive is Seen.ABSENT:
        inactive = Seen.UNKNOWN  # plugged in for this boot alone: no definition names it, none will
    return DiskSight(
        target=known.target,
        qemu=qemu,
        live=live,
        inactive=inactive,
        job=_seen_job(known, view),
        overlay=seen_file(known, overlay_now, same_boot),
        base_present=base_present,
        base_intact=intact(known, base_now),
        base_newer=_newer(base_now, overlay_now),
        overlay_empty=_empty(known, overlay_now) if qemu is Seen.BASE else None,
        leaked_nodes=_leaked(known, view.qemu) if qemu is Seen.BASE else (),
        equal=None if view.power.has_qemu else compared.get(known.target),
    )


def seen_by_qemu(known: DiskRecord, qemu: QemuView | None) -> Seen:
    """Return which image QEMU uses for the disk."""
    disk: QemuDisk | None = None if qemu is None else qemu.disks.get(known.target)
    if disk is None or not disk.files:
        return Seen.UNKNOWN
    return _which(known, disk.files[0] == known.base_qemu_file, disk.files)


def seen_in(known: DiskRecord, xml: DomainXml | None) -> Seen:
    """Return which image an XML names for the disk."""
    if xml is None:
        return Seen.UNKNOWN
    disk = xml.disks.get(known.target)
    if disk is None:
        return Seen.ABSENT
    places = tuple(source.place for source in disk.chain)
    return _which(known, disk.top.key == known.base_key, places)


def _which(known: DiskRecord, is_base: bool, chain: tuple[str, ...]) -> Seen:
    if is_base:
        return Seen.BASE
    if chain[0] == known.overlay_path:
        return Seen.OVERLAY
    return Seen.UNDER if known.overlay_path in chain else Seen.OTHER


def _seen_job(known: DiskRecord, view: DomainView) -> JobSeen:
    disk = None if view.live is None else view.live.disks.get(known.target)
    if disk is None or view.qemu is None:
        return JobSeen.NONE
    job = qemu_job(view.qemu, known.target, known)
    if disk.mirror is not None:
        if disk.mirror.job != ACTIVE_COMMIT or disk.top.place != known.overlay_path:
            return JobSeen.FOREIGN
        if job is None and known.target not in (view.jobs or {}):
            return JobSeen.NONE  # the commit is over, and libvirt has not noticed, or never will
        return JobSeen.READY if disk.mirror.ready else JobSeen.COMMITTING
    if job is not None and job.name != OWN_COMMIT.format(known.target):
        return JobSeen.STRAY
    if job is not None:
        return JobSeen.READY if job.status in ("ready", "concluded") else JobSeen.COMMITTING
    return JobSeen.COMMITTING if view.jobs and known.target in view.jobs else JobSeen.NONE


def qemu_job(qemu: QemuView, target: str, known: DiskRecord) -> QemuJob | None:
    """Return QEMU's commit of the disk's overlay, None if it runs none."""
    # libvirt names its jobs after the disk and the overlay's node: commit-vda-libvirt-3-format.
    names = {OWN_COMMIT.format(target)}
    names |= {f"commit-{target}-{node.name}" for node in qemu.nodes if node.file == known.overlay_path}
    for job in qemu.jobs:
        if job.name in names:
            return job
    return None


def _leaked(known: DiskRecord, qemu: QemuView | None) -> tuple[str, ...]:
    if qemu is None or qemu_job(qemu, known.target, known) is not None:
        return ()
    # The format layer first: it holds the storage layer, which can't be closed before it.
    found = [node for node in qemu.nodes if node.file == known.overlay_path]
    return tuple(node.name for node in sorted(found, key=lambda node: node.driver != "qcow2"))


def base_file(known: DiskRecord, same_boot: bool) -> tuple[FileIdentity | None, bool]:
    """Return what lies at the base's place now, and whether it is the base that was recorded."""
    try:
        now = known.base.identity()
    except OSError:
        return None, False
    recorded = known.base_identity
    return now, recorded is None or now is None or same_file(known.base.path, now, recorded, same_boot)


def same_file(path: str, now: FileIdentity, recorded: FileIdentity, same_boot: bool) -> bool:
    """Return whether it is the file that was recorded. Device numbers last only until a reboot."""
    if same_boot:
        return now.same_file(recorded)
    if now.special or recorded.special:
        return bool(now.special) and bool(recorded.special) and _is_lasting_name(path)
    return now.inode == recorded.inode


def _is_lasting_name(device: str) -> bool:
    """Return whether the name of a device means the same device after a reboot, as /dev/sdb does not."""
    return device.startswith(("/dev/disk/", "/dev/mapper/")) or Path(device).parent.parent == Path("/dev")


def intact(known: DiskRecord, now: FileIdentity | None) -> bool:
    """Return whether nothing wrote to the base since it was recorded, as far as that can be told."""
    recorded = known.base_identity
    if recorded is None or now is None or recorded.special:
        return True  # a device's times do not tell, and before the capture there is nothing to compare
    return (now.size_bytes, now.mtime_ns) == (recorded.size_bytes, recorded.mtime_ns)


def _newer(base: FileIdentity | None, overlay: FileIdentity | None) -> bool | None:
    if base is None or overlay is None or base.special:
        return None  # neither a device's nor a network image's last write can be told
    return base.mtime_ns > overlay.mtime_ns


def _empty(known: DiskRecord, now: FileIdentity | None) -> bool | None:
    if now is None or now.size_bytes == 0 or known.phase in (DiskPhase.PIVOTING, DiskPhase.ON_BASE):
        return None
    try:
        return not holds_data(known.overlay_path)
    except (ProgramFailed, ProgramTimedOut):
        return None


def overlay_file(known: DiskRecord) -> FileIdentity | None:
    """Return what lies at the overlay's path, None if nothing does."""
    try:
        return file_identity(known.overlay_path)
    except OSError:
        return None


def seen_file(known: DiskRecord, now: FileIdentity | None, same_boot: bool) -> FileSeen:
    """Return whether what lies at the overlay's path is the overlay."""
    if now is None:
        return FileSeen.ABSENT
    recorded = known.overlay_identity
    if recorded is not None:
        ours = same_file(known.overlay_path, now, recorded, same_boot) and _backing_is_base(known)
        return FileSeen.OURS if ours else FileSeen.OTHER
    # The run died between making the file and writing down which it is: its backing file tells.
    return FileSeen.OURS if now.size_bytes == 0 or _backing_is_base(known) else FileSeen.OTHER


def _backing_is_base(known: DiskRecord) -> bool:
    try:
        info = image_info(file_place(known.overlay_path, "qcow2"))
    except (ProgramFailed, ProgramTimedOut):
        return False
    return known.base.is_named(info.backing)


def _in_use(disk: DiskSight) -> bool:
    uses = (disk.qemu, disk.live, disk.inactive)
    return Seen.OVERLAY in uses or Seen.UNDER in uses


def _with_other_users(
    record: RunRecord, domain: Guest, disks: tuple[DiskSight, ...]
) -> tuple[DiskSight, ...]:
    paths = {record.disk(disk.target).overlay_path for disk in disks if not settled(disk)}
    users = other_users(domain, paths) if paths else {}
    return tuple(
        replace(disk, named_by=users.get(record.disk(disk.target).overlay_path, "")) for disk in disks
    )
