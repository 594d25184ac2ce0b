"""The collector: looks, decides, perhaps copies, creates the next generation, deletes one pack at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tests.model.rules import Beneath, Look, Rules
from tests.model.state import NO_GENERATION, NO_REFS, Generation, Ref, Refs, Session, Storage


class Seen(NamedTuple):
    """What the collector has read. *pending*: names it has listed and still has to get."""

    latest: Generation = NO_GENERATION
    packs: frozenset[str] = frozenset()
    sessions: frozenset[Session] = frozenset()
    live: Refs = NO_REFS
    marked: frozenset[str] = frozenset()
    pending: tuple[str, ...] = ()


class Plan(NamedTuple):
    """What the collector has decided: the generation, what goes, and what is copied out of one pack."""

    generation: Generation
    deletable: frozenset[str] = frozenset()
    source: str = ""
    copied: Refs = NO_REFS


NOTHING_SEEN = Seen()
NO_PLAN = Plan(NO_GENERATION)


class Collector(NamedTuple):
    """Collects *rounds* times. One that *compacts* has a session, and may copy the live slots of one pack.

    *gets_each*: it lists names and then gets object after object, as real ones do. Others get what they
    list in one step, for smaller state spaces.
    """

    name: str
    at: str = "start"
    rounds: int = 1
    compacts: bool = False
    gets_each: bool = False
    looked: int = 0
    seen: Seen = NOTHING_SEEN
    plan: Plan = NO_PLAN

    @property
    def session_name(self) -> str:
        return f"{self.name}{self.rounds}"

    def steps(self, storage: Storage, rules: Rules) -> Iterator[tuple[Storage, Collector]]:
        plan = self.plan
        match self.at:
            case "start" | "look":
                yield from self._look(storage, rules)
            case "session":
                session = Session(self.session_name, self.seen.latest.n, commits=False)
                yield storage.put_session(session), self._replace(at="look")
            case "read" | "put":
                yield self._copy(storage)
            case "create" if storage.has_generation(plan.generation.n):
                yield storage, self._ended(won=not rules.stop_losers)
            case "create":
                generation = plan.generation
                if rules.beneath is Beneath.LISTED_LATE:
                    there = frozenset(each.name for each in storage.manifests if each.refs is not None)
                    generation = generation._replace(marked=there)
                yield storage.create_generation(generation), self._won(rules)
            case "still latest":
                yield storage, self._ended(won=storage.latest().n == plan.generation.n)
            case "delete first" | "delete" | "old generations":
                yield from self._delete(storage)
            case "end":
                yield storage.delete_session(self.session_name), self._next_round()

    def _copy(self, storage: Storage) -> tuple[Storage, Collector]:
        plan = self.plan
        if self.at == "put":
            return storage.put_pack(self.session_name, plan.copied), self._replace(at="create")
        there = plan.source in storage.pack_names()
        return storage, self._replace(at="put") if there else self._ended(won=False)

    def _delete(self, storage: Storage) -> Iterator[tuple[Storage, Collector]]:
        """One object, in any order; the packs before the old generations."""
        plan = self.plan
        if self.at == "old generations":
            yield storage.delete_generations(plan.generation.n - 1), self._ended(won=False)
        for name in sorted(plan.deletable):
            left = self._replace(plan=plan._replace(deletable=plan.deletable - {name}))
            after = left._ended(won=True) if self.at == "delete" else left._planned(win_first=False)
            yield storage.delete_pack(name), after

    # --- where it goes on -----------------------------------------------------------------------

    def _planned(self, *, win_first: bool) -> Collector:
        if self.plan.deletable and not win_first:
            return self._replace(at="delete first")
        return self._replace(at="read" if self.plan.source else "create")

    def _won(self, rules: Rules) -> Collector:
        if not rules.win_first:
            return self._ended(won=False)
        return self._replace(at="still latest") if rules.still_latest else self._ended(won=True)

    def _ended(self, *, won: bool) -> Collector:
        """Go on with what is left to delete, then the session, then the next round.

        Content of the generation are left out of the state once nobody asks for them.
        """
        plan = Plan(Generation(self.plan.generation.n), self.plan.deletable)
        if won and plan.deletable:
            return self._replace(at="delete", plan=plan)
        if won and plan.generation.n > 2:
            return self._replace(at="old generations", plan=plan._replace(deletable=frozenset()))
        return self._replace(at="end", plan=NO_PLAN) if self.compacts else self._next_round()

    def _next_round(self) -> Collector:
        if self.rounds == 1:
            return self._replace(at="done", plan=NO_PLAN, seen=NOTHING_SEEN, looked=0)
        return Collector(self.name, rounds=self.rounds - 1, compacts=self.compacts, gets_each=self.gets_each)

    # --- looking and deciding -------------------------------------------------------------------

    def _look(self, storage: Storage, rules: Rules) -> Iterator[tuple[Storage, Collector]]:
        look = rules.order[self.looked]
        seen = self._seen(look, storage, rules)
        if seen.pending:
            yield storage, self._replace(seen=seen)
            return
        looked = self.looked + 1
        if looked < len(rules.order):
            at = "session" if self.compacts and look is Look.LATEST else "look"
            yield storage, self._replace(at=at, looked=looked, seen=seen)
            return
        sources = ["", *sorted(compactable(seen))] if self.compacts else [""]
        for source in sources:
            plan = decide(seen, source, self.session_name, rules)
            planned = self._replace(looked=0, seen=NOTHING_SEEN, plan=plan)
            yield storage, planned._planned(win_first=rules.win_first)

    def _seen(self, look: Look, storage: Storage, rules: Rules) -> Seen:
        """What it knows after one more operation."""
        seen = self.seen
        if look is Look.LATEST:
            return seen._replace(latest=storage.latest())
        if look is Look.PACKS:
            return seen._replace(packs=storage.pack_names())
        sessions = {each.name: each for each in storage.sessions if each.name != self.session_name}
        manifests = {each.name: each for each in storage.manifests if each.refs is not None}
        names: tuple[str, ...] = tuple(sorted(sessions if look is Look.SESSIONS else manifests))
        if self.gets_each and names and not seen.pending:
            return seen._replace(pending=names)
        if self.gets_each:
            names = seen.pending[:1]
            seen = seen._replace(pending=seen.pending[1:])
        if look is Look.SESSIONS:
            there = {sessions[name] for name in names if name in sessions}
            return seen._replace(sessions=seen.sessions | there)
        got = [manifests[name] for name in names if name in manifests]
        marked = {each.name for each in got} if rules.beneath.is_recorded else set()
        return seen._replace(
            live=seen.live.union(*(each.refs or NO_REFS for each in got)), marked=seen.marked | marked)


def compactable(seen: Seen) -> frozenset[str]:
    """Listed packs of ended sessions in which a live slot is at home. How full they are is policy."""
    busy = {session.name for session in seen.sessions}
    return frozenset({seen.latest.homes(ref)[0] for ref in seen.live} & seen.packs - busy)


def decide(seen: Seen, source: str, session_name: str, rules: Rules) -> Plan:
    """Mark, and say what the next generation holds and which packs go once it is won (G3 to G5).

    *source*: the pack whose live slots are to be copied into the collector's own pack, or nothing.
    """
    n = seen.latest.n + 1
    moved = dict(seen.latest.moved)
    if rules.homes_listed:
        moved = {ref: tuple(name for name in names if name in seen.packs) for ref, names in moved.items()}
    copied = frozenset(ref for ref in seen.live if source and _home(moved, ref) == source)
    for ref in copied:
        moved[ref] = (session_name, *moved.get(ref, ()))
    homes = {_home(moved, ref) for ref in seen.live}

    condemned = {(name, at) for name, at in seen.latest.condemned if name in seen.packs and name not in homes}
    deletable = frozenset(
        name for name, at in condemned
        if not rules.wait_for_sessions or all(each.generation >= at for each in seen.sessions))
    if not rules.condemned_until_gone:
        condemned = {(name, at) for name, at in condemned if name not in deletable}
    known = {name for name, _ in seen.latest.condemned}
    busy = {session.name for session in seen.sessions} if rules.spare_sessions else set()
    condemned |= {(name, n) for name in seen.packs - homes - known - busy}

    there = (seen.packs | {session_name}) - (deletable if rules.drop_moved else set())
    kept = {
        (ref, left) for ref, names in moved.items() if rules.keep_moved or ref in seen.live
        if (left := tuple(name for name in names if name in there))}
    return Plan(Generation(n, frozenset(condemned), frozenset(kept), seen.marked), deletable, source, copied)


def _home(moved: dict[Ref, tuple[str, ...]], ref: Ref) -> str:
    names = moved.get(ref)
    return names[0] if names else ref[0]
