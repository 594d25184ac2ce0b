"""Mirrors in real folders, of real images, read by a real qemu-nbd."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from stillframe.block.image import ImagePlace, file_place, nbd_place
from stillframe.block.reader import open_reader
from stillframe.clock import SystemClock
from stillframe.errors import CopyFailed, DestinationBusy, DestinationForeign, DestinationUnwritable
from stillframe.extent import Extent, Kind
from stillframe.mirror import lock
from stillframe.mirror.folder import MirrorFolder
from stillframe.mirror.place import LocalPlace
from stillframe.mirror.record import CaptureFacts, FolderState
from stillframe.mirror.update import CopyProgress, CopyResult
from stillframe.units import KIB, MIB

CLOCK = SystemClock()
SIZE = 40 * MIB


def _qemu_io(path: Path, driver: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", driver, *words, str(path)], check=True, capture_output=True)


def _image(folder: Path, driver: str) -> Path:
    path = folder / f"disk.{driver}"
    subprocess.run(["qemu-img", "create", "-q", "-f", driver, path, str(SIZE)], check=True)
    _qemu_io(path, driver, "write -P 1 0 1M", "write -P 2 9000k 700k", "write -z 20M 1M",
             "write -P 3 41942528 512")
    return path


def _mirror(place: ImagePlace, folder: Path, label: str, *, verify: bool = False) -> CopyResult:
    mirror = MirrorFolder(LocalPlace(folder), clock=CLOCK)
    with mirror.lock("test"):
        mirror.recover()
        update = mirror.begin("guest", "uuid")
        with open_reader(place, clock=CLOCK) as reader:
            result = update.copy_disk("vda", reader, source=place.text(), verify_destination=verify)
        update.publish(CaptureFacts(label, "crash", f"<domain>{label}</domain>"))
        update.finish()
    assert mirror.inspect().state is FolderState.WHOLE
    return result


def _same(path: Path, driver: str, image: Path) -> bool:
    done = subprocess.run(["qemu-img", "compare", "-f", driver, "-F", "raw", path, image],
                          capture_output=True, text=True)
    return done.returncode == 0


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_a_mirror_follows_its_disk(tmp_path: Path, driver: str) -> None:
    path = _image(tmp_path, driver)
    place = file_place(str(path), driver)
    folder = tmp_path / "guest"
    first = _mirror(place, folder, "1")
    image = folder / "vda.img"
    assert first.first_copy
    assert first.size_bytes == SIZE
    assert _same(path, driver, image)
    assert image.stat().st_blocks * 512 < 4 * MIB  # holes stay holes
    assert oct(image.stat().st_mode & 0o777) == "0o600"

    _qemu_io(path, driver, "write -P 9 512k 64k", "write -z 9000k 128k", "discard 0 64k",
             "write -P 4 30M 10k")
    second = _mirror(place, folder, "2")
    assert _same(path, driver, image)
    assert second.fell_back == ""
    assert second.destination_read_bytes == 0
    assert 0 < second.changed_bytes <= 6 * 64 * KIB
    assert (folder / "domain.xml").read_text() == "<domain>2</domain>"
    assert sorted(os.listdir(folder)) == [
        ".stillframe.lock", "domain.xml", "mirror.json", "vda.img", "vda.map"]

    third = _mirror(place, folder, "3", verify=True)
    assert third.changed_bytes == third.healed_blocks == 0
    assert third.destination_read_bytes > 0

    with image.open("r+b") as file:
        file.seek(100)
        file.write(b"written by somebody else")
    fourth = _mirror(place, folder, "4")
    assert fourth.fell_back
    assert fourth.changed_bytes == 64 * KIB
    assert _same(path, driver, image)


@pytest.mark.parametrize("size", [SIZE + 70_000 * 512, 13 * MIB + 512])
def test_a_resized_disk_is_followed(tmp_path: Path, size: int) -> None:
    path = _image(tmp_path, "raw")
    place = file_place(str(path), "raw")
    folder = tmp_path / "guest"
    _mirror(place, folder, "1")
    os.truncate(path, size)
    result = _mirror(place, folder, "2")
    assert result.fell_back == ""
    assert (folder / "vda.img").read_bytes() == path.read_bytes()


def test_progress_is_reported_up_to_its_end(tmp_path: Path) -> None:
    place = file_place(str(_image(tmp_path, "raw")), "raw")
    mirror = MirrorFolder(LocalPlace(tmp_path / "guest"), clock=CLOCK)
    seen: list[CopyProgress] = []
    with mirror.lock("test"), open_reader(place, clock=CLOCK) as reader:
        update = mirror.begin("guest", "uuid")
        result = update.copy_disk("vda", reader, source="", report=seen.append)
        update.abandon()
    assert seen[-1].done_bytes == seen[-1].total_bytes == result.data_bytes
    assert mirror.inspect().state is FolderState.EMPTY


def test_extents_of_a_chain_are_those_the_guest_sees(tmp_path: Path) -> None:
    base = _image(tmp_path, "raw")
    top = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True)
    _qemu_io(top, "qcow2", "write -z 0 512k", "write -P 5 2M 64k")
    with open_reader(file_place(str(top), "qcow2"), clock=CLOCK) as reader:
        extents = list(reader.extents())
        assert sum(extent.length_bytes for extent in extents) == SIZE
        data = [(extent.offset_bytes, extent.end_bytes) for extent in extents if extent.kind is Kind.DATA]
        assert data == [
            (512 * KIB, MIB), (2 * MIB, 2 * MIB + 64 * KIB), (9000 * KIB, 9700 * KIB),
            (SIZE - 4 * KIB, SIZE)]
        part = list(reader.extents(600 * KIB, 100 * KIB))
        assert part == [Extent(600 * KIB, 100 * KIB, Kind.DATA)]


def test_an_nbd_disk_is_read_through_its_server(tmp_path: Path) -> None:
    path = _image(tmp_path, "raw")
    socket = tmp_path / "s"
    server = subprocess.Popen(["qemu-nbd", "-t", "-x", "a b", "-k", socket, "-f", "raw", path])
    try:
        while not socket.exists():
            CLOCK.pause(0.01)
        place = nbd_place("raw", socket=str(socket), export="a b")
        _mirror(place, tmp_path / "guest", "1")
        assert (tmp_path / "guest" / "vda.img").read_bytes() == path.read_bytes()
    finally:
        server.terminate()
        server.wait()


def test_a_raw_image_that_somebody_writes_to_is_not_read(tmp_path: Path) -> None:
    path = _image(tmp_path, "raw")
    # What a running QEMU holds: the byte that stands for "I write" (QEMU's block/file-posix.c).
    fd = os.open(path, os.O_RDWR)
    held = lock_bytes(101)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, held)
    try:
        with pytest.raises(CopyFailed, match="lock"), open_reader(file_place(str(path), "raw"), clock=CLOCK):
            pass
    finally:
        os.close(fd)


def lock_bytes(start: int) -> bytes:
    import struct

    return struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, start, 1, 0)


def test_a_server_that_dies_is_a_failed_copy(tmp_path: Path) -> None:
    path = _image(tmp_path, "raw")
    socket = tmp_path / "s"
    server = subprocess.Popen(["qemu-nbd", "-t", "-e", "4", "-k", socket, "-f", "raw", path])
    while not socket.exists():
        CLOCK.pause(0.01)
    with open_reader(nbd_place("raw", socket=str(socket)), clock=CLOCK) as reader, reader.connect() as link:
        server.kill()
        server.wait()
        buffer = memoryview(bytearray(64 * KIB))
        with pytest.raises(CopyFailed, match="reading 65536 bytes at 1048576"):
            link.pread_into(buffer, MIB)


@pytest.mark.parametrize("flock_works", [True, False])
def test_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock_works: bool) -> None:
    if not flock_works:
        monkeypatch.setattr(lock, "_flocked", lambda _fd, _folder: False)
    folder = MirrorFolder(LocalPlace(tmp_path / "guest"), clock=CLOCK)
    with folder.lock("mirror of guest"), pytest.raises(DestinationBusy, match="mirror of guest, process"), \
            MirrorFolder(LocalPlace(tmp_path / "guest"), clock=CLOCK).lock("other"):
        pass
    with folder.lock("again"):
        assert folder.inspect().state is FolderState.EMPTY


def test_a_lock_file_of_a_dead_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_flocked", lambda _fd, _folder: False)
    held = tmp_path / "guest" / ".stillframe.lock.held"
    folder = MirrorFolder(LocalPlace(tmp_path / "guest"), clock=CLOCK)
    with folder.lock("first"):
        text = held.read_text()
    held.write_text(text.replace("started ", "started long ago "))
    with folder.lock("second"):
        assert "second" in held.read_text()
    held.write_text(text.replace("host ", "host another-"))
    with pytest.raises(DestinationBusy, match=r"another-"), folder.lock("third"):
        pass


def test_a_destination_that_is_not_there_or_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DestinationUnwritable), \
            MirrorFolder(LocalPlace(tmp_path / "a" / "b"), clock=CLOCK).lock("x"):
        pass
    assert os.listdir(tmp_path) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DestinationForeign, match="notes"), \
            MirrorFolder(LocalPlace(tmp_path), clock=CLOCK).lock("x"):
        pass
    assert os.listdir(tmp_path) == ["notes.txt"]
