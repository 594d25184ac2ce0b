"""Packs: objects of about 32 MiB that hold many slots. All numbers are little-endian.

    head     "SFPK" ‖ u8 version ‖ kind 'p' or 't' ‖ u16 0 ‖ sid(16) ‖ u32 n                       28 bytes
    slots    sealed slots, back to back
    footer   for each: birth sid(16) ‖ birth n u32 ‖ birth slot u32 ‖ offset u32 ‖ stored u32
             ‖ plain u32 ‖ BLAKE3 of the stored bytes(32)                                          68 bytes
    trailer  u32 slots ‖ BLAKE3(head ‖ footer ‖ u32 slots)(32) ‖ "SFPE"                            40 bytes

Nothing of it needs a key: what is stored can be checked by anybody. A slot's *birth* is the pack and
number it was sealed as; that is its identity for the key, the nonce and every reference. In a pack
that a compaction wrote, slots were born in other packs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec
from blake3 import blake3

from stillframe.errors import ObjectTruncated, RepositoryDamaged
from stillframe.repository.layout import FORMAT_VERSION, PackName, check_version
from stillframe.storage.model import Storage

HASH_BYTES = 32
_HEAD = struct.Struct("<4sB1sH16sI")
_ROW = struct.Struct("<16sIIIII32s")
_COUNT = struct.Struct("<I")
_TRAILER_BYTES = _COUNT.size + HASH_BYTES + 4
_MAGIC, _END = b"SFPK", b"SFPE"
# The footer of a common pack fits into the first read of its end.
_TAIL_BYTES = 64 * 1024

HEAD_BYTES = _HEAD.size
#: What is behind the footer.
END_BYTES = _TRAILER_BYTES
#: What a slot costs in the footer.
ROW_BYTES = _ROW.size

Buffer = bytes | bytearray | memoryview


class SlotRef(msgspec.Struct, frozen=True, gc=False):
    """A reference to a slot: its birth, and where in the birth pack its bytes are.

    A run makes these by the million, as it does with the other structs without garbage collection here.
    """

    pack: PackName
    slot: int
    offset_bytes: int
    stored_bytes: int


class SlotRow(msgspec.Struct, frozen=True, gc=False):
    """What a pack's footer says of one slot. *birth* is not always the pack that holds it."""

    birth: PackName
    slot: int
    offset_bytes: int
    stored_bytes: int
    plain_bytes: int
    digest: bytes

    def is_intact(self, stored: Buffer) -> bool:
        """Return whether *stored* are the bytes that were put there."""
        return len(stored) == self.stored_bytes and stored_digest(stored) == self.digest


def stored_digest(stored: Buffer) -> bytes:
    """Return the hash of stored bytes, which needs no key."""
    return blake3(stored).digest()


class PackBuilder:
    """A pack in memory, while it grows. For one thread."""

    def __init__(self, name: PackName) -> None:
        self.name = name
        self._body = bytearray(_head(name))
        self._rows: list[SlotRow] = []

    @property
    def size_bytes(self) -> int:
        """How large the pack is by now, without its end."""
        return len(self._body)

    @property
    def slots(self) -> int:
        """How many slots the pack has by now."""
        return len(self._rows)

    def add(self, sealed: Buffer, plain_bytes: int) -> SlotRef:
        """Add a slot that was sealed as the next number of this pack; return the reference to it."""
        return self._add(self.name, len(self._rows), sealed, plain_bytes)

    def add_moved(self, row: SlotRow, sealed: Buffer) -> None:
        """Add a slot that was born elsewhere, as it is."""
        self._add(row.birth, row.slot, sealed, row.plain_bytes)

    def _add(self, birth: PackName, slot: int, sealed: Buffer, plain_bytes: int) -> SlotRef:
        row = SlotRow(birth, slot, len(self._body), len(sealed), plain_bytes, stored_digest(sealed))
        self._body += sealed
        self._rows.append(row)
        return SlotRef(birth, slot, row.offset_bytes, row.stored_bytes)

    def finished(self) -> bytearray:
        """Return the whole object; nothing can be added any more."""
        self._body += end_of_pack(self.name, self._rows)
        return self._body


def head_of_pack(name: PackName) -> bytes:
    """Return the bytes that a pack begins with."""
    return _head(name)


