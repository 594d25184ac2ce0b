"""The collector: takes back the space that no snapshot needs any more. Plan, show, execute.

    G0   sessions of dead writers are fenced: they can't commit any more
    G1-3 packs, sessions and snapshots are listed, in this order; what the snapshots need is marked
    G4   packs that nothing needs are condemned; G5 those condemned earlier are taken back if they are
         needed, and may go once no session is older than that
    G6   the generation that says so is created; if another collector was first, this one stops
    G7   what may go is deleted

No clock takes part in what is safe: a pack is deleted only if every session knows that it is condemned,
and a session that is wrongly taken for dead loses its backup, never a snapshot. The collector may be killed
at any point; what it leaves is rubbish for the next one. Packs that are mostly unused are copied (compact.py)
before G6. A second round follows at once: it deletes what the first condemned, if no session minds. So does
a third, where heals were removed that had kept packs until then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from stillframe.clock import Clock, utc_text
from stillframe.errors import ObjectMissing
from stillframe.repository.believe import believed
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.collection import (
    COMPACT_BELOW,
    MAX_UNUSED,
    Collected,
    CollectionPlan,
    Limits,
    Looked,
    PackFate,
)
from stillframe.repository.compact import Copies, SlotCopier
from stillframe.repository.decide import (
    Decision,
    decide,
    homes_of,
    waiting_for,
    with_known_homes,
    worth_compacting,
)
from stillframe.repository.generation import (
    Generation,
    create_generation,
    generation_numbers,
    latest_generation,
    latest_number,
)
from stillframe.repository.heal import clear_bad, read_bad, record_bad
from stillframe.repository.layout import (
    HEALED,
    PackKind,
    PackName,
    generation_key,
    pack_name,
    packs_prefix,
)
from stillframe.repository.mark import Marker
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.repository.session import (
    Session,
    SessionRecord,
    fence,
    is_dead,
    list_sessions,
    open_session,
)
from stillframe.repository.snapshots import newest_of_each
from stillframe.storage.model import Storage

#: Deleted with one request, by servers that can.
_BATCH = 1000
_ROUNDS = 3

#: Shown the plan; returns whether to carry it out.
Approve = Callable[[CollectionPlan], bool]


def plan_collection(
    repository: Repository, clock: Clock, *, fence_after_s: float, max_unused: float = MAX_UNUSED,
    compact_below: float = COMPACT_BELOW,
) -> CollectionPlan:
    """Return what a collection would do now. Nothing is changed, no session is registered.

    Raises RepositoryDamaged if it can't be told what a snapshot needs; StorageError.
    """
    return _Collector(repository, clock, Limits(fence_after_s, max_unused, compact_below)).plan()


def collect(
    repository: Repository, host: str, clock: Clock, *, fence_after_s: float, max_unused: float = MAX_UNUSED,
    compact_below: float = COMPACT_BELOW, approve: Approve | None = None,
) -> Collected:
    """Collect. *approve* is shown the plan before anything but a session is written.

    What the limits mean is said in `Limits`.
    Raises RepositoryDamaged, and has deleted nothing, if it can't be told what a snapshot needs;
    StorageError: what was not done yet is left for the next collection.
    """
    collector = _Collector(repository, clock, Limits(fence_after_s, max_unused, compact_below))
    with open_session(repository.storage, repository.key, clock, host, lambda _: "") as session:
        return collector.run(session, approve)


class _Collector:
    """One collection."""

    def __init__(self, repository: Repository, clock: Clock, limits: Limits) -> None:
        self._repository = repository
        self._storage: Storage = repository.storage
        self._clock = clock
        self._limits = limits
        self._marker: Marker | None = None
        self._heals: list[str] = []
        self._copied: dict[PackName, dict[PackName, int]] = {}
        self.done = Collected()

    # --- what the collection is made of -------------------------------------------------------

    def plan(self) -> CollectionPlan:
        """Return what would be done."""
        generation = latest_generation(self._storage, self._repository.key)
        return self._planned(self._look(generation, self._dead("")))

    def run(self, session: Session, approve: Approve | None) -> Collected:
        """Do it, as the session that is registered for it."""
        dead = self._dead(session.sid)
        looked = None
        if approve is not None:
            looked = self._look(session.generation, dead, session.sid)
            plan = self._planned(looked)
            if not approve(plan):
                return replace(self.done, plans=(plan,), approved=False)
        if dead:
            for record in dead:
                fence(self._storage, record)
            # Until it was fenced, a session could commit: what it refers to must be seen.
            looked, self._marker = None, None
            self.done = replace(self.done, fenced=dead)
        looked = looked or self._look(session.generation, (), session.sid)
        goes_on = self._round(looked, session, compacts=True)
        while goes_on and len(self.done.plans) < _ROUNDS:
            generation = latest_generation(self._storage, self._repository.key)
            goes_on = self._round(self._look(generation, (), session.sid), session, compacts=False)
        return self.done

    def _round(self, looked: Looked, session: Session, *, compacts: bool) -> bool:
        """Carry out what follows from *looked*; return whether another round has something to delete.

        It has not if another collector was first with the generation.
        """
        plan = self._planned(looked, compacts=compacts)
        self.done = replace(self.done, plans=(*self.done.plans, plan))
        copies = self._copies(looked, plan, session)
        if copies is None:
            self.done = replace(self.done, lost_race=True)
            return False
        decision = decide(looked, copies.moved)
        latest = looked.generation.number
        if not decision.changes_nothing or copies.moved or looked.mended:
            generation = Generation(decision.number, decision.condemned, decision.moved, session.sid,
                                    utc_text(self._clock.now()), looked.marked)
            if not create_generation(self._storage, generation, self._repository.key):
                self.done = replace(self.done, lost_race=True)
                return False
            # This one may have been slow: created, superseded and removed as old already, and created again.
            if latest_number(self._storage) != decision.number:
                self.done = replace(self.done, lost_race=True)
                return False
            latest = decision.number
            self._delete_packs(decision, looked)
        self._delete_generations(latest)
        heals_went = self._delete_records(looked, decision, copies)
        self.done = replace(
            self.done, waiting=tuple(waiting_for(looked, decision)),
            condemned_packs=self.done.condemned_packs + len(decision.newly_condemned))
        return bool(plan.condemned or plan.compacted or heals_went)

    # --- looking (G1 to G3) -------------------------------------------------------------------

    def _dead(self, own_sid: str) -> tuple[SessionRecord, ...]:
        return tuple(record for record in list_sessions(self._storage, self._repository.key)
                     if record.sid != own_sid and is_dead(record, self._storage, self._limits.fence_after_s))

    def _look(self, latest: Generation, dead: Sequence[SessionRecord], own_sid: str = "") -> Looked:
        """Look at everything, in the order that the protocol needs. The dead count as gone already."""
        gone = {record.sid for record in dead}
        packs = list_packs(self._storage)
        self._heals = [listed.key for listed in self._storage.list(HEALED)]
        sessions = [record for record in list_sessions(self._storage, self._repository.key)
                    if record.sid != own_sid and record.sid not in gone]
        names = list_snapshots(self._storage)
        generation, disbelieved = believed(self._repository, latest, packs, self._copied)
        places = Places(self._repository, generation)
        if self._marker is None or self._marker.has_gaps:
            self._marker = Marker(places)
        self._marker.mark(names, places)
        marked = newest_of_each(self._marker.marked(names)).values()
        return Looked(generation, packs, sessions, tuple(dead), self._marker.live, self._marker.healing,
                      self._marker.homes, len(names), tuple(name.sid for name in marked),
                      self._late(generation, packs, self._marker.live), disbelieved,
                      mended=generation.moved != with_known_homes(latest, packs).moved)

    def _late(
        self, generation: Generation, packs: Mapping[PackName, int], live: Mapping[PackName, int],
    ) -> frozenset[PackName]:
        """Return the packs that hold a live slot, and were not listed because they are too new."""
        unlisted = homes_of(generation, live) - packs.keys()
        if not unlisted:
            return frozenset()
        there = list_packs(self._storage).keys()
        if latest_number(self._storage) != generation.number:  # they may have been moved, and deleted, since
            return frozenset(unlisted)
        return frozenset(unlisted & there)

    def _planned(self, looked: Looked, *, compacts: bool = True) -> CollectionPlan:
        decision = decide(looked)
        bad = read_bad(self._storage)
        hurt = {home for birth in bad.packs
                for home in (birth, *(home for home, _ in looked.generation.moved.get(birth, ())))}
        chosen = worth_compacting(looked, hurt, self._limits) if compacts else []
        since = looked.generation.condemned

        def fates(packs: Sequence[PackName], why: Callable[[PackName], str]) -> tuple[PackFate, ...]:
            return tuple(PackFate(pack, looked.packs.get(pack, 0), why(pack)) for pack in packs)

        return CollectionPlan(
            generation=decision.number, snapshots=looked.snapshots, fenced=tuple(looked.dead),
            condemned=fates(decision.newly_condemned, lambda _: "no snapshot needs it"),
            taken_back=fates(decision.taken_back, lambda _: "a snapshot needs it after all"),
            deleted=fates(decision.deletable, lambda pack: f"condemned since generation {since[pack]}"),
            compacted=tuple(chosen), waiting=tuple(waiting_for(looked, decision)),
            missing=decision.missing, disbelieved=looked.disbelieved, mended=looked.mended,
            repository_bytes=sum(looked.packs.values()),
            live_bytes=sum(looked.homes.values()),
        )

    # --- changing -----------------------------------------------------------------------------

    def _copies(self, looked: Looked, plan: CollectionPlan, session: Session) -> Copies | None:
        """Return what was copied; None if a pack is gone, which only a later generation can have done."""
        copier = SlotCopier(self._storage, self._storage, session.sid, self._repository.parameters.pack_bytes,
                            self._record_bad)
        sources = [(each.pack, each.size_bytes) for each in plan.compacted]
        try:
            copies = copier.copy(sources, looked.needed, looked.generation)
        except ObjectMissing:
            return None
        for birth, targets in copies.moved.items():
            self._copied.setdefault(birth, {}).update(targets)
        self.done = replace(self.done, copied_bytes=self.done.copied_bytes + copies.copied_bytes,
                            damaged=(*self.done.damaged, *copies.damaged))
        return copies

    def _record_bad(self, pack: PackName, slots: int | None, why: str) -> None:
        record_bad(self._storage, pack, slots, why, self._clock.now())

    def _delete_packs(self, decision: Decision, looked: Looked) -> None:
        for begin in range(0, len(decision.deletable), _BATCH):
            # A newer generation may have taken one of them back.
            if latest_number(self._storage) != decision.number:
                return
            batch = decision.deletable[begin : begin + _BATCH]
            self._storage.delete([pack.key for pack in batch])
            self.done = replace(
                self.done, deleted_packs=self.done.deleted_packs + len(batch),
                deleted_bytes=self.done.deleted_bytes + sum(looked.packs[pack] for pack in batch))

    def _delete_generations(self, latest: int) -> None:
        """Remove those before the last two; an earlier collector may have left some.

        *latest* says what was true of what they say: it is ours, or needed no mending. Later ones, which we
        have not looked at, are no reason to remove any: a stolen host may have written them (believe.py).
        """
        old = [generation_key(number) for number in generation_numbers(self._storage) if number < latest - 1]
        if old:
            self._storage.delete(old)

    def _delete_records(self, looked: Looked, decision: Decision, copies: Copies) -> bool:
        """Remove what is written about bad slots that nobody can refer to any more, and then all heals.

        Return whether heals were removed: what only they needed is needed no more.
        """
        bad = read_bad(self._storage)
        copied = {target for targets in copies.moved.values() for target in targets}
        there = (looked.packs.keys() | copied) - {*decision.deletable}
        needed = bool(decision.missing)
        for pack, slots in bad.packs.items():
            hurt = bad.within(pack, looked.live.get(pack, 0))
            needed |= bool(hurt)
            if pack in there or any(home in there for home, _ in decision.moved.get(pack, ())):
                continue
            if not hurt:
                clear_bad(self._storage, pack, None, self._clock.now())
            elif slots is not None and slots != hurt:
                clear_bad(self._storage, pack, slots & ~hurt, self._clock.now())
        if not self._heals or needed or looked.sessions:
            return False
        self._storage.delete(self._heals)
        return True


def list_packs(storage: Storage) -> dict[PackName, int]:
    """Return every pack with its size. Raises StorageError."""
    packs = {}
    for kind in PackKind:
        for listed in storage.list(packs_prefix(kind)):
            try:
                packs[pack_name(listed.key)] = listed.size_bytes
            except ValueError:
                continue  # not ours; nothing refers to it and nothing deletes it
    return packs
