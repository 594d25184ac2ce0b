"""Restoring into files: equal bytes, holes kept, refusals before the first write, nothing half-written."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.clock import SystemClock
from stillframe.errors import (
    DestinationFull,
    DestinationUnwritable,
    Interrupted,
    SlotDamaged,
    StillframeError,
    TargetExists,
    TargetInUse,
    TargetSmall,
)
from stillframe.extent import Kind
from stillframe.repository.manifest import DiskEntry, Root
from stillframe.repository.places import Places
from stillframe.restore.files import lock_as_qemu
from stillframe.restore.run import Restored, RestoreProgress, restore_disk
from stillframe.restore.target import Wishes
from stillframe.storage.memory import MemoryStorage
from tests.unit.repository_disks import CHUNK, Book, SourceDisk, noise

SIZE = 300 * CHUNK + 512


class Shelf:
    """A repository with one snapshot of one disk, to be restored."""

    def __init__(self, disk: SourceDisk | None = None) -> None:
        self.storage = MemoryStorage()
        self.book = Book(self.storage)
        self.disk = disk or SourceDisk(noise(SIZE), [(40 * CHUNK, 100 * CHUNK, Kind.HOLE)])
        written = self.book.backup(self.disk)
        self.entry = DiskEntry(
            size_bytes=written.size_bytes, root=Root.of(written.root), target="vda", format="raw", source="",
            method="overlay", read_bytes=0, data_bytes=written.data_bytes, changed_bytes=0, stored_bytes=0)

    def restore(self, wishes: Wishes, *, skip_bad: bool = False,
                stop: Callable[[], StillframeError | None] = lambda: None,
                report: Callable[[RestoreProgress], None] = lambda _: None) -> Restored:
        return restore_disk(Places(self.book.repository), self.entry, wishes, clock=SystemClock(),
                            skip_bad=skip_bad, stop=stop, report=report)

    def damage(self) -> None:
        key = [listed.key for listed in self.storage.list("main/p/")][1]
        content = bytearray(self.storage.get(key))
        content[20000] ^= 1
        self.storage.replace(key, content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder / "disk.raw"


def only(path: Path) -> bool:
    return os.listdir(path.parent) == ([path.name] if path.exists() else [])


def test_a_new_file_is_equal_and_sparse(path: Path) -> None:
    shelf, seen = Shelf(), list[RestoreProgress]()
    restored = shelf.restore(Wishes(str(path)), report=seen.append)
    assert path.read_bytes() == shelf.disk.content
    assert path.stat().st_blocks * 512 <= 201 * CHUNK
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    data = SIZE - 100 * CHUNK
    assert (restored.lost, restored.data_bytes, restored.written_bytes) == ((), data, data)
    assert seen[-1] == RestoreProgress(SIZE, SIZE, data)
    assert only(path)


@pytest.mark.parametrize("content", [b"", bytes(100 * CHUNK), bytes(7)])
def test_a_disk_of_zeroes(path: Path, content: bytes) -> None:
    Shelf(SourceDisk(content)).restore(Wishes(str(path)))
    assert path.read_bytes() == content


def test_what_exists_is_not_overwritten_unasked(path: Path) -> None:
    path.write_bytes(b"mine")
    with pytest.raises(TargetExists):
        Shelf().restore(Wishes(str(path)))
    assert path.read_bytes() == b"mine"


def test_a_folder_is_no_target(path: Path) -> None:
    path.mkdir()
    with pytest.raises(TargetExists, match="neither"):
        Shelf().restore(Wishes(str(path), force=True))


def test_force_replaces_it_and_keeps_its_owner(path: Path) -> None:
    path.write_bytes(b"old" * 100_000)
    path.chmod(0o640)
    os.chown(path, 1234, 2345)
    link = path.with_name("link.raw")
    link.symlink_to(path.name)
    shelf = Shelf()
    shelf.restore(Wishes(str(link), force=True))
    assert link.is_symlink()
    assert path.read_bytes() == shelf.disk.content
    facts = path.stat()
    assert (stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid) == (0o640, 1234, 2345)


def test_a_file_that_appears_meanwhile_is_kept(path: Path) -> None:
    def appear(_: RestoreProgress) -> None:
        path.write_text("theirs")

    with pytest.raises(TargetExists, match="appeared"):
        Shelf().restore(Wishes(str(path)), report=appear)
    assert path.read_text() == "theirs"
    assert only(path)


def test_delta_writes_what_differs_only(path: Path) -> None:
    shelf, chance = Shelf(), random.Random(1)
    old = bytearray(shelf.disk.content)
    for at in (0, 39 * CHUNK + 5, 90 * CHUNK, 299 * CHUNK, SIZE - 1):
        old[at] ^= 1
    path.write_bytes(old)
    before = path.stat().st_ino
    restored = shelf.restore(Wishes(str(path), delta=True))
    assert path.read_bytes() == shelf.disk.content
    assert path.stat().st_ino == before
    assert 0 < restored.written_bytes <= 4 * 4 * CHUNK
    assert shelf.restore(Wishes(str(path), delta=True)).written_bytes == 0
    path.write_bytes(chance.randbytes(SIZE + 9999))
    shelf.restore(Wishes(str(path), delta=True))
    assert path.read_bytes() == shelf.disk.content


def test_delta_without_a_target_makes_one(path: Path) -> None:
    shelf = Shelf()
    shelf.restore(Wishes(str(path), delta=True))
    assert path.read_bytes() == shelf.disk.content


def test_a_smaller_file_is_refused(path: Path) -> None:
    path.write_bytes(bytes(SIZE - 1))
    with pytest.raises(TargetSmall):
        Shelf().restore(Wishes(str(path), delta=True))
    assert path.read_bytes() == bytes(SIZE - 1)


def test_too_little_room_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 100, CHUNK

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(TargetSmall, match="left"):
        Shelf().restore(Wishes(str(path)))
    assert only(path)


def test_no_folder_is_refused(path: Path) -> None:
    with pytest.raises(DestinationUnwritable):
        Shelf().restore(Wishes(str(path / "no" / "where")))


@pytest.mark.parametrize("wishes", [{"delta": True}, {"force": True}])
def test_a_locked_image_is_refused(path: Path, wishes: dict[str, bool]) -> None:
    path.write_bytes(bytes(SIZE))
    held = os.open(path, os.O_RDWR)
    try:
        assert lock_as_qemu(held)
        with pytest.raises(TargetInUse):
            Shelf().restore(Wishes(str(path), **wishes))  # type: ignore[arg-type]
    finally:
        os.close(held)
    assert path.read_bytes() == bytes(SIZE)
    Shelf().restore(Wishes(str(path), **wishes))  # type: ignore[arg-type]


def test_stop_leaves_no_new_file(path: Path) -> None:
    asked = iter(range(1000))
    with pytest.raises(Interrupted) as raised:
        Shelf().restore(Wishes(str(path)),
                        stop=lambda: Interrupted("stopped") if next(asked) == 9 else None)
    assert os.listdir(path.parent) == []
    assert "incomplete" not in raised.value.message


def test_stop_says_that_an_existing_target_is_incomplete(path: Path) -> None:
    path.write_bytes(bytes(SIZE))
    asked = iter(range(1000))
    with pytest.raises(Interrupted, match="incomplete"):
        Shelf().restore(Wishes(str(path), delta=True),
                        stop=lambda: Interrupted("stopped") if next(asked) == 9 else None)


def test_stop_with_force_keeps_what_was_there(path: Path) -> None:
    path.write_bytes(b"old")
    with pytest.raises(Interrupted):
        Shelf().restore(Wishes(str(path), force=True), stop=lambda: Interrupted("stopped"))
    assert path.read_bytes() == b"old"
    assert only(path)


def test_damage_ends_it_and_leaves_no_file(path: Path) -> None:
    shelf = Shelf()
    shelf.damage()
    with pytest.raises(SlotDamaged):
        shelf.restore(Wishes(str(path)))
    assert os.listdir(path.parent) == []


def test_skip_bad_names_what_is_lost(path: Path) -> None:
    shelf = Shelf()
    shelf.damage()
    restored = shelf.restore(Wishes(str(path)), skip_bad=True)
    expected = bytearray(shelf.disk.content)
    assert len(restored.lost) == 4
    for lost in restored.lost:
        assert lost.why
        expected[lost.offset_bytes : lost.offset_bytes + lost.length_bytes] = bytes(lost.length_bytes)
    assert path.read_bytes() == expected


def test_skip_bad_leaves_what_an_existing_target_has(path: Path) -> None:
    shelf = Shelf()
    shelf.damage()
    path.write_bytes(shelf.disk.content)
    assert len(shelf.restore(Wishes(str(path), delta=True), skip_bad=True).lost) == 4
    assert path.read_bytes() == shelf.disk.content


def test_a_full_disk_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, iter(range(1000))

    def pwrite(fd: int, content: memoryview, offset: int) -> int:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(fd, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DestinationFull):
        Shelf().restore(Wishes(str(path)))
    assert os.listdir(path.parent) == []


def test_a_link_is_restored_to_in_the_format_of_its_own_name(path: Path) -> None:
    path.write_bytes(b"")
    link = path.with_name("disk.qcow2")
    link.symlink_to(path)
    with pytest.raises(TargetExists, match="no qcow2"):
        Shelf().restore(Wishes(str(link), delta=True))
    assert path.read_bytes() == b""


def test_a_qcow2_image_with_a_plain_name_is_not_overwritten_as_raw(path: Path) -> None:
    shelf = Shelf()
    path.write_bytes(b"QFI\xfb" + bytes(len(shelf.disk.content)))
    before = path.read_bytes()
    with pytest.raises(TargetExists, match="is a qcow2 image"):
        shelf.restore(Wishes(str(path), delta=True))
    assert path.read_bytes() == before
    shelf.restore(Wishes(str(path), format="raw", delta=True))
    assert path.read_bytes() == bytes(shelf.disk.content)
