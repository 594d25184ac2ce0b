"""The cache of what never changes: quick, bounded, and never anything but the storage's own bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.clock import SystemClock
from stillframe.errors import ObjectMissing, ObjectTruncated
from stillframe.storage.cache import Cached
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.wrappers import Counted
from stillframe.units import KIB
from tests.unit.repository_disks import noise

PACK, FIXED = "main/t/a", "main/m/b"


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = MemoryStorage()
        self.counted = Counted(self.server, SystemClock())

    def client(self, limit_bytes: int = 1 << 30) -> Cached:
        """As another run of the command has it."""
        return Cached(self.counted, self.folder, ("main/t/", "main/m/"), listed="main/t/",
                      limit_bytes=limit_bytes)

    def gets(self) -> int:
        counts = self.counted.counts()
        return counts["get"].calls if "get" in counts else 0

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "cache")


def test_what_this_host_stored_is_not_fetched(world: World) -> None:
    content = noise(300 * KIB)
    world.client().create(PACK, memoryview(content))
    later, chance = world.client(), random.Random(1)
    for _ in range(50):
        begin = chance.randrange(len(content))
        length = chance.randrange(1, len(content) - begin + 1)
        assert later.get(PACK, begin, length) == content[begin : begin + length]
    assert later.get(PACK) == content
    assert later.get(PACK, 7) == content[7:]
    assert world.gets() == 0


def test_the_fifth_part_fetches_the_whole(world: World) -> None:
    content = noise(200 * KIB)
    world.server.create(PACK, content)
    client = world.client()
    for number in range(20):
        assert client.get(PACK, number * KIB, KIB) == content[number * KIB :][:KIB]
    assert world.gets() == 5
    assert world.client().get(PACK) == content
    assert world.gets() == 5


def test_what_changes_is_not_kept(world: World) -> None:
    client = world.client()
    client.create("main/s/x", b"one")
    assert client.get("main/s/x") == b"one"
    world.server.replace("main/s/x", b"two")
    assert client.get("main/s/x") == b"two"
    assert world.files() == []


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _gone(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [_flip, _cut, _empty, _gone, _folder])
@pytest.mark.parametrize("key", [PACK, FIXED])
def test_a_damaged_entry_is_as_if_it_were_not_there(
    world: World, harm: Callable[[Path], None], key: str,
) -> None:
    content = noise(100 * KIB)
    world.client().create(key, content)
    (file,) = world.files()
    harm(file)
    assert world.client().get(key) == content
    assert world.gets() == 1


def test_an_entry_under_another_name_is_not_taken(world: World) -> None:
    """Not even one of the same size."""
    client = world.client()
    client.create("main/m/one", noise(5000, 1))
    (one,) = world.files()
    client.create("main/m/two", noise(5000, 2))
    (two,) = set(world.files()) - {one}
    two.write_bytes(one.read_bytes())
    assert client.get("main/m/two") == noise(5000, 2)


def test_a_pack_that_is_gone_or_cut_short_does_not_come_from_the_cache(world: World) -> None:
    content = noise(10 * KIB)
    world.client().create(PACK, content)
    world.server.replace(PACK, content[:-1])
    with pytest.raises(ObjectTruncated):
        world.client().get(PACK, 0, len(content))
    world.server.delete([PACK])
    with pytest.raises(ObjectMissing):
        world.client().get(PACK, 0, 10)


def test_what_is_deleted_here_is_dropped(world: World) -> None:
    client = world.client()
    client.create(PACK, b"pack")
    client.create(FIXED, b"fixed")
    assert client.get(PACK) == b"pack"
    client.delete([PACK, FIXED])
    assert world.files() == []
    for key in (PACK, FIXED):
        with pytest.raises(ObjectMissing):
            client.get(key)


def test_it_is_bounded_and_what_was_used_last_stays(world: World) -> None:
    limit = 100 * KIB
    for number in range(30):
        client = world.client(limit)
        client.create(f"main/t/{number}", noise(10 * KIB, number))
        assert client.get("main/t/0") == noise(10 * KIB, 0)
        assert sum(path.stat().st_size for path in world.files()) <= limit
    assert world.gets() == 0
    world.client(limit).create("main/t/large", noise(40 * KIB))
    assert len(world.files()) >= 7


def test_a_cache_that_can_not_be_written_changes_nothing(world: World) -> None:
    world.folder.write_bytes(b"a file where the folder should be")
    client = world.client()
    client.create(PACK, b"content")
    assert client.get(PACK, 1, 2) == b"on"
    assert client.get(PACK) == b"content"
    client.delete([PACK])
    with pytest.raises(ObjectMissing):
        client.get(PACK)
