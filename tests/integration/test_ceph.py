"""What is said and done about a guest with disks on Ceph RBD, from the command to the restored image.

That each method captures such disks is shown where it is shown for the other kinds of storage: every test
that takes kinds (`tests/kinds.py`) takes those on Ceph in `make test-ceph`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import ceph
from lab.diskguest import DiskGuest
from lab.disks import Kind
from lab.images import MIB, assert_equal_images, run
from stillframe import errors
from stillframe.capture.journal import Journal
from stillframe.clock import SystemClock
from tests.fault.harness import Place, overlays_left
from tests.integration.repositories import Repo, make_repo
from tests.kinds import disks

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 32 * MIB

pytestmark = pytest.mark.ceph


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    """Give an empty repository."""
    return make_repo(place, tmp_path)


@pytest.fixture
def guest(disk_guest: MakeGuest) -> DiskGuest:
    """Give a guest with one raw disk on RBD."""
    return disk_guest(*disks((Kind.RBD,), _SIZE_BYTES))


def backed_up(repo: Repo, guest: DiskGuest, *options: str, code: int = 0) -> dict[str, Any]:
    return repo.backup(guest, "--overlay-dir", str(repo.place.overlays), *options, code=code)


def change(guest: DiskGuest, round_: int) -> None:
    for target in guest.disks:
        guest.write(target, (1 + round_) * MIB, 300 * 1024, 0xA0 + round_)
        guest.write_zeroes(target, (10 + round_) * MIB, 200 * 1024)
        guest.discard(target, 24 * MIB, 4 * MIB)
        guest.write(target, 24 * MIB + round_ * 4096, 4096, 0xB0 + round_)
    guest.flush()


def methods_of(result: dict[str, Any]) -> dict[str, str]:
    return {disk["target"]: disk["method"] for disk in result["disks"]}


@pytest.mark.parametrize(("kind", "chosen"), [(Kind.RBD, "overlay"), (Kind.RBD_QCOW2, "bitmap")])
def test_snapshots_by_each_method_in_turn_restore_byte_for_byte(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path, kind: Kind, chosen: str
) -> None:
    guest = disk_guest(*disks((kind,), _SIZE_BYTES))
    points: list[tuple[str, dict[str, Path]]] = []
    wanted = ["auto", "overlay", "standing-overlay", "standing-overlay", "standing-overlay", "auto", "auto"]
    expected = [chosen, "overlay", *["standing-overlay"] * 4, chosen]
    for round_, (asked, by) in enumerate(zip(wanted, expected, strict=True)):
        change(guest, round_)
        moment = {"vda": guest.model().copy_at_moment()}
        first = asked == "standing-overlay" and expected[round_ - 1] != by
        last = round_ == len(wanted) - 1
        if last:  # as after any other method: the anchor of the last snapshot is no checkpoint
            assert repo.json("settle", guest.name)["guests"][0]["ok"]
            assert not overlays_left(repo.place)
        fell_back = first or (last and chosen == "bitmap")
        result = backed_up(
            repo, guest, "--method", asked, code=errors.EXIT_FELL_BACK if fell_back else 0)
        assert methods_of(result) == {"vda": by}, result
        points.append((result["snapshot"], moment))
        change(guest, round_ + 3)
    for snapshot, moment in points:
        repo.assert_restores(snapshot, moment, tmp_path)
    assert repo.json("verify", "--level", "full")["sound"] is True
    guest.destroy()
    guest.assert_disk_equals_model()
