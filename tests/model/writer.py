"""The writer: one backup, from reading the latest generation to the end of its session.

An actor is an immutable value with a name and a program counter (*at*, the step it does next). Its
`steps` are all the outcomes that one storage operation of it may have. An actor may stop for ever after
any step, which is a crash: the search needs no step for it, since it looks at every state.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations
from typing import NamedTuple

from tests.model.rules import Beneath, LostReply, Reuse, Rules
from tests.model.state import NO_GENERATION, NO_REFS, Generation, Manifest, Ref, Refs, Session, Storage

WRONG = "wrong"
"""Where a writer is that said that there is no snapshot, while there was one."""

TREE_SLOT = 9
"""In a pack with this slot, it is the tree node above the manifest's other slots."""


class Writer(NamedTuple):
    """Makes one backup: reuses any part of any parent and of its hints, and may write one pack.

    *hints*: what its cache knows of other snapshots, forgotten ones too. *beats*: its heartbeat brings a
    deleted session back. *loses_reply*: it may hear nothing of its commit, which is *in_flight* then and
    takes effect later, at any time or never; nor of its tombstone, which it sends again, and one of them is
    *burying* still. *twice*: something in between may carry out its commit twice, and what it hears is what
    came of the second one. *foreign*: it copies any of these slots as they are out of another repository with
    the same key, instead of new ones, and lets a generation of its own say where they are.
    """

    name: str
    at: str = "W1"
    hints: Refs = NO_REFS
    new_slots: int = 1
    foreign: Refs = NO_REFS
    loses_reply: bool = False
    twice: bool = False
    beats: bool = False
    in_flight: bool = False
    burying: bool = False
    generation: Generation = NO_GENERATION
    latest: Generation = NO_GENERATION
    refs: Refs = NO_REFS

    def steps(self, storage: Storage, rules: Rules) -> Iterator[tuple[Storage, Writer]]:
        yield from self._beside(storage, rules)
        match self.at:
            case "W1" | "session" | "W2" | "replace":
                yield self._begin(storage, rules)
            case "W3" | "hints":
                yield from self._choose(storage, rules)
            case "W4":
                yield from self._put(storage)
            case "adopt" | "adopt create":
                yield self._adopt(storage, rules)
            case "W6":
                yield storage.delete_session(self.name), self._replace(at="done")
            case at if at.startswith("W5"):
                yield from self._commit(storage, rules)

    def _beside(self, storage: Storage, rules: Rules) -> Iterator[tuple[Storage, Writer]]:
        """What may happen whatever it does next: a heartbeat, and what was sent earlier."""
        if self.beats and self.at in {"hints", "W4", "W5"} and not storage.has_session(self.name):
            yield storage.put_session(self._session()), self
        if self.in_flight:
            landed = self._replace(in_flight=False)
            yield self._committed(storage, rules), landed if self.at == "W5 lost" else landed._ending(self.at)
        if self.burying:
            yield self._buried(storage), self._replace(burying=False)

    def _begin(self, storage: Storage, rules: Rules) -> tuple[Storage, Writer]:
        """W1 and W2."""
        match self.at:
            case "W1":
                return storage, self._replace(at="session", generation=storage.latest())
            case "session":
                return storage.put_session(self._session()), self._replace(at="W2" if rules.reread else "W3")
            case "W2" if storage.latest().n == self.generation.n:
                return storage, self._replace(at="W3")
            case "W2":
                return storage, self._replace(at="replace", generation=storage.latest())
            case _:
                return storage.put_session(self._session()), self._replace(at="W2")

    def _choose(self, storage: Storage, rules: Rules) -> Iterator[tuple[Storage, Writer]]:
        """W3: any part of what may be reused."""
        if self.at == "W3":
            for refs in sorted(self._from_parent(storage, rules), key=sorted):
                yield storage, self._chosen("hints" if self.hints else "W4", refs)
        else:
            for more in subsets(self._from_hints(storage, rules) - self.refs):
                yield storage, self._chosen("W4", self.refs | more)

    def _put(self, storage: Storage) -> Iterator[tuple[Storage, Writer]]:
        """W4."""
        new = frozenset((self.name, slot) for slot in range(self.new_slots))
        for foreign in subsets(self.foreign - self.refs):
            if foreign:
                yield storage.put_pack(self.name, foreign), self._replace(at="adopt", foreign=foreign)
        if new and not self.foreign:
            yield storage.put_pack(self.name, new), self._replace(at="W5", refs=self.refs | new)
        if self.refs:
            yield storage, self._replace(at="W5", foreign=NO_REFS)

    def _adopt(self, storage: Storage, rules: Rules) -> tuple[Storage, Writer]:
        """Create the next generation until the latest one says what is in its pack."""
        known = Generation(self.generation.n)
        brought = self._replace(
            at="W5", generation=known, latest=NO_GENERATION, refs=self.refs | self.foreign, foreign=NO_REFS)
        if self.at == "adopt":
            latest = storage.latest()
            if all(self.name in latest.homes(ref)[:-1] for ref in self.foreign):
                return storage, brought
            return storage, self._replace(at="adopt create", latest=latest)
        moved = dict(self.latest.moved)
        moved |= {ref: (self.name, *moved.get(ref, ())) for ref in self.foreign}
        made = self.latest._replace(n=self.latest.n + 1, moved=frozenset(moved.items()))
        after = storage if storage.has_generation(made.n) else storage.create_generation(made)
        return after, self._replace(at="adopt", latest=NO_GENERATION) if rules.adopted_seen else brought

    def _commit(self, storage: Storage, rules: Rules) -> Iterator[tuple[Storage, Writer]]:
        """W5. Whose manifest key is taken has lost to a fencer, unless it is taken by its own manifest."""
        if self.at in {"W5", "W5 again"}:
            yield self._committed(storage, rules), self._ending()
            if self.loses_reply and self.at == "W5":
                yield storage, self._replace(at="W5 lost", in_flight=True)
            if self.twice:
                yield self._committed(storage, rules), self._replace(at="W5 twice")
        elif self.at == "W5 twice":
            yield from self._second(storage, rules)
        elif self.at == "W5 whose":
            yield storage, self._ending()
        elif rules.lost_reply is LostReply.CLOSE:
            yield self._buried(storage), self._ending()
            yield storage, self._replace(burying=True)
        elif rules.lost_reply is LostReply.AGAIN and not storage.has_key(self.name):
            yield storage, self._replace(at="W5 again")
        else:
            yield storage, self._ending()

    def _second(self, storage: Storage, rules: Rules) -> Iterator[tuple[Storage, Writer]]:
        """The same request is carried out again."""
        if not storage.has_key(self.name):  # forgotten in between
            comes = storage.has_session(self.name) or not rules.copies_end
            yield self._committed(storage, rules) if comes else storage, self._ending()
        elif rules.own_bytes:
            yield storage, self._replace(at="W5 whose")
        else:
            yield storage, self._ending("W6" if storage.has_tombstone(self.name) else WRONG)

    def _buried(self, storage: Storage) -> Storage:
        return storage.create_manifest(Manifest(self.name, None))

    def _committed(self, storage: Storage, rules: Rules) -> Storage:
        generation = self.generation.n if rules.beneath.is_recorded else 0
        return storage.create_manifest(Manifest(self.name, self.refs, generation))

    def _session(self) -> Session:
        return Session(self.name, self.generation.n, commits=True)

    def _chosen(self, at: str, refs: Refs) -> Writer:
        """Go on with *refs*; what nobody asks for any more is left out of the state."""
        known = self.generation if at == "hints" else Generation(self.generation.n)
        return self._replace(at=at, generation=known, refs=refs)

    def _ending(self, at: str = "W6") -> Writer:
        return self._replace(at=at, refs=self.refs if self.in_flight or at == "W5 again" else NO_REFS)

    def _from_parent(self, storage: Storage, rules: Rules) -> set[Refs]:
        choices = {NO_REFS}
        for manifest in storage.manifests:
            refs = manifest.refs or NO_REFS
            usable = frozenset(ref for ref in refs if may_reuse(self.generation, ref, rules.reuse))
            if vouched_for(self.generation, manifest, rules.beneath):
                choices.update(subsets(refs))
            elif rules.beneath is not Beneath.UNKNOWN:
                choices.update(subsets(usable))
            elif any(slot == TREE_SLOT for _, slot in usable):
                choices.add(refs)
        return choices

    def _from_hints(self, storage: Storage, rules: Rules) -> Refs:
        names = storage.pack_names()
        return frozenset(
            ref for ref in self.hints
            if may_reuse(self.generation, ref, rules.reuse)
            and (not rules.hints_listed or self.generation.homes(ref)[0] in names))


