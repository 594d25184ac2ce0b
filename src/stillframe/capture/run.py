"""The overlay method: the forward half of a run, up to the moment the bases stand still.

Within the block of `captured` the bases stand still and can be copied. Behind it the guest
is back on its own images, whatever happened inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import msgspec

from stillframe.block.anchor import Anchor
from stillframe.block.image import FileIdentity, ImagePlace, file_identity
from stillframe.block.reader import DiskReader, open_reader
from stillframe.block.tools import create_overlay
from stillframe.capture.bitmap_choice import is_our_name
from stillframe.capture.bring_back import BringBack
from stillframe.capture.forward import Forward, brought_back
from stillframe.capture.journal import DiskRecord, Journal
from stillframe.capture.method import Method
from stillframe.capture.plan import Plan
from stillframe.capture.states import Consistency, DiskPhase, Quiesce, State
from stillframe.capture.stepping import Watcher
from stillframe.clock import Clock, Deadline, utc_text
from stillframe.errors import (
    ConnectionLost,
    CopyFailed,
    GuestState,
    HypervisorError,
    OverlayTaken,
    ProgramFailed,
    ShutdownTimedOut,
    SnapshotFailed,
    StillframeError,
)
from stillframe.hypervisor.model import Power
from stillframe.hypervisor.monitor import delete_bitmap

_POLL_S = 0.25

Stop = Callable[[], StillframeError | None]


@dataclass(frozen=True, slots=True)
class Tools:
    """What a run works with."""

    journal: Journal
    clock: Clock
    watcher: Watcher


@dataclass(frozen=True, slots=True)
class StillDisk:
    """A disk that stands still: *read* opens what the guest's disk held at the captured moment.

    *base* is the guest's own image, for people. *method* is how the disk was captured, and *note* why it is
    read whole although it was to be read by its changes, "" if there is no such reason. A reader that knows
    changes counts from the anchor that the capture was given. *never_counts*: its changes can't be known by
    this method, which `auto` chose for another disk's sake, so nobody expected it.
    """

    target: str
    base: ImagePlace
    size_bytes: int
    method: Method
    read: Callable[[], contextlib.AbstractContextManager[DiskReader]]
    note: str = ""
    never_counts: bool = False

    @property
    def fell_back(self) -> bool:
        """Whether the disk is read whole although it was to be read by its changes."""
        return bool(self.note) and not self.never_counts


@dataclass(frozen=True, slots=True)
class Capture:
    """All disks of a domain at one moment. Valid only within the block of `captured`.

    *anchor* is what a later capture may count from once this one is durable, None if it leaves nothing.
    *frozen_s* is how long the guest was frozen, 0 if it was not. *stop* returns the error to
    end the copy with, if there is a reason. *check_still* raises CopyFailed if a base was
    written to since the moment; call it before the copy is called good.
    """

    run_id: str
    captured_at: str
    consistency: Consistency
    disks: tuple[StillDisk, ...]
    warnings: tuple[str, ...]
    frozen_s: float
    stop: Stop
    check_still: Callable[[], None]
    anchor: Anchor | None = None


@contextlib.contextmanager
def captured(plan: Plan, tools: Tools, destination: str, stop: Stop) -> Iterator[Capture]:
    """Put overlays on all disks of the plan and give their bases, standing still.

    *stop* is asked throughout; an error it returns ends the run. When the block ends, by
    success or by any exception, overlays are committed back, the guest is on its own
    images, and no overlay is left; only NeedsAttention says otherwise.
    Raises RunFailed and what the block raises.
    """
    run = OverlayRun(plan, tools, destination, stop)
    back = BringBack(tools.journal, plan.domain, tools.clock, plan.limits, tools.watcher)
    with brought_back(run, back.finish, GuestState.OVERLAID):
        yield run.take()


class OverlayRun(Forward):
    """The forward half, step by step."""

    method = Method.OVERLAY

    def __init__(
        self, plan: Plan, tools: Tools, destination: str, stop: Stop, follows: str = ""
    ) -> None:
        super().__init__(plan, tools.journal, tools.clock, tools.watcher.say, destination, stop, follows)

    def take(self) -> Capture:
        """Put the overlays on; return the capture. Raises RunFailed."""
        self._delete_spoiled_bitmaps()
        self._create_overlays()
        if self._plan.quiesce is Quiesce.AGENT:
            consistency = self._take_frozen()
        elif self._plan.quiesce is Quiesce.SHUTDOWN:
            consistency = self._take_shut_down()
        else:
            self._take_moment()
            self._verify_moment()
            consistency = Consistency.CRASH
        self._enter(State.COPYING, consistency=consistency.value)
        self._remember_bases()
        return Capture(
            self.record.id, self.record.captured_at, consistency,
            tuple(self.still(disk) for disk in self.record.disks),
            tuple(self._warnings), self._frozen_s, self.stop, self.check_still,
        )

    def still(self, disk: DiskRecord) -> StillDisk:
        """Return how one disk is read at the captured moment."""
        return StillDisk(disk.target, disk.base, disk.size_bytes, Method.OVERLAY,
                         partial(open_reader, disk.base, clock=self._clock))

    def stop(self) -> StillframeError | None:
        """Return why the copy must end, None if it may go on."""
        error = self._stop()
        for mark in () if error else self._plan.watermarks:
            error = error or mark.reached()
        return error

    def check_still(self) -> None:
        """Raise CopyFailed if somebody wrote to a base while it was being copied."""
        for disk in self.record.disks:
            if disk.base_identity is not None and not disk.base_identity.special \
                    and _identity(disk.base) != disk.base_identity:
                raise CopyFailed(
                    f"The base of {disk.target} ({disk.base.text()}) was changed during the copy.",
                    "find out which program writes to it (fuser -v), then run again",
                )

    # --- steps --------------------------------------------------------------------------------

    def _delete_spoiled_bitmaps(self) -> None:
        """Delete bitmaps of ours that QEMU's death has made inconsistent: nothing counts from one any more.

        QEMU makes no image larger that has one, so a disk that grows on its overlay could not be committed.
        """
        qemu = self._plan.view.qemu
        for disk in self.record.disks:
            bitmaps = qemu.bitmaps(disk.base_qemu_file) if qemu is not None else {}
            for name in (each.name for each in bitmaps.values() if each.inconsistent):
                if is_our_name(name):
                    self.record = self._journal.note(self.record, f"deleting the spoiled bitmap {name}")
                    with contextlib.suppress(HypervisorError):  # the next run tries again
                        self._domain.qmp(partial(delete_bitmap, files=[disk.base_qemu_file], name=name))

    def _create_overlays(self) -> None:
        self._check_stop()
        self._enter(State.OVERLAYS)
        made = []
        for disk in self.record.disks:
            try:
                create_overlay(disk.overlay_path, disk.base, disk.size_bytes)
            except OverlayTaken:
                raise
            except (ProgramFailed, OSError) as error:
                raise SnapshotFailed(
                    f"The overlay {disk.overlay_path} could not be made: {error}",
                    "check the folder's rights and space, or choose --overlay-dir",
                ) from error
            made.append(
                msgspec.structs.replace(disk, overlay_identity=file_identity(disk.overlay_path))
            )
        self._done(disks=tuple(made))

    def _take_shut_down(self) -> Consistency:
        limits = self._plan.limits
        self._check_stop()
        self._enter(
            State.SHUTTING_DOWN, shutdown_begun_at=utc_text(self._clock.now()),
            shutdown_timeout_s=limits.shutdown_s,
        )
        self._say("asking the guest to shut down")
        self._domain.ask_to_shut_down(max(1, round(limits.agent_s)))
        deadline = Deadline(self._clock, limits.shutdown_s)
        while self._domain.power() is not Power.OFF:
            if deadline.passed():
                raise ShutdownTimedOut(
                    f"{self.record.name} did not shut down within {limits.shutdown_s:.0f} s. It runs on; "
                    "should it still go down later, nothing will start it again.",
                    f"{self._domain.advice.state}   # and start it if it went down; "
                    "a longer time: --shutdown-timeout",
                )
            self._domain.connection.wait_change(_POLL_S)
        self._done("shut off")
        self._take_moment()
        self._verify_moment()
        self._enter(State.STARTING)
        self._domain.start()
        self._done(start_verified=True)
        return Consistency.SHUTDOWN

    def _take_moment(self) -> None:
        self._check_stop()
        self._enter(State.SNAPSHOT, snapshot_begun=True)
        overlays = {disk.target: disk.overlay_path for disk in self.record.disks}
        try:
            self._domain.put_overlays_on(overlays, self._plan.others)
        except ConnectionLost:
            # It may have been carried out all the same: only a look tells.
            self._domain.connection.ensure()
        except HypervisorError as error:
            raise SnapshotFailed(
                f"{self._domain.advice.runner} did not put the overlay on {self.record.name}: "
                f"{error.message}",
                f"stillframe doctor {self._domain.advice.guest}; {self._domain.advice.log}",
            ) from error
        self._done(captured_at=utc_text(self._clock.now()))

    def _verify_moment(self) -> None:
        """Look whether the guest writes to the overlays. Raises SnapshotFailed."""
        view = self._domain.view()
        for disk in self.record.disks:
            xml = view.live if view.power.has_qemu else view.inactive
            seen = xml.disks.get(disk.target) if xml else None
            in_qemu = view.qemu.disks.get(disk.target) if view.qemu else None
            on_overlay = seen is not None and seen.top.place == disk.overlay_path
            if not on_overlay or (in_qemu is not None and in_qemu.files[0] != disk.overlay_path):
                raise SnapshotFailed(
                    f"{disk.target} of {self.record.name} is not on its overlay although "
                    f"{self._domain.advice.runner} was asked.", self._domain.advice.definition,
                )
        overlaid = tuple(disk.with_phase(DiskPhase.OVERLAID) for disk in self.record.disks)
        self.record = self._journal.note(self.record, "seen on the overlays", disks=overlaid)

    def _remember_bases(self) -> None:
        disks = tuple(
            msgspec.structs.replace(disk, base_identity=_identity(disk.base))
            for disk in self.record.disks
        )
        self._done(disks=disks)


def _identity(base: ImagePlace) -> FileIdentity | None:
    try:
        return base.identity()
    except OSError as error:
        raise CopyFailed(f"The base {base.text()} can't be looked at: {error}",
                         f"ls -l {base.text()}") from error
