"""Backups, prunes and compactions as processes: killed at any moment, and side by side."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lab.forked import Forked
from stillframe.clock import SystemClock
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.collect import collect
from stillframe.repository.opened import init_repository
from stillframe.repository.verify import Level, verify
from tests.contract.addresses import ADDRESSES
from tests.contract.drivers import Servers
from tests.fault.repository_driver import SECRET, content, number_of, opened, storage_at
from tests.unit.repository_disks import CHEAP, SMALL
from tests.unit.repository_snapshots import DAY_S, read_snapshot, rubbish

_ROOT = Path(__file__).resolve().parent.parent.parent
_TIMEOUT_S = 120.0


class Place(NamedTuple):
    """Where a repository is, and a folder for what its writers remember."""

    address: str
    hints: Path

    @property
    def is_near(self) -> bool:
        """Whether it is in a folder: a server takes several times as long."""
        return Path(self.address).is_dir()


@pytest.fixture(params=["folder", "s3", "sftp"])
def place(
    request: pytest.FixtureRequest, servers: Servers, monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Place]:
    """Make a repository; the folder is in memory: a killed process loses nothing of it, and it is fast."""
    with tempfile.TemporaryDirectory(prefix="stillframe-kill-", dir="/dev/shm") as folder:
        address, settings = ADDRESSES[request.param](servers, Path(folder))
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        init_repository(storage_at(address, make=True), SECRET, "test", SystemClock(), costs=CHEAP,
                        parameters=SMALL)
        yield Place(address, Path(folder) / "hints")


class Work:
    """Work on the repository in a process of its own, begun when this is made."""

    def __init__(self, place: Place, *words: str) -> None:
        said, output = os.pipe()
        self._process = Forked(
            [sys.executable, "-m", "tests.fault.repository_driver", place.address, str(place.hints), *words],
            output=output, errors=output, cwd=_ROOT)
        os.close(output)
        self._said = os.fdopen(said)
        line = self._said.readline()
        assert line == "go\n", line + self._said.read()

    def is_killed(self, after_s: float) -> bool:
        """Wait so long for its end and kill it then; return whether it had to be."""
        with self._said, contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(after_s)
            return False
        return True

    def end(self) -> None:
        """Wait for its end, which must be a good one."""
        with self._said:
            code = self._process.wait(_TIMEOUT_S)
            assert code == 0, self._said.read()


def _check(place: Place) -> set[tuple[str, int]]:
    """Read every snapshot that is listed; return which there are."""
    repository = opened(place.address)
    names = list_snapshots(repository.storage)
    for name in names:
        assert read_snapshot(repository, name) == content(name.guest, number_of(name)), name
    return {(name.guest, number_of(name)) for name in names}


def _check_nothing_is_left(place: Place) -> None:
    """Collect undisturbed; nothing but what the snapshots need is there then."""
    repository = opened(place.address)
    for _ in range(2):
        collect(repository, "here", SystemClock(), fence_after_s=DAY_S)
    assert rubbish(repository) == set()
    assert verify(repository, SystemClock(), Level.FULL).is_sound


def _kill_again_and_again(place: Place, times: int, seed: int) -> None:
    draw = random.Random(seed)
    began_s = time.monotonic()
    Work(place, "backup", "web", "0", "3").end()
    whole_s = time.monotonic() - began_s
    number, kept = 3, _check(place)
    killed = 0
    for _ in range(times):
        words = ("prune", "2") if draw.random() < 0.4 else ("backup", "web", str(number), "2")
        # Any moment of the work is as good as another: this is the kill's, not a wait for something.
        killed += Work(place, *words).is_killed(draw.uniform(0.0, whole_s / 2))
        found = _check(place)
        # A backup forgets old snapshots only once it has made new ones: some good one is always there.
        assert max(found)[1] >= max(kept)[1], "the last good snapshot is gone"
        number, kept = max(found)[1] + 1, found
    assert killed, "nothing was killed"
    _check_nothing_is_left(place)


def test_killed_at_any_moment(place: Place) -> None:
    _kill_again_and_again(place, 12 if place.is_near else 2, seed=random.randrange(2**32))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_two_hundred_times(place: Place) -> None:
    _kill_again_and_again(place, 200, seed=random.randrange(2**32))


def test_two_writers_and_a_collector_at_once(place: Place) -> None:
    count = 8 if place.is_near else 3
    Work(place, "backup", "web", "0", "2").end()
    for work in [Work(place, "backup", "web", "2", str(count)),
                 Work(place, "backup", "database", "0", str(count)), Work(place, "prune", str(count + 4))]:
        work.end()
    assert _check(place) >= {
        ("web", count - 1), ("web", count), ("web", count + 1), ("database", count - 1)}
    _check_nothing_is_left(place)
