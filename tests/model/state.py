"""What lies in the model's storage, and how a reader finds a slot in it.

Everything is an immutable tuple or frozenset: a state of the search is a value that can be hashed. A pack
is its name (that of the session that wrote it: one pack per session is enough) and the slots it holds.
Content is not modelled: a slot is named by its birth, and a name is written once.
"""

from __future__ import annotations

from typing import NamedTuple

Ref = tuple[str, int]
"""The pack in which a slot was born, and its number in it."""

Refs = frozenset[Ref]
NO_REFS: Refs = frozenset()


class Generation(NamedTuple):
    """*condemned*: pack and the generation that condemned it; *moved*: slot and its homes, the newest first.

    *marked*: the manifests that its collector saw; filled only where the rules ask for it.
    """

    n: int
    condemned: frozenset[tuple[str, int]] = frozenset()
    moved: frozenset[tuple[Ref, tuple[str, ...]]] = frozenset()
    marked: frozenset[str] = frozenset()

    def condemned_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.condemned)

    def homes(self, ref: Ref) -> tuple[str, ...]:
        """Where *ref* was copied to, the newest first, then where it was born."""
        for moved_ref, targets in self.moved:
            if moved_ref == ref:
                return (*targets, ref[0])
        return (ref[0],)


NO_GENERATION = Generation(0)


class Session(NamedTuple):
    """*commits*: a writer's, with a manifest key of the session's name; otherwise a collector's."""

    name: str
    generation: int
    commits: bool


class Manifest(NamedTuple):
    """*refs*: None is a tombstone. *generation*: its session's, filled only where the rules ask for it."""

    name: str
    refs: Refs | None
    generation: int = 0


class Storage(NamedTuple):
    """All objects, and the operations on them."""

    packs: frozenset[tuple[str, Refs]] = frozenset()
    sessions: frozenset[Session] = frozenset()
    manifests: frozenset[Manifest] = frozenset()
    generations: tuple[Generation, ...] = ()

    def latest(self) -> Generation:
        return self.generations[-1] if self.generations else NO_GENERATION

    def pack_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.packs)

    def live(self) -> Refs:
        """Every slot that a manifest refers to."""
        return frozenset().union(*(each.refs for each in self.manifests if each.refs is not None))

    # --- one storage operation each -------------------------------------------------------------

    def put_pack(self, name: str, refs: Refs) -> Storage:
        return self._replace(packs=self.packs | {(name, refs)})

    def delete_pack(self, name: str) -> Storage:
        return self._replace(packs=frozenset(pack for pack in self.packs if pack[0] != name))

    def put_session(self, session: Session) -> Storage:
        return self._replace(sessions=self.delete_session(session.name).sessions | {session})

    def delete_session(self, name: str) -> Storage:
        return self._replace(sessions=frozenset(each for each in self.sessions if each.name != name))

    def has_session(self, name: str) -> bool:
        return any(each.name == name for each in self.sessions)

    def has_key(self, name: str) -> bool:
        """Is there a manifest or a tombstone?"""
        return any(each.name == name for each in self.manifests)

    def has_tombstone(self, name: str) -> bool:
        return Manifest(name, None) in self.manifests

    def create_manifest(self, manifest: Manifest) -> Storage:
        """What is there already stays."""
        return self if self.has_key(manifest.name) else self._replace(manifests=self.manifests | {manifest})

    def bury(self, session: Session, *, tombstone: bool = True) -> Storage:
        """Create a tombstone at the session's manifest key, if it has one."""
        if not (session.commits and tombstone):
            return self
        return self.create_manifest(Manifest(session.name, None))

    def forget(self, name: str) -> Storage:
        return self._replace(manifests=frozenset(each for each in self.manifests if each.name != name))

    def has_generation(self, n: int) -> bool:
        return any(each.n == n for each in self.generations)

    def create_generation(self, generation: Generation) -> Storage:
        return self._replace(generations=tuple(sorted((*self.generations, generation))))

    def delete_generations(self, below: int) -> Storage:
        """Delete those older than *below*, never the latest."""
        latest = self.latest()
        return self._replace(generations=tuple(
            each for each in self.generations if each.n >= below or each is latest))


def lost(storage: Storage) -> Ref | None:
    """A slot that a manifest refers to and a reader with the latest generation doesn't find, or None."""
    latest = storage.latest()
    packs = dict(storage.packs)
    for ref in storage.live():
        if ref not in packs.get(latest.homes(ref)[0], NO_REFS):
            return ref
    return None


def rubbish(storage: Storage) -> frozenset[str]:
    """The packs in which no slot is at home that a manifest refers to."""
    latest = storage.latest()
    return storage.pack_names() - {latest.homes(ref)[0] for ref in storage.live()}
