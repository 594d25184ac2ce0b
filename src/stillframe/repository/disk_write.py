"""Writing one disk: what is known is referred to, what is not gets a place in a new slot.

This is the one thread that decides, in the order of the disk. A leaf waits until the slots of its chunks
have their places; leaves that are the parent's wait as a number and a place, so that many may wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from stillframe.block.reader import DiskReader
from stillframe.errors import SlotDamaged, StillframeError
from stillframe.repository.jobs import InOrder
from stillframe.repository.known import Pending
from stillframe.repository.nodes import ChunkRef, Leaf
from stillframe.repository.pack import SlotRef
from stillframe.repository.pipeline import NewSlot
from stillframe.repository.scan import Scanned, Scanner, Unit, data_runs, unit_chunks, units
from stillframe.repository.stages import UNITS, Stages
from stillframe.repository.tree import Tree, TreeBuilder

#: So many leaves may wait for an unfilled slot; most of them are the parent's and take no room.
WAITING_LEAVES = 4096

Entry = ChunkRef | Pending | None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a disk is: *done_bytes* of *size_bytes* are looked at, zeroes included."""

    done_bytes: int
    size_bytes: int
    read_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """A content that is written. All numbers but the chunks are bytes.

    *data* is what is not zero; *changed* what differs from the parent (all data without one), chunks
    that became zero included; *stored* what was added to packs for it, the tree included. Of the
    chunks that are not zero and not the parent's, *new* were stored and *known* found stored already.
    """

    root: SlotRef | None
    size_bytes: int
    read_bytes: int
    data_bytes: int
    changed_bytes: int
    stored_bytes: int
    new_chunks: int
    known_chunks: int


@dataclass(slots=True)
class _OpenLeaf:
    """The leaf that units are added to. *needs* is the last slot that must have a place before it is put."""

    index: int
    old: Leaf | None
    old_place: SlotRef | None
    entries: list[Entry]
    needs: int = -1


@dataclass(frozen=True, slots=True)
class _DoneLeaf:
    """A leaf that waits for its slots, or for leaves before it; without entries it is one that is stored."""

    index: int
    needs: int
    entries: Sequence[Entry] = ()
    place: SlotRef | None = None


@dataclass(frozen=True, slots=True)
class _Read:
    """What comes back from a reading thread: the unit, and the parent's leaf if the unit begins a leaf."""

    scanned: Scanned
    old: Leaf | None
    old_place: SlotRef | None


