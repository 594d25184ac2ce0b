"""What verifying found bad, and where the same chunks were stored again.

    main/v/bad/<kind>-<sid>-<n>   JSON: version, pack, slots (bitset in hex, or "all"), why, at
    main/v/heal/<sid>             sealed JSON: version, heals: [[chunk ID, "p/<sid>/<n>", slot, offset,
                                  stored, position], ...]

Slots are named by their birth. A bad slot is never referred to again: a backup that sees the same
chunks stores them anew, and writes their new places down here, by chunk ID, so that older snapshots read
whole again. Neither object is needed for what is good: losing one loses no snapshot.

A slot's record stays as long as somebody could still refer to the slot; the collector removes it then.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from datetime import datetime

import msgspec

from stillframe.clock import utc_text
from stillframe.errors import ObjectMissing, ObjectTruncated, RepositoryDamaged
from stillframe.repository.crypto import ID_BYTES
from stillframe.repository.layout import (
    BAD,
    FORMAT_VERSION,
    HEALED,
    PackKind,
    PackName,
    check_version,
    pack_name,
)
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.opened import Repository
from stillframe.repository.pack import SlotRef
from stillframe.storage.model import Storage
from stillframe.storage.own import create_own

#: No pack has as many slots; it bounds the bitsets that a damaged or forged object can ask for.
SLOTS_LIMIT = 1 << 22
#: Heals of one session; what is beyond is stored again by a later backup.
HEALS_LIMIT = 1 << 17
_ALL = "all"
_BAD_KEY = re.compile(rf"{BAD}([pt])-([0-9a-f]{{32}})-(\d{{8,10}})")


class BadSlots:
    """Slots, by their birth (pack, number), that must not be referred to any more. Never changes."""

    def __init__(self, packs: Mapping[PackName, int | None] | None = None) -> None:
        #: A bitset of slots for each pack; None: all that were born in it.
        self.packs: Mapping[PackName, int | None] = dict(packs or {})

    def __contains__(self, at: object) -> bool:
        if not isinstance(at, tuple):
            return False
        pack, slot = at
        slots = self.packs.get(pack, 0)
        return slots is None or bool(slots >> slot & 1)

    def __len__(self) -> int:
        return len(self.packs)

    def within(self, pack: PackName, slots: int) -> int:
        """Return those of *slots* (a bitset) of a pack that are bad."""
        bad = self.packs.get(pack, 0)
        return slots if bad is None else slots & bad


class _Bad(msgspec.Struct, frozen=True, kw_only=True):
    pack: str
    slots: str
    why: str
    at: str
    version: int = FORMAT_VERSION


class _Heal(msgspec.Struct, frozen=True, array_like=True):
    id: bytes
    pack: str
    slot: int
    offset: int
    stored: int
    position: int


class _Heals(msgspec.Struct, frozen=True, kw_only=True):
    heals: list[_Heal]
    version: int = FORMAT_VERSION


def bad_key(pack: PackName) -> str:
    """Return the key of the record of a pack's bad slots."""
    return f"{BAD}{pack.text.replace('/', '-')}"


def bits(slots: int) -> Iterator[int]:
    """Yield the numbers that are in a bitset, in order."""
    while slots:
        low = slots & -slots
        yield low.bit_length() - 1
        slots ^= low


def read_bad(storage: Storage) -> BadSlots:
    """Return all slots that are recorded as bad. No key is needed. Raises StorageError.

    A record that can't be read says no less than its name does: the whole pack is taken for bad.
    """
    packs: dict[PackName, int | None] = {}
    for listed in storage.list(BAD):
        match = _BAD_KEY.fullmatch(listed.key)
        if match is None:
            continue
        with contextlib.suppress(ObjectMissing):  # it was removed meanwhile
            name = PackName(match[1], bytes.fromhex(match[2]), int(match[3]))
            packs[name] = _read_slots(storage, listed.key)
    return BadSlots(packs)


