"""Which chunks a session knows already, and may refer to.

Three sources, asked in this order: chunks of this run whose slot has no place yet; the parent's entry
at the same place of the disk; and what this run and earlier ones of this host have stored (hints).
The last are believed only where the pack was listed after the session was opened: such a pack can't
go while the session lives, unless it was condemned, and that the session's generation tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from stillframe.repository.heal import HEALS_LIMIT
from stillframe.repository.hints import ChunkHints
from stillframe.repository.layout import PackKind, pack_name, packs_prefix
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.pack import SlotRef
from stillframe.repository.pipeline import NewSlot
from stillframe.repository.session import Session


class Bad(Protocol):
    """Bad slots, as (pack, slot) of their birth."""

    def __contains__(self, at: object, /) -> bool:
        """Return whether a slot is one."""
        ...

    def __len__(self) -> int:
        """Return 0 if there are none."""
        ...



@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A chunk of this run whose slot is not sealed yet."""

    id: bytes
    slot: NewSlot
    position: int


class KnownChunks:
    """See above. For one thread. Makes one listing of the data packs."""

    def __init__(self, session: Session, bad: Bad, hints: ChunkHints) -> None:
        self._generation = session.generation
        self._sid = bytes.fromhex(session.sid)
        self._bad = bad
        self._hints = hints
        self._pending: dict[bytes, Pending] = {}
        self._hurt: set[bytes] = set()
        #: Where chunks are now that were in a bad slot, for older snapshots: see heal.py.
        self.healed: dict[bytes, ChunkRef] = {}
        self._listed = frozenset(_data_packs(session))

    def may_reuse(self, place: SlotRef) -> bool:
        """Return whether a slot that a listed manifest refers to may be referred to again."""
        return not self.is_bad(place) and self._generation.may_reuse(place.pack, place.slot)

    def may_reuse_unseen(self, sid: str, generation: int | None) -> bool:
        """Return whether that is true of all that a listed snapshot refers to: see Generation."""
        # Nobody knows which snapshots a bad slot belongs to without looking.
        return not self._bad and self._generation.may_reuse_unseen(sid, generation)

    def is_bad(self, place: SlotRef) -> bool:
        """Return whether a slot is known not to be what was stored."""
        return (place.pack, place.slot) in self._bad

    def find(self, ids: Sequence[bytes]) -> dict[bytes, ChunkRef | Pending]:
        """Return what may be referred to for chunks that the parent does not have."""
        found: dict[bytes, ChunkRef | Pending] = {}
        asked = []
        for chunk_id in ids:
            if (pending := self._pending.get(chunk_id)) is not None:
                found[chunk_id] = pending
            else:
                asked.append(chunk_id)
        for chunk_id, ref in self._hints.find(asked).items() if asked else ():
            if self.is_bad(ref.place):
                self.hurt(chunk_id)
            elif self._may_believe(ref.place):
                found[chunk_id] = ref
                if chunk_id in self._hurt:
                    self._heal(ref)
        return found

    def hurt(self, chunk_id: bytes) -> None:
        """Remember that a chunk of this disk is in a bad slot: where it is found or stored, heals that."""
        if len(self._hurt) < HEALS_LIMIT:
            self._hurt.add(chunk_id)

    def begin(self, pending: Pending) -> None:
        """Remember a chunk whose slot is on its way."""
        self._pending[pending.id] = pending

    def placed(self, slot: NewSlot) -> None:
        """Remember where the chunks of a slot are, now that it has a place."""
        assert slot.place is not None
        refs = [ChunkRef(chunk_id, slot.place, position) for position, chunk_id in enumerate(slot.ids)]
        self._hints.add(refs)
        for ref in refs:
            del self._pending[ref.id]
            if ref.id in self._hurt:
                self._heal(ref)

    def _heal(self, ref: ChunkRef) -> None:
        self._hurt.discard(ref.id)
        self.healed[ref.id] = ref

    def _may_believe(self, place: SlotRef) -> bool:
        if place.pack.sid == self._sid:
            return True
        condemned = self._generation.condemned
        return any(
            home not in condemned and (home.sid, home.number) in self._listed
            for home in self._generation.homes(place.pack, place.slot))


def _data_packs(session: Session) -> Iterator[tuple[bytes, int]]:
    for listed in session.storage.list(packs_prefix(PackKind.DATA)):
        with contextlib.suppress(ValueError):  # whatever it is, it is no pack of ours
            name = pack_name(listed.key)
            yield name.sid, name.number
