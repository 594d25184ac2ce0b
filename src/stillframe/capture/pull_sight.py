"""Looking at what a run of the bitmap method made: from libvirt, QEMU and the files to a PullSight."""

from __future__ import annotations

import os

from stillframe.block.tools import image_info
from stillframe.capture.decide_pull import BackupSeen, PullSight
from stillframe.capture.journal import PullRecord, RunRecord
from stillframe.errors import HypervisorError, ProgramFailed, ProgramTimedOut
from stillframe.hypervisor.codes import INTERNAL, TIMED_OUT
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import Power, QemuView


def look_at_pull(record: RunRecord, domain: Guest, *, thaw_hopeless: bool = False) -> PullSight:
    """Return what is to be seen of the run right now. Raises HypervisorError, NoHypervisor."""
    pull = pull_of(record)
    power = domain.power()
    files = left_files(pull)
    if power in (Power.GONE, Power.HIDDEN):
        return PullSight(power, files=files, thaw_hopeless=thaw_hopeless)
    names = {pull.checkpoint, *pull.older}
    if not power.has_qemu:
        kept = domain.checkpoints() | _bitmaps_in_images(record)
        return PullSight(power, checkpoints=frozenset(names & kept), files=files, thaw_hopeless=thaw_hopeless)
    try:
        job = _seen_job(domain, pull)
        if job is BackupSeen.WEDGED:
            return PullSight(power, job, files=files, thaw_hopeless=thaw_hopeless)
        view = domain.view()
        listed = domain.checkpoints()
    except HypervisorError as error:
        if error.libvirt_code != TIMED_OUT:
            raise
        return PullSight(power, BackupSeen.WEDGED, files=files, thaw_hopeless=thaw_hopeless)
    return PullSight(
        view.power, job,
        stray=job is BackupSeen.NONE and bool(scratch_nodes(pull, view.qemu)),
        checkpoints=frozenset(names & (listed | bitmaps_in_qemu(pull, view.qemu))),
        files=files, thaw_hopeless=thaw_hopeless,
    )


def pull_of(record: RunRecord) -> PullRecord:
    """Return what a run of the bitmap method makes."""
    assert record.pull is not None  # each run of this method is begun with it
    return record.pull


def left_files(pull: PullRecord) -> tuple[str, ...]:
    """Return the run's files that are there, the folder behind what is in it."""
    return tuple(path for path in (*pull.scratch, pull.socket, pull.folder) if path and os.path.lexists(path))


def scratch_nodes(pull: PullRecord, qemu: QemuView | None) -> tuple[str, ...]:
    """Return QEMU's nodes over the run's scratch files, format before storage."""
    found = [node for node in (qemu.nodes if qemu else ()) if node.file in pull.scratch]
    return tuple(node.name for node in sorted(found, key=lambda node: node.driver != "qcow2"))


def bitmaps_in_qemu(pull: PullRecord, qemu: QemuView | None) -> frozenset[str]:
    """Return the names of the bitmaps that QEMU has on the guest's disks."""
    found = [qemu.bitmaps(file) for file in pull.qemu_files] if qemu else []
    return frozenset(name for bitmaps in found for name in bitmaps)


def _seen_job(domain: Guest, pull: PullRecord) -> BackupSeen:
    if domain.backup_runs(pull.socket):
        return BackupSeen.OURS
    try:
        return BackupSeen.OTHER if domain.has_job() else BackupSeen.NONE
    except HypervisorError as error:
        if error.libvirt_code != INTERNAL:
            raise
        return BackupSeen.WEDGED


def _bitmaps_in_images(record: RunRecord) -> frozenset[str]:
    found: set[str] = set()
    for disk in record.disks:
        if disk.base_format == "qcow2":
            try:
                found |= {name for name, _flags in image_info(disk.base).bitmaps}
            except (ProgramFailed, ProgramTimedOut):
                continue  # an image that can't be opened has no bitmap that could be deleted
    return frozenset(found)
