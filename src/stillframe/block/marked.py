"""Stretches that count as changed besides what a reader says: kept with an anchor older than its snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from stillframe.block.reader import Connection, DiskReader
from stillframe.extent import Extent, Kind
from stillframe.units import KIB

#: So many stretches are kept with an anchor. Of more, some are joined with what lies between them.
LIMIT = 512
_FIRST_GAP_BYTES = 64 * KIB


def stretches(changed: Iterable[Extent], limit: int = LIMIT) -> tuple[tuple[int, int], ...]:
    """Return (offset, length) of at most about *limit* stretches that hold all of *changed* (in order)."""
    found: list[tuple[int, int]] = []
    gap = 0
    for extent in changed:
        if found and extent.offset_bytes - sum(found[-1]) <= gap:
            found[-1] = found[-1][0], extent.end_bytes - found[-1][0]
            continue
        found.append((extent.offset_bytes, extent.length_bytes))
        while len(found) > limit:
            gap = 2 * gap or _FIRST_GAP_BYTES
            found = _joined(found, gap)
    return tuple(found)


def _joined(found: list[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for offset, length in found:
        if joined and offset - sum(joined[-1]) <= gap:
            joined[-1] = joined[-1][0], offset + length - joined[-1][0]
        else:
            joined.append((offset, length))
    return joined


def with_marked(
    changed: Iterable[Extent], marked: Sequence[tuple[int, int]],
    kinds: Callable[[int, int], Iterable[Extent]] = lambda at, length: [Extent(at, length, Kind.DATA)],
) -> Iterator[Extent]:
    """Yield *changed*, and between its extents what of *marked* is in none of them. All in order.

    *kinds* gives the extents of a stretch; without it, all of it is data.
    """
    left = list(reversed(marked))
    done = 0

    def until(limit: int | None) -> Iterator[Extent]:
        while left and (limit is None or left[-1][0] < limit):
            offset, length = left[-1]
            start, end = max(offset, done), offset + length
            stop = end if limit is None else min(end, limit)
            if start < stop:
                yield from kinds(start, stop - start)
            if stop < end:
                return
            left.pop()

    for extent in changed:
        yield from until(extent.offset_bytes)
        yield extent
        done = extent.end_bytes
    yield from until(None)


class MarkedReader:
    """A DiskReader for which *marked* stretches have changed, too."""

    def __init__(self, reader: DiskReader, marked: Sequence[tuple[int, int]]) -> None:
        self._reader = reader
        self._marked = marked

    @property
    def size_bytes(self) -> int:
        """See DiskReader."""
        return self._reader.size_bytes

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """See DiskReader."""
        return self._reader.extents(offset_bytes, length_bytes)

    def changed(self) -> Iterator[Extent] | None:
        """See DiskReader."""
        changed = self._reader.changed()
        return None if changed is None else with_marked(changed, self._marked, self._reader.extents)

    def connect(self) -> contextlib.AbstractContextManager[Connection]:
        """See DiskReader."""
        return self._reader.connect()
