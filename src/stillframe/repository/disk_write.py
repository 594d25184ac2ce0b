"""Writing one disk: what is known is referred to, what is not gets a place in a new slot.

This is the one thread that decides, in the order of the disk. A leaf waits until the slots of its chunks
have their places; leaves that are the parent's wait as a number and a place, so that many may wait.

An incremental write looks at the leaves that changes fall into, and at no others: in them, what is not
among the changes stays the parent's; the tree's builder inherits all other leaves.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from stillframe.block.reader import DiskReader
from stillframe.errors import SlotDamaged
from stillframe.repository.changes import Changes
from stillframe.repository.jobs import InOrder
from stillframe.repository.known import Pending
from stillframe.repository.nodes import ChunkRef, Leaf
from stillframe.repository.pack import SlotRef
from stillframe.repository.pipeline import NewSlot
from stillframe.repository.scan import Batch, Scanned, Scanner, Unit, batches, data_runs, unit_chunks, units
from stillframe.repository.stages import UNITS, Stages
from stillframe.repository.tree import Tree, TreeBuilder

#: So many leaves may wait for an unfilled slot; most of them are the parent's and take no room.
WAITING_LEAVES = 4096
#: A batch that fills a slot so far is not copied: changes seldom come in just as many chunks as fit.
_FULL = 0.75

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

    *whole*: all of the disk was read that is not zero by its extents; else only what had changed, and
    *audited* chunks that had not, which do not count as read. *mismatch*: where one of those begins that had
    changed all the same (and so the disk was read whole). *why_whole* says why a disk was read whole although
    its changes are known, "" if there is no such reason.
    """

    root: SlotRef | None
    size_bytes: int
    read_bytes: int
    data_bytes: int
    changed_bytes: int
    stored_bytes: int
    new_chunks: int
    known_chunks: int
    whole: bool = True
    audited_chunks: int = 0
    mismatch_offset_bytes: int | None = None
    why_whole: str = ""


@dataclass(frozen=True, slots=True)
class Upon:
    """What an incremental write builds upon: all but *changes* is the parent's, which has *data_bytes*.

    *looked*: all nodes of the parent were looked at, and what can't be read there is among the changes.
    Otherwise all of the parent may be reused unseen, and a node that can't be read ends the write.
    """

    changes: Changes
    data_bytes: int
    looked: bool

    def may_lack(self, first: int, end: int) -> bool:
        """Return whether the parent's leaves from *first* to *end* are not needed."""
        return self.looked and self.changes.covers_leaves(first, end)


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
    """A leaf that waits for its slots, or for leaves before it.

    Without entries it is one that is stored at *place*, or all zero.
    """

    index: int
    needs: int
    entries: Sequence[Entry] = ()
    place: SlotRef | None = None


@dataclass(frozen=True, slots=True)
class _Cleared:
    """What comes back for leaves that are zero now: those that were not, and how many bytes they had."""

    end: int
    leaves: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Read:
    """What comes back from a reading thread: a batch, and for each of its units the parent's leaf there."""

    scanned: Scanned
    olds: Sequence[tuple[Leaf | None, SlotRef | None]]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A chunk that the parent does not have: its number, and where it lies in the buffer of its batch."""

    chunk: int
    id: bytes
    at: int


@dataclass(frozen=True, slots=True)
class _Decided:
    """What becomes of one unit: chunks that are the parent's or zero, and those that are asked for."""

    entries: Sequence[tuple[int, ChunkRef | None]]
    asked: Sequence[_Asked]


