"""A backup job in pull mode by QEMU's own commands: what libvirt makes of backupBegin().

For each disk there is a scratch image that stands on the disk. A job copies into it what the guest is about
to overwrite, and an export shows it: the disk as it was when the job began. Everything that is made here has
a name that is made of the job's socket, so that it is found again after a crash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from stillframe.clock import Clock, Deadline
from stillframe.errors import HypervisorError
from stillframe.hypervisor.bare_view import OURS
from stillframe.hypervisor.model import PulledDisk, PullJob, QemuDisk
from stillframe.hypervisor.monitor import Qmp, block_nodes, drop_nodes, job_of

T = TypeVar("T")

_HASH_LETTERS = 8  # a node has a name of 31 letters at most
_PULL = f"{OURS}pull-"
_END_S = 20.0
_PAUSE_S = 0.02
#: Makes an empty file that QEMU's user owns.
MakeFile = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Part:
    """What is made for one disk of a job."""

    disk: PulledDisk
    source: str
    size_bytes: int
    name: str

    @property
    def storage(self) -> str:
        """The node of the scratch file itself."""
        return f"{self.name}-f"

    def snapshot(self, job: PullJob) -> Iterator[dict[str, Any]]:
        """Yield what is done at the moment: begin to copy, begin a bitmap, fix the earlier one."""
        yield _action("blockdev-backup", device=self.source, target=self.name, sync="none",
                      **{"job-id": self.name, "auto-dismiss": False})
        if self.disk.keeps:
            yield _action("block-dirty-bitmap-add", node=self.source, name=job.checkpoint, persistent=True)
        if self.disk.since:
            yield _action("block-dirty-bitmap-add", node=self.name, name=self.bitmap, disabled=True)
            yield _action("block-dirty-bitmap-merge", node=self.name, target=self.bitmap,
                          bitmaps=[{"node": self.source, "name": self.disk.since}])

    @property
    def bitmap(self) -> str:
        """What the export calls the bitmap that says what changed; libvirt calls it so."""
        return f"backup-{self.disk.target}"

    def export(self) -> dict[str, Any]:
        """Return the arguments of block-export-add."""
        bitmaps = {"bitmaps": [self.bitmap]} if self.disk.since else {}
        return {"type": "nbd", "id": self.name, "node-name": self.name, "name": self.disk.target, **bitmaps}


def begin(
    qmp: Qmp, job: PullJob, disks: Mapping[str, QemuDisk], sizes: Mapping[str, int], make_file: MakeFile,
    clock: Clock,
) -> None:
    """Begin the job over *disks* of these sizes in bytes; nothing of it is left if it can't be begun.

    Raises HypervisorError, OSError.
    """
    prefix = _prefix(job.socket)
    made: list[str] = []
    taken = False
    parts = [
        _Part(disk, of_disk(disks, disk.target).node, of_disk(sizes, disk.target), f"{prefix}{number}")
        for number, disk in enumerate(job.disks)
    ]
    try:
        for part in parts:
            make_file(part.disk.scratch)
            made.append(part.disk.scratch)
            _make_scratch(qmp, part, clock)
        qmp("nbd-server-start", {"addr": {"type": "unix", "data": {"path": job.socket}}})
        qmp("transaction", {"actions": [action for part in parts for action in part.snapshot(job)]})
        taken = True
        for part in parts:
            qmp("block-export-add", part.export())
    except (HypervisorError, OSError):
        end(qmp, clock, job.socket)
        for part in parts if taken else ():  # before that a bitmap of this name is somebody else's
            _remove_bitmap(qmp, part.source, job.checkpoint)
        for path in made:  # and no file that was there before
            os.unlink(path)
        raise


def of_disk(found: Mapping[str, T], target: str) -> T:
    """Return what was *found* of disk *target*. Raises HypervisorError if QEMU has no such disk."""
    if target not in found:
        raise HypervisorError(f"QEMU has no disk {target}.", 0)
    return found[target]


def _make_scratch(qmp: Qmp, part: _Part, clock: Clock) -> None:
    qmp("blockdev-add", {"driver": "file", "node-name": part.storage, "filename": part.disk.scratch})
    qmp("blockdev-create", {"job-id": part.name, "options": {
        "driver": "qcow2", "file": part.storage, "size": part.size_bytes}})
    _dismissed(qmp, part.name, clock)
    qmp("blockdev-add", {
        "driver": "qcow2", "node-name": part.name, "file": part.storage, "backing": part.source})


def _remove_bitmap(qmp: Qmp, node: str, name: str) -> None:
    for each in block_nodes(qmp):
        if each.name == node and any(bitmap.name == name for bitmap in each.bitmaps):
            qmp("block-dirty-bitmap-remove", {"node": node, "name": name})


def runs(qmp: Qmp, socket: str) -> bool:
    """Return whether the job that serves on *socket* is whole: each disk's copying and its export."""
    prefix = _prefix(socket)
    at_work = {job["id"] for job in qmp("query-jobs", {})
               if job["id"].startswith(prefix) and job["type"] == "backup" and job["status"] == "running"}
    exported = {export["id"] for export in qmp("query-block-exports", {}) if export["id"].startswith(prefix)}
    made = {node.name for node in block_nodes(qmp) if node.name.startswith(prefix)}
    disks = {name for name in made if not name.endswith("-f")}
    return bool(disks) and at_work == exported == disks


