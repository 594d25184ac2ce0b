"""Extents and joining neighbours."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from stillframe.extent import Extent, Kind, merged


@st.composite
def _runs(draw: st.DrawFn) -> list[Extent]:
    """Extents in order without gaps, as a block status answer gives them."""
    offset = draw(st.integers(0, 2**40))
    extents = []
    for length, kind in draw(st.lists(st.tuples(st.integers(1, 2**32), st.sampled_from(Kind)), max_size=30)):
        extents.append(Extent(offset, length, kind))
        offset += length
    return extents


def test_only_data_does_not_read_as_zero() -> None:
    assert {kind for kind in Kind if not kind.reads_as_zero} == {Kind.DATA}


def test_an_extent_ends_behind_its_last_byte() -> None:
    assert Extent(4096, 512, Kind.DATA).end_bytes == 4608


def test_equal_neighbours_are_joined_and_others_kept() -> None:
    extents = [
        Extent(0, 10, Kind.DATA), Extent(10, 5, Kind.DATA), Extent(15, 5, Kind.ZERO),
        Extent(20, 5, Kind.HOLE), Extent(25, 1, Kind.HOLE),
    ]
    assert list(merged(extents)) == [
        Extent(0, 15, Kind.DATA), Extent(15, 5, Kind.ZERO), Extent(20, 6, Kind.HOLE),
    ]


def test_a_gap_is_not_bridged() -> None:
    extents = [Extent(0, 10, Kind.DATA), Extent(11, 5, Kind.DATA)]
    assert list(merged(extents)) == extents


def test_nothing_gives_nothing() -> None:
    assert list(merged([])) == []


@given(_runs())
def test_merging_keeps_what_each_byte_is(extents: list[Extent]) -> None:
    result = list(merged(extents))
    assert sum(extent.length_bytes for extent in result) == sum(extent.length_bytes for extent in extents)
    for extent in extents:
        home = [one for one in result if one.offset_bytes <= extent.offset_bytes < one.end_bytes]
        assert len(home) == 1
        assert home[0].kind is extent.kind
        assert home[0].end_bytes >= extent.end_bytes
    for left, right in pairwise(result):
        assert left.end_bytes == right.offset_bytes
        assert left.kind is not right.kind