def end_of_pack(name: PackName, rows: Sequence[SlotRow]) -> bytes:
    """Return footer and trailer: what comes behind the slots of *rows*."""
    footer = b"".join(
        _ROW.pack(row.birth.sid, row.birth.number, row.slot, row.offset_bytes, row.stored_bytes,
                  row.plain_bytes, row.digest) for row in rows)
    count = _COUNT.pack(len(rows))
    return footer + count + blake3(_head(name) + footer + count).digest() + _END


def read_footer(storage: Storage, name: PackName, size_bytes: int) -> tuple[SlotRow, ...]:
    """Return the rows of a pack that is *size_bytes* long, by reading its end.

    Raises RepositoryDamaged when it is not whole, ObjectMissing when it is gone.
    """
    least = HEAD_BYTES + _TRAILER_BYTES
    if size_bytes < least:
        raise _damaged(name, "it is too short")
    tail = _read_tail(storage, name, size_bytes, min(size_bytes, _TAIL_BYTES))
    count = _count(name, tail)
    needed = count * _ROW.size + _TRAILER_BYTES
    if needed + HEAD_BYTES > size_bytes:
        raise _damaged(name, "its end is not that of a pack")
    if needed > len(tail):
        tail = _read_tail(storage, name, size_bytes, needed)
    return _rows(name, tail[-needed:], size_bytes)


def footer_of(name: PackName, pack: Buffer) -> tuple[SlotRow, ...]:
    """Return the rows of a whole pack in memory. Raises RepositoryDamaged."""
    view = memoryview(pack)
    if len(view) < HEAD_BYTES + _TRAILER_BYTES:
        raise _damaged(name, "it is too short")
    if bytes(view[:HEAD_BYTES]) != _head(name):
        check_head(name, bytes(view[:HEAD_BYTES]))
    needed = _count(name, bytes(view[-_TRAILER_BYTES:])) * _ROW.size + _TRAILER_BYTES
    if needed + HEAD_BYTES > len(view):
        raise _damaged(name, "its end is not that of a pack")
    return _rows(name, bytes(view[-needed:]), len(view))


def check_head(name: PackName, head: bytes) -> None:
    """Raise RepositoryDamaged or RepositoryNewer if *head* is not the head of that pack."""
    if len(head) < HEAD_BYTES or head[:4] != _MAGIC:
        raise _damaged(name, "its head is not that of a pack")
    check_version(head[4], f"{name.text} is a pack")
    if head[:HEAD_BYTES] != _head(name):
        raise _damaged(name, "it is another pack")


def _read_tail(storage: Storage, name: PackName, size_bytes: int, length: int) -> bytes:
    try:
        return storage.get(name.key, size_bytes - length, length)
    except ObjectTruncated as error:
        raise _damaged(name, "it was cut short") from error


def _count(name: PackName, tail: bytes) -> int:
    if not tail.endswith(_END):
        raise _damaged(name, "its end is missing")
    (count,) = _COUNT.unpack_from(tail, len(tail) - _TRAILER_BYTES)
    return int(count)


def _rows(name: PackName, end: bytes, size_bytes: int) -> tuple[SlotRow, ...]:
    """Return the rows in *end*, which is footer and trailer and nothing else."""
    footer, trailer = end[:-_TRAILER_BYTES], end[-_TRAILER_BYTES:]
    count, digest = trailer[:_COUNT.size], trailer[_COUNT.size:-4]
    if blake3(_head(name) + footer + count).digest() != digest:
        raise _damaged(name, "its footer is not what was stored")
    rows = tuple(_unpacked_rows(name.kind, footer))
    begin = size_bytes - len(end)
    if any(row.offset_bytes < HEAD_BYTES or row.offset_bytes + row.stored_bytes > begin for row in rows):
        raise _damaged(name, "its footer names bytes that are not there")
    return rows


def _unpacked_rows(kind: str, footer: bytes) -> Iterator[SlotRow]:
    births: dict[tuple[bytes, int], PackName] = {}
    for sid, number, slot, offset, stored, plain, digest in _ROW.iter_unpack(footer):
        birth = births.get((sid, number))
        if birth is None:
            birth = births[sid, number] = PackName(kind, sid, number)
        yield SlotRow(birth, slot, offset, stored, plain, digest)


def _head(name: PackName) -> bytes:
    return _HEAD.pack(_MAGIC, FORMAT_VERSION, name.kind.encode(), 0, name.sid, name.number)


def _damaged(name: PackName, why: str) -> RepositoryDamaged:
    return RepositoryDamaged(
        f"The pack {name.text} is damaged: {why}.",
        "stillframe verify --repo REPO   # names the snapshots that are hurt",
    )