class DiskWrite:
    """One disk being written: `run` is called once."""

    def __init__(
        self, stages: Stages, source: DiskReader, parent: Tree | None,
        stop: Callable[[], StillframeError | None], report: Callable[[Progress], None],
    ) -> None:
        self._stages = stages
        self._source = source
        self._parameters = stages.parameters
        self._parent = parent
        stages.stop = stop
        self._report = report
        self._size_bytes = source.size_bytes
        self._known = stages.known
        self._builder = TreeBuilder(
            self._parameters, self._size_bytes, stages.put_node, parent, self._known.may_reuse)
        self._leaf: _OpenLeaf | None = None
        self._slot: NewSlot | None = None
        self._waiting: deque[_DoneLeaf] = deque()
        self._next_leaf = 0
        self._stored_before = stages.stored_bytes
        self._read_bytes = self._data_bytes = self._changed_bytes = 0
        self._new_chunks = self._known_chunks = 0

    def run(self) -> Written:
        """Read the disk, and hand all that is new to the stages. Raises CopyFailed, StorageError."""
        chunk_bytes, unit = self._parameters.chunk_bytes, unit_chunks(self._parameters)
        runs = data_runs(self._source.extents(), self._size_bytes, chunk_bytes)
        reads: InOrder[Unit, _Read] = InOrder(self._stages.readers, UNITS, self._stages.ask_stop)
        with self._stages.scanner(self._source) as scanner:
            try:
                for each in units(runs, self._parameters.chunks(self._size_bytes), unit):
                    if reads.full:
                        self._take(reads)
                    reads.put(each, partial(self._read, scanner, each, self._stages.buffer()))
                while reads:
                    self._take(reads)
            finally:
                reads.drop()
        return self._finished()

    def _read(self, scanner: Scanner, unit: Unit, buffer: bytearray) -> _Read:
        """Read a unit, and the parent's leaf behind its first one: all on a reading thread."""
        scanned = scanner.scan(unit, buffer)
        return _Read(scanned, *self._parents(unit.first // self._parameters.leaf_chunks))

    def _parents(self, index: int) -> tuple[Leaf | None, SlotRef | None]:
        if self._parent is None:
            return None, None
        try:
            place = self._parent.node_at(0, index)
            return (None, None) if place is None else (self._parent.leaf(place), place)
        except SlotDamaged:
            return None, None  # what can't be read there is stored anew, or found by its ID

    def _take(self, reads: InOrder[Unit, _Read]) -> None:
        self._stages.ask_stop()
        unit, read = reads.take()
        self._stages.check()
        index = unit.first // self._parameters.leaf_chunks
        if self._leaf is None or self._leaf.index != index:
            self._close_leaf()
            self._count_zeroed(index)
            self._leaf = _OpenLeaf(index, read.old, read.old_place, [None] * self._parameters.leaf_chunks)
        self._decide(self._leaf, read.scanned)
        self._flush()
        self._report(Progress(
            min((unit.first + unit.count) * self._parameters.chunk_bytes, self._size_bytes),
            self._size_bytes, self._read_bytes, self._stages.stored_bytes - self._stored_before))

    def _decide(self, leaf: _OpenLeaf, scanned: Scanned) -> None:
        """Set the leaf's entries for a unit: the parent's, known ones, or places in new slots."""
        unit, ids = scanned.unit, scanned.ids
        self._read_bytes += scanned.read_bytes
        begin = unit.first % self._parameters.leaf_chunks
        asked: list[tuple[int, bytes]] = []
        for place, chunk_id in enumerate(ids, begin):
            if chunk_id is None:
                continue
            old = None if leaf.old is None else leaf.old.entries[place]
            if old is not None and old.id == chunk_id:
                if self._known.may_reuse(old.place):
                    leaf.entries[place] = old
                    continue
                if self._known.is_bad(old.place):
                    self._known.hurt(chunk_id)
            asked.append((place, chunk_id))
        if asked:
            self._store(leaf, scanned, asked, begin)
        else:
            self._stages.free(scanned.buffer)

    def _store(
        self, leaf: _OpenLeaf, scanned: Scanned, asked: Sequence[tuple[int, bytes]], begin: int
    ) -> None:
        known = self._known.find([chunk_id for _, chunk_id in asked])
        whole = len({chunk_id for _, chunk_id in asked}) == self._parameters.slot_chunks and not known
        if whole and len(asked) == scanned.unit.count == self._parameters.slot_chunks:
            self._store_whole(leaf, scanned, begin)
            return
        chunk_bytes = self._parameters.chunk_bytes
        with memoryview(scanned.buffer) as view:
            for place, chunk_id in asked:
                found = known.get(chunk_id)
                if found is None:
                    at = (place - begin) * chunk_bytes
                    found = known[chunk_id] = self._new_chunk(chunk_id, view[at : at + chunk_bytes])
                else:
                    self._known_chunks += 1
                self._refer(leaf, place, found)
        self._stages.free(scanned.buffer)

    def _store_whole(self, leaf: _OpenLeaf, scanned: Scanned, begin: int) -> None:
        """All chunks of the unit are new: it becomes a slot as it is, and nothing is copied."""
        self._close_slot()
        slot = self._stages.new_slot(scanned.buffer)
        for position, chunk_id in enumerate(scanned.ids):
            assert chunk_id is not None
            self._refer(leaf, begin + position, self._add(slot, chunk_id))
        self._stages.slots.put(slot)

    def _new_chunk(self, chunk_id: bytes, content: memoryview) -> Pending:
        if self._slot is None:
            self._slot = self._stages.new_slot()
        slot, chunk_bytes = self._slot, self._parameters.chunk_bytes
        at = len(slot.ids) * chunk_bytes
        slot.buffer[at : at + chunk_bytes] = content
        pending = self._add(slot, chunk_id)
        if len(slot.ids) == self._parameters.slot_chunks:
            self._close_slot()
        return pending

    def _add(self, slot: NewSlot, chunk_id: bytes) -> Pending:
        pending = Pending(chunk_id, slot, len(slot.ids))
        slot.ids.append(chunk_id)
        self._known.begin(pending)
        self._new_chunks += 1
        return pending

    def _refer(self, leaf: _OpenLeaf, place: int, entry: ChunkRef | Pending) -> None:
        leaf.entries[place] = entry
        if isinstance(entry, Pending):
            leaf.needs = max(leaf.needs, entry.slot.number)

    def _close_slot(self) -> None:
        if self._slot is not None:
            slot, self._slot = self._slot, None
            self._stages.slots.put(slot)

    def _close_leaf(self) -> None:
        leaf, self._leaf = self._leaf, None
        if leaf is None:
            return
        old = leaf.old.entries if leaf.old is not None else (None,) * len(leaf.entries)
        self._count(leaf, old)
        # Entries of the parent are the same objects: where all are, so is the leaf, and nothing is encoded.
        same = all(new is before for new, before in zip(leaf.entries, old, strict=True))
        if same and leaf.old_place is not None and self._known.may_reuse(leaf.old_place):
            self._waiting.append(_DoneLeaf(leaf.index, -1, place=leaf.old_place))
        else:
            self._waiting.append(_DoneLeaf(leaf.index, leaf.needs, leaf.entries))
        self._next_leaf = leaf.index + 1

    def _count(self, leaf: _OpenLeaf, old: Sequence[ChunkRef | None]) -> None:
        first = leaf.index * self._parameters.leaf_chunks
        for place, (new, before) in enumerate(zip(leaf.entries, old, strict=True), first):
            if new is None and before is None:
                continue
            length = self._length(place)
            if new is not None:
                self._data_bytes += length
            if new is not before and (new is None or before is None or new.id != before.id):
                self._changed_bytes += length

    def _length(self, chunk: int) -> int:
        at = chunk * self._parameters.chunk_bytes
        return max(0, min(self._parameters.chunk_bytes, self._size_bytes - at))

    def _count_zeroed(self, end: int) -> None:
        """Count what the parent has in the leaves before *end* that are zero now."""
        if self._parent is None or end <= self._next_leaf:
            return
        for index, place, _ in self._parent.stretches(self._next_leaf, end):
            try:
                entries = () if place is None else self._parent.leaf(place).entries
            except SlotDamaged:
                continue
            first = index * self._parameters.leaf_chunks
            self._changed_bytes += sum(
                self._length(first + at) for at, entry in enumerate(entries) if entry is not None)

    def _flush(self) -> None:
        """Put the leaves whose slots are placed; close the open slot if too many wait for it."""
        if len(self._waiting) > WAITING_LEAVES:
            self._close_slot()
            self._stages.slots.finish()
        while self._waiting and self._waiting[0].needs < self._stages.slots.count:
            leaf = self._waiting.popleft()
            if leaf.place is not None:
                self._builder.keep_leaf(leaf.index, leaf.place)
            else:
                self._builder.put_leaf(leaf.index, [_settled(entry) for entry in leaf.entries])

    def _finished(self) -> Written:
        self._close_leaf()
        leaves = -(-self._parameters.chunks(self._size_bytes) // self._parameters.leaf_chunks)
        self._count_zeroed(leaves)
        self._close_slot()
        self._stages.slots.finish()
        self._flush()
        root = self._builder.finish()
        return Written(
            root, self._size_bytes, self._read_bytes, self._data_bytes, self._changed_bytes,
            self._stages.stored_bytes - self._stored_before, self._new_chunks, self._known_chunks)


def _settled(entry: Entry) -> ChunkRef | None:
    """Return the entry with its place, which its slot has by now."""
    if not isinstance(entry, Pending):
        return entry
    assert entry.slot.place is not None
    return ChunkRef(entry.id, entry.slot.place, entry.position)
