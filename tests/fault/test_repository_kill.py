"""Backups, prunes and compactions as processes: killed at any moment, and side by side."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.clock import SystemClock
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.collect import collect
from stillframe.repository.opened import init_repository
from stillframe.repository.verify import Level, verify
from stillframe.storage.local import LocalStorage
from tests.fault.repository_driver import SECRET, content, number_of, opened
from tests.unit.repository_disks import CHEAP, SMALL
from tests.unit.repository_snapshots import DAY_S, read_snapshot, rubbish

_ROOT = Path(__file__).resolve().parent.parent.parent
_TIMEOUT_S = 120.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """Make a repository in a folder in memory: a killed process loses nothing of it, and it is fast."""
    with tempfile.TemporaryDirectory(prefix="stillframe-kill-", dir="/dev/shm") as place:
        folder = Path(place) / "repository"
        init_repository(LocalStorage(folder, make=True), SECRET, "test", SystemClock(), costs=CHEAP,
                        parameters=SMALL)
        yield folder


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fault.repository_driver", str(folder), *words],
        cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "go\n", line + process.communicate()[1]
    return process


def _end(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=_TIMEOUT_S)
    assert process.returncode == 0, said


def _check(folder: Path) -> set[tuple[str, int]]:
    """Read every snapshot that is listed; return which there are."""
    repository = opened(folder)
    names = list_snapshots(repository.storage)
    for name in names:
        assert read_snapshot(repository, name) == content(name.guest, number_of(name)), name
    return {(name.guest, number_of(name)) for name in names}


def _check_nothing_is_left(folder: Path) -> None:
    """Collect undisturbed; nothing but what the snapshots need is there then."""
    repository = opened(folder)
    for _ in range(2):
        collect(repository, "here", SystemClock(), fence_after_s=DAY_S)
    assert rubbish(repository) == set()
    assert verify(repository, SystemClock(), Level.FULL).is_sound


def _kill_again_and_again(folder: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    began_s = time.monotonic()
    _end(_start(folder, "backup", "web", "0", "3"))
    whole_s = time.monotonic() - began_s
    number, kept = 3, _check(folder)
    killed = 0
    for _ in range(times):
        words = ("prune", "2") if draw.random() < 0.4 else ("backup", "web", str(number), "2")
        process = _start(folder, *words)
        try:
            # Any moment of the work is as good as another: this is the kill's, not a wait for something.
            process.wait(draw.uniform(0.0, whole_s / 2))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.communicate()
        found = _check(folder)
        # A backup forgets old snapshots only once it has made new ones: some good one is always there.
        assert max(found)[1] >= max(kept)[1], "the last good snapshot is gone"
        number, kept = max(found)[1] + 1, found
    assert killed, "nothing was killed"
    _check_nothing_is_left(folder)


def test_killed_at_any_moment(folder: Path) -> None:
    _kill_again_and_again(folder, 12, seed=random.randrange(2**32))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_two_hundred_times(folder: Path) -> None:
    _kill_again_and_again(folder, 200, seed=random.randrange(2**32))


def test_two_writers_and_a_collector_at_once(folder: Path) -> None:
    _end(_start(folder, "backup", "web", "0", "2"))
    processes = [
        _start(folder, "backup", "web", "2", "8"), _start(folder, "backup", "database", "0", "8"),
        _start(folder, "prune", "12"),
    ]
    for process in processes:
        _end(process)
    assert {(guest, number) for guest, number in _check(folder) if number >= 7} >= {
        ("web", 7), ("web", 8), ("web", 9), ("database", 7)}
    _check_nothing_is_left(folder)
