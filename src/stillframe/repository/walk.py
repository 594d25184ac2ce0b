"""Visiting every node of many trees once, in an order that reads packs in long stretches.

Trees are walked level by level. What is to be visited waits in order of packs, a few bytes a node; what
was seen is a bit for each slot. So memory grows with the number of tree packs, not with that of chunks
or snapshots. If too many nodes wait on a level, they are visited before more of the level above.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stillframe.errors import ObjectMissing, ObjectTruncated, SlotDamaged
from stillframe.repository.layout import PackName
from stillframe.repository.nodes import decode_inner
from stillframe.repository.pack import SlotRef
from stillframe.repository.places import Places
from stillframe.units import KIB, MIB

_WAITING_MOST = 1 << 18
#: Nodes of one level lie this far apart in a pack; reading what is between costs less than a request.
_GAP_BYTES = 256 * KIB
_READ_BYTES = 4 * MIB
_OFFSET_BITS = 32


@dataclass(frozen=True, slots=True)
class At:
    """Where in a tree a node is: it covers the same stretch of any disk."""

    level: int
    index: int


#: Called with each leaf's slot, index and bytes. What it raises as ValueError makes the leaf a damaged one.
OnLeaf = Callable[[SlotRef, int, bytes], None]
#: Called with each node that can't be read.
OnDamage = Callable[[SlotDamaged, At], None]
#: Called with each node that is going to be visited.
OnNode = Callable[[SlotRef, At], None]


#: Asked of each node that was not seen yet.
Skip = Callable[[SlotRef, At], bool]


class TreeWalk:
    """Visits nodes of trees; a slot is visited once in the life of the walk, damaged ones aside.

    Nodes for which *skip* says so are left out, with all below them.
    """

    def __init__(self, on_leaf: OnLeaf, on_damage: OnDamage, on_node: OnNode,
                 skip: Skip = lambda _place, _at: False) -> None:
        self._skip = skip
        self._on_leaf = on_leaf
        self._on_damage = on_damage
        self._on_node = on_node
        #: The slots of tree packs that were reached: a bitset for each pack.
        self.seen: dict[PackName, int] = {}
        self._waiting: dict[int, _Waiting] = {}

    def add(self, place: SlotRef, level: int, index: int = 0) -> None:
        """Let `run` visit a node, and all below it."""
        known = self.seen.get(place.pack, 0)
        bit = 1 << place.slot
        if not known & bit and not self._skip(place, At(level, index)):
            self.seen[place.pack] = known | bit
            self._on_node(place, At(level, index))
            self._waiting.setdefault(level, _Waiting()).add(place, index)

    def run(self, places: Places) -> None:
        """Visit what was added and all below it. Raises StorageError."""
        while any(waiting.count for waiting in self._waiting.values()):
            self._drain(places, max(level for level, waiting in self._waiting.items() if waiting.count))

    def _drain(self, places: Places, level: int) -> None:
        waiting = self._waiting[level]
        while waiting.count:
            for place, index, node in nodes_of(places, waiting.take()):
                if isinstance(node, SlotDamaged):
                    self._damage(node, level, index)
                else:
                    self._visit(places, place, At(level, index), node)
                if level and self._waiting_at(level - 1) > _WAITING_MOST:
                    self._drain(places, level - 1)

    def _visit(self, places: Places, place: SlotRef, at: At, node: bytes) -> None:
        try:
            if at.level == 0:
                self._on_leaf(place, at.index, node)
                return
            width = places.repository.parameters.inner_nodes
            children = decode_inner(node, at.level, width).children
        except ValueError as error:
            self._damage(SlotDamaged(place, str(error)), at.level, at.index)
            return
        for number, child in enumerate(children):
            if child is not None:
                self.add(child, at.level - 1, at.index * width + number)

    def _damage(self, damage: SlotDamaged, level: int, index: int) -> None:
        # Reached again by a tree that is added later, it is looked at again.
        self.seen[damage.place.pack] &= ~(1 << damage.place.slot)
        self._on_damage(damage, At(level, index))

    def _waiting_at(self, level: int) -> int:
        return self._waiting[level].count if level in self._waiting else 0


class _Waiting:
    """The nodes of one level that are still to be visited, three numbers each."""

    def __init__(self) -> None:
        self.count = 0
        self._packs: dict[PackName, array[int]] = {}

    def add(self, place: SlotRef, index: int) -> None:
        numbers = self._packs.get(place.pack)
        if numbers is None:
            numbers = self._packs[place.pack] = array("Q")
        numbers.extend((place.slot, place.offset_bytes << _OFFSET_BITS | place.stored_bytes, index))
        self.count += 1

    def take(self) -> list[tuple[SlotRef, int]]:
        """Take all that wait in the first pack."""
        pack = min(self._packs)
        numbers = self._packs.pop(pack)
        self.count -= len(numbers) // 3
        mask = (1 << _OFFSET_BITS) - 1
        return [(SlotRef(pack, slot, where >> _OFFSET_BITS, where & mask), index)
                for slot, where, index in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)]


def nodes_of(
    places: Places, wanted: list[tuple[SlotRef, int]]
) -> Iterator[tuple[SlotRef, int, bytes | SlotDamaged]]:
    """Yield each of the nodes with what came along with it, in the order in which they are stored."""
    located = []
    for place, index in wanted:
        try:
            located.append((places.located(place), place, index))
        except (SlotDamaged, ObjectMissing):
            yield place, index, _alone(places, place)
    located.sort(key=lambda each: (each[0].pack, each[0].offset_bytes))
    for run in _runs(located):
        yield from _read_run(places, run)


_Located = tuple[SlotRef, SlotRef, int]


def _runs(located: list[_Located]) -> Iterator[list[_Located]]:
    """Yield stretches that are worth one read."""
    run: list[_Located] = []
    for each in located:
        home = each[0]
        if run:
            begin, last = run[0][0], run[-1][0]
            gap = home.offset_bytes - last.offset_bytes - last.stored_bytes
            length = home.offset_bytes + home.stored_bytes - begin.offset_bytes
            if home.pack != begin.pack or gap > _GAP_BYTES or length > _READ_BYTES:
                yield run
                run = []
        run.append(each)
    if run:
        yield run


def _read_run(
    places: Places, run: list[_Located]
) -> Iterator[tuple[SlotRef, int, bytes | SlotDamaged]]:
    begin, codec = run[0][0].offset_bytes, places.repository.codec
    end = max(home.offset_bytes + home.stored_bytes for home, _, _ in run)
    try:
        stored = memoryview(places.repository.storage.get(run[0][0].pack.key, begin, end - begin))
    except (ObjectMissing, ObjectTruncated):
        stored = memoryview(b"")
    for home, place, index in run:
        at = home.offset_bytes - begin
        node: bytes | SlotDamaged
        try:
            node = codec.open_node(place.pack, place.slot, stored[at : at + home.stored_bytes])
        except ValueError:
            node = _alone(places, place)
        yield place, index, node


def _alone(places: Places, place: SlotRef) -> bytes | SlotDamaged:
    """Read one node with all that can be tried for it."""
    try:
        return places.node(place)
    except SlotDamaged as damage:
        return damage
