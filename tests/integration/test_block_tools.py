"""qemu-img as stillframe uses it."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from stillframe.block.image import ImagePlace, file_place, nbd_place
from stillframe.block.reader import open_reader
from stillframe.block.tools import chain_info, commit_offline, compare, create_overlay, image_info
from stillframe.clock import SystemClock
from stillframe.errors import CopyFailed, OverlayTaken, ProgramFailed
from stillframe.units import MIB


def _base(folder: Path, driver: str = "raw") -> ImagePlace:
    path = folder / f"base.{driver}"
    subprocess.run(["qemu-img", "create", "-q", "-f", driver, path, "16M"], check=True)
    subprocess.run(["qemu-io", "-f", driver, "-c", "write -P 1 0 1M", path], check=True, capture_output=True)
    return file_place(str(path), driver)


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_an_overlay_is_made_compared_and_written_back(tmp_path: Path, driver: str) -> None:
    base = _base(tmp_path, driver)
    path = tmp_path / "over lay:1.qcow2"
    create_overlay(str(path), base, 16 * MIB)
    overlay = file_place(str(path), "qcow2")
    top, bottom = chain_info(overlay)
    assert (top.backing, top.backing_format, top.virtual_size_bytes) == (base.path, driver, 16 * MIB)
    assert bottom.driver == driver
    assert compare(base, overlay, timeout_s=30)
    command = ["qemu-io", "-c", "write -P 2 3M 1M", overlay.json_name()]
    subprocess.run(command, check=True, capture_output=True)
    assert not compare(base, overlay, timeout_s=30)
    commit_offline(str(path), base, timeout_s=30)
    assert compare(base, overlay, timeout_s=30)
    assert image_info(overlay).virtual_size_bytes == 16 * MIB


def test_a_taken_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "taken.qcow2"
    path.write_text("mine")
    with pytest.raises(OverlayTaken, match=r"taken\.qcow2"):
        create_overlay(str(path), _base(tmp_path), 16 * MIB)
    assert path.read_text() == "mine"


def test_a_failed_creation_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "o.qcow2"
    with pytest.raises(ProgramFailed):
        create_overlay(str(path), file_place("/base.raw", "no-such-format"), 16 * MIB)
    assert not path.exists()


def test_an_overlay_over_a_network_disk_needs_no_server(tmp_path: Path) -> None:
    path = tmp_path / "o.qcow2"
    base = nbd_place("raw", socket="/no such/socket", export="a/b")
    create_overlay(str(path), base, 16 * MIB)
    assert image_info(file_place(str(path), "qcow2")).backing == base.backing_text()


def test_an_overlay_is_only_written_back_into_its_own_base(tmp_path: Path) -> None:
    base = _base(tmp_path)
    path = tmp_path / "o.qcow2"
    create_overlay(str(path), base, 16 * MIB)
    with pytest.raises(CopyFailed, match="not on"):
        commit_offline(str(path), file_place(str(tmp_path / "other.raw"), "raw"), timeout_s=30)


def test_nothing_is_written_back_while_the_overlay_is_in_use(tmp_path: Path) -> None:
    base = _base(tmp_path)
    path = tmp_path / "o.qcow2"
    create_overlay(str(path), base, 16 * MIB)
    user = subprocess.Popen(["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert user.stdin is not None
    assert user.stdout is not None
    try:
        user.stdin.write(b"length\n")
        user.stdin.flush()
        user.stdout.readline()
        with pytest.raises(CopyFailed, match="lock"):
            commit_offline(str(path), base, timeout_s=30)
        with pytest.raises(CopyFailed, match="lock"):
            compare(base, file_place(str(path), "qcow2"), timeout_s=30)
    finally:
        user.communicate(b"quit\n")


def test_a_raw_image_is_read_from_its_file_to_the_end_of_its_last_sector(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(2 * MIB + 100)
    path = tmp_path / "odd.raw"
    path.write_bytes(content)
    place = file_place(str(path), "raw")
    with open_reader(place, clock=SystemClock()) as reader, reader.connect() as connection:
        assert reader.size_bytes == 2 * MIB + 512
        buffer = bytearray(b"\xff" * (MIB + 512))
        connection.pread_into(memoryview(buffer), MIB)
        assert buffer == content[MIB:] + bytes(412)
        # QEMU's server is alive, and holds the lock, but it is not asked for content.
        assert type(connection).__name__ == "_RawFile"


def test_a_raw_image_that_takes_another_ones_place_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"a" * MIB)
    with open_reader(file_place(str(path), "raw"), clock=SystemClock()) as reader:
        other = tmp_path / "other.raw"
        other.write_bytes(b"b" * MIB)
        other.rename(path)
        with reader.connect() as connection:
            buffer = bytearray(MIB)
            connection.pread_into(memoryview(buffer), 0)
            assert buffer == b"a" * MIB
