"""Verifying: every kind of damage is found, told apart, written down and healed; a prune is none."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from stillframe.errors import RepositoryDamaged
from stillframe.repository.damaged import damaged_snapshots
from stillframe.repository.heal import read_bad
from stillframe.repository.layout import PackName, SnapshotName
from stillframe.repository.pack import read_footer
from stillframe.repository.session import open_session
from stillframe.repository.verified import Subset, Verified, read_verified
from stillframe.repository.verify import Level, Verification, verify, verify_stored
from stillframe.storage.memory import MemoryStorage
from stillframe.units import GIB
from tests.unit.repository_disks import CHUNK
from tests.unit.repository_snapshots import World

LEVELS = pytest.mark.parametrize("level", list(Level))


def disk(chunks: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(chunks * CHUNK)


def changed(content: bytes, *chunks: int) -> bytes:
    new = bytearray(content)
    for chunk in chunks:
        new[chunk * CHUNK : (chunk + 1) * CHUNK] = random.Random(1000 + chunk).randbytes(CHUNK)
    return bytes(new)


def looked(world: World, level: Level = Level.FULL, subset: Subset | None = None) -> Verification:
    return verify(world.repository, world.clock, level, subset)


def some_slot(world: World, of: SnapshotName, number: int = 0) -> tuple[PackName, int, int]:
    """Return the first data pack of a snapshot, a slot of it, and where the slot's bytes begin."""
    pack = next(pack for pack in world.data_packs() if pack.sid.hex() == of.sid)
    row = read_footer(world.repository.storage, pack, world.packs()[pack])[number]
    return pack, row.slot, row.offset_bytes


@LEVELS
def test_all_is_well(level: Level) -> None:
    world = World()
    content = disk(40, 1)
    first = world.backup(content)
    world.backup(changed(content, *range(30)))
    world.forget(first)
    world.prune(0.0, 1.0)  # some slots are moved
    found = looked(world, level)
    assert found.is_sound, found
    assert (found.snapshots, found.packs) == (1, len(world.packs()))
    assert found.checked_packs == (0 if level is Level.STRUCTURE else len(world.packs()))
    assert not read_bad(world.repository.storage)


def test_an_empty_repository_is_well() -> None:
    assert looked(World()).is_sound


@pytest.mark.parametrize("level", [Level.STORED, Level.FULL])
def test_a_flipped_slot_is_found_recorded_and_healed(level: Level) -> None:
    world = World()
    content = disk(40, 1)
    first = world.backup(content)
    second = world.backup(changed(content, 39))
    pack, slot, offset = some_slot(world, first)
    world.flip(pack.key, offset + 50)
    assert looked(world, Level.STRUCTURE).is_sound
    found = looked(world, level)
    assert not found.is_sound
    assert {hurt.snapshot for hurt in found.hurt} == {first, second}
    assert all(hurt.ranges == ((slot * 4 * CHUNK, (slot + 1) * 4 * CHUNK),) and not hurt.is_tree
               for hurt in found.hurt)
    assert [finding.key for finding in found.findings] == [pack.key]
    assert (pack, slot) in read_bad(world.repository.storage)
    assert found.healed == ()
    # The next backup that sees the same data stores it again, for the old ones too.
    world.backup(content)
    found = looked(world, level)
    assert found.is_sound, found
    assert found.hurt == ()
    assert {hurt.snapshot for hurt in found.healed} == {first, second}
    assert all(hurt.size_bytes == 4 * CHUNK for hurt in found.healed)
    assert all(finding.is_mended for finding in found.findings)
    world.check()
    world.prune(0.0, 1.0)
    world.check()


def known_damaged(world: World, *names: SnapshotName) -> frozenset[str]:
    return damaged_snapshots(world.repository.storage, lambda: world.repository, names)


def test_what_heals_stays_when_its_snapshot_is_dropped() -> None:
    """No rule of retention has to know which snapshot healed an older one: the collector keeps what heals."""
    world = World()
    content = disk(40, 1)
    first = world.backup(content)
    pack, _, offset = some_slot(world, first)
    world.flip(pack.key, offset + 50)
    assert known_damaged(world, first) == frozenset(), "nobody has looked yet"
    assert not looked(world).is_sound
    assert known_damaged(world, first) == {first.sid}
    healer = world.backup(content)
    assert known_damaged(world, first, healer) == frozenset()
    world.forget(healer)
    for _ in range(3):
        world.prune(0.0, 1.0)
    world.check()
    assert looked(world).is_sound
    assert known_damaged(world, first) == frozenset()


def test_a_manifest_that_cannot_be_read_is_of_a_damaged_snapshot() -> None:
    world = World()
    first, second = world.backup(disk(40, 1)), world.backup(disk(40, 2))
    world.flip(second.key, 40)
    pack, _, offset = some_slot(world, first)
    world.flip(pack.key, offset + 50)
    looked(world)
    assert known_damaged(world, first, second) == {first.sid, second.sid}


