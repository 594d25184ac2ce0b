"""A generation that somebody forged, who has the key and may create: the collector deletes nothing by it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillframe.errors import RepositoryDamaged
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.generation import (
    Generation,
    create_generation,
    encode_generation,
    latest_generation,
)
from stillframe.repository.layout import MAX_GENERATION, PackKind, PackName, generation_key
from stillframe.repository.mark import Marker
from stillframe.repository.opened import Repository, with_cache
from stillframe.repository.pack import PackBuilder, read_footer
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView
from stillframe.repository.snapshots import read_snapshot as read_entry
from tests.unit.repository_disks import whole
from tests.unit.repository_snapshots import World
from tests.unit.test_collect import changed, disk, plan
from tests.unit.test_copy import beside, check_whole, copy_all


def forge(world: World, **said: object) -> None:
    """Create the next generation, which says what *said* does and nothing else."""
    repository = world.repository
    number = latest_generation(repository.storage, repository.key).number + 1
    assert create_generation(repository.storage, Generation(number, **said), repository.key)  # type: ignore[arg-type]


def false_copy(world: World, pack: PackName, *, junk: bool, into: Repository | None = None) -> PackName:
    """Create a pack that claims to have all slots of *pack*: with other bytes, or none at all."""
    storage = world.repository.storage
    builder = PackBuilder(PackName(pack.kind, os.urandom(16), 0))
    for row in read_footer(storage, pack, world.packs()[pack]):
        if junk:
            builder.add_moved(row, os.urandom(row.stored_bytes))
    (into or world.repository).storage.create(builder.name.key, builder.finished())
    return builder.name


@pytest.mark.parametrize("kind", list(PackKind))
@pytest.mark.parametrize("junk", [True, False])
def test_slots_that_were_never_copied_are_not_deleted(kind: PackKind, junk: bool) -> None:
    world = World()
    world.backup(disk(60, 1))
    packs = [pack for pack in world.packs() if pack.kind == kind.value]
    copies = {pack: false_copy(world, pack, junk=junk) for pack in packs}
    forge(world, moved={pack: [(copy, (1 << 64) - 1)] for pack, copy in copies.items()},
          condemned=dict.fromkeys(packs, 1))
    assert plan(world).disbelieved == tuple(sorted(copies.values()))
    done = world.prune()
    assert done.plans[0].disbelieved == tuple(sorted(copies.values()))
    world.check()
    assert plan(world).is_empty
    assert set(packs) <= world.packs().keys()


def test_a_generation_that_leaves_out_where_slots_are_deletes_none_of_them() -> None:
    world = World()
    first = world.backup(disk(60, 1))
    world.backup(changed(world.expected[first], *range(40)))
    world.forget(first)
    assert world.prune().copied_bytes > 0
    world.check()
    for _ in range(3):
        forge(world, condemned=dict.fromkeys(world.packs(), 1))
    world.prune()
    world.check()


def test_a_copy_that_takes_the_place_of_a_true_one_is_not_believed() -> None:
    """The slots' birth packs are gone: the copy from the last compaction is what it is compared with."""
    world = World()
    first = world.backup(disk(60, 1))
    world.backup(changed(world.expected[first], *range(40)))
    world.forget(first)
    world.prune()
    latest = latest_generation(world.repository.storage, world.repository.key)
    marker = Marker(Places(world.repository))
    marker.mark(list_snapshots(world.repository.storage))
    moved = {birth: [(false_copy(world, homes[0][0], junk=True), homes[0][1])]
             for birth, homes in latest.moved.items() if birth in marker.live}
    assert moved
    forge(world, moved=moved, condemned=dict.fromkeys(world.packs(), 1))
    done = world.prune()
    assert set(done.plans[0].disbelieved) == {homes[0][0] for homes in moved.values()}
    world.check()


def compacted(world: World) -> Generation:
    """Make a repository where slots are known by the latest generation alone; return that."""
    first = world.backup(disk(60, 1))
    world.backup(changed(world.expected[first], *range(12, 28)))
    world.forget(first)
    assert world.prune(max_unused=0.0, compact_below=1.0).copied_bytes > 0
    return latest_generation(world.repository.storage, world.repository.key)


def test_what_is_left_out_again_and_again_is_said_again() -> None:
    """The forged ones condemn nothing, so that nothing but where the slots are is to be written."""
    world = World()
    compacted(world)
    for _ in range(3):
        forge(world)
    shown = plan(world)
    assert shown.mended
    assert not shown.is_empty
    for _ in range(3):
        world.prune()
        world.check()


def test_a_home_that_is_said_to_have_less_keeps_what_it_had() -> None:
    world = World()
    latest = compacted(world)
    forge(world, moved={birth: [(home, 0) for home, _ in homes] for birth, homes in latest.moved.items()},
          condemned=dict.fromkeys(world.packs(), 1))
    world.prune()
    world.check()


