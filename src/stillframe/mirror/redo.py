r"""The redo file: what an update writes into an image, durable before the image is touched.

Format 1, all numbers little-endian. Header, 56 bytes: magic ``SFREDO\0\0``, u32 version, u32
reserved, u64 disk size after the update, 16 bytes generation, 16 bytes BLAKE3 of what is before.
Then records: a head of 56 bytes {u64 offset, u64 length, u32 kind, u32 reserved, 16 bytes BLAKE3
of the payload, 16 bytes BLAKE3 of (generation, u64 the head's place in this file, the head's
first 40 bytes)}, and for kind 1 (data) *length* bytes of payload. Kind 2 (zero) has none and may
be of any length. Kind 3 ends the file: offset is the number of records, length the sum of the
payloads. Nothing follows it. Records never overlap, so that applying them is idempotent and
their order does not matter.

A redo file counts as damaged when any of this does not hold; it is then not applied at all.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator

from blake3 import blake3

from stillframe.mirror.files import Files
from stillframe.units import MIB

_MAGIC = b"SFREDO\0\0"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ16s")
_HEAD = struct.Struct("<QQII16s")
_DIGEST_BYTES = 16
_HEADER_BYTES = _HEADER.size + _DIGEST_BYTES
_HEAD_BYTES = _HEAD.size + _DIGEST_BYTES
_DATA, _ZERO, _END = 1, 2, 3
#: No payload is longer: it is read into memory whole.
PAYLOAD_LIMIT_BYTES = 4 * MIB
#: Written and not yet on its way to the disk, at most.
_WRITEBACK_BYTES = 16 * MIB


class RedoDamaged(ValueError):
    """The redo file is missing, torn or damaged, or belongs to another update."""


class RedoWriter:
    """A redo file in the making. For several threads."""

    def __init__(self, files: Files, name: str, generation: bytes, size_bytes: int) -> None:
        self._files = files
        self._generation = generation
        self._lock = threading.Lock()
        self._fd = files.open(name, create=True)
        self._end = _HEADER_BYTES
        self._flushed = 0
        self._records = 0
        self._payload = 0
        files.pwrite(self._fd, _header(generation, size_bytes), 0)

    @property
    def written_bytes(self) -> int:
        """How long the file is."""
        return self._end

    def data(self, offset: int, content: memoryview) -> None:
        """Add: *content* goes to *offset* of the image."""
        assert len(content) <= PAYLOAD_LIMIT_BYTES
        digest = blake3(content).digest(length=_DIGEST_BYTES)
        with self._lock:
            # Only taking the place is done under the lock; threads write side by side.
            place = self._end
            self._end += _HEAD_BYTES + len(content)
            self._records += 1
            self._payload += len(content)
            start, self._flushed = self._flushed, max(self._flushed, place - _WRITEBACK_BYTES)
            ready = self._flushed
        self._files.pwrite(self._fd, self._head(place, offset, len(content), _DATA, digest), place)
        self._files.pwrite(self._fd, content, place + _HEAD_BYTES)
        if ready > start:
            self._files.start_writeback(self._fd, start, ready - start)

    def zero(self, offset: int, length: int) -> None:
        """Add: *length* bytes from *offset* of the image on become zeroes."""
        with self._lock:
            place = self._end
            self._end += _HEAD_BYTES
            self._records += 1
        self._files.pwrite(self._fd, self._head(place, offset, length, _ZERO), place)

    def end(self) -> None:
        """Write the footer and make the file durable."""
        head = self._head(self._end, self._records, self._payload, _END)
        self._files.pwrite(self._fd, head, self._end)
        self._end += _HEAD_BYTES
        self._files.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        self._files.close(self._fd)

    def _head(
        self, place: int, offset: int, length: int, kind: int, digest: bytes = bytes(_DIGEST_BYTES)
    ) -> bytes:
        return _head(self._generation, place, _HEAD.pack(offset, length, kind, 0, digest))


def check_redo(
    files: Files, name: str, generation: bytes, size_bytes: int, tick: Callable[[], None]
) -> None:
    """Read the redo file to its end. Raises RedoDamaged unless every byte of it is as written."""
    fd = _open(files, name)
    try:
        for _ in _records(files, fd, generation, size_bytes):
            tick()
    finally:
        files.close(fd)


def apply_redo(
    files: Files, name: str, image_fd: int, *, generation: bytes, size_bytes: int, tick: Callable[[], None]
) -> None:
    """Write a redo file that check_redo has passed into the open image, and make that durable.

    Raises RedoDamaged if it changed since; the image is then a mixture.
    """
    fd = _open(files, name)
    try:
        if files.size_bytes(image_fd) != size_bytes:
            files.truncate(image_fd, size_bytes)
        for offset, length, content in _records(files, fd, generation, size_bytes):
            tick()
            if content is None:
                files.zero(image_fd, offset, length)
            else:
                files.pwrite(image_fd, content, offset)
                files.start_writeback(image_fd, offset, length)
        files.fsync(image_fd)
    finally:
        files.close(fd)


def _open(files: Files, name: str) -> int:
    try:
        return files.open(name)
    except FileNotFoundError as error:
        raise RedoDamaged(f"{name} is missing") from error


def _records(
    files: Files, fd: int, generation: bytes, disk_size: int
) -> Iterator[tuple[int, int, memoryview | None]]:
    """Yield (offset, length, content or None for zeroes); the content lives until the next step."""
    if _piece(files, fd, _HEADER_BYTES, 0) != _header(generation, disk_size):
        raise RedoDamaged("its header does not belong to this update")
    buffer = memoryview(bytearray(PAYLOAD_LIMIT_BYTES))
    place, records, payload = _HEADER_BYTES, 0, 0
    while True:
        packed = _piece(files, fd, _HEAD_BYTES, place)
        if packed != _head(generation, place, packed[: _HEAD.size]):
            raise RedoDamaged(f"the record at {place} is damaged")
        offset, length, kind, _, digest = _HEAD.unpack(packed[: _HEAD.size])
        place += _HEAD_BYTES
        if kind == _END:
            if (offset, length, place) != (records, payload, files.size_bytes(fd)):
                raise RedoDamaged("its end does not fit")
            return
        if kind not in (_DATA, _ZERO) or offset + length > disk_size:
            raise RedoDamaged(f"the record at {place - _HEAD_BYTES} is not possible")
        records += 1
        if kind == _ZERO:
            yield offset, length, None
            continue
        if length > PAYLOAD_LIMIT_BYTES:
            raise RedoDamaged(f"the record at {place - _HEAD_BYTES} is too long")
        content = buffer[:length]
        _exactly(files, fd, content, place)
        if blake3(content).digest(length=_DIGEST_BYTES) != digest:
            raise RedoDamaged(f"the data at {place} is damaged")
        place += length
        payload += length
        yield offset, length, content


def _exactly(files: Files, fd: int, buffer: memoryview, offset: int) -> None:
    if files.pread_into(fd, buffer, offset) != len(buffer):
        raise RedoDamaged("it ends too early")


def _piece(files: Files, fd: int, length: int, offset: int) -> bytes:
    buffer = bytearray(length)
    _exactly(files, fd, memoryview(buffer), offset)
    return bytes(buffer)


def _header(generation: bytes, size_bytes: int) -> bytes:
    head = _HEADER.pack(_MAGIC, _VERSION, 0, size_bytes, generation)
    return head + blake3(head).digest(length=_DIGEST_BYTES)


def _head(generation: bytes, place: int, packed: bytes) -> bytes:
    seal = blake3(generation + struct.pack("<Q", place) + packed).digest(length=_DIGEST_BYTES)
    return packed + seal
