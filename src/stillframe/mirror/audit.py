"""The audit: is what is said to be unchanged really unchanged? Looked at in samples, in every update.

Bitmaps and overlays are kept by other programs, for weeks. A reader that leaves a change out would make the
mirror wrong for good, and nobody would see it. So a part of what it calls unchanged is compared with the
map; where one block differs, nothing that it says of the disk is believed, and the disk is read whole.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stillframe.block.reader import Connection, DiskReader
from stillframe.capture.watched import Watch
from stillframe.clock import Clock, Deadline
from stillframe.mirror.blockmap import DIGEST_BYTES, MapReader, block_digests, digest_of_zeroes
from stillframe.mirror.units import ZERO_UNIT_BYTES, Unit, block_stretches

#: How many of the unchanged blocks that hold data are read, for how long at most, and how many at least.
SHARE = 0.005
TIMEOUT_S = 5.0
HANDFUL = 8
#: So many blocks are read in the order of the disk; which ones is left to chance.
_BATCH = 256


class Ranges:
    """Stretches of whole blocks, in order, to look up whether a block is in one."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        for unit in units:
            end = unit.offset_bytes + unit.length_bytes
            if self._ends and self._ends[-1] == unit.offset_bytes:
                self._ends[-1] = end
            else:
                self._starts.append(unit.offset_bytes)
                self._ends.append(end)

    def holds(self, offset_bytes: int) -> bool:
        """Return whether the byte is in one of the stretches."""
        at = bisect_right(self._starts, offset_bytes) - 1
        return at >= 0 and offset_bytes < self._ends[at]

    def outside(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what of the stretch is in none."""
        at = max(bisect_right(self._starts, start) - 1, 0)
        while start < end and at < len(self._starts):
            if self._starts[at] >= end:
                break
            if start < self._starts[at]:
                yield start, self._starts[at]
            start, at = max(start, self._ends[at]), at + 1
        if start < end:
            yield start, end


@dataclass(frozen=True, slots=True)
class Audited:
    """What came of an audit: how many blocks were compared, and where one differs (None if none does)."""

    blocks: int
    differs_at_bytes: int | None = None


class Audit:
    """One audit of one disk, whose *changed* stretches are left aside."""

    def __init__(
        self, reader: DiskReader, block_map: MapReader, changed: Ranges, block_size: int, clock: Clock,
        watch: Watch,
    ) -> None:
        self._reader = reader
        self._map = block_map
        self._changed = changed
        self._block_size = block_size
        self._zero_digest = digest_of_zeroes(block_size)
        self._watch = watch
        self._deadline = Deadline(clock, TIMEOUT_S)
        self._chance = random.SystemRandom()
        #: All unchanged blocks with data while they are few, and those that were picked of all.
        self._few: list[int] = []
        self._picked: list[int] = []

    def run(self) -> Audited:
        """Compare a sample. Raises CopyFailed, and what reading the map raises."""
        with self._watch.reads_source():
            differs = self._pick()
        if differs is not None:
            return Audited(0, differs)
        if len(self._picked) < HANDFUL:
            self._picked = self._chance.sample(self._few, min(HANDFUL, len(self._few)))
        self._chance.shuffle(self._picked)
        done = 0
        with self._reader.connect() as connection:
            for at in range(0, len(self._picked), _BATCH):
                for offset in sorted(self._picked[at : at + _BATCH]):
                    if self._deadline.passed() and done >= HANDFUL:
                        return Audited(done)
                    self._watch.tick()
                    done += 1
                    if not self._is_equal(connection, offset):
                        return Audited(done, offset)
        return Audited(done)

    def _pick(self) -> int | None:
        """Choose the blocks to read; return where one reads as zero that the map knows to hold data."""
        for stretch in block_stretches(
                self._reader.extents(), self._reader.size_bytes, self._block_size):
            self._watch.tick()
            if self._deadline.passed() and self._few:
                break
            end = stretch.offset_bytes + stretch.length_bytes
            for start, stop in self._changed.outside(stretch.offset_bytes, end):
                if not stretch.is_zero:
                    self._pick_of(start, stop)
                elif (differs := self._not_zero(start, stop)) is not None:
                    return differs
        return None

    def _pick_of(self, start: int, end: int) -> None:
        if len(self._few) < HANDFUL / SHARE:
            self._few.extend(range(start, end, self._block_size))
        # As far as the next one to pick, if each is picked with the same chance.
        at = start + self._skip() * self._block_size
        while at < end:
            self._picked.append(at)
            at += (1 + self._skip()) * self._block_size

    def _skip(self) -> int:
        return int(math.log(1.0 - self._chance.random()) / math.log(1.0 - SHARE))

    def _not_zero(self, start: int, end: int) -> int | None:
        for at in range(start, end, ZERO_UNIT_BYTES):
            count = -(-(min(at + ZERO_UNIT_BYTES, end) - at) // self._block_size)
            digests = self._map.digests(at, count)
            if digests.count(0) != len(digests):
                first = next(index for index, byte in enumerate(digests) if byte)
                return at + first // DIGEST_BYTES * self._block_size
        return None

    def _is_equal(self, connection: Connection, offset: int) -> bool:
        length = min(self._block_size, self._reader.size_bytes - offset)
        content = memoryview(bytearray(length))
        with self._watch.reads_source():
            connection.pread_into(content, offset)
        return block_digests(content, self._block_size, self._zero_digest) == self._map.digests(offset, 1)