def record_bad(storage: Storage, pack: PackName, slots: int | None, why: str, at: datetime) -> None:
    """Add slots that were born in *pack* (a bitset; None: all) to those that are bad. Raises StorageError.

    Two that record the same pack at once may lose one of the records; the next verification finds it again.
    """
    key = bad_key(pack)
    with contextlib.suppress(ObjectMissing):
        known = _read_slots(storage, key)
        slots = None if known is None or slots is None else known | slots
    _write_slots(storage, pack, slots, why, at)


def clear_bad(storage: Storage, pack: PackName, slots: int | None, at: datetime) -> None:
    """Take slots (None: all) off the record: they are good again, or nobody can refer to them any more."""
    key = bad_key(pack)
    with contextlib.suppress(ObjectMissing):
        known = _read_slots(storage, key)
        if slots is None or (known is not None and not known & ~slots):
            storage.delete([key])
        elif known is not None and known & slots:
            _write_slots(storage, pack, known & ~slots, "what is left of an older record", at)


def read_heals(repository: Repository) -> Mapping[bytes, ChunkRef]:
    """Return where chunks that were bad somewhere were stored again, by chunk ID. Raises StorageError.

    An object that can't be read is left out: what it heals stays hurt, and nothing else does.
    """
    found: dict[bytes, ChunkRef] = {}
    for listed in list(repository.storage.list(HEALED)):
        with contextlib.suppress(ObjectMissing, ObjectTruncated, RepositoryDamaged):
            found.update(_decode_heals(repository, listed.key))
    return found


def write_heals(repository: Repository, sid: str, heals: Mapping[bytes, ChunkRef]) -> None:
    """Say where session *sid* stored chunks again; once for a session, and before it commits.

    No more than HEALS_LIMIT are kept, the first ones. Raises StorageError.
    """
    if not heals:
        return
    kept = [
        _Heal(chunk_id, ref.place.pack.text, ref.place.slot, ref.place.offset_bytes, ref.place.stored_bytes,
              ref.position)
        for chunk_id, ref in list(heals.items())[:HEALS_LIMIT]
    ]
    key = f"{HEALED}{sid}"
    content = repository.key.seal_object(key, msgspec.json.encode(_Heals(heals=kept)))
    create_own(repository.storage, key, content)


def _read_slots(storage: Storage, key: str) -> int | None:
    try:
        record = msgspec.json.decode(storage.get(key), type=_Bad)
        check_version(record.version, f"{key} is a record")
        slots = None if record.slots == _ALL else int(record.slots, 16)
    except (msgspec.DecodeError, ValueError, ObjectTruncated):
        return None
    return None if slots is None or slots < 0 or slots.bit_length() > SLOTS_LIMIT else slots


def _write_slots(storage: Storage, pack: PackName, slots: int | None, why: str, at: datetime) -> None:
    if slots is not None and slots.bit_length() > SLOTS_LIMIT:
        slots = None
    record = _Bad(pack=pack.text, slots=_ALL if slots is None else f"{slots:x}", why=why, at=utc_text(at))
    storage.replace(bad_key(pack), msgspec.json.encode(record, order="sorted"))


def _decode_heals(repository: Repository, key: str) -> Iterator[tuple[bytes, ChunkRef]]:
    plain = repository.key.open_object(key, repository.storage.get(key))
    try:
        content = msgspec.json.decode(plain, type=_Heals)
        check_version(content.version, f"{key} is an object")
        for heal in content.heals:
            pack = pack_name(heal.pack)
            if len(heal.id) == ID_BYTES and pack.kind == PackKind.DATA.value:
                place = SlotRef(pack, heal.slot, heal.offset, heal.stored)
                yield heal.id, ChunkRef(heal.id, place, heal.position)
    except (msgspec.DecodeError, ValueError) as error:
        raise RepositoryDamaged(f"The object {key} is not valid: {error}.",
                                "stillframe verify --repo REPO") from error
