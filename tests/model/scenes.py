"""What lies in storage when a search begins: early moments, and later ones that would take long to reach.

`test_protocol.py` shows that the later ones can be reached.
"""

from __future__ import annotations

from tests.model.state import Generation, Manifest, Storage
from tests.model.writer import TREE_SLOT

P0 = ("p", 0)
P1 = ("p", 1)
TREE = ("t", TREE_SLOT)

HINT = frozenset({P0})
"""What a writer's cache knows from a snapshot that may be forgotten by now."""

_PACK = ("p", frozenset({P0, P1}))

ONE = Storage(packs=frozenset({_PACK}), manifests=frozenset({Manifest("m", frozenset({P0, P1}))}))
"""One snapshot of two slots."""

TWO = Storage(
    packs=frozenset({_PACK}),
    manifests=frozenset({Manifest("m", frozenset({P0})), Manifest("k", frozenset({P1}))}))
"""Two snapshots share a pack; each uses one of its slots."""

FORGOTTEN = Storage(packs=frozenset({_PACK}))
"""The one snapshot was forgotten and nothing collected yet."""

BENEATH = Storage(
    packs=frozenset({("t", frozenset({TREE})), ("p", frozenset({P0}))}),
    manifests=frozenset({Manifest("m", frozenset({TREE, P0}))}))
"""A snapshot of a tree node and of a slot in another pack beneath it."""

LATE = BENEATH._replace(generations=(Generation(1, frozenset({("p", 1)})),))
"""It was committed late: its writer began before generation 1 condemned what it reused."""

TAKEN_BACK = Storage(
    packs=frozenset({_PACK, ("c", frozenset({P0}))}),
    manifests=frozenset({Manifest("m", frozenset({P1}))}),
    generations=(Generation(4, frozenset({("c", 4)}), frozenset({(P0, ("c",))})),))
"""P0 was copied to c and is used no more, so c is condemned; p is not, since a late writer used P1."""

GONE = Storage(
    packs=frozenset({("c", frozenset({P0}))}),
    generations=(Generation(4, frozenset({("c", 4)}), frozenset({(P0, ("c",))})),))
"""What was live in p was copied to c and p deleted; then it was forgotten too, and c is condemned."""
