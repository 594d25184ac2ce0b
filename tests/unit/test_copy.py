"""Copies of snapshots in another repository: with another key, sealed anew; with the same, as stored."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest

from stillframe.errors import Interrupted, SlotDamaged, StillframeError, StorageLost, StorageRefused
from stillframe.repository import collect as collect_module
from stillframe.repository import move
from stillframe.repository.catalog import forget, list_snapshots, plan_forget
from stillframe.repository.collect import collect, list_packs
from stillframe.repository.copy import Copied, Copier, copy_drill, missing, missing_drills
from stillframe.repository.crypto import DomainKey
from stillframe.repository.drills import Drill, list_drills, read_drill, record_drill
from stillframe.repository.hints import ChunkHints
from stillframe.repository.layout import GENERATIONS, PackName, SnapshotName
from stillframe.repository.opened import Repository, init_with_keys_of
from stillframe.repository.pack import read_footer
from stillframe.repository.session import open_session
from stillframe.repository.slots import SlotCodec
from stillframe.repository.snapshots import read_snapshot as read_entry
from stillframe.repository.verify import Level, verify
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.model import Content, Storage
from stillframe.storage.wrappers import Wrapper
from tests.model.baton import Crash
from tests.unit.repository_disks import SMALL, SourceDisk, small_repository
from tests.unit.repository_snapshots import DAY_S, World, make_snapshot, read_snapshot, rubbish
from tests.unit.test_drills import DRILL
from tests.unit.test_drills import T0 as DRILLED

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


# With the same key and sizes


@contextlib.contextmanager
def nothing_is_opened() -> Iterator[None]:
    """Within the block no chunk may be opened, sealed or given an ID, and no node sealed."""
    def refuse(*_: object) -> None:
        raise AssertionError("a slot is opened or sealed")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open_chunks", "chunks_content", "node_content"):
            patch.setattr(SlotCodec, name, refuse)
        for name in ("chunk_id", "seal_slot", "seal_slot_into", "open_slot_into"):
            patch.setattr(DomainKey, name, refuse)
        yield


def beside(world: World, storage: Storage | None = None) -> Repository:
    return init_with_keys_of(world.repository, storage or MemoryStorage(), world.clock)


def check_whole(world: World, target: Repository) -> None:
    """All is equal; all is sound, by every hash and by opening it; and no prune takes any of it."""
    check(world, target)
    assert verify(target, world.clock, Level.FULL).is_sound
    collect(target, "there", world.clock, fence_after_s=DAY_S, max_unused=0.0, compact_below=0.9)
    check(world, target)
    assert rubbish(target) == set()


def test_with_the_same_key_slots_move_as_they_are_stored() -> None:
    world = World()
    links = chain(world)
    target = beside(world)
    with nothing_is_opened():
        first, *later = copy_all(world, target)
        assert copy_all(world, target) == []
    check_whole(world, target)
    assert all(each.moved for each in (first, *later))
    assert all(0 < each.stored_bytes < first.stored_bytes / 2 for each in later)
    stored = {digest for pack in list_packs(world.repository.storage) for digest in digests(world, pack)}
    copies = [digest for pack in list_packs(target.storage) for digest in digests(world, pack, target)]
    assert set(copies) == stored
    assert len(copies) == len(stored), "nothing is there twice"
    # It stands on its own.
    expected = dict(world.expected)
    world.forget(*links)
    world.prune()
    world.expected = expected
    check_whole(world, target)


def digests(world: World, pack: PackName, repository: Repository | None = None) -> list[bytes]:
    storage = (repository or world.repository).storage
    return [row.digest for row in read_footer(storage, pack, storage.stat(pack.key).size_bytes)]


def test_what_was_compacted_moves_from_where_it_is() -> None:
    world = World()
    links = chain(world, 5)
    world.forget(*links[:3])
    assert world.prune(0.0, 0.9).copied_bytes
    target = beside(world)
    with nothing_is_opened():
        copy_all(world, target)
    check_whole(world, target)


@pytest.mark.parametrize("killed", [False, True])
def test_a_move_that_was_cut_goes_on_where_it_was(killed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that failed, all that was brought is kept; of a killed one, what was adopted."""
    world = World()
    chain(world, 1)
    monkeypatch.setattr(move, "_ADOPT_BYTES", 100_000)
    memory = MemoryStorage()
    target = beside(world, memory)
    before = memory.contents().keys()
    packs = 0

    def cut(verb: str, key: str) -> None:
        nonlocal packs
        packs += verb == "create" and key.startswith("main/p/")
        if packs > 4 and (killed or verb == "create"):
            raise Crash if killed else StorageLost("cut")

    memory.before = cut
    with pytest.raises(Crash if killed else StorageLost):
        copy_all(world, target)
    memory.before = None
    brought = sum(map(len, (content for key, content in memory.contents().items()
                            if key not in before and key.startswith("main/p/"))))
    assert list_snapshots(memory) == []
    with nothing_is_opened():
        (copied,) = copy_all(world, target)
    assert copied.stored_bytes < _DISK_BYTES - brought / 2
    check(world, target)
    # A killed one has left its session, too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_module, "is_dead", lambda *_: True)
        check_whole(world, target)


