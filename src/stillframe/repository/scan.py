"""Reading a disk for a snapshot: which stretches, and the IDs of their chunks. What is zero is left out.

The disk is cut into units of about a mebibyte that never cross a leaf's edge. As many units as have together
no more chunks than one are read at a time, all on their way together, and tested for zeroes and hashed while
they are in the processor's cache.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from stillframe.block.reader import Connection, DiskReader, OneByOne
from stillframe.extent import Extent, Kind
from stillframe.repository.crypto import DomainKey
from stillframe.repository.layout import Parameters
from stillframe.units import MIB

#: Large enough that a request's own cost is small, small enough to stay in the cache (measured).
UNIT_BYTES = MIB


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive chunks from *first*, all within one leaf. *runs* are those of them that may hold data.

    *cleared* are those that were something else in the parent, perhaps, and are zero now.
    """

    first: int
    count: int
    runs: tuple[tuple[int, int], ...]
    cleared: tuple[tuple[int, int], ...] = ()

    @property
    def read_chunks(self) -> int:
        """How many chunks are read."""
        return sum(end - first for first, end in self.runs)

    def read(self) -> Iterator[int]:
        """Yield the chunks that are read, in order."""
        for first, end in self.runs:
            yield from range(first, end)


#: Units that are read together, in order.
Batch = tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class Scanned:
    """A batch that was read: the chunks of its runs lie back to back in *buffer*, and their IDs in *ids*.

    None stands for a zero chunk.
    """

    units: Batch
    buffer: bytearray
    ids: list[bytes | None]
    read_bytes: int


def unit_chunks(parameters: Parameters) -> int:
    """Return how many chunks a unit has; a leaf is a whole number of units."""
    return max(1, min(parameters.leaf_chunks, UNIT_BYTES // parameters.chunk_bytes))


def data_runs(extents: Iterable[Extent], size_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the runs of chunks that are not zero by *extents*, in order, joined."""
    first = end = 0
    for extent in extents:
        if extent.kind.reads_as_zero:
            continue
        begin = extent.offset_bytes // chunk_bytes
        if begin > end > first:
            yield first, end
        if begin > end or end == first:
            first = max(begin, end)
        end = max(end, -(-min(extent.end_bytes, size_bytes) // chunk_bytes))
    if end > first:
        yield first, end


def units(runs: Iterable[tuple[int, int]], chunks: int, unit: int) -> Iterator[Unit]:
    """Yield the units that hold data; *chunks* is the size of the disk, *unit* that of a unit."""
    index, parts = -1, list[tuple[int, int]]()
    for first, end in runs:
        at = first
        while at < end:
            if at // unit != index:
                if parts:
                    yield _unit(index * unit, chunks, unit, parts)
                index, parts = at // unit, []
            until = min(end, (index + 1) * unit)
            parts.append((at, until))
            at = until
    if parts:
        yield _unit(index * unit, chunks, unit, parts)


def batches(each: Iterable[Unit | range], most_chunks: int) -> Iterator[Batch | range]:
    """Yield units in batches of at most *most_chunks* chunks to read, and ranges of leaves as they are."""
    batch, count = list[Unit](), 0
    for unit in each:
        # A unit of which nothing is read counts as well: a batch is no longer than that many units.
        more = most_chunks if isinstance(unit, range) else max(1, unit.read_chunks)
        if batch and (count + more > most_chunks or isinstance(unit, range)):
            yield tuple(batch)
            batch, count = [], 0
        if isinstance(unit, range):
            yield unit
        else:
            batch.append(unit)
            count += more
    if batch:
        yield tuple(batch)


def _unit(first: int, chunks: int, unit: int, runs: list[tuple[int, int]]) -> Unit:
    return Unit(first, min(unit, chunks - first), tuple(runs))


class Scanner:
    """Reads units of one disk, on several threads, with a connection for each. Valid within its block."""

    def __init__(self, source: DiskReader, parameters: Parameters, key: DomainKey, connections: int) -> None:
        self._source = source
        self._size_bytes = source.size_bytes
        self._chunk_bytes = parameters.chunk_bytes
        self._zeroes = bytes(parameters.chunk_bytes)
        self._key = key
        self._count = connections
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            for _ in range(self._count):
                self._free.put(self._stack.enter_context(self._source.connect()))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def scan(self, batch: Batch, buffer: bytearray) -> Scanned:
        """Read the batch into *buffer* and return its IDs. Raises CopyFailed."""
        runs = [run for unit in batch for run in unit.runs]
        chunks = sum(end - first for first, end in runs)
        with memoryview(buffer) as view:
            read = self._read(view, runs) if runs else 0
            ids: list[bytes | None] = [None] * chunks
            for place in range(chunks):
                at = place * self._chunk_bytes
                # Of all ways to compare this is the fastest, and it copies nothing (FACTS 11).
                if not buffer.startswith(self._zeroes, at):
                    ids[place] = self._key.chunk_id(view[at : at + self._chunk_bytes])
        return Scanned(batch, buffer, ids, read)

    def _read(self, view: memoryview, runs: Iterable[tuple[int, int]]) -> int:
        pieces = list[tuple[memoryview, int]]()
        at = read = 0
        for first, end in runs:
            offset, until = first * self._chunk_bytes, at + (end - first) * self._chunk_bytes
            length = min(end * self._chunk_bytes, self._size_bytes) - offset
            pieces.append((view[at : at + length], offset))
            padding = until - at - length
            if padding:
                view[at + length : until] = self._zeroes[:padding]
            read += length
            at = until
        connection = self._free.get()
        try:
            connection.pread_pieces(pieces)
        finally:
            self._free.put(connection)
        return read


class BytesSource(OneByOne):
    """A DiskReader over bytes in memory, for small files."""

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self.size_bytes = len(content)

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """See DiskReader."""
        end = self.size_bytes if length_bytes is None else min(offset_bytes + length_bytes, self.size_bytes)
        if end > offset_bytes:
            yield Extent(offset_bytes, end - offset_bytes, Kind.DATA)

    def changed(self) -> Iterator[Extent] | None:
        """See DiskReader."""
        return None

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        """See DiskReader."""
        yield self

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """See Connection."""
        buffer[:] = self._content[offset_bytes : offset_bytes + len(buffer)]
