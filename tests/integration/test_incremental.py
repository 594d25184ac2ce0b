"""Snapshots built upon one another by what changed: when one of them is dropped, all others are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import KIB, MIB
from stillframe.errors import EXIT_FELL_BACK, EXIT_OK
from tests.fault.harness import Place
from tests.integration.repositories import Repo, make_repo

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 24 * MIB


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    return make_repo(place, tmp_path)


def change(guest: DiskGuest, number: int) -> None:
    for target in guest.disks:
        guest.write(target, number * MIB, 200 * KIB, 0xA0 + number)  # in each link anew
        guest.write(target, 20 * MIB, 64 * KIB, 0x10 + number)  # over what the link before wrote
        guest.write_zeroes(target, number * MIB - 256 * KIB, 128 * KIB)
    guest.flush()


@pytest.mark.parametrize("method", ["bitmap", "standing-overlay"])
@pytest.mark.parametrize("dropped", ["the middle", "the newest"])
def test_a_missing_link(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path, place: Place, method: str, dropped: str
) -> None:
    """Without the middle one the next run counts on; without the newest it reads all, and says so."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.CHAIN, _SIZE_BYTES))
    links: dict[str, dict[str, Path]] = {}

    def link(number: int, code: int = EXIT_OK) -> None:
        change(guest, number)
        moment = {target: guest.model(target).copy_at_moment() for target in guest.disks}
        result = repo.backup(guest, "--method", method, "--overlay-dir", str(place.overlays), code=code)
        assert {bool(disk["note"]) for disk in result["disks"]} == {code == EXIT_FELL_BACK}
        links[result["snapshot"]] = moment

    for number in range(1, 5):
        link(number)
    gone = list(links)[1 if dropped == "the middle" else -1]
    links.pop(gone)
    assert repo.call("forget", gone).returncode == 0
    assert repo.call("prune").returncode == 0
    link(5, EXIT_OK if dropped == "the middle" else EXIT_FELL_BACK)
    link(6)
    assert [each["id"] for each in repo.json("list")["snapshots"]] == list(links)
    for snapshot, moment in links.items():
        repo.assert_restores(snapshot, moment, tmp_path)
    assert repo.json("verify", "--level", "full")["sound"] is True
