"""What `list`, `status` and `doctor` say of a guest that stands on overlays, to people and to programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB
from stillframe.capture.journal import Journal
from stillframe.clock import SystemClock
from stillframe.errors import EXIT_OK, GuestUnfit, NeedsAttention
from tests.fault.harness import Place
from tests.integration.repositories import Repo, make_repo

MakeGuest = Callable[..., DiskGuest]


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    return make_repo(place, tmp_path)


@pytest.fixture
def guest(disk_guest: MakeGuest, repo: Repo) -> DiskGuest:
    """Give a guest that stands on the overlays of a backup."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, 16 * MIB), DiskSpec("vdb", Kind.RAW, 16 * MIB))
    repo.backup(guest, "--method", "standing-overlay", "--overlay-dir", str(repo.place.overlays))
    return guest


def said(repo: Repo, *words: str, code: int = EXIT_OK) -> str:
    """Return what a command says to people."""
    done = repo.call(*words)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def doctor(repo: Repo, guest: DiskGuest) -> tuple[str, ...]:
    return "doctor", guest.name, "--quiesce", "none", "--overlay-dir", str(repo.place.overlays)


def test_a_guest_that_stands_as_it_was_left(guest: DiskGuest, repo: Repo) -> None:
    (run,) = Journal(repo.place.state_dir, SystemClock()).standing_runs()
    words = f"stands on the overlays of run {run.id} by intention"
    assert repo.json("list")["standing"] == {guest.name: run.id}
    assert f"{guest.name} {words}" in said(repo, "list")
    status = repo.json("status")
    assert status["open_runs"] == []
    (stands,) = status["standing"]
    assert (stands["guest"], stands["run"], stands["past_limit"]) == (guest.name, run.id, "")
    assert str(repo.path) in stands["destination"]
    assert {(each["target"], each["overlay"], each["run"]) for each in status["guests_on_overlays"]} == {
        (disk.target, disk.overlay_path, run.id) for disk in run.disks}
    assert f"{guest.name} {words}" in said(repo, "status")
    (looked_at,) = repo.json(*doctor(repo, guest))["guests"]
    assert (looked_at["method"], looked_at["standing"]) == ("standing-overlay", run.id)
    assert {disk["image"] for disk in looked_at["disks"]} == {disk.overlay_path for disk in run.disks}
    assert words in said(repo, *doctor(repo, guest))

    assert repo.call("settle", guest.name).returncode == EXIT_OK
    assert repo.json("list")["standing"] == {}
    assert repo.json("status")["standing"] == repo.json("status")["guests_on_overlays"] == []
    for command in (("list",), ("status",), doctor(repo, guest)):
        assert "stands on" not in said(repo, *command)


def test_a_guest_that_stands_and_is_off(guest: DiskGuest, repo: Repo) -> None:
    """It is not captured before it is settled, which doctor says; the others still name its overlays."""
    guest.destroy()
    assert guest.name in repo.json("list")["standing"]
    assert len(repo.json("status")["guests_on_overlays"]) == 2
    (looked_at,) = repo.json(*doctor(repo, guest), code=GuestUnfit.exit_code)["guests"]
    assert looked_at["error"]["next_command"].startswith(f"stillframe settle {guest.name}")


def test_a_guest_that_does_not_stand_as_it_was_left(guest: DiskGuest, repo: Repo) -> None:
    theirs = guest.folder / "theirs.qcow2"
    guest.domain().snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{theirs}'/></disk>"
        "<disk name='vdb' snapshot='no'/></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA)
    (looked_at,) = repo.json(*doctor(repo, guest), code=NeedsAttention.exit_code)["guests"]
    assert str(theirs) in looked_at["error"]["message"]
    assert guest.name in repo.json("list")["standing"], "it is known where the disks' data is"
    (run,) = Journal(repo.place.state_dir, SystemClock()).standing_runs()
    assert [each["run"] for each in repo.json("status")["standing"]] == [run.id]
