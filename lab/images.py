"""Whole images: comparing them, turning them into raw, and a model of what one must hold."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from pathlib import Path
from typing import BinaryIO

KIB = 1024
MIB = 1024 * KIB

_PROGRAM_TIMEOUT_S = 600.0
_STEP_BYTES = 4 * MIB
_INITIAL_RUN_BYTES = 4 * MIB
_INITIAL_EVERY_BYTES = 8 * MIB
_INITIAL_PIECE_BYTES = 64 * KIB


class ImagesDiffer(AssertionError):
    """Two images that must be equal are not."""


def run(*command: str | Path) -> str:
    """Run a program to its end and return its output; the error carries what it said."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          timeout=_PROGRAM_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def assert_equal_images(one: Path, other: Path) -> None:
    """Compare two raw images byte by byte. Raises ImagesDiffer with size or first differing offset."""
    sizes = one.stat().st_size, other.stat().st_size
    if sizes[0] != sizes[1]:
        raise ImagesDiffer(f"{one} has {sizes[0]} bytes, {other} has {sizes[1]}")
    with one.open("rb") as first, other.open("rb") as second:
        offset = 0
        # Where both have a hole both hold zeroes: of 100 GiB there may be little to read.
        while (offset := min(_data_at(first, offset), _data_at(second, offset))) < sizes[0]:
            first.seek(offset)
            second.seek(offset)
            left, right = first.read(_STEP_BYTES), second.read(_STEP_BYTES)
            if left != right:
                at = next(i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
                raise ImagesDiffer(f"{one} and {other} differ first at offset {offset + at} "
                                   f"(0x{offset + at:x}): {left[at]:#04x} and {right[at]:#04x}; "
                                   f"{_differing_blocks(one, other)}")
            offset += len(left)


def _data_at(file: BinaryIO, offset_bytes: int) -> int:
    """Return where the first data at or behind *offset_bytes* is; the file's end when only a hole follows."""
    try:
        return os.lseek(file.fileno(), offset_bytes, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return os.fstat(file.fileno()).st_size


def _differing_blocks(one: Path, other: Path) -> str:
    block_bytes = 4 * KIB
    count = 0
    with one.open("rb") as first, other.open("rb") as second:
        while left := first.read(_STEP_BYTES):
            right = second.read(_STEP_BYTES)
            if left != right:
                count += sum(left[i:i + block_bytes] != right[i:i + block_bytes]
                             for i in range(0, len(left), block_bytes))
    return f"{count} blocks of 4 KiB differ"


def to_raw(source: str | Path, image_format: str, raw: Path, *, shared: bool = False) -> Path:
    """Write the whole content of *source* (a path or an NBD address) to the file *raw*.

    *shared* reads it although a QEMU holds it for writing; the content may then be in motion.
    """
    force_share = ["-U"] if shared else []
    run("qemu-img", "convert", *force_share, "-f", image_format, "-O", "raw", source, raw)
    return raw


def make_initial(raw: Path, size_bytes: int, seed: str) -> None:
    """Make a raw image with random data, alike for the same seed, and with plenty of holes."""
    generator = random.Random(seed)
    with raw.open("wb") as file:
        file.truncate(size_bytes)
        file.write(generator.randbytes(min(_INITIAL_RUN_BYTES, size_bytes)))
        for offset in range(_INITIAL_EVERY_BYTES, size_bytes - _INITIAL_PIECE_BYTES, _INITIAL_EVERY_BYTES):
            file.seek(offset)
            file.write(generator.randbytes(_INITIAL_PIECE_BYTES))


class Model:
    """What a disk must hold: a sparse raw file to which every write is applied a second time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size_bytes(self) -> int:
        """Return the disk's size."""
        return self.path.stat().st_size

    def write(self, offset: int, data: bytes) -> None:
        """Put *data* at *offset*."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def zero(self, offset: int, length: int) -> None:
        """Put zeroes at *offset*."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            for start in range(0, length, _STEP_BYTES):
                file.write(bytes(min(_STEP_BYTES, length - start)))

    def resize(self, size_bytes: int) -> None:
        """Cut or extend (with zeroes) to *size_bytes*."""
        os.truncate(self.path, size_bytes)

    def copy_at_moment(self, to: Path | None = None) -> Path:
        """Keep the content of this moment in a file of its own and return its path."""
        copy = to or _unused(self.path)
        run("cp", "--sparse=always", "--reflink=auto", self.path, copy)
        return copy

    def assert_equal(self, raw: Path) -> None:
        """Compare with a raw image. Raises ImagesDiffer."""
        assert_equal_images(self.path, raw)


def _unused(path: Path) -> Path:
    number = 1
    while (candidate := path.with_suffix(f".moment-{number}.raw")).exists():
        number += 1
    return candidate
