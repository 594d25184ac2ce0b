"""Kinds of storage as parameters of a test: some belong to a make target of their own."""

from __future__ import annotations

import string
from collections.abc import Iterable

import pytest
from _pytest.mark import ParameterSet

from lab.disks import ON_RBD, DiskSpec, Kind

#: What a test must be marked with so that the storage is there (tests/conftest.py).
_MARKS = {**dict.fromkeys(ON_RBD, pytest.mark.ceph), Kind.LVM: pytest.mark.lvm}


def each(kinds: Iterable[tuple[Kind, ...]]) -> list[ParameterSet]:
    """Return a parameter for each tuple of kinds, those of a guest's disks in turn, named after them."""
    return [
        pytest.param(
            every, id="+".join(kind.name for kind in every),
            marks=[mark for kind, mark in _MARKS.items() if kind in every])
        for every in kinds
    ]


def disks(kinds: Iterable[Kind], size_bytes: int) -> list[DiskSpec]:
    """Return disks vda, vdb and so on, of these kinds."""
    return [
        DiskSpec(f"vd{letter}", kind, size_bytes)
        for letter, kind in zip(string.ascii_lowercase, kinds, strict=False)]
