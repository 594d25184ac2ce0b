"""The model test: whatever happens to a guest between its backups, and to its backups, every one of them is right.

A walk takes steps drawn from a seed. One that fails prints its history; take it again with

    make test ARGS="-k test_a_walk_of_any_seed -m 'slow or not slow'" STILLFRAME_WALK_SEED=N STILLFRAME_WALKS=1
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec
from lab.images import KIB, MIB, ImagesDiffer
from tests.fault.harness import Place
from tests.integration.repositories import make_repo
from tests.walk.steps import Step
from tests.walk.walk import Walk
from tests.walk.world import CONTROLLER, FIRST_DISKS, World

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 12 * MIB
_STEPS = 30


@pytest.fixture
def world(disk_guest: MakeGuest, place: Place, tmp_path: Path) -> World:
    guest = disk_guest(*(DiskSpec(target, kind, _SIZE_BYTES) for target, kind in FIRST_DISKS), devices=CONTROLLER)
    repos = {}
    for name in ("one", "two"):
        repos[name] = make_repo(place, tmp_path / name)
    return World(guest, place, repos, tmp_path)


@contextmanager
def told(walk: Walk) -> Iterator[None]:
    """Print the history of a walk that fails."""
    try:
        yield
    except BaseException:
        print(walk.text())
        raise


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_walk(world: World, seed: int) -> None:
    walk = Walk(world, seed)
    with told(walk):
        walk.at_random(_STEPS)


def _seeds() -> list[int]:
    first = int(os.environ.get("STILLFRAME_WALK_SEED", "1000"))
    return list(range(first, first + int(os.environ.get("STILLFRAME_WALKS", "10"))))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", _seeds())
def test_a_walk_of_any_seed(world: World, seed: int) -> None:
    walk = Walk(world, seed)
    with told(walk):
        walk.at_random(int(os.environ.get("STILLFRAME_WALK_STEPS", "60")))
