"""The story of one backup: capture, write a snapshot, commit it, commit the overlays back.

The snapshot is durable once its manifest is created, and only then may anything be written to a base.
Whatever the storage does before that ends the copy, and the guest is brought back all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stillframe.backup.machine import take_machine
from stillframe.backup.snapshot import DiskResult, Parent, SnapshotRun
from stillframe.block.anchor import Anchor
from stillframe.capture.apart import about_bytes, refuse_inside_images, refuse_overlays_at
from stillframe.capture.choose import captured, planned
from stillframe.capture.growth import free_bytes
from stillframe.capture.journal import in_repository
from stillframe.capture.lock import domain_lock
from stillframe.capture.plan import Plan, Wishes
from stillframe.capture.recover import recover_domain
from stillframe.capture.run import Stop, Tools
from stillframe.capture.states import Consistency
from stillframe.errors import GuestUnfit
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import ExcludedDisk
from stillframe.repository.layout import SID_BYTES, SnapshotName
from stillframe.repository.opened import Repository
from stillframe.repository.snapshots import newest_of
from stillframe.storage.model import check_key
from stillframe.units import size_text

#: Told of a disk, how many of its bytes are done, and how many there are.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What one backup came to. Times in seconds.

    *parent* is the ID of the snapshot that it was built upon, "" if there was none: *parent_note* says why
    then. *stored_bytes* is all that was added to the repository. *fell_short*: it is crash-consistent, and
    nobody had asked for no more than that.
    """

    guest: str
    repository: str
    snapshot: str
    captured_at: str
    consistency: str
    fell_short: bool
    disks: tuple[DiskResult, ...]
    files: tuple[str, ...]
    excluded: tuple[ExcludedDisk, ...]
    warnings: tuple[str, ...]
    recovered: tuple[str, ...]
    parent: str
    parent_note: str
    stored_bytes: int
    frozen_s: float
    seconds: float

    @property
    def fell_back(self) -> bool:
        """Whether a disk was read whole although it was to be read by its changes."""
        return any(disk.fell_back for disk in self.disks)


@dataclass(frozen=True, slots=True)
class BackupJob:
    """What is to be backed up, and how.

    *open_repository* is called once, when the guest was recovered and could be captured. *folder* is where
    the repository is if that is on this host or mounted there. *host* is the name that snapshots are filed
    under; *hints_folder* is this host's own memory of what is stored. *tags* are the user's words.
    """

    domain: Guest
    open_repository: Callable[[], Repository]
    folder: Path | None
    host: str
    hints_folder: Path
    wishes: Wishes
    stop: Stop
    report: Report
    tags: tuple[str, ...] = ()


def backup_guest(job: BackupJob, tools: Tools) -> BackupResult:
    """Make a snapshot of what the guest's disks hold now.

    What an earlier run left is recovered first. When this returns or raises anything but
    NeedsAttention, the guest is on its own images. When it returns, the snapshot is durable.
    Raises any StillframeError.
    """
    began_s = tools.clock.monotonic_s()
    domain = job.domain
    with domain_lock(tools.journal.folder, domain.uuid, domain.name, "backup", tools.clock):
        recovered = recover_domain(domain, tools, job.wishes.limits)
        plan = planned(domain, job.wishes, tools)
        _refuse_name(job)
        if job.folder is not None:
            refuse_place(job.folder, plan)
        repository = job.open_repository()
        parent = _parent(repository, job)
        warnings = [*parent.problems, *_space_warnings(job, plan, parent)]
        run = SnapshotRun(repository, plan, parent, job.host, job.hints_folder, tools.clock, job.report)
        run.tags = job.tags
        try:
            place = in_repository(repository.address)
            with captured(plan, tools, place, job.stop, _earlier(parent)) as capture:
                machine = take_machine(plan.live.text, domain.uuid, tools.clock)
                run.write(capture, machine, (*warnings, *capture.warnings, *machine.warnings))
        finally:
            # The guest first: the repository may hang.
            run.close()
        assert run.manifest is not None
    return BackupResult(
        guest=domain.name, repository=repository.address, snapshot=run.manifest.sid,
        captured_at=capture.captured_at, consistency=capture.consistency.value,
        fell_short=capture.consistency is Consistency.CRASH and bool(capture.warnings),
        disks=tuple(run.disks),
        files=tuple(each.path for each in run.manifest.files), excluded=plan.excluded,
        warnings=(*run.manifest.warnings, *run.late_warnings),
        recovered=tuple(word for each in recovered for word in each.told), parent=run.manifest.parent,
        parent_note=run.parent_note, stored_bytes=run.manifest.stored_bytes, frozen_s=capture.frozen_s,
        seconds=tools.clock.monotonic_s() - began_s,
    )


def _refuse_name(job: BackupJob) -> None:
    """Raise GuestUnfit if no snapshot can be filed under the guest's name: now, not when it is committed."""
    name = SnapshotName(job.host, job.domain.name, datetime.fromtimestamp(0, UTC), "0" * 2 * SID_BYTES)
    try:
        check_key(name.key)
    except ValueError as error:
        raise GuestUnfit(
            f"{job.domain.name} on {job.host} has too long a name for a repository: {error}.",
            f"virsh domrename {job.domain.name} NEW-NAME   # while it is shut off",
        ) from error


def refuse_place(repository: Path, plan: Plan) -> None:
    """Raise DestinationInsideGuest, OverlayFolderNeeded if the repository and the guest lie too near."""
    if not repository.is_dir():
        return  # opening it will tell
    folder = repository.resolve()
    refuse_inside_images(folder, plan)
    refuse_overlays_at(folder, folder, plan)


def _parent(repository: Repository, job: BackupJob) -> Parent:
    found, problems = newest_of(repository, job.host, job.domain.name, job.domain.uuid)
    warnings = tuple(f"a newer snapshot can't be built upon: {problem}" for problem in problems)
    return Parent(None, None, warnings) if found is None else Parent(*found, warnings)


def _earlier(parent: Parent) -> Anchor | None:
    """Return what the snapshot to build upon left: what changed since its anchor is all that differs from it.

    Never another snapshot's: with a later one's anchor, what changed in between would be missing.
    """
    return parent.manifest.anchor if parent.manifest is not None else None


def _space_warnings(job: BackupJob, plan: Plan, parent: Parent) -> list[str]:
    """Warn of a first copy that may not fit. How well it compresses, and what is known, nobody can tell."""
    if parent.name is not None or job.folder is None:
        return []
    needed, free = sum(about_bytes(disk) for disk in plan.disks), free_bytes(str(job.folder))
    if needed <= free:
        return []
    room = f"{job.folder} has {size_text(free)} free"
    return [f"the disks hold about {size_text(needed)}, {room}: it may be too little"]
