"""Guests that QEMU runs without libvirt: every restore point is the disk at its moment, whatever dies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lab.barequemu import Attach, BareQemu
from lab.disks import DiskSpec, Kind
from lab.images import MIB
from stillframe.capture.states import State
from tests.fault.harness import Place, Run, overlays_left
from tests.integration.repositories import Repo, make_repo

MakeBare = Callable[..., BareQemu]
_KIB = 1024
_SIZE_BYTES = 24 * MIB
TWO = (DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))
UUID = "6f1b7c52-3a80-4b5e-9d0c-2f4f6b1d7a11"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("mirrors", "overlays"):
        (tmp_path / name).mkdir()
    return Place(tmp_path / "mirrors", tmp_path / "state", tmp_path / "overlays")


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    return make_repo(place, tmp_path)


def moment_of(guest: BareQemu) -> dict[str, Path]:
    return {target: guest.model(target).copy_at_moment() for target in guest.disks}


def change(guest: BareQemu, round_: int) -> None:
    for target in guest.disks:
        guest.write(target, (1 + round_) * MIB, 192 * _KIB, 0xA0 + round_)
        guest.write_zeroes(target, (8 + round_) * MIB, 128 * _KIB)
    guest.flush()


def assert_clean(guest: BareQemu, place: Place) -> None:
    """Nothing of a run is left in QEMU or beside the images, and the guest runs on its own."""
    assert not overlays_left(place)
    assert not list(guest.folder.rglob("*stillframe*"))
    assert not list(place.overlays.iterdir())
    if guest.running():
        assert guest.monitor.execute("query-jobs") == []
        assert guest.monitor.execute("query-block-exports") == []
        nodes = guest.monitor.execute("query-named-block-nodes")
        assert [node["node-name"] for node in nodes if "stillframe" in node["file"] + node["node-name"]] == []
        assert guest.monitor.execute("query-status")["status"] == "running"
    for target in guest.disks:
        assert guest.top(target) == str(guest.disks[target].path)
        guest.assert_disk_equals_model(target)


@pytest.mark.parametrize("attach", list(Attach))
def test_an_overlay_backup(bare_qemu: MakeBare, repo: Repo, tmp_path: Path, attach: Attach) -> None:
    guest = bare_qemu(*TWO, attach=(attach,))
    change(guest, 0)
    expected = moment_of(guest)
    result = repo.backup(guest, "--method", "overlay", "--overlay-dir", str(repo.place.overlays))
    assert [disk["target"] for disk in result["disks"]] == ["vda", "vdb"]
    assert_clean(guest, repo.place)
    repo.assert_restores(result["snapshot"], expected, tmp_path)


def test_writes_during_the_copy_are_not_in_it(bare_qemu: MakeBare, repo: Repo, tmp_path: Path) -> None:
    guest = bare_qemu(*TWO, uuid=UUID)
    place = replace(repo.place, destination=repo.path)
    chain = []
    for round_ in range(3):
        change(guest, round_)
        expected = moment_of(guest)
        run = Run(place, guest, what="backup", state=State.COPYING, phase="done")
        assert run.wait_reached(), run.output
        change(guest, round_ + 3)
        assert run.go_on() == 0, run.output
        assert_clean(guest, place)
        chain.append((run.output.rpartition("snapshot ")[2].split()[0], expected))
    for snapshot, expected in chain:
        repo.assert_restores(snapshot, expected, tmp_path)
