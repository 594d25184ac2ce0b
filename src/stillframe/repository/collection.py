"""What a collection is going to do, and what it did; for people, and for collect.py to carry out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillframe.repository.generation import Generation
from stillframe.repository.layout import PackName
from stillframe.repository.session import SessionRecord

MAX_UNUSED = 0.05
COMPACT_BELOW = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """What a collection goes by.

    A session elsewhere is taken for dead when it gave no sign of life for *fence_after_s*. Packs that are
    used to less than *compact_below* are copied until no more than *max_unused* of what is kept is unused.
    """

    fence_after_s: float
    max_unused: float = MAX_UNUSED
    compact_below: float = COMPACT_BELOW


@dataclass(frozen=True, slots=True)
class PackFate:
    """What becomes of one pack, and why."""

    pack: PackName
    size_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Compaction:
    """A pack whose live slots are copied elsewhere. *live_bytes* is what is copied."""

    pack: PackName
    size_bytes: int
    live_bytes: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Condemned packs that can't be deleted before a session ends, which may still refer to them."""

    sid: str
    host: str
    since: str
    manifest_key: str
    packs: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CollectionPlan:
    """What would be done. Packs are sorted by name; *generation* is the one that would be created.

    `fenced`: sessions that are taken for dead. `condemned`: packs that nothing refers to, to be deleted
    by the collection after this one. `taken_back`: condemned, but referred to after all. `deleted`:
    packs condemned earlier that no session can refer to any more. `compacted`: see there. `waiting`: what
    keeps other condemned packs. `missing`: packs with live slots that are not there (damage). `disbelieved`:
    packs that do not have the slots that a generation says were moved there; the next one says so no more.
    `mended`: the latest generation leaves out where slots are, and the next one says it again.
    """

    generation: int
    snapshots: int
    fenced: tuple[SessionRecord, ...]
    condemned: tuple[PackFate, ...]
    taken_back: tuple[PackFate, ...]
    deleted: tuple[PackFate, ...]
    compacted: tuple[Compaction, ...]
    waiting: tuple[Waiting, ...]
    missing: tuple[PackName, ...]
    disbelieved: tuple[PackName, ...]
    mended: bool
    repository_bytes: int
    live_bytes: int

    @property
    def deleted_bytes(self) -> int:
        """What is freed at once."""
        return sum(fate.size_bytes for fate in self.deleted)

    @property
    def condemned_bytes(self) -> int:
        """What is freed by a later collection, besides what is compacted."""
        return sum(fate.size_bytes for fate in self.condemned)

    @property
    def compaction_gain_bytes(self) -> int:
        """What compacting frees in the end."""
        return sum(each.size_bytes - each.live_bytes for each in self.compacted)

    @property
    def unused_bytes(self) -> int:
        """What is stored and not needed by any snapshot."""
        return max(0, self.repository_bytes - self.live_bytes)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do at all."""
        return not (self.fenced or self.condemned or self.taken_back or self.deleted or self.compacted
                    or self.disbelieved or self.mended)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did.

    `plans`: one for each round that was begun; none if it was not approved. `lost_race`: another
    collector was first with the generation, nothing was deleted. `damaged`: slots that a compaction found
    bad (recorded, left where they are).
    """

    plans: tuple[CollectionPlan, ...] = ()
    approved: bool = True
    lost_race: bool = False
    deleted_packs: int = 0
    deleted_bytes: int = 0
    condemned_packs: int = 0
    copied_bytes: int = 0
    fenced: tuple[SessionRecord, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    damaged: tuple[tuple[PackName, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Looked:
    """What a collector saw (G1 to G3). *generation* is the latest, with homes that are not there left out.

    *live* are the slots that snapshots refer to, by birth, *healing* those that heals refer to; *homes* what
    both take in the packs that hold them. *marked* are the SIDs of each guest's newest snapshot, if all that
    it refers to is among *live*. *late* are packs that are needed and were stored after *packs* were listed:
    by a session that was over when sessions were. *disbelieved* are packs that lack what the latest
    generation, or one before it, says (believe.py); *mended*: the next one must say anew where slots are.
    """

    generation: Generation
    packs: Mapping[PackName, int]
    sessions: Sequence[SessionRecord]
    dead: Sequence[SessionRecord]
    live: Mapping[PackName, int]
    healing: Mapping[PackName, int]
    homes: Mapping[PackName, int]
    snapshots: int
    marked: tuple[str, ...] = ()
    late: frozenset[PackName] = frozenset()
    disbelieved: tuple[PackName, ...] = ()
    mended: bool = False

    @property
    def needed(self) -> dict[PackName, int]:
        """All slots that are referred to, by birth."""
        needed = dict(self.live)
        for pack, slots in self.healing.items():
            needed[pack] = needed.get(pack, 0) | slots
        return needed
