"""The nodes of a disk's tree, as bytes. All numbers are little-endian.

    leaf    u8 0 ‖ u8 0 ‖ u16 P ‖ u16 S ‖ u16 E ‖ P x (sid(16) ‖ n u32)
            ‖ S x (u16 pack ‖ u32 slot ‖ u32 offset ‖ u32 stored)
            ‖ E x u16 place among S, 0xFFFF: the chunk is zero
            ‖ E x u8 position in the slot
            ‖ chunk ID(32) of each entry that is not zero, in order
    inner   u8 1 ‖ u8 level ‖ u16 P ‖ u16 0 ‖ u16 E ‖ P x (sid(16) ‖ n u32)
            ‖ E x (u16 pack, 0xFFFF: all below is zero ‖ u32 slot ‖ u32 offset ‖ u32 stored)

Packs are listed once and named by their place in the list: data packs in leaves, tree packs in inner
nodes. The slots of a leaf are listed once, too; each of them is used. E is the repository's
`leaf_chunks` or `inner_nodes`. The leaf at index i covers the chunks from i x leaf_chunks; the inner
node of level k at index i the nodes of level k-1 from i x inner_nodes: so a node covers the same
stretch however high the tree is, and a disk that grew keeps its nodes. What is all zero has no node.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

from stillframe.repository.crypto import ID_BYTES
from stillframe.repository.layout import SID_BYTES, PackKind, PackName
from stillframe.repository.pack import SlotRef

_HEAD = struct.Struct("<BBHHH")
_PACK = struct.Struct(f"<{SID_BYTES}sI")
_REF = struct.Struct("<HIII")
_NOTHING = 0xFFFF
_LEAF, _INNER = 0, 1

T = TypeVar("T")


class ChunkRef(msgspec.Struct, frozen=True, gc=False):
    """Where one chunk is: *position* in the slot *place*."""

    id: bytes
    place: SlotRef
    position: int


class Leaf(msgspec.Struct, frozen=True, gc=False):
    """Consecutive chunks; None is a zero chunk."""

    entries: tuple[ChunkRef | None, ...]


class Inner(msgspec.Struct, frozen=True, gc=False):
    """Consecutive nodes of the level below; None is all zero."""

    level: int
    children: tuple[SlotRef | None, ...]


def encode_leaf(entries: Sequence[ChunkRef | None]) -> bytes:
    """Return a leaf as bytes."""
    used = [entry for entry in entries if entry is not None]
    packs = _numbered(entry.place.pack for entry in used)
    slots = _numbered(entry.place for entry in used)
    return b"".join((
        _HEAD.pack(_LEAF, 0, len(packs), len(slots), len(entries)),
        *(_PACK.pack(pack.sid, pack.number) for pack in packs),
        *(_REF.pack(packs[slot.pack], slot.slot, slot.offset_bytes, slot.stored_bytes) for slot in slots),
        struct.pack(f"<{len(entries)}H",
                    *(_NOTHING if entry is None else slots[entry.place] for entry in entries)),
        bytes(0 if entry is None else entry.position for entry in entries),
        *(entry.id for entry in used),
    ))


def encode_inner(level: int, children: Sequence[SlotRef | None]) -> bytes:
    """Return an inner node as bytes."""
    packs = _numbered(child.pack for child in children if child is not None)
    return b"".join((
        _HEAD.pack(_INNER, level, len(packs), 0, len(children)),
        *(_PACK.pack(pack.sid, pack.number) for pack in packs),
        *(_REF.pack(_NOTHING, 0, 0, 0) if child is None else
          _REF.pack(packs[child.pack], child.slot, child.offset_bytes, child.stored_bytes)
          for child in children),
    ))


def decode_leaf(node: bytes, width: int) -> Leaf:
    """Return a leaf of *width* entries. Raises ValueError if *node* is none."""
    slots, at = _leaf_slots(node, width)
    places = struct.unpack_from(f"<{width}H", node, at)
    positions = node[at + 2 * width : at + 3 * width]
    at += 3 * width
    if len(node) != at + ID_BYTES * sum(place != _NOTHING for place in places):
        raise ValueError("a leaf is not as long as its entries")
    entries: list[ChunkRef | None] = []
    for place, position in zip(places, positions, strict=True):
        if place == _NOTHING:
            entries.append(None)
            continue
        if place >= len(slots):
            raise ValueError("a leaf names a slot that it does not list")
        entries.append(ChunkRef(node[at : at + ID_BYTES], slots[place], position))
        at += ID_BYTES
    return Leaf(tuple(entries))


def leaf_slots(node: bytes, width: int) -> list[SlotRef]:
    """Return the slots that a leaf of *width* entries uses, each once. Raises ValueError."""
    return _leaf_slots(node, width)[0]


def leaf_data(node: bytes, width: int) -> list[int]:
    """Return the numbers of a leaf's entries that are not zero. Raises ValueError."""
    _, at = _leaf_slots(node, width)
    places = struct.unpack_from(f"<{width}H", node, at)
    return [number for number, place in enumerate(places) if place != _NOTHING]


def decode_inner(node: bytes, level: int, width: int) -> Inner:
    """Return an inner node of that level and width. Raises ValueError if *node* is none."""
    packs, count, at = _packs(node, (_INNER, level), width, PackKind.TREE)
    if count or len(node) != at + width * _REF.size:
        raise ValueError("an inner node is not as long as its children")
    return Inner(level, tuple(
        None if pack == _NOTHING else _ref(packs, pack, slot, offset, stored)
        for pack, slot, offset, stored in _REF.iter_unpack(node[at:])
    ))


def _leaf_slots(node: bytes, width: int) -> tuple[list[SlotRef], int]:
    packs, count, at = _packs(node, (_LEAF, 0), width, PackKind.DATA)
    end = at + count * _REF.size
    if len(node) < end + 3 * width:
        raise ValueError("a leaf is cut short")
    return [_ref(packs, *row) for row in _REF.iter_unpack(node[at:end])], end


def _packs(node: bytes, sort: tuple[int, int], width: int, kind: PackKind) -> tuple[list[PackName], int, int]:
    """Return (packs, number of slots, where the packs end)."""
    if len(node) < _HEAD.size:
        raise ValueError("a node is cut short")
    found, level, packs, slots, entries = _HEAD.unpack_from(node)
    if (found, level) != sort or entries != width:
        raise ValueError(f"not the node that was looked for: {found}, level {level}, {entries} wide")
    end = _HEAD.size + packs * _PACK.size
    if len(node) < end:
        raise ValueError("a node is cut short")
    rows = _PACK.iter_unpack(node[_HEAD.size : end])
    return [PackName(kind.value, sid, number) for sid, number in rows], slots, end


def _ref(packs: list[PackName], pack: int, slot: int, offset: int, stored: int) -> SlotRef:
    if pack >= len(packs):
        raise ValueError("a node names a pack that it does not list")
    return SlotRef(packs[pack], slot, offset, stored)


def _numbered(things: Iterable[T]) -> dict[T, int]:
    """Return a number for each of *things*, in the order in which they come first."""
    numbers: dict[T, int] = {}
    for thing in things:
        numbers.setdefault(thing, len(numbers))
    return numbers
