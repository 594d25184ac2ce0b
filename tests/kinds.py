"""Kinds of storage as parameters of a test: those on Ceph belong to `make test-ceph`."""

from __future__ import annotations

import string
from collections.abc import Iterable

import pytest
from _pytest.mark import ParameterSet

from lab.disks import ON_RBD, DiskSpec, Kind


def each(kinds: Iterable[tuple[Kind, ...]]) -> list[ParameterSet]:
    """Return a parameter for each tuple of kinds, those of a guest's disks in turn, named after them."""
    return [
        pytest.param(
            every, id="+".join(kind.name for kind in every),
            marks=[pytest.mark.ceph] if set(every) & set(ON_RBD) else [])
        for every in kinds
    ]


def disks(kinds: Iterable[Kind], size_bytes: int) -> list[DiskSpec]:
    """Return disks vda, vdb and so on, of these kinds."""
    return [
        DiskSpec(f"vd{letter}", kind, size_bytes)
        for letter, kind in zip(string.ascii_lowercase, kinds, strict=False)]
