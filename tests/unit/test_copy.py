"""Copies of snapshots in another repository, with another key and other sizes of everything."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest

from stillframe.errors import Interrupted, SlotDamaged, StillframeError
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.copy import Copied, Copier, missing
from stillframe.repository.hints import ChunkHints
from stillframe.repository.layout import SnapshotName
from stillframe.repository.opened import Repository
from stillframe.repository.snapshots import read_snapshot as read_entry
from tests.unit.repository_disks import SMALL, small_repository
from tests.unit.repository_snapshots import World, read_snapshot

_DISK_BYTES = 640 * 1024
OTHER_SIZES = msgspec.structs.replace(SMALL, chunk_bytes=SMALL.chunk_bytes * 4, slot_chunks=2)


def copy_all(world: World, target: Repository) -> list[Copied]:
    with contextlib.closing(ChunkHints(target.parameters.id)) as hints:
        copier = Copier(world.repository, target, hints, world.clock, "here")
        left = missing(list_snapshots(world.repository.storage), list_snapshots(target.storage))
        return [copier.copy(name) for name in left]


def check(world: World, target: Repository) -> None:
    """Every snapshot of the world is in the target, and reads back equal."""
    copies = {(name.host, name.guest, name.utc): name for name in list_snapshots(target.storage)}
    assert len(copies) == len(world.expected)
    for name, content in world.expected.items():
        copy = copies[name.host, name.guest, name.utc]
        assert copy.sid != name.sid
        assert read_entry(target, copy).origin == name.sid
        assert read_snapshot(target, copy) == content


def chain(world: World, links: int = 4) -> list[SnapshotName]:
    chance = random.Random(7)
    content = bytearray(chance.randbytes(_DISK_BYTES))
    made = [world.backup(bytes(content))]
    for _ in range(links - 1):
        at = chance.randrange(0, _DISK_BYTES - 9000)
        content[at : at + 5000] = chance.randbytes(5000)
        hole = chance.randrange(0, _DISK_BYTES - 90_000)
        content[hole : hole + 80_000] = bytes(80_000)
        made.append(world.backup(bytes(content)))
    return made


@pytest.mark.parametrize("parameters", [SMALL, OTHER_SIZES], ids=["the same sizes", "other sizes"])
def test_copies_are_equal_and_later_ones_move_only_what_differs(parameters: object) -> None:
    world = World()
    chain(world)
    target = small_repository(parameters=parameters)  # type: ignore[arg-type]
    first, *later = copy_all(world, target)
    check(world, target)
    assert first.read_bytes >= _DISK_BYTES
    assert all(each.read_bytes < _DISK_BYTES / 2 for each in later)
    assert copy_all(world, target) == []
    world.backup(b"new" * 40_000, guest="db")
    (only,) = copy_all(world, target)
    assert only.name.guest == "db"
    check(world, target)


def test_a_link_that_was_forgotten_in_the_source_is_read_whole() -> None:
    world, target = World(), small_repository()
    links = chain(world, 2)
    copy_all(world, target)
    content = world.expected[links[-1]]
    world.backup(content[:1000] + b"x" * 1000 + content[2000:])
    forgotten = {name: world.expected[name] for name in links}
    world.forget(*links)
    world.prune()
    (copied,) = copy_all(world, target)
    assert copied.read_bytes > _DISK_BYTES / 2
    world.expected |= forgotten  # the target has them still
    check(world, target)


def test_what_is_damaged_in_the_source_makes_no_snapshot_and_the_next_is_copied() -> None:
    world, target = World(), small_repository()
    world.backup(random.Random(1).randbytes(_DISK_BYTES))
    pack = world.data_packs()[0]
    world.flip(pack.key, 5000)
    with pytest.raises(SlotDamaged):
        copy_all(world, target)
    assert list_snapshots(target.storage) == []
    world.flip(pack.key, 5000)
    copy_all(world, target)
    check(world, target)


def test_one_that_is_stopped_leaves_nothing_and_is_repeated() -> None:
    world, target = World(), small_repository()
    (name,) = chain(world, 1)
    calls = 0

    def stop() -> StillframeError | None:
        nonlocal calls
        calls += 1
        return Interrupted("enough") if calls > 2 else None

    with pytest.raises(Interrupted), contextlib.closing(ChunkHints(target.parameters.id)) as hints:
        Copier(world.repository, target, hints, world.clock, "here").copy(name, stop=stop)
    assert list_snapshots(target.storage) == []
    copy_all(world, target)
    check(world, target)


def test_a_copy_of_a_copy_names_the_first() -> None:
    world, target, third = World(), small_repository(), small_repository()
    (name,) = chain(world, 1)
    copy_all(world, target)
    (copy,) = list_snapshots(target.storage)
    with contextlib.closing(ChunkHints(third.parameters.id)) as hints:
        again = Copier(target, third, hints, world.clock, "here").copy(copy)
    assert read_entry(third, again.name).origin == name.sid
    assert read_snapshot(third, again.name) == world.expected[name]
