r"""The map: a digest for each block of a mirrored disk, so that the image need not be read.

Format 1, all numbers little-endian. Header, 4096 bytes: magic ``SFMAP\0\0\0``, u32 version,
u32 block size, u64 disk size, 16 bytes generation, 16 bytes BLAKE3 of what is before; zeroes.
Then 16 bytes a block, in the order of the blocks: the first 16 bytes of the BLAKE3 of the
block's content (the last block may be short). All zero stands for a block of zeroes, so
that stretches which the disk doesn't use stay holes in the map as well.

The BLAKE3 of the whole file is kept in mirror.json. A map is believed only if it fits that
and the image is as stillframe left it. It is never held in memory whole.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from blake3 import blake3

from stillframe.mirror.files import Files
from stillframe.units import KIB, MIB

BLOCK_SIZE_BYTES = 64 * KIB
DIGEST_BYTES = 16
HEADER_BYTES = 4096
ZERO_DIGEST = bytes(DIGEST_BYTES)

_MAGIC = b"SFMAP\0\0\0"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ16s")
_SLICE_BYTES = MIB


def block_digests(content: memoryview, block_size: int, zero_digest: bytes) -> bytes:
    """Return the digests of the blocks in *content*, which begins at a block's edge.

    *zero_digest* is digest_of_zeroes(block_size): finding zero blocks by their digest is
    cheaper than looking at them twice.
    """
    digests = [
        blake3(content[at : at + block_size]).digest(length=DIGEST_BYTES)
        for at in range(0, len(content), block_size)
    ]
    if len(content) % block_size and digests[-1] == digest_of_zeroes(len(content) % block_size):
        digests[-1] = ZERO_DIGEST
    joined = b"".join(digests)
    # Most units hold no zero block: one search in C instead of a test for each block.
    if zero_digest not in joined:
        return joined
    return b"".join(ZERO_DIGEST if digest == zero_digest else digest for digest in digests)


def digest_of_zeroes(length: int) -> bytes:
    """Return the digest that *length* zero bytes would have if they were not special."""
    return bytes(blake3(bytes(length)).digest(length=DIGEST_BYTES))


def differing_runs(new: bytes, old: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield (first block, number of blocks, now zero) for runs of blocks whose digests differ.

    Both are digests of the same blocks; a run is all zero or all not.
    """
    if new == old:
        return
    first, count, zero = 0, 0, False
    for at in range(0, len(new), DIGEST_BYTES):
        digest = new[at : at + DIGEST_BYTES]
        if digest == old[at : at + DIGEST_BYTES]:
            continue
        index, is_zero = at // DIGEST_BYTES, digest == ZERO_DIGEST
        if count and index == first + count and is_zero is zero:
            count += 1
            continue
        if count:
            yield first, count, zero
        first, count, zero = index, 1, is_zero
    if count:
        yield first, count, zero


def block_count(size_bytes: int, block_size: int) -> int:
    """Return how many blocks a disk of *size_bytes* has."""
    return -(-size_bytes // block_size)


class MapWriter:
    """A new map. Blocks that are never written are zero blocks. For several threads."""

    def __init__(self, files: Files, name: str, generation: bytes, size_bytes: int, block_size: int) -> None:
        self._files = files
        self._block_size = block_size
        self._holes_are_zero = True
        self.written_bytes = HEADER_BYTES
        self._fd = files.open(name, create=True)
        files.truncate(self._fd, HEADER_BYTES + DIGEST_BYTES * block_count(size_bytes, block_size))
        files.pwrite(self._fd, _header(generation, size_bytes, block_size), 0)

    def take_over(self, old: MapReader, size_bytes: int, tick: Callable[[], None]) -> None:
        """Write all digests of *old*, a map of a disk of the same size. Before any put."""
        step = _SLICE_BYTES // DIGEST_BYTES * self._block_size
        for offset in range(0, size_bytes, step):
            tick()
            count = block_count(min(step, size_bytes - offset), self._block_size)
            self.put(offset, old.digests(offset, count))
        self._holes_are_zero = False

    def put(self, offset_bytes: int, digests: bytes) -> None:
        """Write the digests of the blocks from *offset_bytes* of the disk on."""
        if self._holes_are_zero and digests.count(0) == len(digests):  # a hole stays a hole
            return
        self._files.pwrite(self._fd, digests, _place(offset_bytes, self._block_size))
        self.written_bytes += len(digests)

    def end(self, tick: Callable[[], None]) -> str:
        """Make the map durable and return the digest (hex) of the whole file."""
        self._files.fsync(self._fd)
        return _file_digest(self._files, self._fd, tick)

    def close(self) -> None:
        """Close the file."""
        self._files.close(self._fd)


class MapReader:
    """A map that was verified as a whole. For several threads."""

    def __init__(self, files: Files, fd: int, block_size: int) -> None:
        self._files = files
        self._fd = fd
        self._block_size = block_size

    def digests(self, offset_bytes: int, count: int) -> bytes:
        """Return the digests of *count* blocks; blocks behind the old disk's end are zero."""
        buffer = bytearray(count * DIGEST_BYTES)
        self._files.pread_into(self._fd, memoryview(buffer), _place(offset_bytes, self._block_size))
        return bytes(buffer)

    def close(self) -> None:
        """Close the file."""
        self._files.close(self._fd)


class MapUnusable(ValueError):
    """The map is missing, damaged, or belongs to another state of the image."""


def open_map(
    files: Files, name: str, *, generation: bytes, size_bytes: int, block_size: int, digest: str,
    tick: Callable[[], None],
) -> MapReader:
    """Open a map after reading it all and finding that everything fits. Raises MapUnusable."""
    try:
        fd = files.open(name)
    except FileNotFoundError as error:
        raise MapUnusable("the map is missing") from error
    try:
        expected = HEADER_BYTES + DIGEST_BYTES * block_count(size_bytes, block_size)
        header = bytearray(HEADER_BYTES)
        files.pread_into(fd, memoryview(header), 0)
        if files.size_bytes(fd) != expected or header != _header(generation, size_bytes, block_size):
            raise MapUnusable("the map belongs to another state of the image")
        if _file_digest(files, fd, tick) != digest:
            raise MapUnusable("the map is damaged (its checksum does not fit)")
    except BaseException:
        files.close(fd)
        raise
    return MapReader(files, fd, block_size)


def looks_like_a_map(files: Files, name: str) -> bool:
    """Return whether the file *name* begins as a map does."""
    try:
        fd = files.open(name)
    except OSError:
        return False
    try:
        magic = bytearray(len(_MAGIC))
        return files.pread_into(fd, memoryview(magic), 0) == len(magic) and magic == _MAGIC
    finally:
        files.close(fd)


def _place(offset_bytes: int, block_size: int) -> int:
    assert offset_bytes % block_size == 0
    return HEADER_BYTES + offset_bytes // block_size * DIGEST_BYTES


def _header(generation: bytes, size_bytes: int, block_size: int) -> bytes:
    head = _HEADER.pack(_MAGIC, _VERSION, block_size, size_bytes, generation)
    return (head + blake3(head).digest(length=DIGEST_BYTES)).ljust(HEADER_BYTES, b"\0")


def _file_digest(files: Files, fd: int, tick: Callable[[], None]) -> str:
    hasher = blake3()
    buffer = bytearray(_SLICE_BYTES)
    offset = 0
    while True:
        tick()
        count = files.pread_into(fd, memoryview(buffer), offset)
        if count == 0:
            return str(hasher.hexdigest())
        hasher.update(memoryview(buffer)[:count])
        offset += count