class DiskWrite:
    """One disk being written: `run` is called once. Incremental with *upon*, which says what *parent* has."""

    def __init__(
        self, stages: Stages, source: DiskReader, parent: Tree | None,
        report: Callable[[Progress], None], upon: Upon | None = None,
    ) -> None:
        self._stages = stages
        self._source = source
        self._parameters = stages.parameters
        self._parent = parent
        self._upon = upon
        self._report = report
        self._size_bytes = source.size_bytes
        self._known = stages.known
        self._builder = TreeBuilder(
            self._parameters, self._size_bytes, stages.put_node, parent, self._known.may_reuse,
            inherit=upon is not None, all_put=upon.may_lack if upon is not None else lambda *_: False)
        self._leaf: _OpenLeaf | None = None
        self._slot: NewSlot | None = None
        self._waiting: deque[_DoneLeaf] = deque()
        self._next_leaf = 0
        self._stored_before = stages.stored_bytes
        self._data_bytes = upon.data_bytes if upon is not None else 0
        self._changed_bytes = self._known_chunks = 0
        self.read_bytes = self.new_chunks = 0

    def run(self) -> Written:
        """Read the disk, and hand all that is new to the stages.

        Raises CopyFailed, StorageError. An incremental write raises SlotDamaged for a node of the parent that
        is needed and can't be read, or refers to what must not be referred to; then what was read is with
        the stages, and the disk can be written again.
        """
        reads: InOrder[None, _Read | _Cleared] = InOrder(
            self._stages.readers, UNITS, self._stages.ask_stop)
        try:
            with self._stages.scanner(self._source) as scanner:
                try:
                    for each in self._units():
                        if reads.full:
                            self._take(reads)
                        reads.put(None, self._job(scanner, each))
                    while reads:
                        self._take(reads)
                finally:
                    reads.drop()
            return self._finished()
        except SlotDamaged:
            self._close_slot()
            self._stages.slots.finish()
            raise

    def _units(self) -> Iterator[Batch | range]:
        unit = unit_chunks(self._parameters)
        if self._upon is not None:
            return batches(self._upon.changes.units(unit), unit)
        runs = data_runs(self._source.extents(), self._size_bytes, self._parameters.chunk_bytes)
        return batches(units(runs, self._parameters.chunks(self._size_bytes), unit), unit)

    def _job(self, scanner: Scanner, each: Batch | range) -> Callable[[], _Read | _Cleared]:
        if isinstance(each, range):
            return partial(self._cleared, each)
        return partial(self._read, scanner, each, self._stages.buffer())

    def _read(self, scanner: Scanner, batch: Batch, buffer: bytearray) -> _Read:
        """Read a batch, and the parent's leaves behind its units: all on a reading thread."""
        scanned = scanner.scan(batch, buffer)
        return _Read(scanned, [self._parents(unit.first // self._parameters.leaf_chunks) for unit in batch])

    def _parents(self, index: int) -> tuple[Leaf | None, SlotRef | None]:
        if self._parent is None:
            return None, None
        try:
            place = self._parent.node_at(0, index)
            return (None, None) if place is None else (self._parent.leaf(place), place)
        except SlotDamaged:
            if self._upon is not None and not self._upon.may_lack(index, index + 1):
                raise
            return None, None  # what can't be read there is stored anew, or found by its ID

    def _cleared(self, leaves: range) -> _Cleared:
        """Look at what the parent has in leaves that are zero now: on a reading thread."""
        assert self._parent is not None
        assert self._upon is not None
        found: list[tuple[int, int]] = []
        for index, place, damage in self._parent.stretches(leaves.start, leaves.stop):
            try:
                if damage is not None:
                    raise damage
                lost = 0 if place is None else self._data_of(index, self._parent.leaf(place))
                found.append((index, lost))
            except SlotDamaged:
                hurt = range(index, index + 1) if damage is None else damage.leaves
                if not self._upon.may_lack(hurt.start, hurt.stop):
                    raise
                found.extend((each, 0) for each in hurt)
        return _Cleared(leaves.stop, found)

    def _data_of(self, index: int, leaf: Leaf) -> int:
        first = index * self._parameters.leaf_chunks
        return sum(self._length(first + at) for at, entry in enumerate(leaf.entries) if entry is not None)

    def _take(self, reads: InOrder[None, _Read | _Cleared]) -> None:
        self._stages.ask_stop()
        _, done = reads.take()
        self._stages.check()
        if isinstance(done, _Cleared):
            self._clear(done)
            end = done.end * self._parameters.leaf_chunks
        else:
            self.read_bytes += done.scanned.read_bytes
            self._put(done)
            unit = done.scanned.units[-1]
            end = unit.first + unit.count
        self._flush()
        self._report(Progress(
            min(end * self._parameters.chunk_bytes, self._size_bytes),
            self._size_bytes, self.read_bytes, self._stages.stored_bytes - self._stored_before))

    def _open(self, index: int, old: Leaf | None, old_place: SlotRef | None) -> _OpenLeaf:
        if self._leaf is not None and self._leaf.index == index:
            return self._leaf
        self._close_leaf()
        self._count_zeroed(index)
        entries: list[Entry] = [None] * self._parameters.leaf_chunks
        if self._upon is not None and old is not None:
            entries = list(old.entries)
        self._leaf = _OpenLeaf(index, old, old_place, entries)
        return self._leaf

    def _clear(self, cleared: _Cleared) -> None:
        self._close_leaf()
        for index, lost_bytes in cleared.leaves:
            self._data_bytes -= lost_bytes
            self._changed_bytes += lost_bytes
            self._waiting.append(_DoneLeaf(index, -1))

    def _put(self, read: _Read) -> None:
        """Set the entries of the leaves of a batch: the parent's, known ones, or places in new slots."""
        scanned, at = read.scanned, 0
        decided = list[_Decided]()
        for unit, (old, _) in zip(scanned.units, read.olds, strict=True):
            decided.append(self._decide(unit, scanned.ids[at : at + unit.read_chunks], old, at))
            at += unit.read_chunks
        asked = [each for unit in decided for each in unit.asked]
        known = self._known.find([each.id for each in asked]) if asked else {}
        before = self.new_chunks
        whole = self._put_whole(scanned, asked, known)
        with memoryview(scanned.buffer) as view:
            for unit, (old, old_place), found in zip(scanned.units, read.olds, decided, strict=True):
                leaf = self._open(unit.first // self._parameters.leaf_chunks, old, old_place)
                self._put_unit(leaf, found, known, view)
        self._known_chunks += len(asked) - (self.new_chunks - before)
        if not whole:
            self._stages.free(scanned.buffer)

    def _decide(self, unit: Unit, ids: Sequence[bytes | None], old: Leaf | None, at: int) -> _Decided:
        """Find what of a unit the parent has, or is zero; its chunks lie in the buffer from number *at*."""
        leaf_chunks = self._parameters.leaf_chunks
        kept: list[tuple[int, ChunkRef | None]] = [
            (chunk, None) for first, end in unit.cleared for chunk in range(first, end)]
        asked = list[_Asked]()
        for number, (chunk, chunk_id) in enumerate(zip(unit.read(), ids, strict=True), at):
            if chunk_id is None:
                kept.append((chunk, None))
                continue
            before = None if old is None else old.entries[chunk % leaf_chunks]
            if before is not None and before.id == chunk_id:
                if self._known.may_reuse(before.place):
                    kept.append((chunk, before))
                    continue
                if self._known.is_bad(before.place):
                    self._known.hurt(chunk_id)
            asked.append(_Asked(chunk, chunk_id, number))
        return _Decided(kept, asked)

    def _put_whole(
        self, scanned: Scanned, asked: Sequence[_Asked], known: dict[bytes, ChunkRef | Pending]
    ) -> bool:
        """Make a batch a slot as it is, without copying, if all its chunks are new and nearly fill one.

        It goes to the stages at once: a slot that has begun and never comes there (closing a leaf may raise)
        would leave chunks that pass for known, and without a place.
        """
        new, most = {each.id for each in asked}, self._parameters.slot_chunks
        if known or not len(new) == len(asked) == len(scanned.ids) or not most * _FULL <= len(new) <= most:
            return False
        self._close_slot()
        slot = self._stages.new_slot(scanned.buffer)
        for each in asked:
            known[each.id] = self._add(slot, each.id)
        self._stages.slots.put(slot)
        return True

    def _put_unit(
        self, leaf: _OpenLeaf, decided: _Decided, known: dict[bytes, ChunkRef | Pending], view: memoryview,
    ) -> None:
        leaf_chunks, chunk_bytes = self._parameters.leaf_chunks, self._parameters.chunk_bytes
        for chunk, entry in decided.entries:
            leaf.entries[chunk % leaf_chunks] = entry
        for each in decided.asked:
            found = known.get(each.id)
            if found is None:
                at = each.at * chunk_bytes
                found = known[each.id] = self._new_chunk(each.id, view[at : at + chunk_bytes])
            leaf.entries[each.chunk % leaf_chunks] = found
            if isinstance(found, Pending):
                leaf.needs = max(leaf.needs, found.slot.number)

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
        self.new_chunks += 1
        return pending

    def _close_slot(self) -> None:
        if self._slot is not None:
            slot, self._slot = self._slot, None
            self._stages.slots.put(slot)

    def _close_leaf(self) -> None:
        leaf, self._leaf = self._leaf, None
        if leaf is None:
            return
        old = leaf.old.entries if leaf.old is not None else (None,) * len(leaf.entries)
        if self._upon is not None:
            self._check_inherited(leaf.entries, old)
        # Entries of the parent are the same objects: where all are, so is the leaf, and nothing is encoded.
        other = [place for place, new in enumerate(leaf.entries) if new is not old[place]]
        self._count(leaf, old, other)
        if not other and leaf.old_place is not None and self._known.may_reuse(leaf.old_place):
            self._waiting.append(_DoneLeaf(leaf.index, -1, place=leaf.old_place))
        else:
            self._waiting.append(_DoneLeaf(leaf.index, leaf.needs, leaf.entries))
        self._next_leaf = leaf.index + 1

    def _check_inherited(self, entries: Sequence[Entry], old: Sequence[ChunkRef | None]) -> None:
        """Raise SlotDamaged if an entry must not be referred to: what let it be inherited was wrong."""
        kept = {before.place for new, before in zip(entries, old, strict=True)
                if before is not None and new is before}
        for place in kept:
            if not self._known.may_reuse(place):
                raise SlotDamaged(place, "it must not be referred to any more")

    def _count(self, leaf: _OpenLeaf, old: Sequence[ChunkRef | None], other: Sequence[int]) -> None:
        """Count the entries that are not the parent's own (*other*), and in a whole read all."""
        first = leaf.index * self._parameters.leaf_chunks
        if self._upon is None:
            self._data_bytes += sum(
                self._length(first + place) for place, new in enumerate(leaf.entries) if new is not None)
        for place in other:
            new, before, length = leaf.entries[place], old[place], self._length(first + place)
            if self._upon is not None:
                self._data_bytes += length * ((new is not None) - (before is not None))
            if new is None or before is None or new.id != before.id:
                self._changed_bytes += length

    def _length(self, chunk: int) -> int:
        at = chunk * self._parameters.chunk_bytes
        return max(0, min(self._parameters.chunk_bytes, self._size_bytes - at))

    def _count_zeroed(self, end: int) -> None:
        """Count what the parent has in the leaves before *end* that were not read, so are zero now."""
        if self._parent is None or self._upon is not None or end <= self._next_leaf:
            return
        for index, place, _ in self._parent.stretches(self._next_leaf, end):
            with contextlib.suppress(SlotDamaged):
                self._changed_bytes += 0 if place is None else self._data_of(index, self._parent.leaf(place))

    def _flush(self) -> None:
        """Put the leaves whose slots are placed; close the open slot if too many wait for it."""
        if len(self._waiting) > WAITING_LEAVES:
            self._close_slot()
            self._stages.slots.finish()
        while self._waiting and self._waiting[0].needs < self._stages.slots.count:
            leaf = self._waiting.popleft()
            if leaf.entries:
                settled = [entry if entry is None or isinstance(entry, ChunkRef) else _placed(entry)
                           for entry in leaf.entries]
                self._builder.put_leaf(leaf.index, settled, differs=True)
            else:
                self._builder.keep_leaf(leaf.index, leaf.place)

    def _finished(self) -> Written:
        self._close_leaf()
        leaves = -(-self._parameters.chunks(self._size_bytes) // self._parameters.leaf_chunks)
        self._count_zeroed(leaves)
        self._close_slot()
        self._stages.slots.finish()
        self._flush()
        assert not self._waiting  # a leaf that is left out would read as zeroes, or as the parent's
        root = self._builder.finish()
        return Written(
            root, self._size_bytes, self.read_bytes, self._data_bytes, self._changed_bytes,
            self._stages.stored_bytes - self._stored_before, self.new_chunks, self._known_chunks,
            whole=self._upon is None)


def _placed(pending: Pending) -> ChunkRef:
    """Return the entry with its place, which its slot has by now."""
    assert pending.slot.place is not None
    return ChunkRef(pending.id, pending.slot.place, pending.position)
