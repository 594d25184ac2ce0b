"""Writing past the page cache: the same bytes, aligned or not, and where a file system has no such thing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.direct import ALIGNED_BYTES, aligned_buffer, open_direct, write_new
from stillframe.restore.bulk import BulkWriter
from stillframe.units import KIB, MIB


@pytest.fixture(params=["disk", "memory"])
def fd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """Give an empty file, on a file system with direct writing and on one that may have none (tmpfs)."""
    folder = tmp_path if request.param == "disk" else Path("/dev/shm")
    with tempfile.TemporaryFile(dir=folder) as file:
        yield file.fileno()


@pytest.mark.parametrize("length", [1, MIB - 1, MIB, 3 * MIB + ALIGNED_BYTES, 3 * MIB + 4097])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_new_file_has_all_its_bytes(fd: int, length: int, shift: int) -> None:
    content = random.Random(length).randbytes(length)
    buffer = aligned_buffer(length + shift)
    buffer[shift:] = content
    with memoryview(buffer) as whole, whole[shift:] as view:
        write_new(fd, view)
    assert os.pread(fd, length + 1, 0) == content


def test_a_file_on_a_disk_is_written_directly(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        direct = open_direct(file.fileno())
        assert direct is not None, "this machine's file system has direct writing"
        os.close(direct)


def test_pieces_come_where_they_belong(fd: int) -> None:
    chance = random.Random(7)
    model = bytearray(32 * MIB + 513)
    os.ftruncate(fd, len(model))
    writer = BulkWriter(fd)
    try:
        at = 0
        while at < len(model):
            length = min(chance.choice([64 * KIB, 128 * KIB, MIB, 5 * MIB]), len(model) - at)
            if chance.random() < 0.6 or at + length == len(model):
                content = chance.randbytes(length)
                model[at : at + length] = content
                writer.write(memoryview(content), at)
            at += length
        writer.finish()
    finally:
        writer.close()
    assert os.pread(fd, len(model) + 1, 0) == model


def test_what_goes_wrong_on_the_way_is_raised() -> None:
    with Path("/dev/full").open("r+b") as file:
        writer = BulkWriter(file.fileno())
        writer.write(memoryview(bytes(MIB)), 0)
        with pytest.raises(OSError, match="No space left"):
            writer.finish()
        writer.close()


def test_memory_that_grows_can_be_used_to_its_end() -> None:
    # In a process of its own: memory that is not really there would end it by a signal.
    code = ("from stillframe.direct import aligned_buffer\n"
            "buffer = aligned_buffer(4096)\n"
            "buffer[:4] = b'kept'\n"
            "buffer.resize(1 << 20)\n"
            "buffer[-3:] = b'end'\n"
            "assert buffer[:4] == b'kept' and buffer[-3:] == b'end'\n")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
