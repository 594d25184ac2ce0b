"""One run at a time for each domain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from stillframe.capture.lock import domain_lock, lock_holder
from stillframe.clock import SystemClock
from stillframe.errors import RunInProgress, StateFolderUnusable

_ROOT = Path(__file__).parents[2]
_UUID = "8b2e3b8e-0d2d-4a0c-9d7e-6f1f6f3c1a11"
_HOLDER = """
import sys
from pathlib import Path
from stillframe.capture.lock import domain_lock
from stillframe.clock import SystemClock

with domain_lock(Path(sys.argv[1]), sys.argv[2], "g", "mirror", SystemClock()):
    print("held", flush=True)
    sys.stdin.read()
"""


def lock(folder: Path, uuid: str, name: str, purpose: str) -> AbstractContextManager[None]:
    return domain_lock(folder, uuid, name, purpose, SystemClock(), 0.1)


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder), _UUID], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=_ROOT, env={**os.environ, "PYTHONPATH": str(_ROOT / "src")},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder


def test_a_second_run_is_refused_and_told_who_holds_the_guest(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as holder:
        words = f"mirror, process {holder.pid}"
        with pytest.raises(RunInProgress, match=words), lock(tmp_path, _UUID, "g", "recover"):
            pytest.fail("held twice")
        assert lock_holder(tmp_path, _UUID) == words
    with lock(tmp_path, _UUID, "g", "recover"):
        assert lock_holder(tmp_path, _UUID) == f"recover, process {os.getpid()}"
    assert lock_holder(tmp_path, _UUID) == ""


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert lock_holder(tmp_path, _UUID) == ""
        with lock(tmp_path, _UUID, "g", "recover"):
            pass


def test_an_error_inside_frees_the_guest(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock(tmp_path, _UUID, "g", "mirror"):
        raise ZeroDivisionError
    assert lock_holder(tmp_path, _UUID) == ""


def test_another_guest_is_free(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path), lock(tmp_path, "another", "h", "mirror"):
        assert lock_holder(tmp_path, "another").startswith("mirror")


def test_a_shorter_text_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    with lock(tmp_path, _UUID, "g", "a purpose with a great many words"):
        pass
    with lock(tmp_path, _UUID, "g", "x"):
        assert lock_holder(tmp_path, _UUID) == f"x, process {os.getpid()}"


def test_asking_who_holds_makes_no_file(tmp_path: Path) -> None:
    assert lock_holder(tmp_path, _UUID) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_child_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with lock(tmp_path, _UUID, "g", "mirror"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert lock_holder(tmp_path, _UUID) == ""
    finally:
        child.kill()
        child.wait()


def test_a_folder_that_cant_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "locks").touch()
    with pytest.raises(StateFolderUnusable, match="locks"), lock(tmp_path, _UUID, "g", "mirror"):
        pytest.fail("locked")
