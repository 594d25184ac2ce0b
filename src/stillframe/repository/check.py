"""Checking one pack: its head and footer, the hash of each slot, and what is in the slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from stillframe.errors import ObjectMissing, ObjectTruncated, RepositoryDamaged
from stillframe.repository.layout import PackKind, PackName
from stillframe.repository.nodes import Leaf, decode_inner, decode_leaf
from stillframe.repository.opened import Repository
from stillframe.repository.pack import HEAD_BYTES, SlotRow, check_head, read_footer
from stillframe.storage.model import Storage
from stillframe.units import MIB

_READ_BYTES = 4 * MIB
_MARK_BYTES = 8

#: Returns what is wrong with the content of a slot whose bytes are as stored, "" if nothing.
CheckContent = Callable[[SlotRow, memoryview], str]


@dataclass(slots=True)
class Checked:
    """What was found in a pack. *why* is about the pack as a whole; *bad* are slots, by birth, and why.

    With *unreadable*, the footer can't be read, and nothing is known of the slots; with *is_gone*, the pack
    was not there at all.
    """

    pack: PackName
    size_bytes: int = 0
    slots: int = 0
    why: str = ""
    unreadable: bool = False
    is_gone: bool = False
    bad: list[tuple[PackName, int, str]] = field(default_factory=list)


def check_pack(
    storage: Storage, pack: PackName, size_bytes: int, check_content: CheckContent | None = None
) -> Checked:
    """Read the whole pack and check it; no key is needed without *check_content*. Raises StorageError."""
    found = Checked(pack, size_bytes)
    try:
        _check(storage, found, check_content)
    except ObjectMissing:
        found.is_gone = True
    return found


def _check(storage: Storage, found: Checked, check_content: CheckContent | None) -> None:
    pack = found.pack
    try:
        rows = read_footer(storage, pack, found.size_bytes)
    except RepositoryDamaged as error:
        found.why, found.unreadable = error.message, True
        return
    found.slots = len(rows)
    try:
        check_head(pack, storage.get(pack.key, 0, HEAD_BYTES))
    except (RepositoryDamaged, ObjectTruncated) as error:
        found.why = error.message
    for row, stored in _slots(storage, pack, rows):
        if not row.is_intact(stored):
            found.bad.append((row.birth, row.slot, f"its bytes in {pack.text} are not what was stored"))
        elif check_content is not None and (why := check_content(row, stored)):
            found.bad.append((row.birth, row.slot, why))


class Expected:
    """What leaves say of the chunks in some packs' slots: the beginnings of their IDs, kept small."""

    def __init__(self, births: Iterable[PackName], slot_chunks: int) -> None:
        self._slot_chunks = slot_chunks
        self._slots: dict[PackName, dict[int, bytearray]] = {birth: {} for birth in births}
        self.contradictions: list[tuple[PackName, int]] = []

    def add(self, leaf: Leaf) -> None:
        """Note what a leaf says."""
        for entry in leaf.entries:
            if entry is None or (slots := self._slots.get(entry.place.pack)) is None:
                continue
            marks = slots.get(entry.place.slot)
            if marks is None:
                marks = slots[entry.place.slot] = bytearray(self._slot_chunks * _MARK_BYTES)
            at, mark = entry.position * _MARK_BYTES, entry.id[:_MARK_BYTES]
            known = marks[at : at + _MARK_BYTES]
            if len(known) < _MARK_BYTES or (any(known) and known != mark):
                self.contradictions.append((entry.place.pack, entry.place.slot))
            else:
                marks[at : at + _MARK_BYTES] = mark

    def agrees(self, birth: PackName, slot: int, ids: tuple[bytes, ...]) -> bool:
        """Return whether the leaves say of a slot what it says itself."""
        marks = self._slots.get(birth, {}).get(slot)
        if marks is None:
            return True
        said = b"".join(chunk_id[:_MARK_BYTES] for chunk_id in ids).ljust(len(marks), b"\0")
        return all(not any(marks[at : at + _MARK_BYTES])
                   or marks[at : at + _MARK_BYTES] == said[at : at + _MARK_BYTES]
                   for at in range(0, len(marks), _MARK_BYTES))


def content_checker(repository: Repository, expected: Expected) -> CheckContent:
    """Return what checks a slot in full: decrypt, decompress, IDs equal to the slot's own and the leaves'."""
    codec, key, parameters = repository.codec, repository.key, repository.parameters

    def check(row: SlotRow, stored: memoryview) -> str:
        try:
            if row.birth.kind == PackKind.TREE.value:
                node = codec.open_node(row.birth, row.slot, stored)
                if node[0]:
                    decode_inner(node, node[1], parameters.inner_nodes)
                else:
                    decode_leaf(node, parameters.leaf_chunks)
                return ""
            chunks = codec.open_chunks(row.birth, row.slot, stored)
        except (ValueError, IndexError) as error:
            return str(error)
        if any(key.chunk_id(chunks.chunk(at)) != chunk_id for at, chunk_id in enumerate(chunks.ids)):
            return "a chunk in it is not the one that its ID says"
        return "" if expected.agrees(row.birth, row.slot, chunks.ids) else "the tree names other chunks in it"

    return check


def _slots(
    storage: Storage, pack: PackName, rows: tuple[SlotRow, ...]
) -> Iterator[tuple[SlotRow, memoryview]]:
    """Yield the slots with their stored bytes; fewer bytes where the pack is too short."""
    run: list[SlotRow] = []
    for row in sorted(rows, key=lambda each: each.offset_bytes):
        if run and row.offset_bytes + row.stored_bytes - run[0].offset_bytes > _READ_BYTES:
            yield from _read(storage, pack, run)
            run = []
        run.append(row)
    yield from _read(storage, pack, run)


def _read(storage: Storage, pack: PackName, run: list[SlotRow]) -> Iterator[tuple[SlotRow, memoryview]]:
    if not run:
        return
    begin = run[0].offset_bytes
    end = max(row.offset_bytes + row.stored_bytes for row in run)
    try:
        stored = memoryview(storage.get(pack.key, begin, end - begin))
    except ObjectTruncated:
        stored = memoryview(b"")
    for row in run:
        at = row.offset_bytes - begin
        yield row, stored[at : at + row.stored_bytes]
