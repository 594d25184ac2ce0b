"""Whatever is interrupted, wherever: the mirror is the old one or the new one, never a mixture."""

from __future__ import annotations

import errno
import random
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillframe.errors import ApplyFailed, CopyFailed, DestinationFull, DestinationLost, StillframeError
from stillframe.mirror.record import CaptureFacts, FolderState
from tests.unit.mirror_model import (
    BLOCK,
    Crashed,
    Disks,
    MemoryDisk,
    ModelClock,
    ModelFiles,
    begin,
    clone,
    folder_of,
    held,
    run,
    stage,
)

# Few different blocks, so that blocks are equal, become zero and come back.
blocks = st.sampled_from([bytes(BLOCK), b"a" * BLOCK, b"b" * BLOCK, bytes(BLOCK - 9) + b"c" * 9])
disks = st.tuples(st.lists(blocks, max_size=12), st.sampled_from([b"", bytes(5), b"tail"])).map(
    lambda parts: b"".join(parts[0]) + parts[1] or b"x")
guests = st.dictionaries(st.sampled_from(["vda", "vdb"]), disks, min_size=1)
slow = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(slow, max_examples=150)
@given(st.lists(st.tuples(guests, st.booleans()), min_size=1, max_size=5), st.integers(0, 2**32))
def test_each_run_ends_equal_to_the_source(runs: list[tuple[Disks, bool]], seed: int) -> None:
    chance = random.Random(seed)
    files = ModelFiles()
    for number, (guest, verify) in enumerate(runs):
        results = run(files, guest, f"run {number}", chance, verify=verify)
        assert held(files) == guest
        assert all(result.fell_back == "" and result.healed_blocks == 0 for result in results.values())
        again = run(files, guest, f"run {number} again", chance)
        assert all(result.changed_bytes == 0 for result in again.values())
        assert all(result.destination_read_bytes == 0 for result in again.values())
    assert folder_of(files).inspect().state is FolderState.WHOLE


def _crash_everywhere(old: Disks | None, new: Disks, seed: int, *, power: bool) -> None:
    chance = random.Random(seed)
    base = ModelFiles()
    folder_of(base)
    if old is not None:
        run(base, old, "old", chance)
    full = clone(base)
    run(full, new, "new", random.Random(seed))
    for at in range(1, full.writes + 1):
        files = clone(base)
        files.crash_at = at
        with pytest.raises(Crashed):
            run(files, new, "new", random.Random(seed))
        left = files.after_crash(chance if power else None)
        # The recovery dies as well, somewhere, and is begun again.
        left.crash_at = chance.randint(1, 12)
        try:
            folder_of(left).recover()
        except Crashed:
            left = left.after_crash(chance if power else None)
        left.crash_at = 0
        _is_old_or_new(left, old, new, f"{at}: {full.log[at - 1]}")
        run(left, new, "next", chance)
        assert held(left) == new


def _is_old_or_new(files: ModelFiles, old: Disks | None, new: Disks, where: str) -> None:
    folder = folder_of(files)
    recovered = folder.recover()
    assert not recovered.damaged, where
    found = folder.inspect()
    assert folder.recover().words == "", where
    if found.record is None:
        assert old is None, where
        assert found.state is FolderState.EMPTY, where
        assert held(files) == {}, where
        return
    assert found.state is FolderState.WHOLE, where
    expected = new if found.record.captured_at == "new" else old
    assert held(files) == expected, where
    text = f"<domain>{found.record.captured_at}</domain>".encode()
    assert files.text("domain.xml") == text, where


@settings(slow, max_examples=30)
@given(st.none() | guests, guests, st.integers(0, 2**32))
def test_a_killed_process_leaves_old_or_new(old: Disks | None, new: Disks, seed: int) -> None:
    _crash_everywhere(old, new, seed, power=False)


@settings(slow, max_examples=60)
@given(st.none() | guests, guests, st.integers(0, 2**32))
def test_a_power_cut_leaves_old_or_new(old: Disks | None, new: Disks, seed: int) -> None:
    _crash_everywhere(old, new, seed, power=True)


