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


def refused(repo: Repo, guest: DiskGuest, error: type[errors.StillframeError], *options: str) -> str:
    """Back up, which must be refused with nothing changed; return what is said."""
    done = repo.call(
        "backup", guest.name, "--quiesce", "none", "--min-free", "32M", "--json", *options)
    assert done.returncode == error.exit_code, done.stdout + done.stderr
    body = json.loads(done.stdout)["guests"][0]["error"]
    assert body["code"] == error.code
    assert not Journal(repo.place.state_dir, SystemClock()).last_runs(1)
    assert "stillframe-overlay" not in guest.disk_source("vda")[0]
    assert guest.running()
    return f"{body['message']} {body['next_command']}"


def methods_of(result: dict[str, Any]) -> dict[str, str]:
    return {disk["target"]: disk["method"] for disk in result["disks"]}


@pytest.mark.parametrize(
    ("kind", "chosen"), [(Kind.RBD, "overlay"), (Kind.RBD_QCOW2, "bitmap")], ids=["raw", "qcow2"])
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
        code = 0
        if asked == "standing-overlay" and guest.domain().listAllCheckpoints():
            done = repo.call("backup", guest.name, "--method", asked, "--overlay-dir", repo.place.overlays)
            assert done.returncode == errors.GuestUnfit.exit_code
            assert "has bitmaps of checkpoints" in done.stderr
            assert not overlays_left(repo.place)
            for checkpoint in guest.domain().listAllCheckpoints():
                checkpoint.delete()
        if round_ == len(wanted) - 1:
            assert repo.json("settle", guest.name)["guests"][0]["ok"]
            assert not overlays_left(repo.place)
            # What the last snapshot left to count from is an overlay, and no checkpoint.
            code = errors.EXIT_FELL_BACK if chosen == "bitmap" else 0
        result = backed_up(repo, guest, "--method", asked, code=code)
        assert methods_of(result) == {"vda": by}, result
        again = by == expected[round_ - 1] == "standing-overlay"
        assert (result["disks"][0]["read_bytes"] < _SIZE_BYTES // 8) is again
        points.append((result["snapshot"], moment))
        change(guest, round_ + 3)
    for snapshot, moment in points:
        repo.assert_restores(snapshot, moment, tmp_path)
    assert repo.json("verify", "--level", "full")["sound"] is True
    guest.destroy()
    guest.assert_disk_equals_model()


def test_a_raw_disk_can_not_be_captured_by_bitmap(guest: DiskGuest, repo: Repo) -> None:
    said = refused(repo, guest, errors.GuestUnfit, "--method", "bitmap",
                   "--overlay-dir", str(repo.place.overlays))
    assert "raw images keep no bitmap" in said
    assert "--method standing-overlay" in said


def test_there_is_no_folder_beside_it_for_an_overlay(guest: DiskGuest, repo: Repo) -> None:
    assert "--overlay-dir" in refused(repo, guest, errors.OverlayFolderNeeded)


def test_a_user_whose_key_this_host_does_not_have(guest: DiskGuest, repo: Repo) -> None:
    """QEMU has its key of libvirt's secret; what stillframe starts looks for the user's keyring."""
    hidden = ceph.USER_KEYRING.rename(ceph.USER_KEYRING.with_suffix(".hidden"))
    try:
        said = refused(repo, guest, errors.GuestUnfit, "--overlay-dir", str(repo.place.overlays))
    finally:
        hidden.rename(ceph.USER_KEYRING)
    assert f"rbd --id {ceph.USER} info {ceph.POOL}/{guest.name}-vda" in said
    assert "keyring" in said
    assert methods_of(backed_up(repo, guest)) == {"vda": "overlay"}


def test_a_snapshot_is_put_back_onto_rbd(guest: DiskGuest, repo: Repo, tmp_path: Path) -> None:
    """As docs/USER-GUIDE.md says: restored to a file, then written over the image."""
    change(guest, 0)
    moment = guest.model().copy_at_moment()
    snapshot = backed_up(repo, guest)["snapshot"]
    change(guest, 1)
    guest.destroy()
    image = tmp_path / "vda.img"
    assert repo.call("restore", f"{snapshot}:vda", "--to", image).returncode == 0
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, guest.disks["vda"].address)
    assert_equal_images(guest.read_disk("vda"), moment)
    guest.start()
    assert guest.reads_as("vda", MIB, 300 * 1024, 0xA0)