def test_a_copy_that_is_damaged_in_a_slot_keeps_the_others() -> None:
    """One of the packs that slots were copied from is there still: it has the slot, and no other."""
    world = World()
    latest = compacted(world)
    storage = world.repository.storage
    birth, homes = next((birth, homes) for birth, homes in latest.moved.items()
                        if birth.kind == PackKind.DATA.value)
    home = homes[0][0]
    rows = [row for row in read_footer(storage, home, world.packs()[home]) if row.birth == birth]
    assert len(rows) > 1
    source = PackBuilder(PackName(birth.kind, os.urandom(16), 0))
    content = storage.get(home.key)
    source.add_moved(rows[0], memoryview(content)[rows[0].offset_bytes:][:rows[0].stored_bytes])
    storage.create(source.name.key, source.finished())
    forge(world, moved={**latest.moved, birth: [*homes, (source.name, 1 << rows[0].slot)]})
    world.flip(home.key, rows[0].offset_bytes)
    shown = plan(world)
    assert (shown.disbelieved, shown.missing) == ((home,), ())
    for _ in range(3):
        world.prune()
        world.check()


def forge_at(world: World, number: int, said: Generation) -> None:
    """Create a generation at a number of one's own choice."""
    storage, key = world.repository.storage, world.repository.key
    under = generation_key(number)
    storage.create(under, encode_generation(said, under, key))


def assert_moves_out(world: World) -> None:
    """What is stored is whole, takes more backups, and goes on where it is copied to, as the error says."""
    world.backup(disk(60, 2))
    world.check()
    packs = world.packs()
    with pytest.raises(RepositoryDamaged) as refused:
        world.prune()
    assert "init NEW --same-keys-as" in refused.value.next_command
    assert world.packs() == packs
    world.check()
    target = beside(world)
    assert all(each.moved for each in copy_all(world, target))
    check_whole(world, target)


def test_a_number_that_comes_again_after_a_rollback_is_read_anew(tmp_path: Path) -> None:
    """A host that read the generation before has a cache; it must not go by what is no more."""
    world = World()
    latest = compacted(world)
    near = with_cache(world.repository, tmp_path)
    assert latest_generation(near.storage, near.key).moved == latest.moved
    world.repository.storage.delete([generation_key(latest.number)])
    forge_at(world, latest.number, Generation(latest.number, dict.fromkeys(world.packs(), latest.number)))
    assert latest_generation(near.storage, near.key).condemned.keys() == world.packs().keys()


def test_a_forged_number_that_leaves_none_ends_pruning_and_nothing_else() -> None:
    world = World()
    compacted(world)
    forge_at(world, MAX_GENERATION, Generation(MAX_GENERATION, dict.fromkeys(world.packs(), 1)))
    assert_moves_out(world)


def test_a_generation_under_the_name_of_another_is_none() -> None:
    """No session would ever be up to date with it."""
    world = World()
    latest = compacted(world)
    forge_at(world, latest.number + 5, Generation(latest.number))
    with pytest.raises(RepositoryDamaged, match="it says that it is number"):
        latest_generation(world.repository.storage, world.repository.key)
    world.check()
    with pytest.raises(RepositoryDamaged) as refused:
        world.backup(disk(60, 2))
    assert "init NEW --same-keys-as" in refused.value.next_command
    target = beside(world)
    copy_all(world, target)
    check_whole(world, target)


@pytest.mark.parametrize("kind", list(PackKind))
@pytest.mark.parametrize("junk", [True, False])
@pytest.mark.parametrize("forged", ["source", "target"])
def test_a_copy_holds_all_that_it_needs(kind: PackKind, junk: bool, forged: str) -> None:
    """It goes by no generation that says of slots that they are where they are not, on either side."""
    world = World()
    world.backup(disk(60, 1))
    target = beside(world)
    packs = [pack for pack in world.packs() if pack.kind == kind.value]
    at = world
    if forged == "target":
        at = World()
        at.repository = target
    copies = {pack: false_copy(world, pack, into=at.repository, junk=junk) for pack in packs}
    forge(at, moved={pack: [(copy, (1 << 64) - 1)] for pack, copy in copies.items()})
    copy_all(world, target)
    check_whole(world, target)


def test_what_a_true_home_has_is_read_though_a_later_generation_names_a_false_one() -> None:
    world = World()
    latest = compacted(world)
    forge(world, moved={birth: [(false_copy(world, homes[0][0], junk=True), homes[0][1])]
                        for birth, homes in latest.moved.items()})
    world.check()
    (name,) = world.expected
    manifest = read_entry(world.repository, name)
    with DiskView(Places(world.repository), manifest.disks[0]) as view:
        assert whole(view) == world.expected[name]
