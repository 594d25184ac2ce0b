"""A snapshot's disk, read anywhere or from end to end.

A chunk is found through the tree (its leaf says which slot, which position, and its ID), the slot is
fetched, and the ID must be the one that was sealed with it. Where a slot is damaged, the heals may know
another place for the same chunk. So what is read is what was backed up, or it is said to be lost.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Self

from stillframe.block.reader import Connection, OneByOne
from stillframe.errors import SlotDamaged
from stillframe.extent import Extent, Kind, merged
from stillframe.repository.fetch import KEPT_BYTES, Coming, SlotFetcher
from stillframe.repository.heal import read_heals
from stillframe.repository.manifest import Content
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.pack import SlotRef
from stillframe.repository.pieces import Piece, Pieces
from stillframe.repository.places import Places
from stillframe.repository.slots import Chunks
from stillframe.repository.tree import KEPT_LEAVES, Tree

#: Chunks that are read at once within a large request, and slots that are fetched ahead of them.
_PORTION_CHUNKS = 16
_AHEAD_SLOTS = 16
_STREAMS = 16


class DiskView:
    """A disk of a snapshot; also a DiskReader. For several threads. Close it, or use it as a block.

    *kept_bytes* bounds the opened slots that are kept; *kept_leaves* those of the tree.
    """

    def __init__(self, places: Places, content: Content, threads: int = 4, *,
                 kept_bytes: int = KEPT_BYTES, kept_leaves: int = KEPT_LEAVES) -> None:
        self._places = places
        self._tree = Tree(places, content.size_bytes, content.place, kept_leaves)
        self._chunk_bytes = places.repository.parameters.chunk_bytes
        self._leaf_chunks = places.repository.parameters.leaf_chunks
        self.size_bytes = content.size_bytes
        self._chunks = places.repository.parameters.chunks(content.size_bytes)
        # The tree never changes; by its number a leaf is found without hashing the places above it.
        self._leaf_at = lru_cache(kept_leaves)(self._tree.leaf_at)
        self._zeroes = memoryview(bytes(self._chunk_bytes))
        self._fetcher = SlotFetcher(places, threads, kept_bytes)
        self._leaves = ThreadPoolExecutor(1, "leaves")
        self._heals: Mapping[bytes, ChunkRef] | None = None
        self._lock = threading.Lock()
        #: Where the last reads ended: several readers may go through the disk at a time.
        self._ends: deque[int] = deque(maxlen=_STREAMS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        self._leaves.shutdown(wait=True, cancel_futures=True)
        self._fetcher.close()

    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """Fill the whole *buffer* from *offset_bytes*. Raises SlotDamaged, StorageError.

        A read that begins where one of the last ended fetches ahead of itself, once for each chunk.
        """
        end = offset_bytes + len(buffer)
        if not 0 <= offset_bytes <= end <= self.size_bytes:
            raise ValueError(f"{len(buffer)} bytes at {offset_bytes} are not within the disk")
        first, last = offset_bytes // self._chunk_bytes, -(-end // self._chunk_bytes)
        within = end < (first + 1) * self._chunk_bytes
        with self._lock:
            onward = not within and offset_bytes in self._ends
            self._ends.append(end)
        at_hand = self._at_hand(first) if within else None
        if at_hand is not None:
            begin = offset_bytes - first * self._chunk_bytes
            buffer[:] = at_hand[begin : begin + len(buffer)]
            return
        until = self._chunks if onward else last
        for chunk in range(first, last, _PORTION_CHUNKS):
            portion = range(chunk, min(chunk + _PORTION_CHUNKS, last))
            ahead = range(portion.stop, min(portion.stop + self._leaf_chunks, until))
            self._read_portion(buffer, offset_bytes, portion, ahead)

    def fetch(self, offset_bytes: int, length_bytes: int, *, wait: bool = False) -> None:
        """Begin to fetch a stretch, no more of it than half of what is kept; *wait* until it is there.

        Raises SlotDamaged, StorageError.
        """
        end = min(offset_bytes + length_bytes, self.size_bytes)
        wanted: dict[SlotRef, None] = {}
        chunks = range(offset_bytes // self._chunk_bytes, -(-end // self._chunk_bytes))
        for first in range(chunks.start, chunks.stop, self._leaf_chunks):
            portion = range(first, min(first + self._leaf_chunks, chunks.stop))
            wanted.update(dict.fromkeys(_places(self._entries(portion))))
            if len(wanted) >= self._fetcher.most // 2:
                break
        coming = self._fetcher.want(list(wanted)[: self._fetcher.most // 2])
        for each in coming.values() if wait else ():
            each.result()

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """Yield the extents of a stretch (to the end if no length), in order, without gaps.

        Neighbours differ in kind; zero is HOLE. What the tree can't tell (it is damaged) is DATA:
        reading it says so. Raises StorageError.
        """
        end = self.size_bytes if length_bytes is None else min(offset_bytes + length_bytes, self.size_bytes)
        return merged(self._raw_extents(offset_bytes, end))

    def changed(self) -> Iterator[Extent] | None:
        """See DiskReader."""
        return None

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        """See DiskReader. Its reads raise as `read_into` does."""
        yield _ViewConnection(self)

    def pieces(self, first_byte: int = 0, end_byte: int | None = None) -> Iterator[Piece]:
        """Yield what is not zero in the disk, or in a part of it, in order; lost stretches among it.

        Much is fetched ahead. A piece is within one slot; its content may be kept. A part is made
        larger up to the edges of leaves. Raises StorageError, never SlotDamaged.
        """
        leaf_bytes = self._leaf_chunks * self._chunk_bytes
        end = self._tree.leaf_count if end_byte is None else -(-end_byte // leaf_bytes)
        return iter(Pieces(
            self._tree, self._fetcher, self._leaves, self._chunk, first_byte // leaf_bytes, end))

    def _at_hand(self, number: int) -> memoryview | None:
        """Return a chunk that needs no waiting: what a small read mostly finds, by the shortest way.

        None: there may be one all the same. Raises SlotDamaged, StorageError.
        """
        index, at = divmod(number, self._leaf_chunks)
        leaf = self._leaf_at(index)
        entry = None if leaf is None else leaf.entries[at]
        if entry is None:
            return self._zeroes
        chunks = self._fetcher.at_hand(entry.place)
        return None if chunks is None or not _is_right(entry, chunks) else chunks.chunk(entry.position)

    def _read_portion(self, buffer: memoryview, offset: int, portion: range, ahead: range) -> None:
        entries = self._entries(portion)
        wanted = dict.fromkeys(_places(entries))
        most = len(wanted) + _AHEAD_SLOTS
        with contextlib.suppress(SlotDamaged):  # whoever reads that part will see it
            for place in _places(self._entries(ahead)):
                if len(wanted) >= most:
                    break
                wanted[place] = None
        coming = self._fetcher.want(wanted)
        end = offset + len(buffer)
        for number, entry in zip(portion, entries, strict=True):
            start = number * self._chunk_bytes
            begin, until = max(start, offset), min(start + self._chunk_bytes, end)
            into = buffer[begin - offset : until - offset]
            into[:] = (bytes(len(into)) if entry is None
                       else self._chunk(entry, coming[entry.place])[begin - start : until - start])

    def _chunk(self, entry: ChunkRef, coming: Coming) -> memoryview:
        """Return a chunk, from elsewhere if it was healed. Raises SlotDamaged, StorageError."""
        try:
            return _checked(entry, coming.result())
        except SlotDamaged as damage:
            healed = self._healed(entry.id)
            if healed is None or healed.id != entry.id:
                raise
            try:
                return _checked(healed, self._places.chunks(healed.place))
            except SlotDamaged:
                raise damage from None

    def _healed(self, chunk_id: bytes) -> ChunkRef | None:
        with self._lock:
            if self._heals is None:
                self._heals = read_heals(self._places.repository)
            return self._heals.get(chunk_id)

    def _entries(self, chunks: range) -> list[ChunkRef | None]:
        """Return the entries of *chunks*, which the disk has. Raises SlotDamaged."""
        found: list[ChunkRef | None] = []
        while len(found) < len(chunks):
            index, at = divmod(chunks.start + len(found), self._leaf_chunks)
            count = min(self._leaf_chunks - at, len(chunks) - len(found))
            leaf = self._leaf_at(index)
            found += [None] * count if leaf is None else leaf.entries[at : at + count]
        return found

    def _raw_extents(self, offset: int, end: int) -> Iterator[Extent]:
        leaf_bytes = self._leaf_chunks * self._chunk_bytes
        at = offset
        for index, place, damage in self._tree.stretches(offset // leaf_bytes, -(-end // leaf_bytes)):
            leaves = damage.leaves if damage is not None else range(index, index + 1)
            begin, until = max(leaves.start * leaf_bytes, offset), min(leaves.stop * leaf_bytes, end)
            if begin > at:
                yield Extent(at, begin - at, Kind.HOLE)
            yield from self._leaf_extents(place, begin, until)
            at = until
        if end > at:
            yield Extent(at, end - at, Kind.HOLE)

    def _leaf_extents(self, place: SlotRef | None, begin: int, end: int) -> Iterator[Extent]:
        try:
            leaf = None if place is None else self._tree.leaf(place)
        except SlotDamaged:
            leaf = None
        if leaf is None:
            yield Extent(begin, end - begin, Kind.DATA)
            return
        at = begin
        while at < end:
            chunk = at // self._chunk_bytes
            until = min((chunk + 1) * self._chunk_bytes, end)
            is_zero = leaf.entries[chunk % self._leaf_chunks] is None
            yield Extent(at, until - at, Kind.HOLE if is_zero else Kind.DATA)
            at = until


def read_whole(places: Places, content: Content) -> bytes:
    """Return all of a small file that is kept as a tree. Raises SlotDamaged, StorageError."""
    whole = bytearray(content.size_bytes)
    with DiskView(places, content) as view:
        view.read_into(memoryview(whole), 0)
    return bytes(whole)


class _ViewConnection(OneByOne):
    def __init__(self, view: DiskView) -> None:
        self._view = view

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        self._view.read_into(buffer, offset_bytes)


def _places(entries: Iterable[ChunkRef | None]) -> Iterator[SlotRef]:
    """Yield the slots of *entries*, not each as often as neighbours are in it: hashing one takes long."""
    last: SlotRef | None = None
    for entry in entries:
        if entry is not None and entry.place is not last:
            last = entry.place
            yield last


def _is_right(entry: ChunkRef, chunks: Chunks) -> bool:
    return entry.position < len(chunks.ids) and chunks.ids[entry.position] == entry.id


def _checked(entry: ChunkRef, chunks: Chunks) -> memoryview:
    """Return the chunk of an opened slot if it is the one that the leaf names. Raises SlotDamaged."""
    if not _is_right(entry, chunks):
        raise SlotDamaged(entry.place, f"the chunk at {entry.position} is not the one that the tree names")
    return chunks.chunk(entry.position)
