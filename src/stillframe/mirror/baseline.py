"""What the destination holds, block by block: what a copy compares the guest's disk with."""

from __future__ import annotations

import threading
from typing import Protocol

from stillframe.mirror.blockmap import DIGEST_BYTES, MapReader, block_count, block_digests, digest_of_zeroes
from stillframe.mirror.files import Files
from stillframe.mirror.units import DATA_UNIT_BYTES, Unit


class Baseline(Protocol):
    """Digests of what the mirror's image holds, at the length the disk has now."""

    #: What was read from the image for it, so far.
    read_bytes: int

    def digests(self, unit: Unit) -> bytes:
        """Return the digests of the blocks of *unit*. For several threads."""
        ...

    def believed(self, unit: Unit) -> bytes | None:
        """Return what the map says, where it was not already taken at its word."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class NoImage:
    """There is no image yet: as if it were all zeroes."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.read_bytes = 0

    def digests(self, unit: Unit) -> bytes:
        """See Baseline."""
        return bytes(DIGEST_BYTES * block_count(unit.length_bytes, self._block_size))

    def believed(self, unit: Unit) -> bytes | None:  # noqa: ARG002 -- there is no map
        """See Baseline."""
        return None

    def close(self) -> None:
        """See Baseline."""


class ByMap:
    """The map is believed; the image is not read."""

    def __init__(self, block_map: MapReader, block_size: int) -> None:
        self._map = block_map
        self._block_size = block_size
        self.read_bytes = 0

    def digests(self, unit: Unit) -> bytes:
        """See Baseline."""
        return self._map.digests(unit.offset_bytes, block_count(unit.length_bytes, self._block_size))

    def believed(self, unit: Unit) -> bytes | None:  # noqa: ARG002 -- it was taken at its word
        """See Baseline."""
        return None

    def close(self) -> None:
        """See Baseline."""
        self._map.close()


class ByImage:
    """The image is read: what it holds counts, whatever the map (if there is one) says.

    It is seen as it will be once it has the disk's present size: cut there, or zeroes behind
    its end.
    """

    def __init__(self, files: Files, name: str, block_size: int, block_map: MapReader | None) -> None:
        self._files = files
        self._map = block_map
        self._block_size = block_size
        self._zero_digest = digest_of_zeroes(block_size)
        self._scratch = threading.local()
        self.read_bytes = 0
        self._fd = files.open(name)
        self._image_size = files.size_bytes(self._fd)

    def digests(self, unit: Unit) -> bytes:
        """See Baseline."""
        found = bytearray(DIGEST_BYTES * block_count(unit.length_bytes, self._block_size))
        unit_end = unit.offset_bytes + unit.length_bytes
        done = unit.offset_bytes
        ranges = self._files.data_ranges(self._fd, unit.offset_bytes, min(unit_end, self._image_size))
        for start, end in ranges:
            at = max(done, start // self._block_size * self._block_size)
            done = min(block_count(end, self._block_size) * self._block_size, unit_end)
            while at < done:
                length = min(DATA_UNIT_BYTES, done - at)
                place = (at - unit.offset_bytes) // self._block_size * DIGEST_BYTES
                digests = self._piece(at, length)
                found[place : place + len(digests)] = digests
                at += length
        return bytes(found)

    def believed(self, unit: Unit) -> bytes | None:
        """See Baseline."""
        if self._map is None:
            return None
        return self._map.digests(unit.offset_bytes, block_count(unit.length_bytes, self._block_size))

    def close(self) -> None:
        """See Baseline."""
        self._files.close(self._fd)
        if self._map is not None:
            self._map.close()

    def _piece(self, offset: int, length: int) -> bytes:
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = memoryview(bytearray(DATA_UNIT_BYTES))
        buffer = self._scratch.buffer[:length]
        count = self._files.pread_into(self._fd, buffer, offset)
        if count < length:
            buffer[count:] = bytes(length - count)
        self.read_bytes += count
        return block_digests(buffer, self._block_size, self._zero_digest)
