"""The story of a restore in place: protect the guest, compare, write what differs, let go.

Until the first byte is written (RestorePhase.WRITING) anything that goes wrong leaves the guest as it was.
From then on it can't be started before the restore is finished, by this call or by a later one, which goes on
where the last was broken off. Everything that can be found out before, such as a chunk that is lost, is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import msgspec

from stillframe.block import tools as block_tools
from stillframe.block.image import ImagePlace
from stillframe.block.reader import open_reader
from stillframe.capture.limits import Limits
from stillframe.capture.restoring import RestorePhase, Restoring, RestoringDisk, RestoringStore
from stillframe.clock import Clock, Deadline
from stillframe.errors import GuestState, ShutdownTimedOut, SlotDamaged, StillframeError
from stillframe.hypervisor.domain import Domain, qemu_by_uuid
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import Power
from stillframe.repository.jobs import InOrder
from stillframe.repository.manifest import DiskEntry, Manifest
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView
from stillframe.restore.compare import Comparison, Differences, Stretch
from stillframe.restore.in_place_plan import is_size
from stillframe.restore.known import Known, may_differ
from stillframe.restore.machine_in_place import check_machine, write_machine
from stillframe.restore.protect import defined, let_go, protect
from stillframe.restore.qcow2 import open_image_target
from stillframe.restore.run import Lost
from stillframe.restore.target import Target, open_existing_target
from stillframe.units import GIB, MIB

#: What is fetched by one job, and jobs that are on their way.
_FETCH_BYTES = MIB
_FETCHERS = 2
_FLYING = 8
#: After so much data is written, it is made durable, and written down how far that is.
_KEEP_BYTES = 256 * MIB
#: So much data is looked at before the first byte is written: whether all of it can be read.
_CHECKED_BYTES = 4 * GIB
_POLL_S = 0.25

#: What is done with a disk once its image is being changed.
WRITING = "write"

#: Told of a disk what is done with it, how many of its bytes are done, and how many there are.
Report = Callable[[str, str, int, int], None]
#: Returns the error to end with, if there is a reason.
Stop = Callable[[], StillframeError | None]


@dataclass(frozen=True, slots=True)
class InPlaceTools:
    """What a restore in place works with.

    *known* is what is known of disks without reading them, by target; the others are read whole.
    """

    places: Places
    domain: Guest
    store: RestoringStore
    clock: Clock
    stop: Stop
    report: Report
    known: Mapping[str, Known] = field(default_factory=dict)


@dataclass(slots=True)
class DiskInPlace:
    """What came of one disk. Numbers are bytes; *skipped* was done by an earlier call.

    *by_bitmap*: only what may differ by a checkpoint's bitmap was read.
    """

    target: str
    path: str
    size_bytes: int
    read_bytes: int = 0
    skipped_bytes: int = 0
    differing_bytes: int = 0
    written_bytes: int = 0
    zeroed_bytes: int = 0
    lost: list[Lost] = field(default_factory=list)
    by_bitmap: bool = False


@dataclass(frozen=True, slots=True)
class InPlace:
    """What came of a restore in place. *lost* are files of the machine that could not be read."""

    disks: tuple[DiskInPlace, ...]
    files: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether nothing was lost."""
        return not self.lost and not any(disk.lost for disk in self.disks)


def compare_in_place(restoring: Restoring, manifest: Manifest, tools: InPlaceTools) -> InPlace:
    """Say what a restore would write, and change nothing. The guest can't start meanwhile."""
    run = _Run(restoring, manifest, tools, skip_bad=True)
    for disk in restoring.disks:
        run.compare(disk, disk.meanwhile if restoring.phase.is_torn else disk.place)
    return InPlace(tuple(run.done.values()))


def restore_in_place(
    restoring: Restoring, manifest: Manifest, tools: InPlaceTools, *, skip_bad: bool = False
) -> InPlace:
    """Make the guest's disks equal to the snapshot's. Needs the domain's lock.

    An error before the first write leaves the guest as it was; a later one leaves it protected, and says so.
    With *skip_bad*, what is lost stays as it is and is named. Raises TargetInUse, TargetSmall, SlotDamaged,
    CopyFailed, DestinationLost, DestinationFull, StorageError, StateFolderUnusable, NeedsAttention.
    """
    run = _Run(restoring, manifest, tools, skip_bad=skip_bad)
    try:
        return run.run()
    except BaseException as error:
        run.given_up(error)
        raise


def finish_untorn(restoring: Restoring, store: RestoringStore, domain: Guest) -> None:
    """End a restore that was broken off before the first write, or after the last. Raises NeedsAttention."""
    let_go(restoring, domain)
    store.remove(restoring.uuid)


