"""Comparing an image with a disk of a snapshot: exactly the chunks that differ are named, and how they do."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from stillframe.extent import Extent, Kind
from stillframe.repository.manifest import DiskEntry, Root
from stillframe.repository.places import Places
from stillframe.restore.compare import Comparison, Stretch
from stillframe.storage.memory import MemoryStorage
from tests.unit.repository_disks import CHUNK, Book, SourceDisk, noise

SIZE = 700 * CHUNK + 1024
_HOLE = (130 * CHUNK, 300 * CHUNK)


class Shelf:
    """A repository with one disk, and images to compare with it."""

    def __init__(self) -> None:
        self.storage = MemoryStorage()
        self.book = Book(self.storage)
        self.disk = SourceDisk(noise(SIZE), [(*_HOLE, Kind.HOLE)])
        written = self.book.backup(self.disk)
        self.entry = DiskEntry(
            size_bytes=SIZE, root=Root.of(written.root), target="vda", format="raw", source="",
            method="offline", read_bytes=0, data_bytes=0, changed_bytes=0, stored_bytes=0)

    def compare(
        self, image: bytes | bytearray, from_bytes: int = 0, only: Sequence[Extent] | None = None,
        holes: Sequence[tuple[int, int, Kind]] = (),
    ) -> list[Stretch]:
        source = SourceDisk(bytes(image), list(holes))
        self.last = Comparison(
            Places(self.book.repository), self.entry, source, lambda: None, lambda _done: None)
        return list(self.last.run(from_bytes, only).stretches())


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf()


def named(stretches: Sequence[Stretch]) -> dict[int, bool]:
    """Return the chunks that are named, and whether each is to be zero."""
    return {
        chunk: each.is_zero for each in stretches
        for chunk in range(each.offset_bytes // CHUNK, -(-(each.offset_bytes + each.length_bytes) // CHUNK))}


def expected(disk: bytes | bytearray, image: bytes | bytearray) -> dict[int, bool]:
    found = {}
    for at in range(0, len(disk), CHUNK):
        one, other = disk[at : at + CHUNK], image[at : at + CHUNK].ljust(min(CHUNK, len(disk) - at), b"\0")
        if one != other:
            found[at // CHUNK] = not any(one)
    return found


def test_equal_images_differ_nowhere(shelf: Shelf) -> None:
    assert shelf.compare(shelf.disk.content) == []
    assert shelf.last.read_bytes == SIZE
    assert shelf.compare(shelf.disk.content, holes=[(*_HOLE, Kind.HOLE)]) == []
    assert shelf.last.read_bytes == SIZE - _HOLE[1]


@pytest.mark.parametrize("seed", range(6))
def test_exactly_what_differs_is_named(shelf: Shelf, seed: int) -> None:
    chance = random.Random(seed)
    image = bytearray(shelf.disk.content)
    for _ in range(chance.randrange(1, 60)):
        at, length = chance.randrange(SIZE), chance.choice([1, 512, CHUNK, 3 * CHUNK])
        length = min(length, SIZE - at)
        image[at : at + length] = bytes(length) if chance.random() < 0.5 else chance.randbytes(length)
    found = shelf.compare(bytes(image))
    assert named(found) == expected(shelf.disk.content, bytes(image))
    assert all(each.offset_bytes + each.length_bytes <= SIZE for each in found)
    # From somewhere on: what is before the edge of a leaf is left alone.
    begin = 200 * CHUNK
    leaf = shelf.book.repository.parameters.leaf_chunks
    later = {chunk: zero for chunk, zero in named(found).items() if chunk >= 200 // leaf * leaf}
    assert named(shelf.compare(bytes(image), begin)) == later


def test_images_of_other_sizes(shelf: Shelf) -> None:
    for image in (shelf.disk.content[: 300 * CHUNK], b"", shelf.disk.content[: 500 * CHUNK + 512]):
        assert named(shelf.compare(image)) == expected(shelf.disk.content, image)
    longer = shelf.disk.content[: 700 * CHUNK].ljust(SIZE, b"\1") + noise(CHUNK, 3)
    assert named(shelf.compare(longer)) == {700: False}


@pytest.mark.parametrize("seed", range(6))
def test_only_the_extents_that_are_given_are_looked_at(shelf: Shelf, seed: int) -> None:
    chance = random.Random(seed)
    image = bytearray(shelf.disk.content)
    only = list[Extent]()
    for _ in range(12):
        at, length = chance.randrange(SIZE - 4 * CHUNK), chance.randrange(1, 3 * CHUNK)
        is_zero = chance.random() < 0.5
        image[at : at + length] = bytes(length) if is_zero else chance.randbytes(length)
        only.append(Extent(at, length, Kind.DATA))
    zero = Extent(600 * CHUNK + 100, 20 * CHUNK, Kind.HOLE)
    image[zero.offset_bytes : zero.end_bytes] = bytes(zero.length_bytes)
    chance.shuffle(only)
    found = shelf.compare(bytes(image), only=[*only, zero])
    assert named(found) == expected(shelf.disk.content, bytes(image))
    read = shelf.last.read_bytes
    assert read < 60 * CHUNK
    # What is zero by what was said is not read, but for the edges.
    assert named(shelf.compare(bytes(image), only=[zero])).keys() >= {601, 610, 619}
    assert shelf.last.read_bytes <= 2 * CHUNK
    assert shelf.compare(bytes(image), only=[]) == []


def test_a_tree_that_is_hurt_is_told_and_its_chunks_are_lost() -> None:
    shelf = Shelf()
    key = next(listed.key for listed in shelf.storage.list("main/t/"))
    content = bytearray(shelf.storage.get(key))
    content[len(content) // 3] ^= 1
    shelf.storage.replace(key, content)
    found = shelf.compare(shelf.disk.content)
    assert shelf.last.damage is not None
    assert found
    assert all(each.is_lost for each in found)