def vouched_for(generation: Generation, manifest: Manifest, beneath: Beneath) -> bool:
    """May a writer whose session says *generation* refer to all of *manifest* without looking at it?"""
    match beneath:
        case Beneath.CHECKED | Beneath.UNKNOWN:
            return False
        case Beneath.ALWAYS:
            return True
        case Beneath.COMMITTED_BEFORE:
            return manifest.name in generation.marked or manifest.generation <= generation.n
        case _:
            # Where nothing is condemned there is nothing to ask, and it needs no manifest to say so.
            return (not generation.condemned or manifest.name in generation.marked
                    or manifest.generation == generation.n)


def may_reuse(generation: Generation, ref: Ref, reuse: Reuse) -> bool:
    """May a writer whose session says *generation* refer to *ref*, as far as the generation tells?"""
    condemned = generation.condemned_names()
    homes = generation.homes(ref)
    match reuse:
        case Reuse.HOME:
            return homes[0] not in condemned
        case Reuse.ANY_HOME:
            return any(home not in condemned for home in homes)
        case Reuse.MOVED:
            return ref[0] not in condemned or len(homes) > 1
        case Reuse.ALWAYS:
            return True


def subsets(refs: Refs) -> Iterator[Refs]:
    ordered = sorted(refs)
    every = chain.from_iterable(combinations(ordered, size) for size in range(len(ordered) + 1))
    return (frozenset(each) for each in every)
