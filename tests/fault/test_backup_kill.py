"""SIGKILL of a backup, anywhere: the guest comes back, snapshots are whole or absent, and go on."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB
from stillframe.capture.states import State
from stillframe.repository.layout import SESSIONS
from stillframe.storage.local import LocalStorage
from tests.fault.harness import Place, Run, overlays_left, recover
from tests.integration.repositories import Repo, make_repo

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 24 * MIB
_RANDOM_KILLS = 6
_SLOW_KILLS = 60
#: About as long as a backup of the small guest takes, start of Python included.
_LONGEST_S = 3.0


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    """Give an empty repository."""
    return make_repo(place, tmp_path)


@pytest.fixture
def guest(disk_guest: MakeGuest) -> DiskGuest:
    """Give a guest with two disks."""
    return disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), DiskSpec("vdb", Kind.QCOW2, _SIZE_BYTES))


def start(repo: Repo, guest: DiskGuest, state: State | None = None, phase: str = "-") -> Run:
    return Run(replace(repo.place, destination=repo.path), guest, what="backup", state=state, phase=phase)


def moment_of(guest: DiskGuest) -> dict[str, Path]:
    return {target: guest.model(target).copy_at_moment() for target in guest.disks}


def write_something(guest: DiskGuest, number: int) -> None:
    for target in guest.disks:
        guest.write(target, (1 + number % 20) * MIB, 256 * 1024, 1 + number % 250)
    guest.flush()


def snapshots(repo: Repo) -> list[str]:
    return [each["id"] for each in repo.json("list")["snapshots"]]


def assert_recovered(repo: Repo, guest: DiskGuest) -> None:
    """The guest is brought back, onto its own images, with all that it wrote."""
    done = recover(repo.place, guest)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not overlays_left(repo.place)
    for target, disk in guest.disks.items():
        assert guest.disk_source(target)[0] == str(disk.path)
        guest.assert_disk_equals_model(target)


def assert_whole(repo: Repo, expected: dict[str, dict[str, Path]], to: Path) -> None:
    """Every snapshot that is listed is one that was expected, and restores to its moment."""
    assert set(snapshots(repo)) <= set(expected)
    for snapshot in snapshots(repo):
        repo.assert_restores(snapshot, expected[snapshot], to)


def assert_rubbish_goes(repo: Repo) -> None:
    """A prune takes the dead for dead, and leaves nothing that no snapshot needs."""
    repo.json("prune")
    assert list(LocalStorage(repo.path).list(SESSIONS)) == []
    found = repo.json("prune", "--dry-run")["plan"]
    assert found["condemned"] == found["deleted"] == []
    assert repo.json("verify", "--level", "full")["sound"] is True


@pytest.mark.parametrize(("state", "phase"), [
    (State.SNAPSHOT, "done"), (State.COPYING, "done"), (State.RELEASED, "intent"), (State.COMMITTING, "done"),
])
def test_killed_at_a_step_of_the_journal(
    repo: Repo, guest: DiskGuest, tmp_path: Path, state: State, phase: str
) -> None:
    expected = {repo.backup(guest)["snapshot"]: moment_of(guest)}
    write_something(guest, 1)
    moment = moment_of(guest)
    run = start(repo, guest, state, phase)
    assert run.wait_reached(), run.output
    run.kill()
    write_something(guest, 2)
    assert_recovered(repo, guest)
    new = set(snapshots(repo)) - set(expected)
    # The manifest is created before the release is written down: from there on it is a snapshot.
    assert len(new) == (1 if state in (State.RELEASED, State.COMMITTING) else 0)
    expected.update(dict.fromkeys(new, moment))
    assert_whole(repo, expected, tmp_path)
    expected[repo.backup(guest)["snapshot"]] = moment_of(guest)
    assert_rubbish_goes(repo)
    assert_whole(repo, expected, tmp_path)


def _kill_at_random(repo: Repo, guest: DiskGuest, to: Path, kills: int, seed: int) -> None:
    generator = random.Random(seed)
    expected = {repo.backup(guest)["snapshot"]: moment_of(guest)}
    for number in range(kills):
        write_something(guest, number)
        moment = moment_of(guest)
        run = start(repo, guest)
        time.sleep(generator.uniform(0.2, _LONGEST_S))
        run.kill()
        assert_recovered(repo, guest)
        new = set(snapshots(repo)) - set(expected)
        assert len(new) <= 1
        expected.update(dict.fromkeys(new, moment))
        if number % 3 == 2:
            assert_rubbish_goes(repo)
    expected[repo.backup(guest)["snapshot"]] = moment_of(guest)
    assert_rubbish_goes(repo)
    assert_whole(repo, expected, to)


def test_killed_at_random_moments(repo: Repo, guest: DiskGuest, tmp_path: Path) -> None:
    _kill_at_random(repo, guest, tmp_path, _RANDOM_KILLS, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_many_random_moments(repo: Repo, guest: DiskGuest, tmp_path: Path) -> None:
    _kill_at_random(repo, guest, tmp_path, _SLOW_KILLS, seed=2)


def test_a_prune_killed_at_random_moments(repo: Repo, guest: DiskGuest, tmp_path: Path) -> None:
    generator = random.Random(3)
    expected = {}
    for number in range(3):
        write_something(guest, number)
        expected[repo.backup(guest)["snapshot"]] = moment_of(guest)
        if number % 2:
            dropped = snapshots(repo)[0]
            repo.json("forget", dropped)
            del expected[dropped]
        pruning = subprocess.Popen(
            repo.command("prune"), env=repo.environment(), cwd=repo.root, stdout=subprocess.DEVNULL)
        time.sleep(generator.uniform(0.3, 1.5))
        pruning.kill()
        pruning.wait()
    assert_rubbish_goes(repo)
    assert_whole(repo, expected, tmp_path)
