"""Where an image differs from a disk of a snapshot, by the IDs of their chunks: no data is fetched for it.

The image is read in chunks, many at a time; what is zero is told without a hash, and holes are not read at
all. The tree says what ID each chunk of the snapshot has. A mark for each chunk is kept: 16 MiB for a
tebibyte.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from stillframe.block.reader import DiskReader
from stillframe.errors import SlotDamaged, StillframeError
from stillframe.extent import Extent
from stillframe.repository.jobs import InOrder, keep_freed_memory
from stillframe.repository.manifest import DiskEntry
from stillframe.repository.nodes import Leaf
from stillframe.repository.pack import SlotRef
from stillframe.repository.places import Places
from stillframe.repository.scan import Scanned, Scanner, batches, data_runs, unit_chunks, units
from stillframe.repository.tree import Tree

#: Threads that read and hash, and batches that are on their way.
_READERS = 2
_FLYING = 6
_AHEAD_LEAVES = 8
_SAME, _WRITE, _ZERO, _LOST = 0, 1, 2, 3
_RUNS = re.compile(b"\x01+|\x02+|\x03+")
#: What is done with a chunk where only some are looked at: it is read, or known to be zero.
_READ, _IS_ZERO = 1, 2


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of chunks that differ: data is to be written there, or zeroes, or what belongs there is lost."""

    offset_bytes: int
    length_bytes: int
    is_zero: bool = False
    is_lost: bool = False