@LEVELS
def test_a_missing_pack_hurts_all_that_need_it(level: Level) -> None:
    world = World()
    first = world.backup(disk(40, 1))
    world.backup(disk(40, 2), "db")
    victim = next(pack for pack in world.data_packs() if pack.sid.hex() == first.sid)
    world.repository.storage.delete([victim.key])
    found = looked(world, level)
    assert {hurt.snapshot for hurt in found.hurt} == {first}
    assert sum(hurt.size_bytes for hurt in found.hurt) == 16 * CHUNK
    assert [finding.key for finding in found.findings] == [victim.key]
    assert (victim, 3) in read_bad(world.repository.storage)
    world.backup(disk(40, 1), "other")
    # Another guest has no parent here, so it does not know that it heals: a backup of the same guest does.
    world.backup(disk(40, 1))
    assert looked(world, level).is_sound
    world.check()


@LEVELS
@pytest.mark.parametrize("number", [0, -1])
def test_a_damaged_node_is_found_at_every_level(level: Level, number: int) -> None:
    world = World()
    hurt = world.backup(disk(40, 1))
    whole = world.backup(disk(40, 2), "db")
    pack = next(pack for pack in world.packs() if pack.kind == "t" and pack.sid.hex() == hurt.sid)
    row = read_footer(world.repository.storage, pack, world.packs()[pack])[number]
    world.flip(pack.key, row.offset_bytes)
    found = looked(world, level)
    (each,) = found.hurt
    assert (each.snapshot, each.disk, each.is_tree) == (hurt, "vda", True)
    assert each.ranges == (((0, 4 * CHUNK),) if number == 0 else ((0, 40 * CHUNK),))
    assert (pack, row.slot) in read_bad(world.repository.storage)
    # The next backup makes whole snapshots again; this one stays hurt until it is forgotten.
    world.backup(disk(40, 1))
    assert {one.snapshot for one in looked(world, level).hurt} == {hurt}
    world.forget(hurt)
    assert looked(world, level).is_sound
    assert whole in world.expected
    world.check()


@LEVELS
@pytest.mark.parametrize("prefix", ["main/m/", "main/g/", "main/keys/"])
def test_damage_of_small_objects_is_found(level: Level, prefix: str) -> None:
    world = World()
    world.forget(world.backup(disk(10, 1)))
    world.backup(disk(10, 2))
    world.prune()
    for listed in list(world.repository.storage.list(prefix)):
        # Of a key slot, what only another secret could open.
        at = world.repository.storage.get(listed.key).find(b'"wrapped"') + 20 if "keys" in prefix else 30
        world.flip(listed.key, at)
        found = looked(world, level)
        assert listed.key in [finding.key for finding in found.findings]
        assert not found.is_sound
        assert [name.key for name in found.unreadable] == ([listed.key] if prefix == "main/m/" else [])
        world.flip(listed.key, at)
    assert looked(world, level).is_sound


def test_a_damaged_session_is_found() -> None:
    world = World()
    with open_session(world.repository.storage, world.repository.key, world.clock, "beta",
                      lambda sid: f"main/m/beta/x/20260101T000000Z-{sid}") as session:
        world.flip(f"main/s/{session.sid}", 40)
        assert [finding.key for finding in looked(world).findings] == [f"main/s/{session.sid}"]
    assert looked(world).is_sound


def test_snapshots_are_read_by_the_generation_before_a_damaged_one() -> None:
    world = World()
    content = disk(64, 1)
    first = world.backup(content)
    world.forget(world.backup(disk(8, 9), "db"))
    world.prune()
    world.backup(changed(content, *(chunk for chunk in range(64) if chunk % 16 < 12)))
    world.forget(first)
    assert world.prune(0.0, 1.0).copied_bytes
    generations = [listed.key for listed in world.repository.storage.list("main/g/")]
    world.flip(generations[-1], 30)
    assert [finding.key for finding in looked(world).findings] == generations[-1:]
    assert not read_bad(world.repository.storage)
    world.check()
    with pytest.raises(RepositoryDamaged):
        world.prune()
    world.flip(generations[-2], 30)
    with pytest.raises(RepositoryDamaged):
        world.check()


@pytest.mark.parametrize("level", list(Level))
def test_a_damaged_footer_is_found(level: Level) -> None:
    world = World()
    world.backup(disk(40, 1))
    pack = world.data_packs()[0]
    world.flip(pack.key, world.packs()[pack] - 60)
    found = looked(world, level)
    # What was born there can be read without the footer.
    assert found.hurt == ()
    assert [finding.key for finding in found.findings] == [pack.key]
    assert (pack, 0) in read_bad(world.repository.storage)
    world.check()


