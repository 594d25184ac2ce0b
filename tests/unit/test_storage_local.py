"""What only a local folder has: modes, the order of durable steps, crashes, file systems that lack a call."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from stillframe.clock import SystemClock
from stillframe.errors import (
    ObjectExists,
    ObjectMissing,
    ObjectTruncated,
    RepositoryUnsafe,
    StorageFull,
    StorageLost,
)
from stillframe.storage.local import UNFINISHED, LocalStorage
from stillframe.storage.publish import WAYS, Way, hard_link, rename_without_replacing
from stillframe.storage.wrappers import Retried
from tests.style.sources import ROOT

STEPS = ("open", "pwrite", "fsync", "close", "link", "rename", "unlink", "mkdir")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def storage(root: Path) -> LocalStorage:
    return LocalStorage(root, make=True)


def unfinished(root: Path) -> list[str]:
    return os.listdir(root / UNFINISHED)


def record_steps(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """Return a list that fills with the real steps: "fsync of main/g", "link to main/g/1"."""
    steps: list[str] = []

    def named(path: str) -> str:
        relative = os.path.relpath(path, root)
        return "the new file" if relative.startswith(UNFINISHED + "/") else relative

    def recorded(name: str, text: Callable[..., str]) -> None:
        real = getattr(os, name)

        def step(*args: Any, **options: Any) -> Any:
            steps.append(text(*args))
            return real(*args, **options)

        monkeypatch.setattr(os, name, step)

    recorded("pwrite", lambda fd, *_: f"write {named(os.readlink(f'/proc/self/fd/{fd}'))}")
    recorded("fsync", lambda fd: f"fsync {named(os.readlink(f'/proc/self/fd/{fd}'))}")
    recorded("link", lambda old, new: f"link {named(old)} to {named(new)}")
    recorded("rename", lambda old, new: f"rename {named(old)} to {named(new)}")
    recorded("mkdir", lambda path, _: f"mkdir {named(path)}")
    recorded("unlink", lambda path: f"unlink {named(path)}")
    return steps


def test_each_step_of_a_create_is_durable_before_the_next(
        monkeypatch: pytest.MonkeyPatch, storage: LocalStorage, root: Path) -> None:
    steps = record_steps(monkeypatch, root)
    storage.create("main/g/1", b"x")
    assert steps == [
        "write the new file", "fsync the new file", "mkdir main", "fsync .", "mkdir main/g", "fsync main",
        "link the new file to main/g/1", "fsync main/g", "unlink the new file"]
    steps.clear()
    storage.create("main/g/2", b"x")
    assert steps == [
        "write the new file", "fsync the new file", "link the new file to main/g/2", "fsync main/g",
        "unlink the new file"]


def test_each_step_of_a_replace_is_durable_before_the_next(
        monkeypatch: pytest.MonkeyPatch, storage: LocalStorage, root: Path) -> None:
    storage.create("main/s/1", b"x")
    steps = record_steps(monkeypatch, root)
    storage.replace("main/s/1", b"y")
    assert steps[:4] == [
        "write the new file", "fsync the new file", "rename the new file to main/s/1", "fsync main/s"]


def test_a_folder_that_another_made_is_made_durable_too(
        monkeypatch: pytest.MonkeyPatch, storage: LocalStorage, root: Path) -> None:
    storage.create("main/g/1", b"x")
    other = LocalStorage(root)
    steps = record_steps(monkeypatch, root)
    other.create("main/g/2", b"x")
    assert [step for step in steps if step.startswith("fsync")] == [
        "fsync the new file", "fsync .", "fsync main", "fsync main/g"]


def test_what_is_said_to_exist_is_durable(
        monkeypatch: pytest.MonkeyPatch, storage: LocalStorage, root: Path) -> None:
    storage.create("main/g/1", b"x")
    steps = record_steps(monkeypatch, root)
    with pytest.raises(ObjectExists):
        storage.create("main/g/1", b"y")
    assert "fsync main/g" in steps


def test_a_deletion_is_durable(monkeypatch: pytest.MonkeyPatch, storage: LocalStorage, root: Path) -> None:
    storage.create("m/1", b"x")
    storage.create("m/2", b"x")
    steps = record_steps(monkeypatch, root)
    storage.delete(["m/1", "m/2", "m/3"])
    assert steps == ["unlink m/1", "unlink m/2", "unlink m/3", "fsync m"]
    assert not (root / "m").exists()


def test_nobody_else_may_read(storage: LocalStorage, root: Path) -> None:
    old = os.umask(0)
    try:
        storage.create("main/p/1", b"x")
    finally:
        os.umask(old)
    for folder in (root, root / UNFINISHED, root / "main", root / "main/p"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert (root / "main/p/1").stat().st_mode & 0o777 == 0o600


def test_no_temporary_stays(storage: LocalStorage, root: Path) -> None:
    storage.create("a/1", b"x")
    with pytest.raises(ObjectExists):
        storage.create("a/1", b"x")
    storage.replace("a/1", b"x")
    storage.now()
    assert unfinished(root) == []


def test_what_killed_writers_left_is_removed_when_old(storage: LocalStorage, root: Path) -> None:
    now_s = storage.now().timestamp()
    for name, age_s in (("old", 3700), ("young", 3500)):
        (root / UNFINISHED / name).write_bytes(b"torn")
        os.utime(root / UNFINISHED / name, (now_s - age_s, now_s - age_s))
    assert list(storage.list("")) == []
    storage.create("a/1", b"x")
    assert unfinished(root) == ["young"]


def test_a_writer_whose_file_is_swept_fails_and_leaves_nothing(
        monkeypatch: pytest.MonkeyPatch, storage: LocalStorage, root: Path) -> None:
    def swept(temporary: str, target: str) -> None:
        os.unlink(temporary)
        hard_link(temporary, target)

    with pytest.raises(StorageLost):
        LocalStorage(root, ways=(swept,)).create("a/1", b"x")
    assert list(storage.list("")) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "link", "mkdir", "open"])
def test_no_room_is_told_as_such_and_leaves_nothing(
        monkeypatch: pytest.MonkeyPatch, storage: LocalStorage, root: Path, call: str, number: int) -> None:
    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises(StorageFull) as caught:
            storage.create("main/g/1", b"x" * 100)
    assert str(root) in caught.value.next_command
    assert list(storage.list("")) == []
    assert unfinished(root) == []


def test_a_short_write_is_gone_on_with(monkeypatch: pytest.MonkeyPatch, storage: LocalStorage) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: real(fd, view[:7], offset))
    storage.create("k", b"0123456789" * 5)
    assert storage.get("k") == b"0123456789" * 5


def test_a_short_read_is_gone_on_with(monkeypatch: pytest.MonkeyPatch, storage: LocalStorage) -> None:
    storage.create("k", b"0123456789" * 5)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 7), offset))
    assert storage.get("k", 3, 40) == (b"0123456789" * 5)[3:43]


def test_a_file_that_is_cut_while_it_is_read(monkeypatch: pytest.MonkeyPatch, storage: LocalStorage) -> None:
    storage.create("k", b"0123456789")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 4 - offset), offset))
    with pytest.raises(ObjectTruncated, match="4 bytes"):
        storage.get("k")


@pytest.mark.parametrize(
    ("call", "number"), [("pread", errno.EIO), ("open", errno.EACCES), ("open", errno.ESTALE)])
def test_what_else_fails_is_lost(
        monkeypatch: pytest.MonkeyPatch, storage: LocalStorage, root: Path, call: str, number: int) -> None:
    storage.create("k", b"x")

    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(StorageLost, match=os.strerror(number)) as caught:
        storage.get("k")
    assert str(root) in caught.value.next_command


def test_an_empty_file_is_no_object_and_is_not_overwritten(storage: LocalStorage, root: Path) -> None:
    (root / "k").touch()
    with pytest.raises(ObjectTruncated):
        storage.get("k")
    with pytest.raises(ObjectTruncated):
        storage.get("k", 0, 0)
    with pytest.raises(ObjectExists):
        storage.create("k", b"x")
    assert [listed.size_bytes for listed in storage.list("")] == [0]


def test_what_is_no_object_is_not_listed_or_read(storage: LocalStorage, root: Path) -> None:
    storage.create("a/1", b"x")
    (root / "lost+found").mkdir()
    (root / "lost+found" / "1").write_text("x")
    (root / "a" / ".nfs0001").write_text("x")
    (root / "a" / "link").symlink_to(root / "a" / "1")
    os.mkfifo(root / "a" / "pipe")
    assert [listed.key for listed in storage.list("")] == ["a/1"]
    with pytest.raises(ObjectMissing):
        storage.stat("a/link")
    with pytest.raises(StorageLost):
        storage.get("a/link")


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_where_nothing_is_mounted_is_not_a_storage_without_objects(root: Path, exists: bool) -> None:
    if exists:
        root.mkdir()
    storage = LocalStorage(root)
    for call in (
        lambda: storage.get("k"), lambda: storage.stat("k"), lambda: list(storage.list("")), storage.now,
        lambda: storage.create("main/k", b"x"), lambda: storage.replace("k", b"x"),
        lambda: storage.delete(["k"]),
    ):
        with pytest.raises(StorageLost, match="not mounted"):
            call()
    assert root.exists() == exists
    assert not exists or os.listdir(root) == []


def test_a_file_system_that_goes_while_it_is_listed_is_noticed(storage: LocalStorage, root: Path) -> None:
    storage.create("a/1", b"x")
    storage.create("b/1", b"x")
    listing = storage.list("")
    next(listing)
    root.rename(root.parent / "gone")
    root.mkdir()
    with pytest.raises(StorageLost, match="not mounted"):
        next(listing)


def test_a_copy_without_the_folder_for_temporaries_works(storage: LocalStorage, root: Path) -> None:
    storage.create("a/1", b"x")
    (root / UNFINISHED).rmdir()
    copy = LocalStorage(root)
    copy.create("a/2", b"y")
    assert [listed.key for listed in copy.list("")] == ["a/1", "a/2"]


def test_the_folder_may_be_several_deep_and_be_there_already(tmp_path: Path) -> None:
    for _ in range(2):
        LocalStorage(tmp_path / "a/b/c", make=True).replace("k", b"x")
    assert LocalStorage(tmp_path / "a/b/c").get("k") == b"x"


def unable(number: int) -> Way:
    def way(_temporary: str, _target: str) -> None:
        raise OSError(number, os.strerror(number))

    return way


def test_without_hard_links_the_next_way_is_taken(root: Path) -> None:
    calls: list[str] = []

    def no_links(temporary: str, target: str) -> None:
        calls.append(target)
        unable(errno.EPERM)(temporary, target)

    storage = LocalStorage(root, make=True, ways=(no_links, rename_without_replacing))
    storage.create("a/1", b"x")
    with pytest.raises(ObjectExists):
        storage.create("a/1", b"y")
    storage.create("a/2", b"z")
    assert len(calls) == 1
    assert storage.get("a/1") == b"x"
    assert storage.capabilities.create_if_absent
    assert unfinished(root) == []


def test_without_any_way_it_is_unsafe(root: Path) -> None:
    storage = LocalStorage(root, make=True, ways=(unable(errno.EPERM), unable(errno.EINVAL)))
    with pytest.raises(RepositoryUnsafe, match="hard links"):
        storage.create("a/1", b"x")
    assert not storage.capabilities.create_if_absent
    assert list(storage.list("")) == []
    assert unfinished(root) == []


def test_what_is_forbidden_is_not_called_unsafe(root: Path) -> None:
    storage = LocalStorage(root, make=True, ways=(unable(errno.EPERM), unable(errno.EPERM)))
    with pytest.raises(StorageLost, match="forbids"):
        storage.create("a/1", b"x")
    assert storage.capabilities.create_if_absent


def test_what_is_forbidden_is_not_tried_again(root: Path) -> None:
    def again(*_: object) -> None:
        raise AssertionError("who reads a read-only folder would wait for the session it can't register")

    storage = LocalStorage(root, make=True, ways=(unable(errno.EROFS),))
    with pytest.raises(StorageLost, match="forbids"):
        Retried(storage, SystemClock(), on_retry=again).create("a/1", b"x")


@pytest.mark.parametrize("way", WAYS)
def test_a_name_given_twice_by_a_repeated_request_is_a_success(root: Path, way: Way) -> None:
    # NFS: the server's reply is lost, the client asks again and is told that the name exists.
    def repeated(temporary: str, target: str) -> None:
        way(temporary, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    storage = LocalStorage(root, make=True, ways=(repeated,))
    storage.create("a/1", b"x")
    assert storage.get("a/1") == b"x"
    with pytest.raises(ObjectExists):
        LocalStorage(root).create("a/1", b"y")


def die_at(step: int, act: Callable[[], None]) -> bool:
    """Run *act* in a child that is killed before its *step*-th system call; return whether it came so far."""
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if next(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        try:
            for name in STEPS:
                setattr(os, name, counted(getattr(os, name)))
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("way", WAYS)
def test_killed_before_any_step_of_a_create(root: Path, way: Way) -> None:
    content = os.urandom(100_000)
    LocalStorage(root, make=True)
    outcomes: set[bool] = set()
    for step in range(1, 100):
        key = f"main/p/{step}/1"
        killed = die_at(step, partial(LocalStorage(root, ways=(way,)).create, key, content))
        after = LocalStorage(root)
        there = [listed.size_bytes for listed in after.list(key)]
        outcomes.add(bool(there))
        assert there in ([], [len(content)])
        if there:
            assert after.get(key) == content
        else:
            after.create(key, b"the next one is not disturbed")
        if not killed:
            assert step > 8
            assert there
            break
    else:
        pytest.fail("the create never came to its end")
    assert outcomes == {True, False}


def test_killed_before_any_step_of_a_replace(storage: LocalStorage, root: Path) -> None:
    storage.create("s/k", b"old")
    for step in range(1, 100):
        killed = die_at(step, lambda: LocalStorage(root).replace("s/k", b"new one"))
        seen = LocalStorage(root).get("s/k")
        assert seen in {b"old", b"new one"}
        if not killed:
            assert step > 5
            assert seen == b"new one"
            break
        storage.replace("s/k", b"old")


_WRITER = """
import os, random, sys
from pathlib import Path
from blake3 import blake3
from stillframe.storage.local import LocalStorage
storage = LocalStorage(Path(sys.argv[1]))
for n in range(1_000_000):
    content = os.urandom(random.randrange(1, 500_000))
    storage.create(f"p/{n % 3}/{sys.argv[2]}-{n}-{blake3(content).hexdigest()}", content)
    print(n, flush=True)
"""


def test_writers_that_are_killed_leave_whole_objects_only(storage: LocalStorage, root: Path) -> None:
    chance = random.Random(1)
    certain = 0
    for turn in range(12):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(root), str(turn)],
                                  stdout=subprocess.PIPE, cwd=ROOT,
                                  env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"0\n"
        time.sleep(chance.uniform(0, 0.06))
        writer.kill()
        certain += 1 + len(writer.stdout.read().splitlines())
        writer.stdout.close()
        writer.wait()
    found = [listed.key for listed in storage.list("")]
    assert certain <= len(found) <= certain + 12
    for key in found:
        assert blake3(storage.get(key)).hexdigest() == key.rpartition("-")[2]
