"""Which chunks of a disk an incremental write looks at. All others stay the parent's; nobody visits them."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from heapq import merge

from stillframe.extent import Extent, Kind, merged
from stillframe.repository.layout import Parameters
from stillframe.repository.scan import Unit

#: So many leaves are cleared in one step.
_CLEARED_LEAVES = 1024

#: Chunks from a first to an end; whether they are known to be zero now, so that nobody has to read them.
Run = tuple[int, int, bool]


class Changes:
    """Runs of chunks of one disk, in order and apart. A few bytes a run, however long it is."""

    def __init__(self, size_bytes: int, parameters: Parameters) -> None:
        self.parameters = parameters
        self.chunks = parameters.chunks(size_bytes)
        self._firsts, self._ends, self._zero = array("Q"), array("Q"), bytearray()

    @staticmethod
    def of(extents: Iterable[Extent], size_bytes: int, parameters: Parameters) -> Changes:
        """Return the chunks that *extents* (in order) touch.

        Zero are those that extents which read as zero cover whole; a chunk that is covered in part is read:
        the rest of it is as it was, and only the disk says what that is. Raises ValueError for extents that
        are not in order.
        """
        changes, chunk_bytes, last = Changes(size_bytes, parameters), parameters.chunk_bytes, 0
        for extent in merged(_plain(each) for each in extents):
            begin, end = extent.offset_bytes, min(extent.end_bytes, size_bytes)
            if begin < last:
                raise ValueError(f"changed extents come in order, not {begin} behind {last}")
            last = extent.end_bytes
            if begin >= end:
                continue
            first, until = begin // chunk_bytes, -(-end // chunk_bytes)
            whole_first = -(-begin // chunk_bytes)
            whole_end = until if end == size_bytes else end // chunk_bytes
            if extent.kind.reads_as_zero and whole_first < whole_end:
                changes._add(first, whole_first, zero=False)
                changes._add(whole_first, whole_end, zero=True)
                changes._add(whole_end, until, zero=False)
            else:
                changes._add(first, until, zero=False)
        return changes

    def and_read(self, more: Iterable[tuple[int, int]]) -> Changes:
        """Return these and *more* runs, (first, end) in any order; what is not among these is to be read."""
        both = Changes(0, self.parameters)
        both.chunks = self.chunks
        added = ((first, min(end, self.chunks), False) for first, end in sorted(more))
        for first, end, zero in merge(self.runs(), self._without(added)):
            both._add(first, end, zero)
        return both

    def runs(self) -> Iterator[Run]:
        """Yield the runs."""
        for first, end, zero in zip(self._firsts, self._ends, self._zero, strict=True):
            yield first, end, bool(zero)

    @property
    def count(self) -> int:
        """How many chunks they are."""
        return sum(self._ends) - sum(self._firsts)

    def __contains__(self, chunk: int) -> bool:
        return self.covers(chunk, chunk + 1)

    def covers(self, first: int, end: int) -> bool:
        """Return whether every chunk from *first* to *end* (or that of the disk) is among them."""
        at, end = first, min(end, self.chunks)
        number = bisect_right(self._firsts, first) - 1
        while at < end:
            if not (0 <= number < len(self._firsts) and self._firsts[number] <= at < self._ends[number]):
                return False
            at = self._ends[number]
            number += 1
        return True

    def covers_leaves(self, first: int, end: int) -> bool:
        """Return whether every chunk of the leaves from *first* to *end* is among them."""
        return self.covers(first * self.parameters.leaf_chunks, end * self.parameters.leaf_chunks)

    def units(self, unit: int) -> Iterator[Unit | range]:
        """Yield what is to be done, in order: units of *unit* chunks, and leaves that are all zero."""
        leaf = self.parameters.leaf_chunks
        index, parts = -1, list[Run]()
        for first, end, zero in self.runs():
            at = first
            while at < end:
                until_leaf = -(-end // leaf) if end == self.chunks else end // leaf
                if zero and at % leaf == 0 and until_leaf > at // leaf:
                    if parts:
                        yield self._unit(index * unit, unit, parts)
                    index, parts = -1, []
                    yield from _pieces(at // leaf, until_leaf)
                    at = min(until_leaf * leaf, end)
                    continue
                if at // unit != index:
                    if parts:
                        yield self._unit(index * unit, unit, parts)
                    index, parts = at // unit, []
                until = min(end, (index + 1) * unit)
                parts.append((at, until, zero))
                at = until
        if parts:
            yield self._unit(index * unit, unit, parts)

    def _unit(self, first: int, unit: int, parts: list[Run]) -> Unit:
        return Unit(first, min(unit, self.chunks - first),
                    tuple((begin, end) for begin, end, zero in parts if not zero),
                    tuple((begin, end) for begin, end, zero in parts if zero))

    def _add(self, first: int, end: int, zero: bool) -> None:
        """Add a run behind all others; what there is already stays what it is."""
        first = max(first, self._ends[-1]) if self._ends else first
        if first >= end:
            return
        if self._ends and self._ends[-1] == first and self._zero[-1] == zero:
            self._ends[-1] = end
            return
        self._firsts.append(first)
        self._ends.append(end)
        self._zero.append(zero)

    def _without(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Yield what is in *runs* (ordered by their first chunks) and not here."""
        done = 0
        for first, end, zero in runs:
            at = max(first, done)
            number = max(0, bisect_right(self._firsts, at) - 1)
            while at < end:
                if number < len(self._firsts) and self._firsts[number] <= at:
                    at = max(at, self._ends[number])
                    number += 1
                    continue
                until = min(end, self._firsts[number]) if number < len(self._firsts) else end
                yield at, until, zero
                at = until
            done = max(done, end)


def _plain(extent: Extent) -> Extent:
    kind = Kind.ZERO if extent.kind.reads_as_zero else Kind.DATA
    return Extent(extent.offset_bytes, extent.length_bytes, kind)


def _pieces(first: int, end: int) -> Iterator[range]:
    for begin in range(first, end, _CLEARED_LEAVES):
        yield range(begin, min(begin + _CLEARED_LEAVES, end))
