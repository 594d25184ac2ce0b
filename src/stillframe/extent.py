"""Extents: what a stretch of a disk holds, without saying what it reads."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


class Kind(enum.Enum):
    """What an extent holds. ZERO and HOLE both read as zeroes; a HOLE takes no space."""

    DATA = "data"
    ZERO = "zero"
    HOLE = "hole"

    @property
    def reads_as_zero(self) -> bool:
        """Whether reading the extent yields only zero bytes."""
        return self is not Kind.DATA


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a disk: *length_bytes* > 0 from *offset_bytes*, all of one *kind*."""

    offset_bytes: int
    length_bytes: int
    kind: Kind

    @property
    def end_bytes(self) -> int:
        """The offset of the first byte behind the extent."""
        return self.offset_bytes + self.length_bytes


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Yield *extents* (in order, without gaps or overlaps) with equal neighbours joined."""
    held: Extent | None = None
    for extent in extents:
        if held is not None and held.kind is extent.kind and held.end_bytes == extent.offset_bytes:
            held = Extent(held.offset_bytes, held.length_bytes + extent.length_bytes, held.kind)
            continue
        if held is not None:
            yield held
        held = extent
    if held is not None:
        yield held