def foreign_jobs(qmp: Qmp) -> bool:
    """Return whether QEMU runs a job that stillframe did not begin."""
    return any(not job["id"].startswith(OURS) and job["status"] != "concluded"
               for job in qmp("query-jobs", {}))


def end(qmp: Qmp, clock: Clock, socket: str = "") -> None:
    """End all backup jobs of stillframe, or what is left of them, and close what they used.

    The NBD server is ended if it served an export of ours, or the file of *socket* is there. Can be repeated.
    Raises HypervisorError.
    """
    exports = [each["id"] for each in qmp("query-block-exports", {}) if each["id"].startswith(_PULL)]
    for export in exports:
        qmp("block-export-del", {"id": export, "mode": "hard"})
    _wait(clock, "exports", lambda: not any(
        each["id"].startswith(_PULL) for each in qmp("query-block-exports", {})))
    if exports or (socket and os.path.exists(socket)):
        qmp("nbd-server-stop", {})
    for job in [each["id"] for each in qmp("query-jobs", {}) if each["id"].startswith(_PULL)]:
        if (found := job_of(qmp, job)) is not None and found["status"] != "concluded":
            qmp("job-cancel", {"id": job})
        _dismissed(qmp, job, clock, failed_is_fine=True)
    names = [node.name for node in block_nodes(qmp) if node.name.startswith(_PULL)]
    # The image before the file that it is in.
    drop_nodes(qmp, tuple(sorted(names, key=lambda name: name.endswith("-f"))))


def _dismissed(qmp: Qmp, name: str, clock: Clock, *, failed_is_fine: bool = False) -> None:
    """Wait until the job is over and dismiss it. Raises HypervisorError if it failed."""
    def is_over() -> bool:
        job = job_of(qmp, name)
        return job is None or job["status"] == "concluded"

    _wait(clock, f"job {name}", is_over)
    job = job_of(qmp, name)
    if job is not None:
        qmp("job-dismiss", {"id": name})
        if job.get("error") and not failed_is_fine:
            raise HypervisorError(f"QEMU's job {name} failed: {job['error']}", 0)


def _wait(clock: Clock, what: str, is_over: Callable[[], bool]) -> None:
    deadline = Deadline(clock, _END_S)
    while not is_over():
        if deadline.passed():
            raise HypervisorError(f"QEMU's {what} does not end.", 0)
        clock.pause(_PAUSE_S)


def _prefix(socket: str) -> str:
    return f"{_PULL}{hashlib.sha256(socket.encode()).hexdigest()[:_HASH_LETTERS]}-"


def _action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": data}