def test_what_was_forgotten_and_pruned_can_be_brought_again() -> None:
    """A pack's slots come a second time, in a pack of another name."""
    world, target = World(), small_repository()
    chain(world, 2)
    target = beside(world)
    copy_all(world, target)
    forget(target.storage, plan_forget(list_snapshots(target.storage)))
    collect(target, "there", world.clock, fence_after_s=DAY_S)
    assert list_packs(target.storage) == {}
    with nothing_is_opened():
        assert len(copy_all(world, target)) == 2
    check_whole(world, target)


def test_what_a_prune_condemned_is_brought_again_and_not_referred_to() -> None:
    world = World()
    chain(world, 1)
    target = beside(world)
    copy_all(world, target)
    forget(target.storage, plan_forget(list_snapshots(target.storage)))
    with open_session(target.storage, target.key, world.clock, "reader", lambda _: ""):
        collect(target, "there", world.clock, fence_after_s=DAY_S)
        assert list_packs(target.storage), "the session keeps them"
        (copied,) = copy_all(world, target)
    assert copied.stored_bytes >= _DISK_BYTES
    check_whole(world, target)


def test_a_backup_builds_upon_a_moved_copy() -> None:
    world = World()
    (name,) = chain(world, 1)
    target = beside(world)
    copy_all(world, target)
    content = bytearray(world.expected[name])
    content[5000:6000] = bytes(1000)
    later = SnapshotName(name.host, name.guest, World.moment(90), "")
    made = make_snapshot(target, SourceDisk(bytes(content)), later, world.clock)
    manifest = read_entry(target, made)
    assert manifest.stored_bytes < _DISK_BYTES / 4
    collect(target, "there", world.clock, fence_after_s=DAY_S, max_unused=0.0, compact_below=0.9)
    assert read_snapshot(target, made) == content


def test_what_the_first_lost_comes_back_from_its_copy() -> None:
    world = World()
    (name,) = chain(world, 1)
    target = beside(world)
    copy_all(world, target)
    world.repository.storage.delete([world.data_packs()[0].key])
    with pytest.raises((SlotDamaged, KeyError)):
        read_snapshot(world.repository, name)
    (copy,) = list_snapshots(target.storage)
    with nothing_is_opened(), contextlib.closing(ChunkHints(world.repository.parameters.id)) as hints:
        back = Copier(target, world.repository, hints, world.clock, "here").copy(copy)
    assert 0 < back.stored_bytes < _DISK_BYTES / 2
    assert read_snapshot(world.repository, back.name) == world.expected[name]
    assert read_snapshot(world.repository, name) == world.expected[name], "the slots are the same"


def test_what_is_damaged_does_not_move() -> None:
    """If it was healed it is opened; if it is lost, nothing comes to be."""
    world = World()
    (name,) = chain(world, 1)
    pack = world.data_packs()[0]
    world.flip(pack.key, 5000)
    target = beside(world)
    with pytest.raises(SlotDamaged):
        copy_all(world, target)
    assert list_snapshots(target.storage) == []
    verify(world.repository, world.clock, Level.STORED)
    world.backup(world.expected[name])  # stores what is bad anew
    copied = copy_all(world, target)
    assert [each.moved for each in copied] == [False, True]
    check_whole(world, target)


def test_other_sizes_are_sealed_anew() -> None:
    world = World()
    chain(world, 1)
    first = beside(world)
    other = msgspec.structs.replace(first.parameters, leaf_chunks=first.parameters.leaf_chunks * 2)
    target = replace(first, parameters=other, codec=SlotCodec(first.key, other))
    (copied,) = copy_all(world, target)
    assert not copied.moved
    check(world, target)


class NoGenerations(Wrapper):
    """A storage that lets us add all but generations, as accounts of a host that may only add do."""

    def create(self, key: str, content: Content) -> None:
        if key.startswith(GENERATIONS):
            raise StorageRefused("You may not.", "ask the admin")
        self._inner.create(key, content)


def test_who_may_not_write_generations_seals_anew() -> None:
    world = World()
    chain(world)
    target = beside(world, NoGenerations(MemoryStorage()))
    assert [each.moved for each in copy_all(world, target)] == [False] * 4
    check(world, target)


def test_drills_come_along() -> None:
    world = World()
    drilled, other = chain(world, 2)
    target = small_repository()
    copy_all(world, target)
    record_drill(world.repository, DRILLED, replace_drill(drilled))
    record_drill(world.repository, DRILLED, replace_drill(SnapshotName("h", "gone", DRILLED, "ab" * 16)))
    here, there = world.repository.storage, target.storage
    assert missing_drills(here, there, "another") == []
    ((name, sid),) = missing_drills(here, there, None)
    copy_drill(world.repository, target, name, sid)
    assert missing_drills(here, there, None) == []
    (found,) = list_drills(target.storage)
    copies = {read_entry(target, name).origin: name.sid for name in list_snapshots(target.storage)}
    assert (found.sid, found.utc, found.passed) == (copies[drilled.sid], DRILLED, False)
    assert read_drill(target.storage, found, target.key).reason == DRILL.reason
    assert other.sid in copies


def replace_drill(name: SnapshotName) -> Drill:
    return msgspec.structs.replace(DRILL, sid=name.sid, host=name.host, guest=name.guest)
