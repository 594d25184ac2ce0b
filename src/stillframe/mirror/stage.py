"""Staging one disk: what to compare it with, what to believe, and the files that come of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from stillframe.block.reader import DiskReader
from stillframe.capture.plan import FULL_READ_EVERY_S, why_due
from stillframe.capture.watched import Watch
from stillframe.clock import Clock, utc_text
from stillframe.errors import DestinationFull
from stillframe.mirror.apply import image_identity, settle_image
from stillframe.mirror.audit import Audit, Audited, Ranges
from stillframe.mirror.baseline import Baseline, ByImage, ByMap, NoImage
from stillframe.mirror.blockmap import BLOCK_SIZE_BYTES, MapReader, MapUnusable, MapWriter, open_map
from stillframe.mirror.copy import THREADS, DiskCopy, NewImage, Redo, Staging, Tally, data_bytes
from stillframe.mirror.files import Files
from stillframe.mirror.layout import (
    RECORD,
    image_name,
    map_name,
    redo_name,
    staged_image_name,
    staged_map_name,
)
from stillframe.mirror.record import (
    DAMAGED,
    DiskRecord,
    FolderState,
    ImageIdentity,
    Inspection,
)
from stillframe.mirror.redo import RedoWriter
from stillframe.mirror.units import DATA_UNIT_BYTES, Unit, changed_units, work_units
from stillframe.storage.open_files import FileFacts
from stillframe.units import size_text


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """How far the copy of one disk is. `total_bytes` is the data there is to read."""

    target: str
    done_bytes: int
    total_bytes: int
    changed_bytes: int


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What copying one disk came to.

    `changed_bytes` is what differs from the old mirror (all data on a first copy);
    `written_bytes` what was written to the destination for it, map and redo headers included.
    `healed_blocks`: the destination differed though the map said equal. `fell_back` says why the
    map was not believed, or the disk read whole although it was to be read by its changes ("" if neither).
    `method` is how the disk was captured, `note` why it was read whole although its changes are known or
    were to be ("" if there is no such reason). `unchanged_bytes` was not read, being known to be as it was;
    `audited_blocks` of it were compared all the same. `audit_differs_at_bytes`: the first place that
    differed there (None if none did).
    """

    target: str
    size_bytes: int
    data_bytes: int
    zero_bytes: int
    changed_bytes: int
    written_bytes: int
    destination_read_bytes: int
    healed_blocks: int
    seconds: float
    first_copy: bool
    fell_back: str
    method: str
    note: str
    unchanged_bytes: int
    audited_blocks: int
    audit_differs_at_bytes: int | None


_NO_AUDIT = Audited(0)


@dataclass(frozen=True, slots=True)
class _How:
    """How a disk is read: by its changes or whole, then why. *suspect*: what it had said to have changed."""

    by_changes: bool
    note: str = ""
    audited: Audited = _NO_AUDIT
    suspect: Ranges | None = None