class Differences:
    """Where an image differs. *size_bytes* is the snapshot's."""

    def __init__(self, size_bytes: int, chunk_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._chunk_bytes = chunk_bytes
        self._marks = bytearray(-(-size_bytes // chunk_bytes))

    def note(self, chunk: int, mark: int, count: int = 1) -> None:
        """Mark chunks that differ."""
        self._marks[chunk : chunk + count] = bytes((mark,)) * count

    def stretches(self) -> Iterator[Stretch]:
        """Yield what differs, in order."""
        for run in _RUNS.finditer(self._marks):
            begin, mark = run.start() * self._chunk_bytes, run[0][0]
            end = min(run.end() * self._chunk_bytes, self.size_bytes)
            yield Stretch(begin, end - begin, mark == _ZERO, mark == _LOST)

    @property
    def data_bytes(self) -> int:
        """How much data is to be fetched."""
        return self._count(_WRITE)

    @property
    def zero_bytes(self) -> int:
        """How much is to become zero."""
        return self._count(_ZERO)

    def _count(self, mark: int) -> int:
        return min(self._marks.count(mark) * self._chunk_bytes, self.size_bytes)


@dataclass(slots=True)
class _ImageLeaf:
    """The chunks of the image in the place of one leaf; those that are zero have no ID."""

    index: int
    ids: dict[int, bytes]


class Comparison:
    """Compares one image with one disk. *stop* and *report* (bytes done) are called now and then."""

    def __init__(
        self, places: Places, disk: DiskEntry, source: DiskReader,
        stop: Callable[[], StillframeError | None], report: Callable[[int], None],
    ) -> None:
        keep_freed_memory()
        self._repository = places.repository
        self._parameters = places.repository.parameters
        self._tree = Tree(places, disk.size_bytes, disk.place)
        self._source = source
        self._size_bytes = disk.size_bytes
        self._stop = stop
        self._report = report
        self._leaf_chunks = self._parameters.leaf_chunks
        self._found = Differences(disk.size_bytes, self._parameters.chunk_bytes)
        self.read_bytes = 0
        self._only: bytearray | None = None
        #: The first node of the tree that can't be read, if there is one.
        self.damage: SlotDamaged | None = None

    def run(self, from_bytes: int = 0, only: Sequence[Extent] | None = None) -> Differences:
        """Return what differs from *from_bytes* on (down to the edge of a leaf). Raises CopyFailed.

        Behind that, only the extents *only* of the image are looked at, if they are given, in any order.
        Where two say different things, it is data.
        """
        first = from_bytes // (self._leaf_chunks * self._parameters.chunk_bytes)
        self._only = None if only is None else self._chosen(only)
        with ThreadPoolExecutor(_READERS + 1, "compare") as pool:
            image = self._image_leaves(pool, first)
            stored = self._stored_leaves(pool, first)
            ours, theirs = next(image, None), next(stored, None)
            while ours is not None or theirs is not None:
                if theirs is None or (ours is not None and ours.index < theirs[0]):
                    assert ours is not None
                    self._leaf(ours.index, ours.ids, None)
                    ours = next(image, None)
                    continue
                is_both = ours is not None and ours.index == theirs[0]
                self._leaf(theirs[0], ours.ids if ours is not None and is_both else {}, theirs[1])
                theirs = next(stored, None)
                if is_both:
                    ours = next(image, None)
        self._report(self._size_bytes)
        return self._found

    def _leaf(self, index: int, ids: Mapping[int, bytes], leaf: Leaf | SlotDamaged | None) -> None:
        first = index * self._leaf_chunks
        count = min(self._leaf_chunks, self._parameters.chunks(self._size_bytes) - first)
        if isinstance(leaf, SlotDamaged):
            self.damage = self.damage or leaf
            self._found.note(first, _LOST, count)
            return
        entries = leaf.entries if leaf is not None else (None,) * count
        for number, entry in enumerate(entries[:count], first):
            if self._only is not None and not self._only[number]:
                continue
            known = ids.get(number)
            if entry is None:
                if known is not None:
                    self._found.note(number, _ZERO)
            elif entry.id != known:
                self._found.note(number, _WRITE)

    def _image_leaves(self, pool: ThreadPoolExecutor, first: int) -> Iterator[_ImageLeaf]:
        """Yield the leaves of the image that are not all zero by its extents, in order."""
        leaf: _ImageLeaf | None = None
        for chunk, chunk_id in self._image_chunks(pool, first * self._leaf_chunks):
            index = chunk // self._leaf_chunks
            if leaf is None or leaf.index != index:
                if leaf is not None:
                    yield leaf
                leaf = _ImageLeaf(index, {})
            leaf.ids[chunk] = chunk_id
        if leaf is not None:
            yield leaf

    def _image_chunks(self, pool: ThreadPoolExecutor, first: int) -> Iterator[tuple[int, bytes]]:
        chunk_bytes, end_bytes = self._parameters.chunk_bytes, min(self._size_bytes, self._source.size_bytes)
        begin_bytes = min(first * chunk_bytes, end_bytes)
        unit = unit_chunks(self._parameters)
        end = self._parameters.chunks(end_bytes)
        runs = self._runs(first, end, _READ) if self._only is not None else data_runs(
            self._source.extents(begin_bytes, end_bytes - begin_bytes), end_bytes, chunk_bytes)
        jobs: InOrder[bytearray, Scanned] = InOrder(pool, _FLYING)
        free = [bytearray(unit * chunk_bytes) for _ in range(_FLYING)]
        with Scanner(self._source, self._parameters, self._repository.key, _READERS) as scanner:
            try:
                for batch in batches(units(runs, end, unit), unit):
                    assert not isinstance(batch, range)  # only a parent makes those
                    if jobs.full:
                        yield from self._taken(jobs, free)
                    buffer = free.pop()
                    jobs.put(buffer, partial(scanner.scan, batch, buffer))
                while jobs:
                    yield from self._taken(jobs, free)
            finally:
                jobs.drop()

    def _taken(
        self, jobs: InOrder[bytearray, Scanned], free: list[bytearray]
    ) -> Iterator[tuple[int, bytes]]:
        reason = self._stop()
        if reason is not None:
            raise reason
        buffer, scanned = jobs.take()
        free.append(buffer)
        self.read_bytes += scanned.read_bytes
        chunks = (chunk for unit in scanned.units for chunk in unit.read())
        for chunk, chunk_id in zip(chunks, scanned.ids, strict=True):
            if chunk_id is not None:
                yield chunk, chunk_id
        last = scanned.units[-1]
        self._report(min((last.first + last.count) * self._parameters.chunk_bytes, self._size_bytes))

    def _stored_leaves(
        self, pool: ThreadPoolExecutor, first: int
    ) -> Iterator[tuple[int, Leaf | SlotDamaged]]:
        """Yield the snapshot's leaves that are not all zero, in order, or why one can't be read."""
        ahead: deque[tuple[int, Callable[[], Leaf | SlotDamaged]]] = deque()
        for index, place, damage in self._stretches(first):
            if damage is not None:
                ahead.extend((each, partial(_same, damage)) for each in damage.leaves)
            elif place is not None:
                ahead.append((index, pool.submit(partial(self._read, place)).result))
            while len(ahead) > _AHEAD_LEAVES:
                number, leaf = ahead.popleft()
                yield number, leaf()
        for number, leaf in ahead:
            yield number, leaf()

    def _stretches(self, first: int) -> Iterator[tuple[int, SlotRef | None, SlotDamaged | None]]:
        if self._only is None:
            yield from self._tree.stretches(first)
            return
        done = first
        for begin, end in self._runs(first * self._leaf_chunks, len(self._only), _READ, _IS_ZERO):
            begin_leaf, end_leaf = max(done, begin // self._leaf_chunks), -(-end // self._leaf_chunks)
            if begin_leaf < end_leaf:
                yield from self._tree.stretches(begin_leaf, end_leaf)
                done = end_leaf

    def _runs(self, first: int, end: int, *marks: int) -> Iterator[tuple[int, int]]:
        """Yield (first, end) of the runs of chunks that are marked so."""
        assert self._only is not None
        for run in _RUNS.finditer(self._only, first, end):
            if run[0][0] in marks:
                yield run.span()

    def _chosen(self, only: Sequence[Extent]) -> bytearray:
        chosen = bytearray(self._parameters.chunks(self._size_bytes))
        chunk_bytes = self._parameters.chunk_bytes
        for extent in sorted(only, key=lambda each: not each.kind.reads_as_zero):
            first = extent.offset_bytes // chunk_bytes
            last = min(-(-extent.end_bytes // chunk_bytes), len(chosen))
            mark = _IS_ZERO if extent.kind.reads_as_zero else _READ
            chosen[first:last] = bytes((mark,)) * max(0, last - first)
            # What else is in the chunks at the edges is not known.
            for chunk, is_whole in ((first, extent.offset_bytes % chunk_bytes == 0),
                                    (last - 1, extent.end_bytes % chunk_bytes == 0)):
                if not is_whole and first <= chunk < last:
                    chosen[chunk] = _READ
        return chosen

    def _read(self, place: SlotRef) -> Leaf | SlotDamaged:
        try:
            return self._tree.leaf(place)
        except SlotDamaged as damage:
            return damage


def _same(damage: SlotDamaged) -> SlotDamaged:
    return damage
