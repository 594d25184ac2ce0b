"""A disk of a snapshot from end to end: what is not zero, in order, and what is lost, by name.

Leaves are decoded ahead of the slots, and slots fetched ahead of whoever takes the pieces. How
far is counted in slots, not in leaves: after many snapshots each chunk of a leaf may be in a slot of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

from stillframe.errors import SlotDamaged
from stillframe.repository.fetch import Coming, SlotFetcher
from stillframe.repository.nodes import ChunkRef, Leaf
from stillframe.repository.pack import SlotRef
from stillframe.repository.tree import Tree

_AHEAD_LEAVES = 8
_AHEAD_SLOTS = 32
_BATCH_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the disk that is not all zero: its *content*, or why it is lost."""

    offset_bytes: int
    length_bytes: int
    content: memoryview | None
    damage: SlotDamaged | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    """Chunks from *first* on that are neighbours in one slot, too."""

    first: int
    entries: list[ChunkRef]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Runs whose slots are on their way, or leaves that are lost."""

    runs: list[_Run]
    coming: dict[SlotRef, Coming]
    leaves: range = range(0)
    damage: SlotDamaged | None = None


@dataclass(frozen=True, slots=True)
class _ComingLeaf:
    index: int
    leaf: Future[Leaf] | None
    leaves: range = range(0)
    damage: SlotDamaged | None = None


class Pieces:
    """Reads leaves first to end of a tree; to be gone through once, by one thread.

    *chunk* is asked for chunks of slots that are not what the leaf says: it returns the
    chunk from elsewhere or raises SlotDamaged.
    """

    def __init__(
        self, tree: Tree, fetcher: SlotFetcher, pool: Executor,
        chunk: Callable[[ChunkRef, Coming], memoryview], first: int, end: int,
    ) -> None:
        self._tree = tree
        self._fetcher = fetcher
        self._pool = pool
        self._chunk = chunk
        self._range = (first, end)
        self._chunk_bytes = tree.parameters.chunk_bytes
        self._leaf_bytes = tree.parameters.leaf_chunks * self._chunk_bytes

    def __iter__(self) -> Iterator[Piece]:
        waiting: deque[_Batch] = deque()
        ahead = 0
        for batch in self._batches():
            # What is asked for goes first: the pool is never idle while the oldest is worked on.
            waiting.append(batch)
            ahead += len(batch.coming)
            while waiting and (ahead > _AHEAD_SLOTS - _BATCH_SLOTS or len(waiting) > _AHEAD_LEAVES):
                oldest = waiting.popleft()
                ahead -= len(oldest.coming)
                yield from self._pieces_of(oldest)
        for batch in waiting:
            yield from self._pieces_of(batch)

    def _batches(self) -> Iterator[_Batch]:
        """Yield the batches; the slots of one that was yielded are being fetched."""
        for coming in self._leaves():
            try:
                leaf = coming.leaf.result() if coming.leaf is not None else None
                damage = coming.damage
            except SlotDamaged as error:
                leaf, damage = None, error
            if leaf is None:
                yield _Batch([], {}, coming.leaves, damage)
                continue
            for runs in _grouped(_runs(coming.index * self._tree.parameters.leaf_chunks, leaf)):
                yield _Batch(runs, self._fetcher.want(dict.fromkeys(run.entries[0].place for run in runs)))

    def _leaves(self) -> Iterator[_ComingLeaf]:
        ahead: deque[_ComingLeaf] = deque()
        try:
            for index, place, damage in self._tree.stretches(*self._range):
                if place is None:
                    ahead.append(_ComingLeaf(index, None, damage.leaves if damage else range(0), damage))
                else:
                    coming = self._pool.submit(partial(self._tree.leaf, place))
                    ahead.append(_ComingLeaf(index, coming, range(index, index + 1)))
                if len(ahead) >= _AHEAD_LEAVES:
                    yield ahead.popleft()
            while ahead:
                yield ahead.popleft()
        finally:
            for each in ahead:
                if each.leaf is not None:
                    each.leaf.cancel()

    def _pieces_of(self, batch: _Batch) -> Iterator[Piece]:
        if batch.damage is not None:
            begin = batch.leaves.start * self._leaf_bytes
            end = min(batch.leaves.stop * self._leaf_bytes, self._tree.size_bytes)
            yield Piece(begin, end - begin, None, batch.damage)
        for run in batch.runs:
            begin = run.first * self._chunk_bytes
            length = min(len(run.entries) * self._chunk_bytes, self._tree.size_bytes - begin)
            coming = batch.coming[run.entries[0].place]
            if length <= 0:
                continue
            content = self._content(run, coming)
            if content is not None:
                yield Piece(begin, length, content[:length])
            else:
                yield from self._one_by_one(run, coming)

    def _content(self, run: _Run, coming: Coming) -> memoryview | None:
        """Return the content of a run, None if any of it is damaged."""
        try:
            chunks = coming.result()
        except SlotDamaged:
            return None
        position, end = run.entries[0].position, run.entries[-1].position + 1
        if chunks.ids[position:end] != tuple(entry.id for entry in run.entries):
            return None
        return chunks.body[position * self._chunk_bytes : end * self._chunk_bytes]

    def _one_by_one(self, run: _Run, coming: Coming) -> Iterator[Piece]:
        for number, entry in enumerate(run.entries, run.first):
            begin = number * self._chunk_bytes
            length = min(self._chunk_bytes, self._tree.size_bytes - begin)
            try:
                yield Piece(begin, length, self._chunk(entry, coming)[:length])
            except SlotDamaged as damage:
                yield Piece(begin, length, None, damage)


def _runs(first: int, leaf: Leaf) -> Iterator[_Run]:
    run: _Run | None = None
    for number, entry in enumerate(leaf.entries, first):
        if run is not None and entry is not None and (
            entry.place == run.entries[-1].place and entry.position == run.entries[-1].position + 1
        ):
            run.entries.append(entry)
            continue
        if run is not None:
            yield run
        run = None if entry is None else _Run(number, [entry])
    if run is not None:
        yield run


def _grouped(runs: Iterable[_Run]) -> Iterator[list[_Run]]:
    """Yield *runs* in groups that use no more than so many slots each."""
    group: list[_Run] = []
    slots: set[SlotRef] = set()
    for run in runs:
        place = run.entries[0].place
        if place not in slots and len(slots) >= _BATCH_SLOTS:
            yield group
            group, slots = [], set()
        group.append(run)
        slots.add(place)
    if group:
        yield group
