"""Kinds of storage as parameters of a test: those on Ceph belong to `make test-ceph`."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from _pytest.mark import ParameterSet

from lab.disks import ON_RBD, Kind


def each(kinds: Iterable[tuple[Kind, ...]]) -> list[ParameterSet]:
    """Return a parameter for each tuple of kinds (the disks of one guest), named after them."""
    return [
        pytest.param(
            every, id="+".join(kind.name for kind in every),
            marks=[pytest.mark.ceph] if set(every) & set(ON_RBD) else [])
        for every in kinds
    ]