@settings(slow, max_examples=60)
@given(st.none() | guests, guests, st.integers(0, 2**32))
def test_what_is_published_or_finished_survives_a_power_cut(
    old: Disks | None, new: Disks, seed: int
) -> None:
    chance = random.Random(seed)
    files = ModelFiles()
    if old is not None:
        run(files, old, "old", chance)
    update = begin(files)
    stage(update, new, chance)
    update.publish(CaptureFacts("new", "crash", "<domain>new</domain>"))
    cut = files.after_crash(chance)
    assert folder_of(cut).recover().finished
    update.finish()
    finished = files.after_crash(chance)
    assert not folder_of(finished).recover().damaged
    for left in (cut, finished):
        assert held(left) == new
        again = run(left, new, "again", chance)
        assert all(result.fell_back == "" and result.changed_bytes == 0 for result in again.values())


class NoFsync(ModelFiles):
    """A negative control: a destination that forgets in spite of fsync."""

    def fsync(self, fd: int) -> None:  # noqa: ARG002
        self._alive()


def test_the_model_does_catch_a_missing_fsync() -> None:
    old, new = {"vda": b"a" * BLOCK * 8}, {"vda": b"b" * BLOCK * 8}
    caught = 0
    for seed in range(40):
        chance = random.Random(seed)
        files = NoFsync()
        run(files, old, "old", chance)
        for inode in files.current.values():
            inode.settle()
        run(files, new, "new", chance)
        left = files.after_crash(chance)
        caught += held(left) not in (old, new)
    assert caught > 0


@settings(slow, max_examples=20)
@given(guests, guests, st.sampled_from([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE]),
       st.integers(0, 2**32))
def test_a_failing_destination_leaves_old_or_new(old: Disks, new: Disks, number: int, seed: int) -> None:
    chance = random.Random(seed)
    base = ModelFiles()
    run(base, old, "old", chance)
    full = clone(base)
    run(full, new, "new", random.Random(seed))
    for at in range(1, full.writes + 1):
        files = clone(base)
        files.fail = {at: number}
        update = begin(files)
        expected = DestinationFull if number in (errno.ENOSPC, errno.EDQUOT) else DestinationLost
        try:
            stage(update, new, random.Random(seed))
            update.publish(CaptureFacts("new", "crash", "<domain>new</domain>"))
        except expected:
            update.abandon()
            _is_old_or_new(files, old, new, full.log[at - 1])
            continue
        try:
            update.finish()
        except ApplyFailed:
            files.fail = {}
            folder_of(files).recover()
        assert held(files) == new


def test_an_abandoned_update_leaves_the_map_believed() -> None:
    chance = random.Random(1)
    files = ModelFiles()
    run(files, {"vda": b"a" * BLOCK * 9}, "old", chance)
    update = begin(files)
    stage(update, {"vda": b"b" * BLOCK * 9}, chance)
    update.abandon()
    assert held(files) == {"vda": b"a" * BLOCK * 9}
    results = run(files, {"vda": b"b" * BLOCK * 9}, "new", chance)
    assert results["vda"].fell_back == ""
    assert results["vda"].destination_read_bytes == 0


def test_a_reader_that_fails_ends_the_copy_with_its_own_error() -> None:
    files = ModelFiles()
    update = begin(files)
    disk = MemoryDisk(b"a" * BLOCK * 30)
    disk.fail_at = BLOCK * 20
    with pytest.raises(CopyFailed):
        update.copy_disk("vda", disk, source="memory")
    update.abandon()
    assert folder_of(files).inspect().state is FolderState.EMPTY


def test_stop_ends_the_copy_with_the_error_it_gives() -> None:
    class Slow(MemoryDisk):
        def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
            super().pread_into(buffer, offset_bytes)
            time.sleep(0.2)

    files = ModelFiles()
    update = begin(files)
    stopped = StillframeError("enough")
    with pytest.raises(StillframeError, match="enough"):
        update.copy_disk("vda", Slow(b"a" * BLOCK * 3000), source="memory", stop=lambda: stopped)
    assert not update.hung


def test_a_destination_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Hanging(ModelFiles):
        def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> None:
            release.wait(60)
            super().pwrite(fd, data, offset)

    files = Hanging()
    update = begin(files)
    monkeypatch.setattr(ModelClock, "patience_s", 0.0002)
    with pytest.raises(DestinationLost, match="hangs"):
        update.copy_disk("vda", MemoryDisk(b"a" * BLOCK * 9), source="memory")
    assert update.hung
    before = files.writes
    with pytest.raises(DestinationLost, match="nothing more is done there"):
        update.publish(CaptureFacts("new", "crash", "<domain/>"))
    update.abandon()
    assert files.writes == before
    release.set()
