"""Disks that say what changed on them: rightly, with too much, with zeroes, or wrongly."""

from __future__ import annotations

import random
from collections.abc import Iterable

from stillframe.extent import Extent, Kind
from tests.unit.repository_disks import SourceDisk

SECTOR = 512
ZERO_KINDS = (Kind.ZERO, Kind.HOLE)


class ChangedDisk(SourceDisk):
    """A SourceDisk that notes by sectors what was written since `settle`, zeroes apart."""

    def __init__(self, content: bytes | bytearray) -> None:
        super().__init__(content)
        self.touched: dict[int, bool] = {}
        self.changes = []

    def write(self, offset: int, content: bytes, *, said: bool = True) -> None:
        """Write; what was not *said* is not told of later."""
        content = content[: max(0, self.size_bytes - offset)]
        self.content[offset : offset + len(content)] = content
        if said:
            self.touch(offset, len(content))

    def touch(self, offset: int, length: int, *, may_be_zero: bool = True) -> None:
        """Say that a stretch may have changed. Sectors that are all zero are told of as zero, or as data."""
        end = min(offset + length, self.size_bytes)
        for sector in range(offset // SECTOR, -(-end // SECTOR) if end > offset else 0):
            self.touched[sector] = may_be_zero
        self.changes = list(self._extents_of(sorted(self.touched)))

    def settle(self) -> None:
        """Begin to count from here."""
        self.touched.clear()
        self.changes = []

    def _extents_of(self, sectors: Iterable[int]) -> Iterable[Extent]:
        held: Extent | None = None
        for sector in sectors:
            begin, end = sector * SECTOR, min((sector + 1) * SECTOR, self.size_bytes)
            zero = self.touched[sector] and not any(self.content[begin:end])
            kind = ZERO_KINDS[sector // 8 % 2] if zero else Kind.DATA
            if held is not None and held.end_bytes == begin and held.kind is kind:
                held = Extent(held.offset_bytes, end - held.offset_bytes, kind)
                continue
            if held is not None:
                yield held
            held = Extent(begin, end - begin, kind)
        if held is not None:
            yield held


def scribble(disk: ChangedDisk, chance: random.Random, chunk_bytes: int) -> None:
    """Write something somewhere, or zeroes, or say too much."""
    offset = chance.randrange(disk.size_bytes)
    length = chance.choice((1, 100, SECTOR, chunk_bytes, chunk_bytes * chance.randrange(1, 20)))
    if chance.random() < 0.5:
        offset -= offset % chunk_bytes
    what = chance.random()
    if what < 0.4:
        disk.write(offset, chance.randbytes(length))
    elif what < 0.7:
        disk.write(offset, bytes(length))
    elif what < 0.8:
        disk.write(offset, bytes(length))
        disk.touch(offset, length, may_be_zero=False)
    else:
        disk.touch(offset, length)
