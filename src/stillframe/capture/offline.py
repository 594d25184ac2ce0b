"""The offline method: a guest that is shut off, its images read under QEMU's own lock.

Nothing of the guest is changed. That it is off is proven and not believed: no process of its QEMU is to be
seen, and the locks of all its images are taken, which a QEMU that uses one would hold. They are held until
the copy is durable. A start of the guest fails meanwhile, with QEMU's words ("Failed to get "write"
lock"), rather than that its first writes spoil the copy: the copy would be worth nothing, and for a guest
that starts whenever it is read there would never be one.

QEMU takes no lock on an image behind a network, and libvirt gives it device nodes of its own, whose locks
nobody else sees. There a start succeeds; it is noticed, and the copy is given up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from stillframe.block.anchor import Anchor
from stillframe.block.image import FileIdentity, file_identity
from stillframe.block.reader import DiskReader, open_reader
from stillframe.block.tools import ImageInfo, chain_info
from stillframe.capture.forward import words
from stillframe.capture.journal import DiskRecord, RunRecord, new_run_id
from stillframe.capture.method import Method
from stillframe.capture.offline_bitmap import kept_anchor, usable_bitmap
from stillframe.capture.plan import Plan
from stillframe.capture.run import Capture, StillDisk, Stop, Tools
from stillframe.capture.states import BEFORE_RELEASE, Consistency, Quiesce, State
from stillframe.clock import utc_text
from stillframe.errors import CopyFailed, GuestState, StillframeError
from stillframe.hypervisor.domain import qemu_by_uuid
from stillframe.hypervisor.model import Ending, Power
from stillframe.process import boot_id


@contextlib.contextmanager
def captured_offline(
    plan: Plan, tools: Tools, destination: str, stop: Stop, earlier: Anchor | None
) -> Iterator[Capture]:
    """Give the disks of a guest that is shut off, locked against its start for the length of the block.

    See choose.captured. Where the bitmap of *earlier*'s checkpoint is in an image and was closed well, the
    disk is counted by it, and `Capture.anchor` is *earlier* again: nothing new can be put in place.
    Raises CopyFailed, also when the guest was started meanwhile.
    """
    run = _Run(plan, tools, destination, stop)
    try:
        with contextlib.ExitStack() as opened:
            yield run.take(opened, earlier)
    except BaseException as error:
        run.end(error)
        if isinstance(error, StillframeError):
            error.guest = GuestState.UNTOUCHED
        raise
    run.end(None)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A disk whose images are locked."""

    disk: DiskRecord
    reader: DiskReader
    chain: tuple[ImageInfo, ...]
    note: str
    counted: bool


