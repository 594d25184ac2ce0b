"""The model test: whatever happens to a guest between its backups, and to them, every one of them is right.

A walk takes steps drawn from its seed. One that fails prints its history; to take it again:

    STILLFRAME_WALK_SEED=N STILLFRAME_WALKS=1 make test-slow ARGS="-k any_seed"
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec
from lab.images import MIB, ImagesDiffer
from tests.fault.harness import Place
from tests.integration.repositories import make_repo
from tests.walk.steps import Step
from tests.walk.walk import Walk
from tests.walk.world import CONTROLLER, FIRST_DISKS, World

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 12 * MIB
_STEPS = 16
_SEEDS = (1, 2, 3)


@pytest.fixture
def world(disk_guest: MakeGuest, place: Place, tmp_path: Path) -> World:
    guest = disk_guest(
        *(DiskSpec(target, kind, _SIZE_BYTES) for target, kind in FIRST_DISKS), devices=CONTROLLER)
    return World(guest, place, {name: make_repo(place, tmp_path / name) for name in ("one", "two")}, tmp_path)


@contextmanager
def told(walk: Walk) -> Iterator[None]:
    """Print the history of a walk that fails, and at once what it failed by."""
    try:
        yield
    except BaseException:
        print(f"{walk.text()}\n{traceback.format_exc()}")
        raise


@pytest.mark.parametrize("seed", _SEEDS)
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
        walk.at_random(int(os.environ.get("STILLFRAME_WALK_STEPS", "40")))


def back_up(method: str) -> Step:
    return Step("back_up", {"where": "one", "method": method, "exclude": "", "seed": 0, "whole": False})


@pytest.mark.parametrize("method", ["bitmap", "standing-overlay"])
def test_a_change_that_a_reader_forgets_is_noticed(world: World, method: str) -> None:
    """The negative control: with the same steps, a walk fails where one changed stretch is said not to be."""
    changes = [Step("write", {"writes": (("write", "vda", at * MIB, 512, 0x60 + at),)}) for at in (3, 5)]
    honest = Walk(world, 0)
    with told(honest):
        for step in (back_up(method), changes[0], back_up(method)):
            honest.take(step)
    wrong = Walk(world, 0, "forget-a-change")
    wrong.take(changes[1])
    with pytest.raises(ImagesDiffer):
        wrong.take(back_up(method))
