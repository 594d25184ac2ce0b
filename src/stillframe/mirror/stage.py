"""Staging one disk: what to compare it with, what to believe, and the files that come of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from stillframe.block.reader import DiskReader
from stillframe.capture.watched import Watch
from stillframe.clock import Clock
from stillframe.errors import DestinationFull
from stillframe.mirror.apply import image_identity, settle_image
from stillframe.mirror.baseline import Baseline, ByImage, ByMap, NoImage
from stillframe.mirror.blockmap import BLOCK_SIZE_BYTES, MapReader, MapUnusable, MapWriter, open_map
from stillframe.mirror.copy import THREADS, DiskCopy, NewImage, Redo, Staging, Tally, data_bytes
from stillframe.mirror.files import FileFacts, Files
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
from stillframe.mirror.units import DATA_UNIT_BYTES
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
    were to be ("" if there is no such reason).
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


class DiskStage:
    """The copy of one disk, from deciding what to believe to the staged files being durable."""

    block_size = BLOCK_SIZE_BYTES
    data_unit_bytes = DATA_UNIT_BYTES
    threads = THREADS
    verify = False
    source = ""
    method = ""
    note = ""

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
        with watch.reads_source():
            self._total_bytes = data_bytes(self._reader, self.block_size, watch.tick)
        image = self._files.facts(image_name(self._target))
        first = image is None
        block_map, doubt = self._believe(watch)
        baseline = self._baseline(first, block_map)
        with contextlib.ExitStack() as stack:
            stack.callback(baseline.close)
            staging = self._staging(first)
            stack.callback(staging.close)
            new_map = MapWriter(
                self._files, staged_map_name(self._target), self._generation, size, self.block_size)
            stack.callback(new_map.close)
            self._copy = DiskCopy(self._reader, baseline, staging, new_map, self.block_size, watch)
            self._copy.run(self.data_unit_bytes, self.threads)
            staging.end()
            watch.tick()
            digest = new_map.end(watch.tick)
        disk = DiskRecord(
            target=self._target, image=image_name(self._target), size_bytes=size,
            block_size_bytes=self.block_size, map_digest=digest, source=self.source,
            identity=self._restored_identity(image), whole=first,
        )
        tally = self._copy.tally()
        return disk, CopyResult(
            target=self._target, size_bytes=size, data_bytes=tally.data_bytes,
            zero_bytes=size - tally.data_bytes, changed_bytes=tally.changed_bytes,
            written_bytes=staging.written_bytes + new_map.written_bytes,
            destination_read_bytes=baseline.read_bytes, healed_blocks=tally.healed_blocks,
            seconds=self._clock.monotonic_s() - began_s, first_copy=first, fell_back=doubt or self.note,
            method=self.method, note=self.note,
        )

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
