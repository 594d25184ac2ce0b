"""Which slots are needed: all that the trees of all snapshots refer to, and what heals them.

A bit for each slot of each pack, by its birth. Whoever deletes by it must be able to trust it: a manifest
or a node that can't be read ends the marking with an error that names the snapshots, and nothing is
deleted. A snapshot that is forgotten meanwhile is no error, and counts or does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from stillframe.errors import ObjectMissing, RepositoryDamaged, SlotDamaged
from stillframe.repository.catalog import display_name
from stillframe.repository.heal import read_heals
from stillframe.repository.hurt import Trunk, read_manifest, trunks, with_node
from stillframe.repository.layout import PackName, SnapshotName
from stillframe.repository.nodes import leaf_slots
from stillframe.repository.pack import ROW_BYTES, SlotRef
from stillframe.repository.places import Places
from stillframe.repository.walk import At, TreeWalk

_NAMED_MOST = 5
_DAMAGES_MOST = 1000


class Marker:
    """Marks what snapshots refer to (only ever added), and what heals do. For one thread."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._repository = places.repository
        self._walk = TreeWalk(self._leaf, self._damage, lambda place, _: self._count(place))
        self._damages: list[tuple[SlotDamaged, At]] = []
        self._done: set[SnapshotName] = set()
        self._trunks: list[Trunk] = []
        self._data: dict[PackName, int] = {}
        #: The slots that heal others by the last marking: heals go, and snapshots' marks don't matter then.
        self.healing: dict[PackName, int] = {}
        self._homes: Counter[PackName] = Counter()
        self._healing_homes: Counter[PackName] = Counter()
        #: Whether something was unreadable, of snapshots that were forgotten meanwhile: then marks are
        #: missing that a later snapshot may need, and another marking must begin from nothing.
        self.has_gaps = False

    @property
    def live(self) -> dict[PackName, int]:
        """The slots that snapshots refer to: a bitset for each pack in which one was born."""
        return {**self._walk.seen, **self._data}

    @property
    def homes(self) -> Mapping[PackName, int]:
        """What the marked slots take in the packs that hold them by the generation of the marking."""
        return self._homes + self._healing_homes

    @property
    def snapshots(self) -> int:
        """How many snapshots were marked."""
        return len(self._done)

    def marked(self, names: Iterable[SnapshotName]) -> Iterator[SnapshotName]:
        """Yield those of *names* all of whose slots are marked."""
        return (name for name in names if name in self._done and not self.has_gaps)

    def mark(self, names: Iterable[SnapshotName], places: Places | None = None) -> None:
        """Mark what *names* refer to, and all heals; those that were marked before are skipped.

        *places* are those of a newer generation. Raises RepositoryDamaged, which names the snapshots
        that can't be read; StorageError.
        """
        self._places = places or self._places
        for name in names:
            if name not in self._done:
                self._add(name)
        self._walk.run(self._places)
        self._refuse_damage()
        self.healing, self._healing_homes = {}, Counter()
        for ref in read_heals(self._repository).values():
            self._heal(ref.place)

    def _add(self, name: SnapshotName) -> None:
        try:
            manifest = read_manifest(self._repository, name)
        except RepositoryDamaged as error:
            raise _refusal([name], error.message) from error
        if manifest is None:
            return  # forgotten since it was listed
        self._done.add(name)
        for trunk in trunks(name, manifest):
            self._trunks.append(trunk)
            self._walk.add(trunk.root, self._repository.parameters.height(trunk.size_bytes))

    def _leaf(self, _place: SlotRef, _index: int, node: bytes) -> None:
        for slot in leaf_slots(node, self._repository.parameters.leaf_chunks):
            if _marks(self._data, slot):
                self._count(slot)

    def _heal(self, place: SlotRef) -> None:
        if _marks(self.healing, place) and not self._data.get(place.pack, 0) >> place.slot & 1:
            self._healing_homes[self._home(place)] += place.stored_bytes + ROW_BYTES

    def _count(self, place: SlotRef) -> None:
        self._homes[self._home(place)] += place.stored_bytes + ROW_BYTES

    def _home(self, place: SlotRef) -> PackName:
        return self._places.generation.home(place.pack, place.slot)

    def _damage(self, damage: SlotDamaged, at: At) -> None:
        if len(self._damages) == _DAMAGES_MOST:
            raise damage
        self._damages.append((damage, at))

    def _refuse_damage(self) -> None:
        """Raise RepositoryDamaged if a node that can't be read belongs to a snapshot that is still there."""
        damages, self._damages = self._damages, []
        hurt: dict[SnapshotName, None] = {}
        for damage, at in damages:
            for trunk in with_node(self._places, self._trunks, at, damage.place):
                hurt.setdefault(trunk.snapshot)
        remaining = [name for name in hurt if self._is_there(name)]
        if remaining:
            raise _refusal(remaining, damages[0][0].message)
        self.has_gaps |= bool(damages)

    def _is_there(self, name: SnapshotName) -> bool:
        try:
            self._repository.storage.stat(name.key)
        except ObjectMissing:
            return False
        return True


def _marks(marks: dict[PackName, int], place: SlotRef) -> bool:
    """Mark a slot; return whether it was not marked yet."""
    known, bit = marks.get(place.pack, 0), 1 << place.slot
    marks[place.pack] = known | bit
    return not known & bit


def _refusal(names: list[SnapshotName], why: str) -> RepositoryDamaged:
    named = ", ".join(f"{name.host}/{display_name(name)} ({name.sid[:12]})" for name in names[:_NAMED_MOST])
    more = f" and {len(names) - _NAMED_MOST} more" if len(names) > _NAMED_MOST else ""
    return RepositoryDamaged(
        f"What these snapshots need can't be told, so nothing is deleted: {named}{more}. {why}",
        f"stillframe verify --repo REPO, then: stillframe forget {names[0].sid[:12]} --repo REPO",
    )
