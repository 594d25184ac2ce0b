"""Looking at all of a parent's tree, where it is not known that what is beneath a node may be reused with it.

Each node is read once, in long stretches; no data is. What comes out is what has to be read from the disk
besides the changes: chunks in slots that may not be referred to any more, and all that is beneath
nodes that can't be read. A node that must be written anew has one of its chunks read: that does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stillframe.errors import SlotDamaged
from stillframe.repository.known import KnownChunks
from stillframe.repository.nodes import decode_leaf, leaf_data, leaf_slots
from stillframe.repository.pack import SlotRef
from stillframe.repository.tree import Tree
from stillframe.repository.walk import At, TreeWalk


@dataclass(frozen=True, slots=True)
class Beneath:
    """What a look at a tree found. *unusable*: runs of chunks, (first, end), in no order.

    They are to be read. *data_bytes* is what is not zero by the leaves that could be read.
    """

    unusable: list[tuple[int, int]]
    data_bytes: int


def look_beneath(tree: Tree, known: KnownChunks, ask_stop: Callable[[], None]) -> Beneath:
    """Read all nodes of *tree*. Raises StorageError, and what *ask_stop* raises."""
    look = _Look(tree, known, ask_stop)
    if tree.root is not None:
        look.walk.add(tree.root, tree.height)
        look.walk.run(tree.places)
    return Beneath(look.unusable, look.data_bytes)


class _Look:
    def __init__(self, tree: Tree, known: KnownChunks, ask_stop: Callable[[], None]) -> None:
        self._tree = tree
        self._known = known
        self._ask_stop = ask_stop
        self._width = tree.parameters.leaf_chunks
        self._chunk_bytes = tree.parameters.chunk_bytes
        self.walk = TreeWalk(self._leaf, self._damage, self._node)
        self.unusable: list[tuple[int, int]] = []
        self.data_bytes = 0

    def _node(self, place: SlotRef, at: At) -> None:
        if not self._known.may_reuse(place):
            first = self._first(at)
            self.unusable.append((first, first + 1))

    def _leaf(self, _place: SlotRef, index: int, node: bytes) -> None:
        self._ask_stop()
        first = index * self._width
        entries = (decode_leaf(node, self._width).entries  # raises for a node that is damaged elsewhere
                   if not all(map(self._known.may_reuse, leaf_slots(node, self._width))) else ())
        self.data_bytes += sum(self._length(first + at) for at in leaf_data(node, self._width))
        self.unusable.extend(
            (chunk, chunk + 1) for chunk, entry in enumerate(entries, first)
            if entry is not None and not self._known.may_reuse(entry.place))

    def _damage(self, _damage: SlotDamaged, at: At) -> None:
        first = self._first(at)
        self.unusable.append((first, first + self._tree.span(at.level) * self._width))

    def _first(self, at: At) -> int:
        return at.index * self._tree.span(at.level) * self._width

    def _length(self, chunk: int) -> int:
        return max(0, min(self._chunk_bytes, self._tree.size_bytes - chunk * self._chunk_bytes))
