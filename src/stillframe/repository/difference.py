"""What differs between two disks of one repository, from their trees alone: no data is read.

Two trees refer to the same node where nothing changed, so what is equal is skipped without looking
into it. The answer is in whole chunks, whether a chunk's bytes all changed or only one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillframe.extent import Extent, Kind, merged
from stillframe.repository.pack import SlotRef
from stillframe.repository.tree import Entries, Tree


def changed_extents(old: Tree, new: Tree) -> Iterator[Extent]:
    """Yield the stretches of *new* that differ from *old*, in order: data, or zero where it was cleared.

    What lies behind the end of the smaller disk counts as zeroes. Extents end at the end of the larger
    disk. Raises SlotDamaged.
    """
    end = max(old.size_bytes, new.size_bytes)
    held: Extent | None = None
    for extent in _changed_chunks(old, new):
        length = min(extent.length_bytes, end - extent.offset_bytes)
        clipped = Extent(extent.offset_bytes, length, extent.kind)
        if held is not None and held.end_bytes == clipped.offset_bytes:
            *done, held = merged((held, clipped))
            yield from done
        else:
            if held is not None:
                yield held
            held = clipped
    if held is not None:
        yield held


def _changed_chunks(old: Tree, new: Tree) -> Iterator[Extent]:
    parameters = new.parameters
    for index, before, after in _changed_leaves(old, new):
        was, now = _entries(old, before), _entries(new, after)
        for number in range(parameters.leaf_chunks):
            one, other = was[number] if was else None, now[number] if now else None
            if (one and one.id) != (other and other.id):
                at = (index * parameters.leaf_chunks + number) * parameters.chunk_bytes
                yield Extent(at, parameters.chunk_bytes, Kind.ZERO if other is None else Kind.DATA)


def _changed_leaves(old: Tree, new: Tree) -> Iterator[tuple[int, SlotRef | None, SlotRef | None]]:
    yield from _below(old, new, max(old.height, new.height), 0, old.root, new.root)


def _below(
    old: Tree, new: Tree, level: int, index: int, before: SlotRef | None, after: SlotRef | None,
) -> Iterator[tuple[int, SlotRef | None, SlotRef | None]]:
    if before == after:
        return
    if level == 0:
        yield index, before, after
        return
    pairs = zip(_children(old, level, before), _children(new, level, after), strict=True)
    for number, (one, other) in enumerate(pairs):
        yield from _below(old, new, level - 1, index * new.parameters.inner_nodes + number, one, other)


def _children(tree: Tree, level: int, place: SlotRef | None) -> Sequence[SlotRef | None]:
    """Return the children of a node; above a tree's own root, that root is the first child."""
    if place is None or level > tree.height:
        return [place, *[None] * (tree.parameters.inner_nodes - 1)]
    return tree.inner(place, level).children


def _entries(tree: Tree, place: SlotRef | None) -> Entries | None:
    return None if place is None else tree.leaf(place).entries
