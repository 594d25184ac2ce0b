"""What the next generation says, and which packs go: a pure function of what a collector saw (G4, G5).

It may be as old as it likes by the time it is carried out: creating the generation fails if another
collector went on meanwhile, and no session that came later refers to what is condemned.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from stillframe.repository.collection import Compaction, Limits, Looked, Waiting
from stillframe.repository.generation import Copied, Generation
from stillframe.repository.layout import PackName
from stillframe.repository.pack import END_BYTES, HEAD_BYTES


@dataclass(frozen=True, slots=True)
class Decision:
    """The next generation's content, and what it means for the packs that were seen."""

    number: int
    condemned: Mapping[PackName, int]
    moved: Mapping[PackName, list[tuple[PackName, int]]]
    newly_condemned: tuple[PackName, ...]
    taken_back: tuple[PackName, ...]
    deletable: tuple[PackName, ...]
    missing: tuple[PackName, ...]

    @property
    def changes_nothing(self) -> bool:
        """Whether the generation would say what the last one said."""
        return not (self.newly_condemned or self.taken_back or self.deletable)


def decide(looked: Looked, copied: Copied | None = None) -> Decision:
    """Return what the collector that saw *looked* decides, having *copied* slots to packs of its own."""
    latest, number = looked.generation, looked.generation.number + 1
    moved = latest.moved_with(copied or {})
    homes = homes_of(Generation(number, moved=moved), looked.needed)
    there = looked.packs.keys() | {target for targets in (copied or {}).values() for target in targets}
    busy = {bytes.fromhex(session.sid) for session in looked.sessions}

    # A pack stays condemned until it is gone from the listing: nobody may refer to it while it is deleted.
    condemned = {pack: since for pack, since in latest.condemned.items()
                 if pack in looked.packs and pack not in homes}
    deletable = tuple(sorted(
        pack for pack, since in condemned.items()
        if all(session.generation >= since for session in looked.sessions)))
    fresh = tuple(sorted(
        pack for pack in looked.packs
        if pack not in homes and pack not in latest.condemned and pack.sid not in busy))
    remaining = there - set(deletable)
    return Decision(
        number=number,
        condemned={**condemned, **dict.fromkeys(fresh, number)},
        moved=_still_there(moved, remaining),
        newly_condemned=fresh,
        taken_back=tuple(sorted(pack for pack in latest.condemned if pack in homes and pack in looked.packs)),
        deletable=deletable,
        missing=tuple(sorted(homes_of(Generation(number, moved=moved), looked.live) - there - looked.late)),
    )


def homes_of(generation: Generation, live: Mapping[PackName, int]) -> set[PackName]:
    """Return the packs that hold a live slot by *generation*."""
    return {home for birth, slots in live.items() for home, held in held_by(generation, birth, slots) if held}


def held_by(generation: Generation, birth: PackName, slots: int) -> Iterator[tuple[PackName, int]]:
    """Yield the packs that hold *slots* (a bitset) born in *birth*, and which of them each holds."""
    for home, held in generation.moved.get(birth, ()):
        if slots & held:
            yield home, slots & held
            slots &= ~held
    if slots:
        yield birth, slots


def with_known_homes(generation: Generation, packs: Mapping[PackName, int]) -> Generation:
    """Return the generation without the homes that are gone: what was moved there is elsewhere, or lost."""
    return generation.saying(_still_there(generation.moved, packs.keys()))


def worth_compacting(looked: Looked, hurt: set[PackName], limits: Limits) -> list[Compaction]:
    """Return the packs that should be copied to keep to *limits*, the least used first.

    Packs of sessions that are registered are left alone, and *hurt* ones: what is bad stays where it is.
    """
    busy = {bytes.fromhex(session.sid) for session in looked.sessions}
    kept = [(pack, looked.packs[pack], live) for pack, live in looked.homes.items() if pack in looked.packs]
    unused = sum(max(0, _room(size) - live) for _, size, live in kept)
    allowed = limits.max_unused * sum(_room(size) for _, size, _ in kept)
    chosen = []
    for pack, size, live in sorted(kept, key=lambda each: (each[2] / max(1, _room(each[1])), each[0])):
        if unused <= allowed or live >= limits.compact_below * _room(size):
            break
        if pack.sid not in busy and pack not in hurt:
            chosen.append(Compaction(pack, size, live))
            unused -= _room(size) - live
    return chosen


def waiting_for(looked: Looked, decision: Decision) -> Iterator[Waiting]:
    """Yield the sessions that keep condemned packs from being deleted, and what each keeps."""
    for session in looked.sessions:
        kept = [pack for pack, since in decision.condemned.items() if session.generation < since]
        if kept:
            yield Waiting(session.sid, session.host, session.began_at, session.manifest_key, len(kept),
                          sum(looked.packs.get(pack, 0) for pack in kept))


def _still_there(
    moved: Mapping[PackName, list[tuple[PackName, int]]], there: Container[PackName]
) -> dict[PackName, list[tuple[PackName, int]]]:
    kept = {birth: [each for each in homes if each[0] in there] for birth, homes in moved.items()}
    return {birth: homes for birth, homes in kept.items() if homes}


def _room(size_bytes: int) -> int:
    """Return what the slots of a pack take, their rows in the footer included."""
    return max(0, size_bytes - HEAD_BYTES - END_BYTES)
