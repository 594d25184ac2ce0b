"""A disk's tree: reading its leaves, and building the next one from the last.

A node that would be equal to the parent's node at the same place is not written: the new tree refers
to the old node. So a snapshot costs what changed, its index included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stillframe.errors import SlotDamaged
from stillframe.repository.layout import Parameters
from stillframe.repository.nodes import (
    ChunkRef,
    Inner,
    Leaf,
    decode_inner,
    decode_leaf,
    encode_inner,
    encode_leaf,
)
from stillframe.repository.pack import SlotRef
from stillframe.repository.places import Places

_KEPT_INNER = 128
KEPT_LEAVES = 16

Entries = Sequence[ChunkRef | None]


class Tree:
    """The tree of one disk of one snapshot. For several threads."""

    def __init__(self, places: Places, size_bytes: int, root: SlotRef | None,
                 kept_leaves: int = KEPT_LEAVES) -> None:
        self.places = places
        self.parameters: Parameters = places.repository.parameters
        self.size_bytes = size_bytes
        self.root = root
        self.height = self.parameters.height(size_bytes)
        self._inner = lru_cache(_KEPT_INNER)(self._read_inner)
        self._leaf = lru_cache(kept_leaves)(self._read_leaf)

    @property
    def leaf_count(self) -> int:
        """How many leaves the disk has, zero ones included."""
        return -(-self.parameters.chunks(self.size_bytes) // self.parameters.leaf_chunks)

    def node_at(self, level: int, index: int) -> SlotRef | None:
        """Return where the node of a place is, None if all below it is zero. Raises SlotDamaged."""
        place, at = self.root, self.height
        width = self.parameters.inner_nodes
        if level > at or index >= width ** (at - level):
            return None
        while place is not None and at > level:
            place = self.inner(place, at).children[index // width ** (at - level - 1) % width]
            at -= 1
        return place

    def inner(self, place: SlotRef, level: int) -> Inner:
        """Return the inner node at *place*. Raises SlotDamaged."""
        return self._inner(place, level)

    def leaf(self, place: SlotRef) -> Leaf:
        """Return the leaf at *place*. Raises SlotDamaged."""
        return self._leaf(place)

    def leaf_at(self, index: int) -> Leaf | None:
        """Return the leaf at *index*, None if all its chunks are zero. Raises SlotDamaged."""
        place = self.node_at(0, index)
        return None if place is None else self.leaf(place)

    def places_of_leaves(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, SlotRef]]:
        """Yield (index, place) of the leaves from *first* to *end* that are not all zero, in order.

        Raises SlotDamaged at a damaged inner node; `stretches` goes on behind it.
        """
        for index, place, damage in self.stretches(first, end):
            if damage is not None:
                raise damage
            if place is not None:
                yield index, place

    def stretches(
        self, first: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, SlotRef | None, SlotDamaged | None]]:
        """Yield (index, place, None) as `places_of_leaves`, and go on where an inner node can't be read.

        Then it yields (index, None, damage), with the leaves that are lost in `damage.leaves`.
        """
        last = self.leaf_count if end is None else min(end, self.leaf_count)
        if self.root is not None:
            yield from self._below(self.root, self.height, 0, first, last)

    def span(self, level: int) -> int:
        """Return how many leaves a node of *level* covers."""
        return int(self.parameters.inner_nodes ** level)

    def _below(
        self, place: SlotRef, level: int, index: int, first: int, last: int
    ) -> Iterator[tuple[int, SlotRef | None, SlotDamaged | None]]:
        begin = index * self.span(level)
        if begin >= last or begin + self.span(level) <= first:
            return
        if level == 0:
            yield index, place, None
            return
        try:
            children = self.inner(place, level).children
        except SlotDamaged as damage:
            damage.leaves = range(max(begin, first), min(begin + self.span(level), last))
            yield max(begin, first), None, damage
            return
        for number, child in enumerate(children):
            if child is not None:
                yield from self._below(
                    child, level - 1, index * self.parameters.inner_nodes + number, first, last)

    def _read_inner(self, place: SlotRef, level: int) -> Inner:
        try:
            return decode_inner(self.places.node(place), level, self.parameters.inner_nodes)
        except ValueError as error:
            raise SlotDamaged(place, str(error)) from error

    def _read_leaf(self, place: SlotRef) -> Leaf:
        try:
            return decode_leaf(self.places.node(place), self.parameters.leaf_chunks)
        except ValueError as error:
            raise SlotDamaged(place, str(error)) from error


@dataclass(slots=True)
class _Open:
    """An inner node that is being put together."""

    index: int
    children: list[SlotRef | None]


class TreeBuilder:
    """Builds a disk's next tree from leaves that come in order. For one thread.

    *put_node* stores a node and returns its place. Nodes of *parent* are referred to where they are equal
    and *may_reuse* allows it. With *inherit*, leaves that are not put are the parent's (same size of disk
    needed, and everything in the parent must be reusable); without, they are zero. *all_put* says of the
    leaves from a first to an end whether all that are not zero now are put anyway: then a node above them
    need not be readable. Where one must be and is not, SlotDamaged is raised.
    """

    def __init__(
        self, parameters: Parameters, size_bytes: int, put_node: Callable[[bytes], SlotRef],
        parent: Tree | None, may_reuse: Callable[[SlotRef], bool], *, inherit: bool = False,
        all_put: Callable[[int, int], bool] = lambda _first, _end: False,
    ) -> None:
        if inherit and (parent is None or parent.size_bytes != size_bytes):
            raise ValueError("only a disk of the same size has leaves to inherit")
        self._parameters = parameters
        self._height = parameters.height(size_bytes)
        self._put_node = put_node
        self._parent = parent
        self._may_reuse = may_reuse
        self._inherit = inherit
        self._all_put = all_put
        self._open: dict[int, _Open] = {}
        self._last = -1
        self._root = parent.root if inherit and parent is not None else None

    def put_leaf(self, index: int, entries: Entries, *, differs: bool = False) -> None:
        """Set the leaf at *index*, higher than any before; *entries* are as many as a leaf has.

        With *differs* the parent's leaf is not looked at: it is known to be another.
        """
        if index <= self._last or len(entries) != self._parameters.leaf_chunks:
            raise ValueError("leaves come in order and in full")
        self._last = index
        self._put(1, index, self._leaf_place(index, entries, differs))

    def keep_leaf(self, index: int, place: SlotRef | None) -> None:
        """Set the leaf at *index*, higher than any before, to one that is stored and may be referred to.

        None makes it all zero.
        """
        if index <= self._last:
            raise ValueError("leaves come in order")
        self._last = index
        self._put(1, index, place)

    def finish(self) -> SlotRef | None:
        """Store what is still open; return the root, None if the disk is all zero."""
        for level in range(1, self._height + 1):
            if level in self._open:
                self._close(level)
        return self._root

    def _put(self, level: int, child: int, place: SlotRef | None) -> None:
        if level > self._height:
            self._root = place
            return
        index, position = divmod(child, self._parameters.inner_nodes)
        if level in self._open and self._open[level].index != index:
            self._close(level)
        if level not in self._open:
            self._open[level] = _Open(index, self._inherited(level, index))
        self._open[level].children[position] = place

    def _close(self, level: int) -> None:
        done = self._open.pop(level)
        self._put(level + 1, done.index, self._inner_place(level, done))

    def _inherited(self, level: int, index: int) -> list[SlotRef | None]:
        children = self._parents(level, index) if self._inherit else None
        return list(children) if children is not None else [None] * self._parameters.inner_nodes

    def _parents(self, level: int, index: int) -> Sequence[SlotRef | None] | None:
        place = self._parent_place(level, index)
        if self._parent is None or place is None:
            return None
        try:
            return self._parent.inner(place, level).children
        except SlotDamaged:
            if self._is_needed(level, index):
                raise
            return None

    def _parent_place(self, level: int, index: int) -> SlotRef | None:
        try:
            return None if self._parent is None else self._parent.node_at(level, index)
        except SlotDamaged:
            if self._is_needed(level, index):
                raise
            return None  # what is damaged there is written anew

    def _is_needed(self, level: int, index: int) -> bool:
        """Return whether something beneath the parent's node at a place is inherited."""
        span = self._parameters.inner_nodes ** level
        return self._inherit and not self._all_put(index * span, (index + 1) * span)

    def _leaf_place(self, index: int, entries: Entries, differs: bool) -> SlotRef | None:
        if not any(entries):
            return None
        if differs:
            return self._put_node(encode_leaf(entries))
        place = self._parent_place(0, index)
        if place is not None and self._parent is not None and self._may_reuse(place):
            try:
                if self._parent.leaf(place).entries == tuple(entries):
                    return place
            except SlotDamaged:
                pass
        return self._put_node(encode_leaf(entries))

    def _inner_place(self, level: int, node: _Open) -> SlotRef | None:
        if not any(node.children):
            return None
        place = self._parent_place(level, node.index)
        if place is not None and self._may_reuse(place):
            children = self._parents(level, node.index)
            if children is not None and list(children) == node.children:
                return place
        return self._put_node(encode_inner(level, node.children))
