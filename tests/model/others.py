"""Who else touches the repository: fencers, people who forget snapshots, readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tests.model.rules import Rules
from tests.model.state import NO_GENERATION, NO_REFS, Generation, Ref, Storage

FAILED = "failed"
"""Where a reader is that gave up on a slot of a snapshot that is still there."""


class Fencer(NamedTuple):
    """Takes any session for dead, living or not: first a tombstone at its manifest key, then it is deleted.

    Collectors do this in G0; here it may happen at any time.
    """

    name: str
    at: str = "tombstone"
    target: str = ""
    left: int = 1

    def steps(self, storage: Storage, rules: Rules) -> Iterator[tuple[Storage, Fencer]]:
        if self.at == "delete":
            left = self.left - 1
            after = Fencer(self.name, "tombstone" if left else "done", "", left)
            yield storage.delete_session(self.target), after
        elif self.at == "tombstone":
            for session in sorted(storage.sessions):
                buried = storage.bury(session, tombstone=rules.tombstone)
                yield buried, self._replace(at="delete", target=session.name)


class Forgetter(NamedTuple):
    """Forgets any snapshot at any time."""

    name: str
    at: str = "forget"
    left: int = 1

    def steps(self, storage: Storage, _rules: Rules) -> Iterator[tuple[Storage, Forgetter]]:
        if self.left:
            for name in sorted(each.name for each in storage.manifests if each.refs is not None):
                left = self.left - 1
                yield storage.forget(name), Forgetter(self.name, "forget" if left else "done", left)


class Reader(NamedTuple):
    """Reads one slot of a snapshot by the generation it has loaded, and loads a newer one when it misses."""

    name: str
    ref: Ref
    at: str = "load"
    generation: Generation = NO_GENERATION
    reloaded: bool = False

    def steps(self, storage: Storage, rules: Rules) -> Iterator[tuple[Storage, Reader]]:
        if self.at == "load":
            yield storage, self._replace(at="get", generation=storage.latest())
        elif self.at == "get":
            packs = dict(storage.packs)
            found = self.ref in packs.get(self.generation.homes(self.ref)[0], NO_REFS)
            yield storage, self._over("done") if found else self._replace(at="reload")
        elif self.at == "reload":
            if storage.latest().n == self.generation.n or (self.reloaded and not rules.reload_often):
                yield storage, self._over("done" if self.ref not in storage.live() else FAILED)
            else:
                yield storage, self._replace(at="get", generation=storage.latest(), reloaded=True)

    def _over(self, at: str) -> Reader:
        return Reader(self.name, self.ref, at)
