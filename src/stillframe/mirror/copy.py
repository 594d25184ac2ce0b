"""Finding what differs on one disk, and staging it: the loop that all the time goes into.

Two threads, each with a connection and a buffer of its own, take one unit after the
other: read, hash each block, compare with what the mirror holds, stage what differs.
All of that lets go of the interpreter's lock, so two threads keep two processors busy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Protocol

from stillframe.block.reader import Connection, DiskReader
from stillframe.capture.watched import Cancelled, Watch
from stillframe.mirror.audit import Ranges
from stillframe.mirror.baseline import Baseline
from stillframe.mirror.blockmap import (
    DIGEST_BYTES,
    ZERO_DIGEST,
    MapWriter,
    block_digests,
    differing_runs,
    digest_of_zeroes,
)
from stillframe.mirror.files import Files
from stillframe.mirror.redo import RedoWriter
from stillframe.mirror.units import DATA_UNIT_BYTES, Unit

THREADS = 2


class Staging(Protocol):
    """Where what differs goes. For several threads."""

    @property
    def written_bytes(self) -> int:
        """What was written to the destination so far."""
        ...

    def data(self, offset: int, content: memoryview) -> None:
        """Stage content for a stretch of the image."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Stage zeroes for a stretch of the image."""
        ...

    def end(self) -> None:
        """Make it all durable."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class NewImage:
    """The first copy: a new image, written in place under its staging name."""

    def __init__(self, files: Files, name: str, size_bytes: int) -> None:
        self._files = files
        self.written_bytes = 0
        self._fd = files.open(name, create=True)
        files.truncate(self._fd, size_bytes)

    def data(self, offset: int, content: memoryview) -> None:
        """See Staging."""
        self._files.pwrite(self._fd, content, offset)
        # The disk begins to write while the next unit is read, instead of all at the end.
        self._files.start_writeback(self._fd, offset, len(content))
        self.written_bytes += len(content)

    def zero(self, offset: int, length: int) -> None:
        """See Staging."""

    def end(self) -> None:
        """See Staging."""
        self._files.fsync(self._fd)

    def close(self) -> None:
        """See Staging."""
        self._files.close(self._fd)


class Redo:
    """An update: a redo file, and room reserved in the image for what will be written there.

    The room is what makes a full destination show up now, while the old mirror is whole.
    """

    def __init__(self, files: Files, writer: RedoWriter, image: str) -> None:
        self._files = files
        self._writer = writer
        self._fd = files.open(image, write=True)

    @property
    def written_bytes(self) -> int:
        """See Staging."""
        return self._writer.written_bytes

    def data(self, offset: int, content: memoryview) -> None:
        """See Staging."""
        self._files.reserve(self._fd, offset, len(content))
        self._writer.data(offset, content)

    def zero(self, offset: int, length: int) -> None:
        """See Staging."""
        self._writer.zero(offset, length)

    def end(self) -> None:
        """See Staging."""
        self._writer.end()

    def close(self) -> None:
        """See Staging."""
        self._writer.close()
        self._files.close(self._fd)


@dataclass(slots=True)
class Tally:
    """What one thread did, in bytes and blocks."""

    data_bytes: int = 0
    zero_bytes: int = 0
    changed_bytes: int = 0
    healed_blocks: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class DiskCopy:
    """The copy of one disk. run() is called once; tally() at any time, by any thread."""

    def __init__(
        self, reader: DiskReader, baseline: Baseline, staging: Staging, block_map: MapWriter,
        block_size: int, watch: Watch,
    ) -> None:
        self._reader = reader
        self._baseline = baseline
        self._staging = staging
        self._map = block_map
        self._block_size = block_size
        self._zero_digest = digest_of_zeroes(block_size)
        self._watch = watch
        self._tallies: list[Tally] = []
        self._errors: list[BaseException] = []
        self._units: Iterator[Unit] = iter(())
        #: Stretches outside of which nothing was to differ, and the first place there where something did.
        self.expected: Ranges | None = None
        self.unexpected_at_bytes: int | None = None
        self._lock = threading.Lock()

    def tally(self) -> Tally:
        """Return what all threads together have done so far."""
        return sum(list(self._tallies), Tally())

    def run(
        self, units: Iterator[Unit], data_unit_bytes: int = DATA_UNIT_BYTES, threads: int = THREADS
    ) -> None:
        """Read *units* and stage what differs; nothing is durable yet. Raises what a thread did."""
        self._units = units
        workers = [
            threading.Thread(target=self._guarded, args=(data_unit_bytes,), name="copy", daemon=True)
            for _ in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self._errors:
            raise next((error for error in self._errors if not isinstance(error, Cancelled)), self._errors[0])

    def _guarded(self, buffer_bytes: int) -> None:
        try:
            self._work(memoryview(bytearray(buffer_bytes)))
        except BaseException as error:  # noqa: BLE001 -- raised again by run
            self._errors.append(error)

    def _work(self, buffer: memoryview) -> None:
        tally = Tally()
        self._tallies.append(tally)
        with self._reader.connect() as connection:
            while not self._errors and (unit := self._next()) is not None:
                self._watch.tick()
                if unit.is_zero:
                    tally.zero_bytes += unit.length_bytes
                    self._compare_zero(unit, tally)
                else:
                    self._compare(unit, connection, buffer[: unit.length_bytes], tally)
                    tally.data_bytes += unit.length_bytes

    def _next(self) -> Unit | None:
        with self._lock, self._watch.reads_source():
            return next(self._units, None)

    def _compare(self, unit: Unit, connection: Connection, content: memoryview, tally: Tally) -> None:
        with self._watch.reads_source():
            connection.pread_into(content, unit.offset_bytes)
        new = block_digests(content, self._block_size, self._zero_digest)
        for start, end, is_zero in self._differing(unit, new, tally):
            if is_zero:
                self._staging.zero(unit.offset_bytes + start, end - start)
            else:
                self._staging.data(unit.offset_bytes + start, content[start:end])
        self._map.put(unit.offset_bytes, new)

    def _compare_zero(self, unit: Unit, tally: Tally) -> None:
        count = -(-unit.length_bytes // self._block_size)
        for start, end, _ in self._differing(unit, ZERO_DIGEST * count, tally):
            self._staging.zero(unit.offset_bytes + start, end - start)
        self._map.put(unit.offset_bytes, ZERO_DIGEST * count)  # the map may have begun as the old one

    def _differing(self, unit: Unit, new: bytes, tally: Tally) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, is zero) within *unit*, in bytes, of what must be staged."""
        old = self._baseline.digests(unit)
        believed = self._baseline.believed(unit) if new != old else None
        for first, count, is_zero in differing_runs(new, old):
            start = first * self._block_size
            end = min(start + count * self._block_size, unit.length_bytes)
            tally.changed_bytes += end - start
            if self.expected is not None:
                self._look_for_unexpected(unit.offset_bytes + start, unit.offset_bytes + end)
            if believed is not None:
                tally.healed_blocks += sum(
                    new[at : at + DIGEST_BYTES] == believed[at : at + DIGEST_BYTES]
                    for at in range(first * DIGEST_BYTES, (first + count) * DIGEST_BYTES, DIGEST_BYTES)
                )
            yield start, end, is_zero


    def _look_for_unexpected(self, start: int, end: int) -> None:
        assert self.expected is not None
        found = next(self.expected.outside(start, end), None)
        if found is not None:
            with self._lock:
                before = self.unexpected_at_bytes
                self.unexpected_at_bytes = found[0] if before is None else min(before, found[0])


def data_bytes(units: Iterator[Unit], tick: Callable[[], None]) -> int:
    """Return how much of *units* is data and will be read."""
    total = 0
    for unit in units:
        tick()
        total += 0 if unit.is_zero else unit.length_bytes
    return total
