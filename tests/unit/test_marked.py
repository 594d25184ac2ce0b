"""Stretches that count as changed besides what a reader says."""

from __future__ import annotations

import random

import pytest

from stillframe.block.marked import stretches, with_marked
from stillframe.extent import Extent, Kind


def some(chance: random.Random, share: float) -> list[Extent]:
    return [Extent(at * 10, 10, chance.choice(list(Kind))) for at in range(200) if chance.random() < share]


def tens(pairs: list[tuple[int, int]]) -> set[int]:
    return {at for offset, length in pairs for at in range(offset // 10, (offset + length) // 10)}


@pytest.mark.parametrize("seed", range(50))
def test_what_is_marked_counts_besides(seed: int) -> None:
    chance = random.Random(seed)
    changed, marked = some(chance, 0.3), stretches(some(chance, 0.3))
    found = list(with_marked(changed, marked))
    pairs = [(each.offset_bytes, each.length_bytes) for each in found]
    assert pairs == sorted(pairs)
    assert sum(length for _, length in pairs) == 10 * len(tens(pairs)), "nothing twice"
    said = tens([(each.offset_bytes, each.length_bytes) for each in changed])
    assert tens(pairs) == said | tens(list(marked))
    assert all(each in changed or each.kind is Kind.DATA for each in found)


@pytest.mark.parametrize("limit", [1, 3, 40])
def test_few_stretches_hold_all_of_them(limit: int) -> None:
    chance = random.Random(limit)
    changed = [Extent(at * 2**20 + chance.randrange(2**18), 4096, Kind.DATA) for at in range(500)]
    found = stretches(changed, limit)
    assert len(found) <= limit
    for each in changed:
        assert any(
            offset <= each.offset_bytes and each.end_bytes <= offset + length for offset, length in found)
    assert stretches(changed) == tuple((each.offset_bytes, 4096) for each in changed)