class _Run:
    """One offline run. *record* is always what the journal has; it has no disks: nothing is to be undone."""

    def __init__(self, plan: Plan, tools: Tools, destination: str, stop: Stop) -> None:
        self._plan = plan
        self._domain = plan.domain
        self._journal = tools.journal
        self._clock = tools.clock
        self._stop = stop
        self._starts = plan.domain.starts()
        self._identities: dict[str, FileIdentity] = {}
        self.record = self._journal.begin(RunRecord(
            id=new_run_id(tools.clock, plan.domain.uuid), uuid=plan.domain.uuid, name=plan.domain.name,
            uri=plan.domain.connection.uri, destination=destination, quiesce=Quiesce.NONE,
            state=State.PLANNED, began_at=utc_text(tools.clock.now()), pid=os.getpid(),
            boot_id=boot_id(), disks=(),
        ))

    def take(self, opened: contextlib.ExitStack, earlier: Anchor | None) -> Capture:
        """Lock all images, then prove that the guest is off; return the capture. Raises CopyFailed."""
        error = self._stop()
        if error is not None:
            raise error
        disks = [self._open(opened, disk, earlier) for disk in self._plan.disks]
        self._prove_off()
        self._refuse_other_definition()
        self._identities = {
            info.name: file_identity(info.name) for each in disks for info in each.chain
            if os.path.isabs(info.name) and os.path.exists(info.name)
        }
        consistency, warnings = self._consistency()
        self.record = self._journal.note(
            self.record, "shut off, and its images are locked", consistency=consistency.value,
            captured_at=utc_text(self._clock.now()))
        return Capture(
            self.record.id, self.record.captured_at, consistency,
            tuple(_still(each) for each in disks), (*self._plan.warnings, *warnings), 0.0, self.stop,
            self.check_still, kept_anchor(earlier, {
                each.disk.target: each.reader for each in disks if each.counted}),
        )

    def stop(self) -> StillframeError | None:
        """Return why the copy must end, None if it may go on."""
        if self._domain.starts() != self._starts:
            return self._started()
        return self._stop()

    def check_still(self) -> None:
        """Raise CopyFailed if the guest was started, or if somebody wrote to an image."""
        self._prove_off()
        for path, before in self._identities.items():
            if not before.special and _now(path) != before:
                raise CopyFailed(
                    f"The image {path} of {self._domain.name} was changed during the copy.",
                    "find out which program writes to it (fuser -v), then run again")

    def end(self, error: BaseException | None) -> None:
        """Write down that the copy is durable, or was given up and why. Nothing else is to be done."""
        record = self._journal.current(self.record)
        if record.state in BEFORE_RELEASE:
            given_up = "" if error is None else words(error)
            detail = "given up" if error is not None else "the copy is durable"
            record = self._journal.enter(record, State.RELEASED, detail, given_up=given_up)
        self.record = self._journal.enter(
            record, State.DONE, "nothing of the guest was changed", ended_at=utc_text(self._clock.now()))

    # --- steps --------------------------------------------------------------------------------

    def _open(
        self, opened: contextlib.ExitStack, disk: DiskRecord, earlier: Anchor | None
    ) -> _Opened:
        chain = chain_info(disk.base)
        bitmap, note = usable_bitmap(disk, chain[0], earlier)
        reader = opened.enter_context(open_reader(disk.base, clock=self._clock, bitmap=bitmap))
        return _Opened(disk, reader, chain, note, bool(bitmap))

    def _prove_off(self) -> None:
        """Raise CopyFailed unless libvirt and the process table both show that no QEMU of the guest runs.

        Where its images are locked by now, none can begin to.
        """
        power = self._domain.power()
        if power is not Power.OFF or qemu_by_uuid(self._domain.uuid) is not None \
                or self._domain.starts() != self._starts:
            raise self._started()

    def _refuse_other_definition(self) -> None:
        found = self._domain.view().inactive
        if found is None or found.text != self._plan.live.text:
            raise CopyFailed(
                f"The definition of {self._domain.name} was changed just now.", "run the command again")

    def _started(self) -> CopyFailed:
        return CopyFailed(
            f"{self._domain.name} was started while it was being read, so the copy is of no moment.",
            "run the command again: a guest that runs is captured by another method",
        )

    def _consistency(self) -> tuple[Consistency, tuple[str, ...]]:
        """Return what the copy is worth, by how the guest ended, and what is to be said of that."""
        ending = self._domain.ending()
        if ending is Ending.SHUTDOWN:
            return Consistency.SHUTDOWN, ()
        if self._plan.wishes.quiesce is Quiesce.NONE:
            return Consistency.CRASH, ()
        more = ", which is not in the copy" if ending is Ending.SAVED else ""
        return Consistency.CRASH, (
            f"the guest is shut off, but {ending.value}{more}: the copy is only crash-consistent",)


def _still(opened: _Opened) -> StillDisk:
    disk, reader = opened.disk, opened.reader
    return StillDisk(
        disk.target, disk.base, reader.size_bytes, Method.OFFLINE, lambda: contextlib.nullcontext(reader),
        opened.note)


def _now(path: str) -> FileIdentity | None:
    try:
        return file_identity(path)
    except OSError:
        return None
