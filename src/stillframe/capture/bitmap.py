"""The bitmap method: a backup job in pull mode, with the checkpoint that the next run counts from.

QEMU writes to the guest's own images all the while. What the guest overwrites goes into scratch files first,
so that the job's exports show all disks as they were at one moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from stillframe.block.anchor import Anchor
from stillframe.block.reader import open_export
from stillframe.capture.bitmap_choice import (
    DiskChoice,
    bitmap_reasons,
    checkpoint_prefix,
    choose_disks,
    image_marks,
    without_checkpoint,
)
from stillframe.capture.end_pull import EndPull
from stillframe.capture.forward import Forward, brought_back
from stillframe.capture.growth import plan_watermarks
from stillframe.capture.journal import DiskRecord, PullRecord
from stillframe.capture.method import Method
from stillframe.capture.plan import Plan
from stillframe.capture.pull_sight import bitmaps_in_qemu, pull_of
from stillframe.capture.run import Capture, StillDisk, Stop, Tools
from stillframe.capture.states import Consistency, Quiesce, State
from stillframe.clock import utc_text
from stillframe.errors import (
    ConnectionLost,
    CopyFailed,
    GuestBusy,
    GuestState,
    GuestUnfit,
    HypervisorError,
    OverlayFull,
    ShutdownImpossible,
    SnapshotFailed,
    StillframeError,
)
from stillframe.hypervisor.codes import TIMED_OUT
from stillframe.hypervisor.model import Power, PulledDisk, PullJob
from stillframe.process import owner_of

#: What a scratch file's name ends in.
SCRATCH_SUFFIX = ".stillframe-scratch.qcow2"
_HASH_LETTERS = 12
#: The kernel's limit for the name of a unix socket, and a folder that is always far from it.
_SOCKET_NAME_BYTES = 107
_SHORT_FOLDER = "/run"


@contextlib.contextmanager
def captured_by_bitmap(
    plan: Plan, tools: Tools, destination: str, stop: Stop, earlier: Anchor | None
) -> Iterator[Capture]:
    """Begin a backup job over all disks of the plan, and give them as they are at this moment.

    Disks that can be counted from *earlier* tell what changed since; the others have a note that says why
    not. Leaving the block without an exception means that the copy is durable: the new checkpoint stays, and
    older ones of stillframe for this destination are deleted. By an exception, the new one is deleted. The
    job is over in either case, and nothing but the checkpoint is left; only NeedsAttention says otherwise.
    Raises GuestUnfit if no disk can keep a bitmap, ShutdownImpossible, OverlaySpace, GuestBusy, RunFailed and
    what the block raises.
    """
    _refuse(plan)
    choices = choose_disks(plan.disks, plan.view, destination, earlier)
    run = _Run(plan, tools, destination, stop, earlier, choices)
    end = EndPull(tools.journal, plan.domain, tools.clock, plan.limits, tools.watcher)
    with brought_back(run, end.finish, GuestState.UNKNOWN):
        yield run.take()


def _refuse(plan: Plan) -> None:
    name = plan.domain.name
    reasons = bitmap_reasons(plan.view)
    if all(disk.target in reasons for disk in plan.disks):
        told = "; ".join(f"{disk.target}: {reasons[disk.target]}" for disk in plan.disks)
        raise GuestUnfit(f"No disk of {name} can be captured by bitmap ({told}).",
                         plan.wishes.again(name, "--method standing-overlay   # or --method overlay"))
    problem = plan.domain.backup_problem()
    if problem:
        raise GuestUnfit(f"{name} can't be captured by bitmap: {problem}.",
                         plan.wishes.again(name, "--method standing-overlay   # or --method overlay"))
    if plan.quiesce is Quiesce.SHUTDOWN:
        raise ShutdownImpossible(
            f"{name} can't be shut down for a capture by bitmap: only a guest that runs has a backup job.",
            plan.wishes.again(name, "--quiesce agent   # or --method overlay"))


class _Run(Forward):
    """The forward half, step by step."""

    method = Method.BITMAP

    def __init__(
        self, plan: Plan, tools: Tools, destination: str, stop: Stop, earlier: Anchor | None,
        choices: tuple[DiskChoice, ...],
    ) -> None:
        self._destination = destination
        self._earlier = earlier
        self._choices = choices
        self._runner = plan.domain.advice.runner
        scratch = [_scratch_path(plan.domain.name, disk, "new") for disk in plan.disks]
        marks = plan_watermarks(scratch, plan.limits, "scratch files")  # refused before a run is begun
        super().__init__(plan, tools.journal, tools.clock, tools.watcher.say, destination, stop)
        named = dict(zip(scratch, pull_of(self.record).scratch, strict=True))
        self._watermarks = tuple(
            replace(mark, paths=tuple(map(named.__getitem__, mark.paths))) for mark in marks)

    def _pull_record(self, run_id: str) -> PullRecord | None:
        plan, short = self._plan, hashlib.sha256(run_id.encode()).hexdigest()[:_HASH_LETTERS]
        files = tuple(disk.base_qemu_file for disk in plan.disks)
        folder = plan.domain.run_folder()
        own = "" if folder else _socket_folder(Path(plan.disks[0].overlay_path).parent, short)
        found = PullRecord(
            checkpoint=checkpoint_prefix(self._destination) + run_id, older=(),
            socket=_socket_in(folder or own, short), folder=own,
            scratch=tuple(_scratch_path(plan.domain.name, disk, short) for disk in plan.disks),
            qemu_files=files,
        )
        return msgspec.structs.replace(found, older=self._older(found))

    def _older(self, pull: PullRecord) -> tuple[str, ...]:
        """Return our checkpoints for this destination that are there: only those that a run wrote down."""
        made = {
            run.pull.checkpoint for run in self._journal.runs_for(self._domain.uuid, self._destination)
            if run.pull is not None
        }
        if self._earlier is not None:
            made.add(self._earlier.checkpoint)
        there = self._domain.checkpoints() | bitmaps_in_qemu(pull, self._plan.view.qemu)
        prefix = checkpoint_prefix(self._destination)
        return tuple(sorted(name for name in made & there if name.startswith(prefix)))

    def take(self) -> Capture:
        """Begin the job; return the capture. Raises RunFailed, GuestBusy."""
        self._check_stop()
        self._redefine()
        if self._plan.quiesce is Quiesce.AGENT:
            consistency = self._take_frozen()
        else:
            self._take_moment()
            self._verify_moment()
            consistency = Consistency.CRASH
        self._enter(State.READING, consistency=consistency.value)
        anchor = self._anchor()
        self._done()
        return Capture(
            self.record.id, self.record.captured_at, consistency,
            tuple(map(self._still, self.record.disks, self._choices)),
            tuple(self._warnings), self._frozen_s, self.stop, self.check_still, anchor,
        )

    def _still(self, disk: DiskRecord, choice: DiskChoice) -> StillDisk:
        name = f"{disk.target} of {self.record.name}"
        read = partial(open_export, pull_of(self.record).socket, disk.target, name,
                       bitmap=f"backup-{disk.target}" if choice.counts else "")
        return StillDisk(disk.target, disk.base, disk.size_bytes, Method.BITMAP, read, choice.note,
                         never_counts=not choice.keeps and self._plan.wishes.method is Method.AUTO)

    def _anchor(self) -> Anchor | None:
        sizes = {
            disk.target: disk.size_bytes
            for disk, choice in zip(self.record.disks, self._choices, strict=True) if choice.keeps
        }
        if not sizes:
            return None
        job = self._job()
        return Anchor(capture=self.record.id, sizes=sizes, checkpoint=job.checkpoint,
                      checkpoint_xml=self._domain.checkpoint_text(job))

    def stop(self) -> StillframeError | None:
        """Return why the copy must end, None if it may go on."""
        error = self._stop()
        for mark in () if error else self._watermarks:
            error = error or mark.reached()
        return error or self._guest_stopped()

    def _guest_stopped(self) -> StillframeError | None:
        power = self._domain.glance_at_power()
        if power is Power.PAUSED_ON_IO_ERROR:
            return OverlayFull(
                f"{self.record.name} was paused by an I/O error: most likely a scratch file has no room. "
                "The copy was given up, and the guest goes on.",
                "run again with --overlay-dir on a larger file system")
        if power in (Power.OFF, Power.GONE):
            return CopyFailed(f"{self.record.name} was shut down during the copy, and its backup job ended.",
                              f"{self._domain.advice.start}, then run again")
        return None

    def check_still(self) -> None:
        """Raise CopyFailed if the job is not there any more: what was read since may be anything."""
        if not self._domain.backup_runs(pull_of(self.record).socket):
            raise CopyFailed(f"The backup job of {self.record.name} ended during the copy.",
                             f"{self._domain.advice.state}; then run again")

    # --- steps --------------------------------------------------------------------------------

    def _redefine(self) -> None:
        """Tell libvirt of the earlier checkpoint if it has lost it; its bitmaps are in the images."""
        earlier = self._earlier
        counted = [choice.target for choice in self._choices if choice.counts]
        if earlier is None or not counted:
            return
        if earlier.checkpoint in self._domain.checkpoints():
            return
        self._enter(State.REDEFINING, earlier.checkpoint)
        try:
            self._domain.redefine_checkpoint(earlier.checkpoint_xml, counted)
        except ConnectionLost:
            self._domain.connection.ensure()
        except HypervisorError as error:
            self._choices = without_checkpoint(
                self._choices, f"libvirt lost the checkpoint and can't take it again: {error.message}")
        if earlier.checkpoint not in self._domain.checkpoints():
            self._choices = without_checkpoint(self._choices, "libvirt lost the checkpoint")
        self._done()

    def _take_moment(self) -> None:
        self._check_stop()
        pull = msgspec.structs.replace(pull_of(self.record), begun=True)
        self._enter(State.BEGINNING, pull=pull)
        try:
            self._make_folder(pull.folder)
        except OSError as error:
            raise SnapshotFailed(
                f"The folder {pull.folder} for the job's socket could not be made: {error.strerror}",
                self._plan.wishes.again(self.record.name, "--overlay-dir FOLDER")) from error
        said = self._begin()
        # A bitmap that was seen a moment ago may be gone or in the way: then by less, but never not at all.
        if said and any(choice.counts for choice in self._choices):
            self._choices = without_checkpoint(self._choices, f"{self._runner} refused to count: {said}")
            self._rename()
            said = self._begin()
        if said and any(choice.keeps for choice in self._choices):
            self._choices = tuple(
                DiskChoice(choice.target, keeps=False, counts=False,
                           note=choice.note or f"{self._runner} refused a checkpoint: {said}")
                for choice in self._choices)
            said = self._begin()
        if said:
            raise SnapshotFailed(
                f"{self._runner} did not begin a backup job on {self.record.name}: {said}",
                f"stillframe doctor {self._domain.advice.guest}; {self._domain.advice.log}")
        self._done(captured_at=utc_text(self._clock.now()))

    def _begin(self) -> str:
        """Begin the job by the choices; return what was said against it, "" if it began (or may have)."""
        try:
            self._domain.begin_backup(self._job())
        except ConnectionLost:
            # It may have been carried out all the same: only a look tells.
            self._domain.connection.ensure()
        except HypervisorError as error:
            self._refuse_other_job(error)
            self._journal.note(self.record, error.message)
            return error.message
        return ""

    def _refuse_other_job(self, error: HypervisorError) -> None:
        if error.libvirt_code == TIMED_OUT or self._domain.has_job():
            raise GuestBusy(
                f"Another job (a backup, a migration or a save) runs on {self.record.name}.",
                f"{self._domain.advice.jobs}   # wait for its end, then run again") from error

    def _rename(self) -> None:
        """Give the checkpoint a name that no bitmap has."""
        pull = pull_of(self.record)
        renamed = msgspec.structs.replace(pull, checkpoint=f"{pull.checkpoint}-2")
        self.record = self._journal.note(self.record, "once more, with nothing counted", pull=renamed)

    def _job(self) -> PullJob:
        pull = pull_of(self.record)
        since = self._earlier.checkpoint if self._earlier else ""
        disks = tuple(
            PulledDisk(choice.target, scratch, since if choice.counts else "", keeps=choice.keeps)
            for choice, scratch in zip(self._choices, pull.scratch, strict=True))
        return PullJob(pull.socket, disks, self._plan.others, pull.checkpoint, image_marks(self.record.disks))

    def _make_folder(self, folder: str) -> None:
        if not folder:
            return
        os.mkdir(folder, 0o700)
        pid = self._domain.qemu_pid()
        owner = None if pid is None else owner_of(pid)
        if owner is not None and os.geteuid() == 0:
            os.chown(folder, *owner)

    def _verify_moment(self) -> None:
        """Look whether the job runs. Raises SnapshotFailed."""
        if not self._domain.backup_runs(pull_of(self.record).socket):
            raise SnapshotFailed(
                f"No backup job of stillframe runs on {self.record.name} although one was asked for.",
                self._domain.advice.jobs)


def _socket_in(folder: Path | str, short: str) -> str:
    return f"{folder}/stillframe-{short}.socket"


def _socket_folder(beside: Path, short: str) -> str:
    """Return the folder to make for the socket: by the scratch files, unless its name gets too long."""
    near = str(beside / f".stillframe-{short}")
    fits = len(os.fsencode(_socket_in(near, short))) <= _SOCKET_NAME_BYTES
    return near if fits else f"{_SHORT_FOLDER}/.stillframe-{short}"


def _scratch_path(name: str, disk: DiskRecord, short: str) -> str:
    return str(Path(disk.overlay_path).parent / f"{name}-{disk.target}-{short}{SCRATCH_SUFFIX}")
