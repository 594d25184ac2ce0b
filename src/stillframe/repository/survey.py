"""Walking all trees to see what is wrong: what is needed, where it is missing, whom it hurts."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from stillframe.errors import ObjectMissing, RepositoryDamaged, RepositoryNewer, SlotDamaged
from stillframe.repository.check import Expected
from stillframe.repository.heal import BadSlots
from stillframe.repository.hurt import Trunk, read_manifest, trunks
from stillframe.repository.layout import PackName, SnapshotName
from stillframe.repository.nodes import ChunkRef, decode_leaf, leaf_slots
from stillframe.repository.opened import Repository
from stillframe.repository.pack import SlotRef, read_footer
from stillframe.repository.places import Places
from stillframe.repository.tree import Tree
from stillframe.repository.walk import At, TreeWalk

_KEPT_FOOTERS = 256
_HITS_MOST = 10_000

#: The first and the last chunk of a stretch, and whether it can be read from where it was healed.
Stretch = tuple[int, int, bool]


@dataclass(frozen=True, slots=True)
class Hit:
    """A node that is bad, or a leaf with bad chunks; *stretches* are numbers of chunks of the disk."""

    place: SlotRef
    at: At
    stretches: tuple[Stretch, ...]
    why: str
    is_node: bool


def read_snapshots(
    repository: Repository, names: Iterable[SnapshotName]
) -> tuple[list[Trunk], dict[SnapshotName, str]]:
    """Return the trees of *names*, and which manifests can't be read, with reasons. Raises StorageError."""
    found: list[Trunk] = []
    unreadable: dict[SnapshotName, str] = {}
    for name in names:
        try:
            manifest = read_manifest(repository, name)
        except (RepositoryDamaged, RepositoryNewer) as error:
            unreadable[name] = error.message
            continue
        if manifest is not None:
            found.extend(trunks(name, manifest))
    return found, unreadable


class Survey:
    """What all trees refer to (`live`, by birth), and what seems to be missing of it (`missing`).

    A slot is there if its home is one of *packs*, and says that it has the slot at that place.
    """

    def __init__(self, places: Places, packs: Container[PackName]) -> None:
        self._places = places
        self._packs = packs
        self._width = places.repository.parameters.leaf_chunks
        self._rows = lru_cache(_KEPT_FOOTERS)(self._read_rows)
        self._walk = TreeWalk(self._leaf, self._damage, lambda *_: None)
        self._data: dict[PackName, int] = {}
        self.missing: dict[PackName, int] = {}
        #: What is wrong with packs that are there.
        self.damaged: dict[PackName, str] = {}
        self.nodes: list[tuple[SlotDamaged, At]] = []

    def run(self, every: Iterable[Trunk]) -> None:
        """Walk the trees. Raises StorageError."""
        for trunk in every:
            self._walk.add(trunk.root, self._places.repository.parameters.height(trunk.size_bytes))
        self._walk.run(self._places)

    @property
    def live(self) -> dict[PackName, int]:
        """The slots that are referred to."""
        return {**self._walk.seen, **self._data}

    def _leaf(self, _place: SlotRef, _index: int, node: bytes) -> None:
        for slot in leaf_slots(node, self._width):
            known, bit = self._data.get(slot.pack, 0), 1 << slot.slot
            if known & bit:
                continue
            self._data[slot.pack] = known | bit
            if not self._is_there(slot):
                self.missing[slot.pack] = self.missing.get(slot.pack, 0) | bit

    def _is_there(self, slot: SlotRef) -> bool:
        home = self._places.generation.home(slot.pack, slot.slot)
        place = self._rows(home).get((slot.pack, slot.slot)) if home in self._packs else None
        return place is not None and (home != slot.pack or place == (slot.offset_bytes, slot.stored_bytes))

    def _read_rows(self, home: PackName) -> Mapping[tuple[PackName, int], tuple[int, int]]:
        storage = self._places.repository.storage
        try:
            rows = read_footer(storage, home, storage.stat(home.key).size_bytes)
        except ObjectMissing:
            return {}
        except RepositoryDamaged as error:
            self.damaged[home] = error.message
            return {}
        return {(row.birth, row.slot): (row.offset_bytes, row.stored_bytes) for row in rows}

    def _damage(self, damage: SlotDamaged, at: At) -> None:
        self.nodes.append((damage, at))


