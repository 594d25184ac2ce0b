"""Restoring into qcow2 images and block devices, and what QEMU and the kernel hold against it."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.block.image import file_place
from stillframe.block.reader import open_reader
from stillframe.clock import SystemClock
from stillframe.errors import Interrupted, TargetExists, TargetInUse, TargetSmall
from stillframe.extent import Kind
from stillframe.restore.target import Wishes
from stillframe.units import MIB
from tests.unit.repository_disks import CHUNK, SourceDisk, noise
from tests.unit.test_restore_target import Shelf


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(SourceDisk(noise(2048 * CHUNK), [(200 * CHUNK, 1000 * CHUNK, Kind.HOLE)]))


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def content(image: Path, size: int) -> bytes:
    raw = image.with_name("compare.raw")
    run("qemu-img", "convert", "-O", "raw", image, raw)
    found = raw.read_bytes()
    raw.unlink()
    assert len(found) >= size
    return found[:size]


@contextlib.contextmanager
def qemu_has(image: Path, image_format: str) -> Iterator[None]:
    """QEMU holds the image as a running guest does."""
    options = f"driver={image_format},node-name=disk,file.driver=file,file.filename={image}"
    process = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", options,
         "--nbd-server", f"addr.type=unix,addr.path={image}.sock",
         "--export", "type=nbd,id=e,node-name=disk,writable=on,name=x",
         "--chardev", "stdio,id=c", "--monitor", "c"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.wait()
        Path(f"{image}.sock").unlink(missing_ok=True)


def test_a_new_qcow2_is_equal_and_keeps_its_holes(shelf: Shelf, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    restored = shelf.restore(Wishes(str(image)))
    assert content(image, restored.size_bytes) == shelf.disk.content
    assert image.stat().st_blocks * 512 < 1048 * CHUNK + MIB
    run("qemu-img", "check", image)
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_an_odd_size_is_rounded_up_to_sectors(tmp_path: Path) -> None:
    shelf = Shelf(SourceDisk(noise(100 * CHUNK + 100)))
    image = tmp_path / "disk"
    shelf.restore(Wishes(str(image), format="qcow2"))
    assert content(image, 100 * CHUNK + 100) == shelf.disk.content


def test_delta_on_a_qcow2(shelf: Shelf, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    shelf.restore(Wishes(str(image)))
    run("qemu-io", "-c", "write -P 7 1M 64k", "-c", "write -P 9 2M 1M", "-c", "discard 5M 1M", image)
    restored = shelf.restore(Wishes(str(image), delta=True))
    assert 0 < restored.written_bytes <= 2 * MIB
    assert content(image, restored.size_bytes) == shelf.disk.content
    assert shelf.restore(Wishes(str(image), delta=True)).written_bytes == 0


def test_stop_leaves_no_qcow2(shelf: Shelf, tmp_path: Path) -> None:
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        shelf.restore(Wishes(str(tmp_path / "disk.qcow2")),
                      stop=lambda: Interrupted("stopped") if next(asked) == 20 else None)
    assert os.listdir(tmp_path) == []


def test_qcow2_images_that_do_not_fit(shelf: Shelf, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-f", "qcow2", image, "1M")
    with pytest.raises(TargetSmall):
        shelf.restore(Wishes(str(image), delta=True))
    run("qemu-img", "create", "-f", "qcow2", image, "1G")
    with pytest.raises(TargetExists, match="larger"):
        shelf.restore(Wishes(str(image), delta=True))
    base = tmp_path / "base.qcow2"
    run("qemu-img", "create", "-f", "qcow2", base, "8M")
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    with pytest.raises(TargetExists, match="another image"):
        shelf.restore(Wishes(str(image), delta=True))
    image.write_bytes(bytes(2048 * CHUNK))
    with pytest.raises(TargetExists, match="no qcow2"):
        shelf.restore(Wishes(str(image), delta=True))
    shelf.restore(Wishes(str(image), force=True))
    assert content(image, 2048 * CHUNK) == shelf.disk.content


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("wishes", [{"delta": True}, {"force": True}])
def test_an_image_that_qemu_has_open_is_refused(
    shelf: Shelf, tmp_path: Path, image_format: str, wishes: dict[str, bool]
) -> None:
    image = tmp_path / f"disk.{image_format}"
    run("qemu-img", "create", "-f", image_format, image, str(2048 * CHUNK))
    before = image.read_bytes()
    with qemu_has(image, image_format), pytest.raises(TargetInUse):
        shelf.restore(Wishes(str(image), **wishes))  # type: ignore[arg-type]
    assert image.read_bytes() == before
    shelf.restore(Wishes(str(image), **wishes))  # type: ignore[arg-type]


def test_qemu_is_refused_what_is_being_restored(shelf: Shelf, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(2048 * CHUNK))
    tries: list[int] = []

    def look(_: object) -> None:
        if len(tries) < 2:
            attempt = (["-c", "write 0 512"], ["-r", "-c", "read 0 512"])[len(tries)]
            command = ["qemu-io", "-f", "raw", *attempt, str(image)]
            tries.append(subprocess.run(command, capture_output=True, check=False).returncode)

    shelf.restore(Wishes(str(image), delta=True), report=look)
    assert tries == [1, 1]


# --- block devices ------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    backing = tmp_path / "device"
    backing.write_bytes(noise(2048 * CHUNK, 5))
    loop = Path(run("losetup", "--find", "--show", backing).strip())
    try:
        yield loop
    finally:
        subprocess.run(["umount", str(loop)], capture_output=True, check=False)
        run("losetup", "--detach", loop)


def test_a_block_device_is_overwritten_on_demand_only(shelf: Shelf, device: Path) -> None:
    with pytest.raises(TargetExists):
        shelf.restore(Wishes(str(device)))
    restored = shelf.restore(Wishes(str(device), force=True))
    assert device.read_bytes() == shelf.disk.content
    assert restored.written_bytes == 1048 * CHUNK
    assert shelf.restore(Wishes(str(device), delta=True)).written_bytes == 0


def test_stop_says_that_the_device_is_incomplete(shelf: Shelf, device: Path) -> None:
    asked = iter(range(1000))
    with pytest.raises(Interrupted, match="incomplete"):
        shelf.restore(Wishes(str(device), force=True),
                      stop=lambda: Interrupted("stopped") if next(asked) == 20 else None)


def test_a_smaller_device_is_refused(device: Path) -> None:
    large = Shelf(SourceDisk(noise(2049 * CHUNK)))
    with pytest.raises(TargetSmall):
        large.restore(Wishes(str(device), force=True))
    assert device.read_bytes() == noise(2048 * CHUNK, 5)


def test_a_mounted_device_is_refused(shelf: Shelf, device: Path, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", "-F", device)
    folder = tmp_path / "mounted"
    folder.mkdir()
    run("mount", device, folder)
    with pytest.raises(TargetInUse, match=str(folder)):
        shelf.restore(Wishes(str(device), force=True))


def test_a_device_never_becomes_a_qcow2_file(shelf: Shelf, device: Path, tmp_path: Path) -> None:
    node = tmp_path / "volume.qcow2"
    os.mknod(node, 0o600 | stat.S_IFBLK, device.stat().st_rdev)
    for wishes in (Wishes(str(node), force=True), Wishes(str(device), "qcow2", delta=True)):
        with pytest.raises(TargetExists, match="raw"):
            shelf.restore(wishes)
    assert node.is_block_device()
    assert device.read_bytes() == noise(2048 * CHUNK, 5)


def test_a_device_that_is_open_through_another_node_is_refused(
    shelf: Shelf, device: Path, tmp_path: Path
) -> None:
    # As under libvirt: QEMU has a /dev of its own, and its locks lie on the nodes there.
    script = ('mount -t tmpfs -o dev tmpfs "$1" && mknod "$1/volume" b "$2" "$3" && mount --move "$1" /dev '
              '&& exec 3<>/dev/volume && echo open && read -r _')
    number = device.stat().st_rdev
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path),
               str(os.major(number)), str(os.minor(number))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(TargetInUse, match=str(holder.pid)):
            shelf.restore(Wishes(str(device), force=True))
        holder.stdin.close()
    shelf.restore(Wishes(str(device), force=True))


def test_a_device_that_a_reader_of_ours_has_open_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(2048 * CHUNK))
    with open_reader(file_place(str(image), "raw"), clock=SystemClock()), pytest.raises(TargetInUse):
        shelf.restore(Wishes(str(image), delta=True))