def test_a_damaged_head_is_found() -> None:
    world = World()
    world.backup(disk(40, 1))
    pack = world.data_packs()[0]
    world.flip(pack.key, 9)
    found = looked(world, Level.STORED)
    assert [finding.key for finding in found.findings] == [pack.key]
    assert found.hurt == ()


def test_a_truncated_pack_is_found() -> None:
    world = World()
    name = world.backup(disk(40, 1))
    pack = world.data_packs()[0]
    content = world.repository.storage.get(pack.key)
    world.repository.storage.replace(pack.key, content[: len(content) // 2])
    for level in Level:
        found = looked(world, level)
        assert {hurt.snapshot for hurt in found.hurt} == {name}
        # Two of four slots are still there whole, or nearly.
        assert 0 < found.hurt[0].size_bytes < 16 * CHUNK


def test_what_was_put_right_by_hand_is_good_again() -> None:
    world = World()
    pack, slot, offset = some_slot(world, world.backup(disk(40, 1)))
    world.flip(pack.key, offset)
    looked(world)
    assert (pack, slot) in read_bad(world.repository.storage)
    world.flip(pack.key, offset)
    assert looked(world).is_sound
    assert not read_bad(world.repository.storage)


def test_without_a_key_stored_bytes_are_checked() -> None:
    world = World()
    name = world.backup(disk(40, 1))
    assert verify_stored(world.repository.storage, world.clock).is_sound
    pack, slot, offset = some_slot(world, name)
    world.flip(pack.key, offset)
    found = verify_stored(world.repository.storage, world.clock)
    assert [finding.key for finding in found.findings] == [pack.key]
    assert found.checked_packs == len(world.packs())
    assert (pack, slot) in read_bad(world.repository.storage)


@pytest.mark.parametrize("level", [Level.STORED, Level.FULL])
def test_nightly_parts_cover_all_in_a_month(level: Level) -> None:
    world = World()
    names = [world.backup(disk(64, seed), f"guest{seed}") for seed in range(12)]
    pack, _, offset = some_slot(world, names[5], 2)
    nights = [looked(world, level, Subset.parse("1/30")) for _ in range(30)]
    verified = read_verified(world.repository.storage)
    assert all(verified.when(each)[0] for each in world.packs())
    most = max(world.packs().values())
    assert all(night.checked_bytes <= sum(world.packs().values()) / 30 + most for night in nights)
    world.flip(pack.key, offset)
    assert sum(not looked(world, level, Subset.parse("1/30")).is_sound for _ in range(30)) >= 1


def test_a_part_is_what_was_verified_least_recently() -> None:
    packs = {PackName("p", bytes([number]) * 16, 0): 100 for number in range(10)}
    names = sorted(packs)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    verified = Verified()
    for number, name in enumerate(names[:8]):
        verified.note([name], at + timedelta(hours=8 - number), full=False)
    assert verified.due(packs, Subset.parse("30%"), full=False) == [names[8], names[9], names[7]]
    assert verified.due(packs, Subset(size_bytes=1), full=False) == [names[8]]
    assert verified.due(packs, Subset(), full=True) == names
    assert len(verified.due(packs, Subset(), full=False)) == 10


def test_subsets() -> None:
    assert Subset.parse("1/30").target_bytes(301) == 11
    assert Subset.parse("2.5%").target_bytes(1000) == 25
    assert Subset.parse("2G").target_bytes(1) == 2 * GIB
    assert Subset().target_bytes(77) == 77
    for wrong in ("", "1/0", "0/3", "4/3", "0%", "101%", "5", "-1%", "1/3/4", "xG"):
        with pytest.raises(ValueError, match="not a"):
            Subset.parse(wrong)


def test_a_damaged_note_of_verifications_is_no_note() -> None:
    world = World()
    world.backup(disk(40, 1))
    looked(world, Level.STORED)
    assert read_verified(world.repository.storage).when(world.data_packs()[0])[0] > 0
    world.repository.storage.replace("main/v/verified", b"nonsense")
    assert read_verified(world.repository.storage).when(world.data_packs()[0]) == (0, 0)
    assert looked(world, Level.STORED).is_sound


@pytest.mark.parametrize("after", range(1, 60, 4))
def test_a_prune_meanwhile_is_no_damage(after: int) -> None:
    world = World()
    content = disk(64, 1)
    first = world.backup(content)
    other = world.backup(disk(20, 5), "db")
    world.backup(changed(content, *(chunk for chunk in range(64) if chunk % 16 < 12)))
    storage = world.repository.storage
    assert isinstance(storage, MemoryStorage)
    left = after

    def meanwhile(verb: str, key: str) -> None:
        nonlocal left
        del verb, key
        left -= 1
        if left == 0:
            storage.before = None
            world.forget(first, other)
            world.prune(0.0, 1.0)

    storage.before = meanwhile
    found = looked(world)
    assert found.is_sound, found
    assert not read_bad(storage)
    world.check()