def expect(places: Places, every: Iterable[Trunk], births: Iterable[PackName]) -> Expected:
    """Return what all leaves say of the slots born in *births*. Raises StorageError."""
    parameters = places.repository.parameters
    expected = Expected(births, parameters.slot_chunks)

    def leaf(_place: SlotRef, _index: int, node: bytes) -> None:
        expected.add(decode_leaf(node, parameters.leaf_chunks))

    walk = TreeWalk(leaf, lambda _damage, _at: None, lambda *_: None)
    for trunk in every:
        walk.add(trunk.root, parameters.height(trunk.size_bytes))
    walk.run(places)
    return expected


class HitSearch:
    """Finds what *suspects* (slots, by birth) make unreadable. Whether they do, is found by reading them."""

    def __init__(self, places: Places, suspects: BadSlots, heals: Mapping[bytes, ChunkRef]) -> None:
        self.places = places
        self._suspects = suspects
        self._heals = heals
        self._parameters = places.repository.parameters
        self._readable = lru_cache(_HITS_MOST)(self._can_be_read)
        self._hits: list[Hit] = []
        #: Slots that could not be read, and those, by birth, of which not all is healed.
        self.lost: set[SlotRef] = set()
        self.unhealed: set[tuple[PackName, int]] = set()
        #: Whether all hits are told.
        self.is_complete = True

    def run(self, every: Iterable[Trunk]) -> list[Hit]:
        """Return the nodes and leaves that are hurt, by their place in a tree; not all if they are many."""
        walk = TreeWalk(self._leaf, self._node, lambda *_: None)
        for trunk in every:
            walk.add(trunk.root, self._parameters.height(trunk.size_bytes))
        walk.run(self.places)
        return sorted(self._hits, key=lambda hit: (hit.at.index * self._span(hit.at.level), hit.at.level))

    def _leaf(self, place: SlotRef, index: int, node: bytes) -> None:
        width = self._parameters.leaf_chunks
        if not any((slot.pack, slot.slot) in self._suspects for slot in leaf_slots(node, width)):
            return
        stretches: list[Stretch] = []
        for number, entry in enumerate(decode_leaf(node, width).entries, index * width):
            if entry is None or (entry.place.pack, entry.place.slot) not in self._suspects:
                continue
            if self._readable(entry):
                continue
            heal = self._heals.get(entry.id)
            healed = heal is not None and self._readable(heal)
            if not healed:
                self.unhealed.add((entry.place.pack, entry.place.slot))
            if stretches and stretches[-1][1:] == (number - 1, healed):
                stretches[-1] = (stretches[-1][0], number, healed)
            else:
                stretches.append((number, number, healed))
        if stretches:
            self._add(Hit(place, At(0, index), tuple(stretches), "chunks in it are lost", is_node=False))

    def _node(self, damage: SlotDamaged, at: At) -> None:
        chunks = self._span(at.level) * self._parameters.leaf_chunks
        stretch = (at.index * chunks, (at.index + 1) * chunks - 1, False)
        self.unhealed.add((damage.place.pack, damage.place.slot))
        self._add(Hit(damage.place, at, (stretch,), damage.message, is_node=True))

    def _add(self, hit: Hit) -> None:
        if len(self._hits) < _HITS_MOST:
            self._hits.append(hit)
        else:
            self.is_complete = False

    def _can_be_read(self, entry: ChunkRef) -> bool:
        try:
            chunks = self.places.chunks(entry.place)
            if (entry.position < len(chunks.ids) and chunks.ids[entry.position] == entry.id
                    == self.places.repository.key.chunk_id(chunks.chunk(entry.position))):
                return True
        except SlotDamaged:
            pass
        self.lost.add(entry.place)
        return False

    def _span(self, level: int) -> int:
        return int(self._parameters.inner_nodes ** level)


def hits_of(places: Places, trunk: Trunk, hits: Iterable[Hit]) -> list[Hit]:
    """Return those of *hits* that are in one tree. Raises StorageError."""
    tree: Tree = trunk.tree(places)
    found = []
    for hit in hits:
        try:
            there = tree.node_at(hit.at.level, hit.at.index)
        except SlotDamaged:
            continue  # hurt further up, which is a hit of its own
        if there is not None and (there.pack, there.slot) == (hit.place.pack, hit.place.slot):
            found.append(hit)
    return found