class DiskStage:
    """The copy of one disk, from deciding what to believe to the staged files being durable."""

    block_size = BLOCK_SIZE_BYTES
    data_unit_bytes = DATA_UNIT_BYTES
    threads = THREADS
    verify = False
    source = ""
    method = ""
    note = ""
    fell_back = False
    full_read_every_s = FULL_READ_EVERY_S

    def __init__(
        self, files: Files, clock: Clock, found: Inspection, target: str, reader: DiskReader,
        generation: bytes,
    ) -> None:
        self._files = files
        self._clock = clock
        self._old = found
        self._target = target
        self._reader = reader
        self._generation = generation
        self._total_bytes = 0
        self._copy: DiskCopy | None = None

    def progress(self) -> CopyProgress:
        """Return how far it is. For any thread, at any time."""
        tally = self._copy.tally() if self._copy is not None else Tally()
        return CopyProgress(self._target, tally.data_bytes, self._total_bytes, tally.changed_bytes)

    def run(self, watch: Watch) -> tuple[DiskRecord, CopyResult]:
        """Stage the disk, durably, and return its record for the marker and the statistics."""
        began_s = self._clock.monotonic_s()
        size = self._reader.size_bytes
        image = self._files.facts(image_name(self._target))
        first = image is None
        block_map, doubt = self._believe(watch)
        how = self._how(block_map, watch)
        with watch.reads_source():
            self._total_bytes = data_bytes(self._units(how.by_changes), watch.tick)
        baseline = self._baseline(first, block_map)
        with contextlib.ExitStack() as stack:
            stack.callback(baseline.close)
            staging = self._staging(first)
            stack.callback(staging.close)
            new_map = MapWriter(
                self._files, staged_map_name(self._target), self._generation, size, self.block_size)
            stack.callback(new_map.close)
            if how.by_changes:
                assert block_map is not None
                new_map.take_over(block_map, size, watch.tick)
            copy = self._copy = DiskCopy(self._reader, baseline, staging, new_map, self.block_size, watch)
            copy.expected = how.suspect
            copy.run(self._units(how.by_changes), self.data_unit_bytes, self.threads)
            staging.end()
            watch.tick()
            digest = new_map.end(watch.tick)
        disk = DiskRecord(
            target=self._target, image=image_name(self._target), size_bytes=size,
            block_size_bytes=self.block_size, map_digest=digest, source=self.source,
            identity=self._restored_identity(image), whole=first,
            read_whole_at=self._read_whole_at() if how.by_changes else utc_text(self._clock.now()),
        )
        tally = copy.tally()
        note, differs_at = how.note, copy.unexpected_at_bytes
        if how.suspect is not None:
            differs_at = how.audited.differs_at_bytes if differs_at is None else differs_at
            note = f"at {differs_at} it differs from the mirror, and was said to be as it was"
        return disk, CopyResult(
            target=self._target, size_bytes=size, data_bytes=tally.data_bytes,
            zero_bytes=tally.zero_bytes, changed_bytes=tally.changed_bytes,
            written_bytes=staging.written_bytes + new_map.written_bytes,
            destination_read_bytes=baseline.read_bytes, healed_blocks=tally.healed_blocks,
            seconds=self._clock.monotonic_s() - began_s, first_copy=first,
            fell_back=doubt or (self.note if self.fell_back else "") or ("" if how.suspect is None else note),
            method=self.method, note=note, unchanged_bytes=size - tally.data_bytes - tally.zero_bytes,
            audited_blocks=how.audited.blocks, audit_differs_at_bytes=differs_at,
        )

    def _units(self, by_changes: bool) -> Iterator[Unit]:
        size = self._reader.size_bytes
        if not by_changes:
            return work_units(self._reader.extents(), size, self.block_size, self.data_unit_bytes)
        changed = self._reader.changed()
        assert changed is not None
        return changed_units(changed, size, self.block_size, self.data_unit_bytes)

    def _how(self, block_map: MapReader | None, watch: Watch) -> _How:
        """Decide whether to read only what changed since the mirror's moment."""
        disk = self._old.record.disk(self._target) if self._old.record is not None else None
        with watch.reads_source():
            # Changes count from the mirror's anchor: without one they would count from nobody knows when.
            changed = self._reader.changed() if self._is_anchored() else None
            if block_map is None or disk is None or changed is None or self.verify \
                    or disk.size_bytes != self._reader.size_bytes:
                return _How(by_changes=False, note=self.note)
            due = why_due(self._clock, disk.read_whole_at or "", self.full_read_every_s)
            if due:
                return _How(by_changes=False, note=due)
            ranges = Ranges(changed_units(changed, disk.size_bytes, self.block_size, self.data_unit_bytes))
        audited = Audit(self._reader, block_map, ranges, self.block_size, self._clock, watch).run()
        if audited.differs_at_bytes is not None:
            return _How(by_changes=False, audited=audited, suspect=ranges)
        return _How(by_changes=True, audited=audited)

    def _is_anchored(self) -> bool:
        anchor = self._old.record.anchor if self._old.record is not None else msgspec.UNSET
        return anchor is not msgspec.UNSET and self._target in anchor.sizes

    def _read_whole_at(self) -> str | msgspec.UnsetType:
        disk = self._old.record.disk(self._target) if self._old.record is not None else None
        return msgspec.UNSET if disk is None else disk.read_whole_at

    def _believe(self, watch: Watch) -> tuple[MapReader | None, str]:
        """Return the map if it can be believed, else None and why not ("" if none is expected)."""
        record, state = self._old.record, self._old.state
        if record is None:
            return None, self._old.detail if state is FolderState.UNREADABLE else ""
        if record.state == DAMAGED:
            return None, "the images were left as a mixture by an update that could not be ended"
        disk = record.disk(self._target)
        now = image_identity(self._files, self._target)
        if disk is None:
            return None, f"{image_name(self._target)} is not in {RECORD}" if now else ""
        if now is None:
            return None, f"{image_name(self._target)} was gone"
        if disk.identity != now:
            return None, f"{image_name(self._target)} was changed by something else than stillframe"
        if disk.block_size_bytes != self.block_size:
            return None, "the map has another block size"
        try:
            return open_map(
                self._files, map_name(self._target), generation=bytes.fromhex(record.generation),
                size_bytes=disk.size_bytes, block_size=self.block_size, digest=disk.map_digest,
                tick=watch.tick,
            ), ""
        except MapUnusable as error:
            return None, str(error)

    def _baseline(self, first: bool, block_map: MapReader | None) -> Baseline:
        if first:
            return NoImage(self.block_size)
        if block_map is not None and not self.verify:
            return ByMap(block_map, self.block_size)
        return ByImage(self._files, image_name(self._target), self.block_size, block_map)

    def _staging(self, first: bool) -> Staging:
        size = self._reader.size_bytes
        if not first:
            writer = RedoWriter(self._files, redo_name(self._target), self._generation, size)
            return Redo(self._files, writer, image_name(self._target))
        free = self._files.free_bytes()
        if self._total_bytes > free:
            raise DestinationFull(
                f"The first copy of {self._target} needs {size_text(self._total_bytes)}; the destination "
                f"has {size_text(free)} free.", "df -h DEST   # free some space, then run again")
        return NewImage(self._files, staged_image_name(self._target), size)

    def _restored_identity(self, before: FileFacts | None) -> ImageIdentity | None:
        """Undo what reserving room did to the image's time of change; return what it looks like.

        If this update is dropped, the old map must still be believed.
        """
        if before is None:
            return None
        return settle_image(self._files, self._target, before.mtime_ns)
