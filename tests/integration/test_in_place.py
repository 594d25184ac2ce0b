"""Restoring a guest in place: equal bytes, only what differs written, and refused where it can't be safe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lab.diskguest import DiskGuest
from lab.disks import Kind
from lab.images import MIB, run
from stillframe import errors
from stillframe.capture.restoring import MARK
from tests.fault.harness import Place
from tests.integration.repositories import Repo, make_repo
from tests.integration.test_offline import shut_down
from tests.kinds import disks, each

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 32 * MIB


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    """Give an empty repository."""
    return make_repo(place, tmp_path)


def in_place(repo: Repo, snapshot: str, *words: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = repo.json("restore", snapshot, "--in-place", *words, code=code)
    return found


def refused(repo: Repo, snapshot: str, *words: str, error: type[errors.StillframeError]) -> dict[str, Any]:
    found: dict[str, Any] = in_place(repo, snapshot, *words, code=error.exit_code)["error"]
    return found


def moment(guest: DiskGuest) -> dict[str, Path]:
    return {target: guest.model(target).copy_at_moment() for target in guest.disks}


def put_back(guest: DiskGuest, then: Mapping[str, Path]) -> None:
    """Make the models what the guest's disks were, and compare them."""
    for target, model in then.items():
        run("cp", "--sparse=always", model, guest.model(target).path)
        guest.assert_disk_equals_model(target)


def change(guest: DiskGuest, seed: int) -> None:
    for target in guest.disks:
        guest.write(target, (2 + seed) * MIB + 4096, 200 * 1024, 0xA0 + seed)
        guest.write_zeroes(target, (9 + seed) * MIB, 300 * 1024)
        guest.write(target, 20 * MIB, 64 * 1024, 0x11 + seed)
    guest.flush()


@pytest.mark.parametrize("kinds", each([
    (Kind.RAW, Kind.QCOW2), (Kind.BLOCK,), (Kind.CHAIN,), (Kind.NBD,), (Kind.LVM,), (Kind.RBD,)]))
def test_only_what_differs_is_written(
    disk_guest: MakeGuest, repo: Repo, kinds: tuple[Kind, ...]
) -> None:
    guest = disk_guest(*disks(kinds, _SIZE_BYTES))
    change(guest, 0)
    then = moment(guest)
    shut_down(guest)
    snapshot = repo.json("backup", guest.name)["guests"][0]["snapshot"]
    guest.start()
    change(guest, 3)
    shut_down(guest)
    lower = [path.read_bytes() for path in guest.disks["vda"].files[:-1]]

    would = in_place(repo, snapshot, "--dry-run")
    done = in_place(repo, snapshot)
    for disk, dry in zip(done["disks"], would["disks"], strict=True):
        assert 0 < disk["written_bytes"] + disk["zeroed_bytes"] == dry["differing_bytes"] < 3 * MIB
        assert dry["written_bytes"] == 0
    assert [path.read_bytes() for path in guest.disks["vda"].files[:-1]] == lower
    now = moment(guest)
    put_back(guest, then)
    assert not list(guest.folder.rglob(f"*{MARK}"))
    guest.start()
    shut_down(guest)

    # The state before is a snapshot, too.
    assert sum(disk["differing_bytes"] for disk in in_place(repo, done["state_before"])["disks"]) > 0
    put_back(guest, now)
    assert repo.json("status")["restoring"] == []
