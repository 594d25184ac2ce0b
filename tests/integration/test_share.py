"""One test run shared among labs: every test is run, once, and what fails is seen wherever it ran."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab import enter
from lab.share import claim, long_first

_ROOT = Path(__file__).resolve().parent.parent.parent
_TESTS = """
import os, pathlib, time
import pytest

HERE = pathlib.Path(__file__).parent

@pytest.fixture(scope="module")
def prepared():
    yield "ready"
    (HERE / f"ended-{os.readlink('/proc/self/ns/net')}").touch()

@pytest.mark.parametrize("number", range(8))
def test_it(prepared, number):
    with (HERE / "ran").open("a") as ran:
        ran.write(f"{number} {os.readlink('/proc/self/ns/net')}\\n")
    # No lab gets all: each waits until another one is there.
    deadline = time.monotonic() + 30
    while len({line.split()[1] for line in (HERE / "ran").read_text().splitlines()}) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert number != FAILS
"""


def share(tests: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run *tests* in two labs."""
    return subprocess.run(
        [sys.executable, "-m", "lab.share", "2", folder, "-c", _ROOT / "pyproject.toml", "-p",
         "no:cacheprovider", tests],
        cwd=_ROOT, env={**os.environ, enter.PLACE: str(folder)}, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("fails", [-1, 3])
def test_every_test_is_run_once_and_a_failure_is_one(tmp_path: Path, fails: int) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("test_one.py", "test_two.py"):
        (tests / name).write_text(_TESTS.replace("FAILS", str(fails if name == "test_two.py" else -1)))
    done = share(tests, tmp_path)
    ran = [line.split() for line in (tests / "ran").read_text().splitlines()]
    assert sorted(number for number, _ in ran) == sorted(2 * [str(number) for number in range(8)])
    labs = {lab for _, lab in ran}
    assert len(labs) == 2
    assert {path.name.removeprefix("ended-") for path in tests.glob("ended-*")} == labs, "fixtures are ended"
    assert done.stdout.count("===== test session starts") == 2
    assert (done.returncode == 0) is (fails < 0)
    assert ("Lab 1: all well\nLab 2: all well\n" in done.stdout) is (fails < 0)
    if fails >= 0:
        assert "test_two.py::test_it[3] - assert 3 != 3" in done.stdout
        assert done.stdout.count("FAILED, exit code 1") == 1


def test_what_is_together_is_run_by_one_lab(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    together = """
import os, pathlib
import pytest

pytestmark = pytest.mark.together

@pytest.mark.parametrize("number", range(8))
def test_it(number):
    with (pathlib.Path(__file__).parent / "together").open("a") as ran:
        ran.write(f"{number} {os.readlink('/proc/self/ns/net')}\\n")
"""
    (tests / "test_together.py").write_text(together)
    (tests / "test_two.py").write_text(_TESTS.replace("FAILS", "-1"))
    done = share(tests, tmp_path)
    assert done.returncode == 0, done.stdout
    ran = [line.split() for line in (tests / "together").read_text().splitlines()]
    assert [number for number, _ in ran] == [str(number) for number in range(8)]
    assert len({lab for _, lab in ran}) == 1


def test_a_lab_that_dies_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import os\ndef test_it(): os.kill(os.getpid(), 9)\n")
    done = share(tmp_path, tmp_path)
    assert done.returncode == 128 + 9, done.stdout
    assert "FAILED, exit code 137" in done.stdout


def test_a_claim_is_for_one(tmp_path: Path) -> None:
    assert claim(tmp_path, "a")
    assert not claim(tmp_path, "a")
    assert claim(tmp_path, "b")


@pytest.mark.parametrize("lab", [1, 2])
def test_long_ones_come_first_and_none_is_lost(request: pytest.FixtureRequest, lab: int) -> None:
    items = request.session.items
    ordered = long_first(items, lab)
    assert sorted(map(id, ordered)) == sorted(map(id, items))
    ranks = [2 if each.get_closest_marker("together") else
             "session_daemons" in getattr(each, "fixturenames", ()) for each in ordered]
    assert ranks == sorted(ranks, reverse=True)
