"""Every snapshot restores, byte for byte, to what the guest's disks held at its moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB
from stillframe.capture.states import State
from tests.fault.harness import Place, Run, overlays_left
from tests.integration.repositories import Repo, make_repo

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 32 * MIB
_ROUNDS = 10


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    """Give an empty repository."""
    return make_repo(place, tmp_path)


def moment_of(guest: DiskGuest) -> dict[str, Path]:
    return {target: guest.model(target).copy_at_moment() for target in guest.disks}


def change(guest: DiskGuest, round_: int) -> None:
    for target in guest.disks:
        at = round_ % 8
        guest.write(target, (1 + at) * MIB + round_ * 512, 300 * 1024, 0xA0 + round_)
        guest.write_zeroes(target, (8 + at) * MIB, 200 * 1024, unmap=bool(round_ % 2))
        guest.write(target, 30 * MIB + round_ * 4096, 512, 0x10 + round_)
        guest.discard(target, (16 + at) * MIB, MIB)
    guest.flush()


def test_a_backup_and_its_restore(disk_guest: MakeGuest, repo: Repo, tmp_path: Path) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), DiskSpec("vdb", Kind.QCOW2, _SIZE_BYTES))
    expected = moment_of(guest)
    result = repo.backup(guest)
    assert result["parent"] == ""
    repo.assert_restores(result["snapshot"], expected, tmp_path)
    assert not overlays_left(repo.place)
