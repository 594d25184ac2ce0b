"""The work of one copy, cut to size: which stretches to read, and which are zero anyway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stillframe.extent import Extent, Kind
from stillframe.units import KIB, MIB

#: A thread's buffer. It must stay in the processor's cache from the socket to the hash to the
#: file: 1 or 4 MiB cost up to twice the system time, 256 KiB costs more round trips (measured).
DATA_UNIT_BYTES = 512 * KIB
#: Zero stretches are only looked up in the map, but stop must be noticed in good time.
ZERO_UNIT_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Unit:
    """A stretch of the disk: begins at a block's edge, ends at one or at the disk's end."""

    offset_bytes: int
    length_bytes: int
    is_zero: bool


def block_stretches(
    extents: Iterable[Extent], size_bytes: int, block_size: int, start_bytes: int = 0
) -> Iterator[Unit]:
    """Yield the disk as alternating stretches of whole blocks, zero and not.

    A block is zero only if all of it is. *extents* cover the disk in order, without gaps, from
    *start_bytes* (a block's edge) to *size_bytes*.
    """
    done = data_start = start_bytes  # up to here all is yielded or belongs to the held stretch of data
    for extent in extents:
        if not extent.kind.reads_as_zero:
            done = min(_up(extent.end_bytes, block_size), size_bytes)
            continue
        start = max(_up(extent.offset_bytes, block_size), done)
        end = size_bytes if extent.end_bytes >= size_bytes else extent.end_bytes // block_size * block_size
        if start >= end:
            continue
        if start > data_start:
            yield Unit(data_start, start - data_start, is_zero=False)
        yield Unit(start, end - start, is_zero=True)
        data_start = done = end
    if data_start < size_bytes:
        yield Unit(data_start, size_bytes - data_start, is_zero=False)


def work_units(
    extents: Iterable[Extent], size_bytes: int, block_size: int, data_unit_bytes: int = DATA_UNIT_BYTES
) -> Iterator[Unit]:
    """Yield the whole disk in order, in pieces that one thread does at a time."""
    assert data_unit_bytes % block_size == 0
    for stretch in block_stretches(extents, size_bytes, block_size):
        yield from _pieces(stretch, data_unit_bytes)


def changed_units(
    changed: Iterable[Extent], size_bytes: int, block_size: int, data_unit_bytes: int = DATA_UNIT_BYTES
) -> Iterator[Unit]:
    """Yield every block that *changed* touches, in order, in pieces that one thread does at a time.

    *changed* are extents in order, with gaps where nothing changed. A block is zero only if all of it is
    said to be: of one that is so in part, the rest is not known here, and it is read.
    """
    assert data_unit_bytes % block_size == 0
    for group in _groups(changed, block_size):
        start = group[0].offset_bytes // block_size * block_size
        end = min(_up(group[-1].end_bytes, block_size), size_bytes)
        for stretch in block_stretches(_filled(group, start, end), end, block_size, start):
            yield from _pieces(stretch, data_unit_bytes)


def _groups(changed: Iterable[Extent], block_size: int) -> Iterator[list[Extent]]:
    """Yield the extents in groups, with at least a block's edge between any two groups."""
    group: list[Extent] = []
    for extent in changed:
        if group and extent.offset_bytes // block_size * block_size >= _up(group[-1].end_bytes, block_size) \
                and extent.offset_bytes > group[-1].end_bytes:
            yield group
            group = []
        group.append(extent)
    if group:
        yield group


def _filled(group: list[Extent], start: int, end: int) -> Iterator[Extent]:
    """Yield the group's extents from *start* to *end* with what is between them, as data."""
    done = start
    for extent in group:
        if extent.offset_bytes > done:
            yield Extent(done, extent.offset_bytes - done, Kind.DATA)
        yield extent
        done = extent.end_bytes
    if done < end:
        yield Extent(done, end - done, Kind.DATA)


def _pieces(stretch: Unit, data_unit_bytes: int) -> Iterator[Unit]:
    piece = ZERO_UNIT_BYTES if stretch.is_zero else data_unit_bytes
    end = stretch.offset_bytes + stretch.length_bytes
    for at in range(stretch.offset_bytes, end, piece):
        yield Unit(at, min(piece, end - at), stretch.is_zero)


def _up(offset: int, block_size: int) -> int:
    return -(-offset // block_size) * block_size
