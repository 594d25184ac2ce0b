"""Collecting: what goes, what waits and for whom, what is copied, and that a plan changes nothing."""

from __future__ import annotations

import random

import msgspec
import pytest

from stillframe.clock import SystemClock
from stillframe.errors import RepositoryDamaged
from stillframe.repository.catalog import display_name, list_snapshots
from stillframe.repository.collect import collect, plan_collection
from stillframe.repository.collection import CollectionPlan
from stillframe.repository.generation import latest_number
from stillframe.repository.heal import bits, read_bad, record_bad
from stillframe.repository.layout import HEALED, SESSIONS, PackKind, PackName
from stillframe.repository.mark import Marker
from stillframe.repository.pack import read_footer
from stillframe.repository.places import Places
from stillframe.repository.session import list_sessions, open_session
from stillframe.repository.verify import Level, verify
from stillframe.storage.memory import MemoryStorage
from tests.unit.repository_disks import CHUNK
from tests.unit.repository_snapshots import DAY_S, World


def disk(chunks: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(chunks * CHUNK)


def changed(content: bytes, *chunks: int, seed: int = 99) -> bytes:
    new = bytearray(content)
    for chunk in chunks:
        new[chunk * CHUNK : (chunk + 1) * CHUNK] = random.Random(seed * 1000 + chunk).randbytes(CHUNK)
    return bytes(new)


def plan(world: World, **limits: float) -> CollectionPlan:
    return plan_collection(world.repository, world.clock, **{"fence_after_s": DAY_S, **limits})


def live_slots(world: World) -> dict[PackName, int]:
    marker = Marker(Places(world.repository))
    marker.mark(list_snapshots(world.repository.storage))
    return marker.live


def contents(world: World) -> dict[str, bytes]:
    storage = world.repository.storage
    assert isinstance(storage, MemoryStorage)
    return storage.contents()


def test_nothing_to_do() -> None:
    world = World()
    world.backup(disk(20, 1))
    assert plan(world).is_empty
    before = contents(world)
    done = world.prune()
    assert (done.deleted_packs, done.lost_race, len(done.plans)) == (0, False, 1)
    assert contents(world) == before


def test_one_prune_gives_back_what_a_forgotten_snapshot_had() -> None:
    world = World()
    first = world.backup(disk(40, 1))
    world.backup(disk(40, 2), guest="db")
    theirs = {pack for pack in world.packs() if pack.sid.hex() == first.sid}
    world.forget(first)
    shown = plan(world)
    assert {fate.pack for fate in shown.condemned} == theirs
    assert shown.condemned_bytes == sum(world.packs()[pack] for pack in theirs)
    done = world.prune()
    assert done.deleted_packs == len(theirs)
    assert done.deleted_bytes == shown.condemned_bytes
    assert world.rubbish() == set()
    assert not theirs & world.packs().keys()
    world.check()


def test_a_stray_file_among_the_generations_is_in_nobodys_way() -> None:
    world = World()
    world.repository.storage.create("main/g/000000000009.bak", b"somebody's copy")
    world.forget(world.backup(disk(40, 1)))
    assert world.prune().deleted_packs > 0
    world.backup(disk(40, 2))
    world.check()
    assert "main/g/000000000009.bak" in contents(world)


def test_a_plan_changes_nothing() -> None:
    world = World()
    world.forget(world.backup(disk(40, 1)))
    before = contents(world)
    assert not plan(world).is_empty
    assert contents(world) == before


def test_what_is_not_approved_is_not_done() -> None:
    world = World()
    world.forget(world.backup(disk(40, 1)))
    before = contents(world)
    shown: list[CollectionPlan] = []

    def refuse(wanted: CollectionPlan) -> bool:
        shown.append(wanted)
        return False

    done = collect(world.repository, "alpha", world.clock, fence_after_s=DAY_S, approve=refuse)
    assert not done.approved
    assert done.plans == tuple(shown)
    assert contents(world) == before


def test_a_session_that_is_older_keeps_what_it_may_refer_to() -> None:
    world = World()
    first = world.backup(disk(40, 1))
    with open_session(world.repository.storage, world.repository.key, world.clock, "beta",
                      lambda sid: f"main/m/beta/x/20260101T000000Z-{sid}") as session:
        world.forget(first)
        for _ in range(2):
            done = world.prune()
            assert done.deleted_packs == 0
            (waiting,) = done.waiting
            assert (waiting.host, waiting.sid) == ("beta", session.sid)
            assert waiting.since == session.record.began_at
            assert waiting.size_bytes == sum(world.packs().values())
    assert world.prune().deleted_packs > 0
    assert world.packs() == {}


def test_packs_of_a_live_session_are_no_rubbish() -> None:
    world = World()
    with open_session(world.repository.storage, world.repository.key, world.clock, "beta",
                      lambda sid: f"main/m/beta/x/20260101T000000Z-{sid}") as session:
        world.repository.storage.create(f"main/p/{session.sid}/00000000", b"x" * 100)
        assert plan(world).is_empty
        assert world.prune().condemned_packs == 0
    assert world.prune().deleted_packs == 1


def test_a_dead_session_is_fenced_and_its_packs_go() -> None:
    world = World()
    name = world.backup(disk(10, 1))
    storage = world.repository.storage
    context = open_session(storage, world.repository.key, world.clock, "alpha",
                           lambda sid: f"main/m/alpha/x/20260101T000000Z-{sid}")
    with context as session:
        record = session.record
    # As if it had been killed, its process ID taken by another since.
    storage.create(f"{SESSIONS}{session.sid}",
                   msgspec.structs.replace(record, mark="0").encode(world.repository.key))
    storage.create(f"main/p/{session.sid}/00000000", b"x" * 100)
    assert [record.sid for record in plan(world).fenced] == [session.sid]
    approved: list[CollectionPlan] = []

    def approve(shown: CollectionPlan) -> bool:
        approved.append(shown)
        return True

    done = collect(world.repository, "alpha", world.clock, fence_after_s=DAY_S, approve=approve)
    assert [record.sid for record in done.fenced] == [session.sid]
    assert len(approved) == 1
    assert done.deleted_packs == 1
    assert list_sessions(storage, world.repository.key) == []
    assert len(storage.get(session.record.manifest_key)) == 64
    assert list(world.expected) == [name]
    world.check()


def test_mostly_dead_packs_are_copied_and_every_snapshot_reads_back() -> None:
    world = World()
    content = disk(60, 1)
    first = world.backup(content)
    second = world.backup(changed(content, *range(40)))
    world.forget(first)
    before = sum(world.packs().values())
    shown = plan(world)
    assert shown.compacted
    done = world.prune()
    assert done.copied_bytes > 0
    assert {compaction.pack for compaction in shown.compacted} & world.packs().keys() == set()
    assert world.rubbish() == set()
    assert sum(world.packs().values()) <= before - shown.compaction_gain_bytes
    world.check()
    # What was moved can be moved again, and is referred to by the next backup.
    third = world.backup(changed(world.expected[second], 45))
    world.check()
    world.forget(second)
    world.prune(compact_below=1.0, max_unused=0.0)
    world.check()
    world.forget(third)
    world.prune()
    assert world.packs() == {}


def test_how_much_may_stay_unused_is_a_limit() -> None:
    world = World()
    content = disk(64, 1)
    first = world.backup(content)
    # Of each pack's four slots, three.
    world.backup(changed(content, *(chunk for chunk in range(64) if chunk % 16 < 12)))
    world.forget(first)
    assert plan(world, compact_below=0.01).compacted == ()
    assert plan(world, max_unused=0.99).compacted == ()
    few = plan(world, max_unused=0.2, compact_below=1.0).compacted
    every = plan(world, max_unused=0.0, compact_below=1.0).compacted
    assert 0 < len(few) < len(every)


def test_a_bad_slot_is_not_copied_as_good() -> None:
    world = World()
    content = disk(64, 1)
    first = world.backup(content)
    second = world.backup(changed(content, *(chunk for chunk in range(64) if chunk % 16 < 12)))
    world.forget(first)
    victim = next(each.pack for each in plan(world).compacted if each.pack.kind == PackKind.DATA.value)
    live = live_slots(world)[victim]
    row = next(row for row in read_footer(world.repository.storage, victim, world.packs()[victim])
               if live >> row.slot & 1)
    world.flip(victim.key, row.offset_bytes + 3)
    done = world.prune()
    assert done.damaged == ((victim, row.slot),)
    assert (victim, row.slot) in read_bad(world.repository.storage)
    assert victim in world.packs()
    # The damaged pack is left alone from now on.
    assert victim not in {each.pack for each in plan(world).compacted}
    world.forget(second)
    world.prune()
    assert world.packs() == {}
    assert not read_bad(world.repository.storage)


@pytest.mark.parametrize("part", ["manifest", "root", "leaf"])
def test_nothing_is_deleted_while_it_cannot_be_told_what_is_needed(part: str) -> None:
    world = World()
    hurt = world.backup(disk(40, 1))
    other = world.backup(disk(40, 2), guest="db")
    world.forget(other)
    (tree,) = (pack for pack in world.packs() if pack.sid.hex() == hurt.sid and pack.kind == "t")
    rows = read_footer(world.repository.storage, tree, world.packs()[tree])
    if part == "manifest":
        world.flip(hurt.key, 40)
    else:
        world.flip(tree.key, rows[0 if part == "leaf" else -1].offset_bytes)
    before = contents(world)
    with pytest.raises(RepositoryDamaged, match=display_name(hurt)):
        plan(world)
    with pytest.raises(RepositoryDamaged, match="nothing is deleted"):
        world.prune()
    assert contents(world) == before
    world.forget(hurt)
    world.prune()
    assert world.packs() == {}


def test_a_snapshot_that_is_forgotten_while_it_is_marked_is_no_damage() -> None:
    world = World()
    first = world.backup(disk(40, 1))
    world.backup(disk(40, 2), guest="db")
    storage = world.repository.storage
    assert isinstance(storage, MemoryStorage)
    deleted = [pack.key for pack in world.packs() if pack.sid.hex() == first.sid]

    def vanish(verb: str, key: str) -> None:
        if verb == "get" and key.startswith("main/t/") and deleted:
            storage.before = None
            world.forget(first)
            storage.delete(deleted)

    storage.before = vanish
    world.prune()
    assert first not in world.expected
    world.check()


def test_a_snapshot_that_is_committed_after_packs_were_listed_is_no_damage() -> None:
    world = World()
    world.backup(disk(40, 1))
    storage = world.repository.storage
    assert isinstance(storage, MemoryStorage)

    def committed(verb: str, key: str) -> None:
        if verb == "list" and key == HEALED:  # what is listed after packs, and before sessions
            storage.before = None
            world.backup(disk(40, 2), guest="db")

    storage.before = committed
    assert plan(world).missing == ()
    assert len(list_snapshots(storage)) == 2
    world.check()


def test_a_pack_that_is_gone_is_missing() -> None:
    world = World()
    first = world.backup(disk(40, 1))
    lost = sorted(pack for pack in world.packs()
                  if pack.sid.hex() == first.sid and pack.kind == PackKind.DATA.value)
    world.repository.storage.delete([lost[0].key])
    assert plan(world).missing == (lost[0],)


def test_the_loser_of_a_race_deletes_nothing() -> None:
    world = World()
    world.forget(world.backup(disk(40, 1)))
    storage = world.repository.storage
    assert isinstance(storage, MemoryStorage)

    def overtaken(verb: str, key: str) -> None:
        if verb == "create" and key.startswith("main/g/"):
            storage.before = None
            world.prune()

    packs = world.packs()
    storage.before = overtaken
    done = world.prune()
    assert done.lost_race
    assert done.deleted_packs == 0
    assert latest_number(storage) == 1
    # The winner had to wait for the loser's session.
    assert world.packs() == packs
    assert world.prune().deleted_packs == len(packs)


def test_old_generations_go_and_the_last_two_stay() -> None:
    world = World()
    for seed in range(5):
        world.forget(world.backup(disk(4, seed)))
        world.prune()
    numbers = [key for key in contents(world) if key.startswith("main/g/")]
    assert numbers == [f"main/g/{number:012d}" for number in (9, 10)]


def test_records_of_bad_slots_and_heals_go_when_nobody_needs_them() -> None:
    world = World()
    content = disk(40, 1)
    first = world.backup(content)
    victim = world.data_packs()[0]
    record_bad(world.repository.storage, victim, 0b1, "test", SystemClock().now())
    second = world.backup(content)
    assert [key for key in contents(world) if key.startswith("main/v/heal/")]
    world.prune()
    assert (victim, 0) in read_bad(world.repository.storage)
    assert [key for key in contents(world) if key.startswith("main/v/heal/")]
    world.check()
    world.forget(first)
    world.prune()
    assert (victim, 0) not in read_bad(world.repository.storage) or victim in world.packs()
    world.forget(second)
    world.prune()
    assert [key for key in contents(world) if key.startswith("main/v/")] == []


def test_a_session_of_another_host_is_dead_only_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setattr("stillframe.repository.session.process_space", lambda: "elsewhere")
    with open_session(world.repository.storage, world.repository.key, world.clock, "beta",
                      lambda sid: f"main/m/beta/x/20260101T000000Z-{sid}"):
        monkeypatch.undo()
        assert plan(world).fenced == ()
        assert [record.host for record in plan(world, fence_after_s=-1.0).fenced] == ["beta"]


def test_bits() -> None:
    assert list(bits(0b10110)) == [1, 2, 4]


def test_another_snapshot_of_the_same_data_keeps_the_packs() -> None:
    world = World()
    content = disk(40, 1)
    first = world.backup(content)
    world.backup(changed(content, 3))
    world.forget(first)
    world.prune()
    world.check()


def test_what_only_a_heal_of_a_dead_run_needed_goes_in_the_same_prune() -> None:
    class Killed(BaseException):
        """The process died."""

    world = World()
    content = disk(20, 1)
    world.backup(content)
    pack = world.data_packs()[0]
    at = world.packs()[pack] // 2
    world.flip(pack.key, at)
    verify(world.repository, world.clock, Level.FULL)
    storage = world.repository.storage
    assert isinstance(storage, MemoryStorage)

    def kill(verb: str, key: str) -> None:
        if verb == "create" and key.startswith("main/m/"):
            raise Killed  # its packs and its heals are there, and it is no snapshot

    storage.before = kill
    with pytest.raises(Killed):
        world.backup(content)
    storage.before, world.all_are_dead = None, True
    world.flip(pack.key, at)
    verify(world.repository, world.clock, Level.FULL)
    assert list(storage.list("main/v/heal/"))
    world.prune()
    assert world.rubbish() == set()
    assert list(storage.list("main/v/heal/")) == []
    world.check()
