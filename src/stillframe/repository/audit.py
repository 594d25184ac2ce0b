"""The audit of an incremental write: what is said not to have changed is looked at here and there.

An incremental snapshot is as right as what says which chunks changed (QEMU's bitmaps, an overlay). If that
is wrong somewhere, nothing else would ever notice. So a random sample of the chunks that are the parent's and
are said to be unchanged is read from the disk, and their IDs are compared. One that differs says that none
of the others can be believed.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import partial

from stillframe.block.reader import DiskReader
from stillframe.clock import Clock, Deadline, SystemClock
from stillframe.errors import SlotDamaged
from stillframe.repository.changes import Changes
from stillframe.repository.jobs import InOrder
from stillframe.repository.nodes import Leaf
from stillframe.repository.scan import Scanner, Unit
from stillframe.repository.stages import UNITS, Stages
from stillframe.repository.tree import Tree

#: So many chunks are taken from a leaf that was drawn: reading the leaf costs as much as a chunk or two.
_CHUNKS_OF_LEAF = 4
#: Where all of a leaf is changed, another is drawn; no more of them than this for each chunk that is wanted.
_DRAWS_OF_CHUNK = 1


@dataclass(frozen=True, slots=True)
class Audit:
    """How much is looked at: *share* of the unchanged chunks that are not zero, for *limit_s* at most.

    But about *least_chunks* in any case, where there are as many. *chance* draws them.
    """

    share: float = 0.005
    least_chunks: int = 16
    limit_s: float = 5.0
    chance: random.Random = field(default_factory=random.SystemRandom)
    clock: Clock = field(default_factory=SystemClock)


@dataclass(frozen=True, slots=True)
class Audited:
    """What an audit found. *mismatch_offset_bytes*: where a chunk begins that is not what it is said to be.

    *damaged*: nodes of the parent's tree can't be read.
    """

    chunks: int = 0
    mismatch_offset_bytes: int | None = None
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class _Look:
    """The chunks of one leaf that were compared, and those of them that differ."""

    chunks: tuple[int, ...] = ()
    different: tuple[int, ...] = ()
    damaged: bool = False


def audited(
    tree: Tree, changes: Changes, data_bytes: int, source: DiskReader, stages: Stages, audit: Audit
) -> Audited:
    """Compare chunks of *source* that *changes* does not have with *tree*, which has about *data_bytes*.

    Ends at the first that differs. Costs what it looks at, whatever the size of the disk. Raises CopyFailed,
    StorageError, and the reason to stop.
    """
    held = data_bytes // tree.parameters.chunk_bytes - changes.count
    needed = max(audit.least_chunks, math.ceil(held * audit.share))
    if tree.root is None or not audit.least_chunks:
        return Audited()
    deadline = Deadline(audit.clock, audit.limit_s)
    draws = 0
    chunks, different, damaged = set[int](), set[int](), False
    looks: InOrder[None, _Look] = InOrder(stages.readers, UNITS, stages.ask_stop)
    with stages.scanner(source) as scanner:
        try:
            while True:
                wanted = audit.least_chunks if deadline.passed() else needed
                goes_on = len(chunks) < wanted and not different and draws < _DRAWS_OF_CHUNK * wanted
                if goes_on and not looks.full:
                    draws += 1
                    seed = audit.chance.getrandbits(64)
                    chance = random.Random(seed)  # noqa: S311 -- a sample, not a secret
                    looks.put(None, partial(_look, tree, changes, scanner, chance))
                elif looks:
                    stages.ask_stop()
                    _, look = looks.take()
                    chunks.update(look.chunks)
                    different.update(look.different)
                    damaged |= look.damaged
                else:
                    break
        finally:
            looks.drop()
    offset = min(different) * tree.parameters.chunk_bytes if different else None
    return Audited(len(chunks), offset, damaged)


def _look(tree: Tree, changes: Changes, scanner: Scanner, chance: random.Random) -> _Look:
    """Draw a leaf, and compare some of its chunks: on a reading thread."""
    try:
        index, leaf = _drawn(tree, chance)
    except SlotDamaged:
        return _Look(damaged=True)
    first = index * tree.parameters.leaf_chunks
    unchanged = [(chunk, entry.id) for chunk, entry in enumerate(leaf.entries, first)
                 if entry is not None and chunk not in changes]
    taken = chance.sample(unchanged, min(_CHUNKS_OF_LEAF, len(unchanged)))
    batch = tuple(Unit(chunk, 1, ((chunk, chunk + 1),)) for chunk, _ in taken)
    found = scanner.scan(batch, bytearray(len(taken) * tree.parameters.chunk_bytes)).ids
    different = tuple(
        chunk for (chunk, chunk_id), now in zip(taken, found, strict=True) if now != chunk_id)
    return _Look(tuple(chunk for chunk, _ in taken), different)


def _drawn(tree: Tree, chance: random.Random) -> tuple[int, Leaf]:
    """Return any leaf: at each node down from the root one of its children, all alike. Raises SlotDamaged."""
    place, index = tree.root, 0
    for level in range(tree.height, 0, -1):
        assert place is not None
        children = tree.inner(place, level).children
        there = [number for number, child in enumerate(children) if child is not None]
        if not there:
            raise SlotDamaged(place, "a node that has nothing beneath it is never stored")
        number = chance.choice(there)
        place, index = children[number], index * tree.parameters.inner_nodes + number
    assert place is not None
    return index, tree.leaf(place)