def turn_off(domain: Domain, limits: Limits, clock: Clock, stop: Stop, *, force: bool) -> None:
    """Shut the guest down, by asking it or by force, and wait until its QEMU is gone.

    Raises ShutdownTimedOut, and the reason to *stop*.
    """
    if domain.power() is not Power.OFF:
        if force:
            domain.destroy()
        else:
            domain.ask_to_shut_down(max(1, round(limits.agent_s)))
    deadline = Deadline(clock, limits.shutdown_s)
    while domain.power() is not Power.OFF or qemu_by_uuid(domain.uuid) is not None:
        if deadline.passed():
            raise ShutdownTimedOut(
                f"{domain.name} did not shut down within {limits.shutdown_s:.0f} s. It runs on.",
                f"{domain.advice.state}   # a longer time: --shutdown-timeout; --force cuts its power",
                GuestState.UNTOUCHED)
        reason = stop()
        if reason is not None:
            reason.guest = GuestState.UNKNOWN
            reason.message = f"{reason.message} {domain.name} was told to shut down, and still may."
            reason.args = (reason.message,)
            reason.next_command = f"{domain.advice.state}; then {reason.next_command}"
            raise reason
        domain.connection.wait_change(_POLL_S)


class _Run:
    """One restore in place. *record* is always what the store has."""

    def __init__(
        self, restoring: Restoring, manifest: Manifest, tools: InPlaceTools, *, skip_bad: bool
    ) -> None:
        self.record = restoring
        self._manifest = manifest
        self._tools = tools
        self._skip_bad = skip_bad
        self._entries = {disk.target: disk for disk in manifest.disks}
        self._found: dict[str, Differences] = {}
        self.done = {
            disk.target: DiskInPlace(
                disk.target, disk.place.text(), self._entries[disk.target].size_bytes)
            for disk in restoring.disks}

    def run(self) -> InPlace:
        self._tools.store.write(self.record)
        protect(self.record, self._tools.domain)
        self._tools.store.hook("protected")
        for disk in self.record.disks:
            self.compare(disk, disk.meanwhile)
        if not self.record.phase.is_torn:
            self._check_readable()
        self._end_if_asked()
        self._enter(RestorePhase.WRITING)
        for disk in self.record.disks:
            self._write(disk)
        machine = write_machine(
            self._manifest, self._definition(), self._tools.places, skip_bad=self._skip_bad,
        ) if self.record.whole else None
        self._enter(RestorePhase.WRITTEN)
        finish_untorn(self.record, self._tools.store, self._tools.domain)
        disks = tuple(self.done.values())
        return InPlace(disks) if machine is None else InPlace(
            disks, machine.files, machine.lost, machine.warnings)

    def given_up(self, error: BaseException) -> None:
        """Leave things as they are to be left after *error*: let the guest go if no byte was written."""
        if self.record.phase is RestorePhase.PROTECTING:
            with contextlib.suppress(StillframeError):  # recover does it then
                finish_untorn(self.record, self._tools.store, self._tools.domain)
                if isinstance(error, StillframeError):
                    error.guest = GuestState.UNTOUCHED
                return
        if not isinstance(error, StillframeError):
            return
        error.guest = GuestState.RESTORING
        if self.record.phase.is_torn:
            error.message = f"{error.message} The disks of {self.record.name} are only partly restored."
            error.args = (error.message,)
            first = f"{error.next_command}; then " if error.next_command else ""
            error.next_command = first + self.record.again()

    def compare(self, disk: RestoringDisk, place: ImagePlace) -> None:
        """Find out where the disk differs. Raises SlotDamaged if the tree can't be read."""
        entry, done = self._entries[disk.target], self.done[disk.target]
        done.skipped_bytes = disk.done_bytes
        known = self._tools.known.get(disk.target) if disk.done_bytes == 0 else None
        bitmap = known.bitmap if known is not None else ""
        with open_reader(place, clock=self._tools.clock, bitmap=bitmap) as source:
            comparison = Comparison(
                self._tools.places, entry, source, self._tools.stop,
                lambda at: self._tools.report(disk.target, "compare", at, entry.size_bytes))
            only = None if known is None else may_differ(self._tools.places, entry, known, source)
            done.by_bitmap = only is not None
            found = self._found[disk.target] = comparison.run(disk.done_bytes, only)
        if comparison.damage is not None and not self._skip_bad:
            raise comparison.damage
        done.read_bytes = comparison.read_bytes
        done.differing_bytes = found.data_bytes + found.zero_bytes

    def _enter(self, phase: RestorePhase) -> None:
        self._note(msgspec.structs.replace(self.record, phase=phase))

    def _end_if_asked(self) -> None:
        reason = self._tools.stop()
        if reason is not None:
            raise reason

    def _note(self, record: Restoring) -> None:
        self._tools.store.write(record)
        self.record = record

    def _definition(self) -> str:
        """Return what the guest will be defined by in the end, but for its images."""
        return self.record.definition or defined(self.record, self._tools.domain).text

    def _check_readable(self) -> None:
        """Read what is to be written once, so that a lost chunk is known before the first write."""
        if self._skip_bad:
            return
        if self.record.whole:
            check_machine(self._manifest, self._definition(), self._tools.places)
        if sum(each.data_bytes for each in self._found.values()) > _CHECKED_BYTES:
            return
        for target, found in self._found.items():
            for _ in self._parts(target, found, "check"):
                pass

    def _write(self, disk: RestoringDisk) -> None:
        entry, found, done = self._entries[disk.target], self._found[disk.target], self.done[disk.target]
        self._tools.report(disk.target, WRITING, disk.done_bytes, entry.size_bytes)
        if not is_size(block_tools.image_info(disk.meanwhile).virtual_size_bytes, entry.size_bytes):
            block_tools.resize(disk.meanwhile, -(-entry.size_bytes // 512) * 512)
        kept = done.written_bytes
        with self._target(disk, entry) as target:
            for part in self._parts(disk.target, found, WRITING):
                self._put(target, part, done)
                if done.written_bytes - kept >= _KEEP_BYTES:
                    target.flush()
                    self._keep(disk.target, part.offset_bytes + part.length_bytes)
                    kept = done.written_bytes
            target.publish()
        self._keep(disk.target, entry.size_bytes)

    def _target(self, disk: RestoringDisk, entry: DiskEntry) -> AbstractContextManager[Target]:
        place = disk.meanwhile
        if place.kind.is_local and place.driver == "raw":
            return open_existing_target(place.path, entry.size_bytes)
        return open_image_target(place, self._tools.clock)

    def _put(self, target: Target, part: _Part, done: DiskInPlace) -> None:
        if part.damage is not None:
            done.lost.append(Lost(part.offset_bytes, part.length_bytes, part.damage))
        elif part.content is None:
            target.zero(part.offset_bytes, part.length_bytes)
            done.zeroed_bytes += part.length_bytes
        else:
            target.write(part.content, part.offset_bytes)
            done.written_bytes += part.length_bytes

    def _keep(self, target: str, done_bytes: int) -> None:
        """Write down how far a disk is. What lies behind something lost is compared again by a later call."""
        lost = self.done[target].lost
        until = min(done_bytes, lost[0].offset_bytes) if lost else done_bytes
        self._note(msgspec.structs.replace(self.record, disks=tuple(
            msgspec.structs.replace(disk, done_bytes=until) if disk.target == target else disk
            for disk in self.record.disks)))

    def _parts(self, target: str, found: Differences, doing: str) -> Iterator[_Part]:
        """Yield what differs, in order, data fetched ahead. Raises SlotDamaged, but with skip_bad."""
        entry = self._entries[target]
        with DiskView(self._tools.places, entry) as view, ThreadPoolExecutor(_FETCHERS, "part") as pool:
            jobs: InOrder[Stretch, list[_Part]] = InOrder(pool, _FLYING)
            fetch = partial(_fetched, view, self._tools.places.repository.parameters.chunk_bytes)
            try:
                for stretch in _portions(found.stretches()):
                    if jobs.full:
                        yield from self._taken(jobs, target, doing, entry.size_bytes)
                    jobs.put(stretch, partial(fetch, stretch))
                while jobs:
                    yield from self._taken(jobs, target, doing, entry.size_bytes)
            finally:
                jobs.drop()
        self._tools.report(target, doing, entry.size_bytes, entry.size_bytes)

    def _taken(
        self, jobs: InOrder[Stretch, list[_Part]], target: str, doing: str, size_bytes: int
    ) -> Iterator[_Part]:
        self._end_if_asked()
        stretch, parts = jobs.take()
        for part in parts:
            if part.error is not None and not self._skip_bad:
                raise part.error
        yield from parts
        self._tools.report(target, doing, stretch.offset_bytes + stretch.length_bytes, size_bytes)


@dataclass(frozen=True, slots=True)
class _Part:
    """What is to be written somewhere: *content*, zeroes if None, or nothing: it is lost, by *damage*."""

    offset_bytes: int
    length_bytes: int
    content: memoryview | None = None
    damage: str | None = None
    error: SlotDamaged | None = None


def _portions(stretches: Iterator[Stretch]) -> Iterator[Stretch]:
    """Yield the stretches, those with data in portions that one job fetches."""
    for each in stretches:
        step = each.length_bytes if each.is_zero or each.is_lost else _FETCH_BYTES
        for at in range(0, each.length_bytes, step):
            length = min(step, each.length_bytes - at)
            yield Stretch(each.offset_bytes + at, length, each.is_zero, each.is_lost)


def _fetched(view: DiskView, chunk_bytes: int, stretch: Stretch) -> list[_Part]:
    """Return what is to be written there; chunk by chunk where a chunk is lost. Raises StorageError."""
    if stretch.is_zero:
        return [_Part(stretch.offset_bytes, stretch.length_bytes)]
    if stretch.is_lost:
        return [_Part(stretch.offset_bytes, stretch.length_bytes, damage="a node of the disk's tree is lost")]
    try:
        return [_read(view, stretch.offset_bytes, stretch.length_bytes)]
    except SlotDamaged:
        parts = []
        for at in range(0, stretch.length_bytes, chunk_bytes):
            offset, length = stretch.offset_bytes + at, min(chunk_bytes, stretch.length_bytes - at)
            try:
                parts.append(_read(view, offset, length))
            except SlotDamaged as damage:
                parts.append(_Part(offset, length, damage=damage.why, error=damage))
        return parts


def _read(view: DiskView, offset: int, length: int) -> _Part:
    # Memory of its own for each: what is written must stay until it is.
    content = memoryview(bytearray(length))
    view.read_into(content, offset)
    return _Part(offset, length, content)
