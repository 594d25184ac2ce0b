"""The real code loses nothing, whatever the order of its operations; without any of its rules it would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stillframe.errors import SlotDamaged
from stillframe.extent import Extent, Kind
from stillframe.repository import catalog, known
from stillframe.repository import collect as collect_module
from stillframe.repository import move as move_module
from stillframe.repository import session as session_module
from stillframe.repository.collection import Looked
from stillframe.repository.crypto import DomainKey
from stillframe.repository.decide import Decision, decide
from stillframe.repository.generation import Copied, Generation, create_generation, latest_generation
from stillframe.repository.layout import PackName, SnapshotName, session_key
from stillframe.repository.session import SessionRecord
from stillframe.repository.writer import Audit
from stillframe.storage.model import Storage
from tests.contract.drivers import DRIVERS, Servers
from tests.model.real import (
    HISTORIES,
    TINY,
    Broken,
    Cast,
    Lost,
    Make,
    Run,
    SharedHints,
    chunk,
    filled,
    history,
)
from tests.unit.repository_disks import CHUNK, SourceDisk
from tests.unit.repository_snapshots import World, make_snapshot, read_snapshot

_RUNS = 300
_TRIES = 3000
_RUNS_ON_SERVERS = 3

Rule = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("batch", [0, 1, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 3))])
def test_nothing_is_lost_and_nothing_is_left(batch: int) -> None:
    for seed in range(batch * _RUNS, (batch + 1) * _RUNS):
        Run(seed).go()


def test_nothing_is_lost_of_what_moves_here() -> None:
    for seed in range(_RUNS // 3):
        Run(seed, Cast("mcf" + "bmc"[seed % 3])).go()


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(20))
def test_nothing_is_lost_in_many_more(batch: int) -> None:
    for seed in range((batch + 10) * 1000, (batch + 11) * 1000):
        Run(seed).go()


def _on_server(kind: str, folder: Path, servers: Servers) -> Make:
    return lambda contents: filled(DRIVERS[kind](folder, servers)(), contents)


@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_nothing_is_lost_on_a_server(kind: str, tmp_path: Path, servers: Servers) -> None:
    for seed in range(_RUNS_ON_SERVERS):
        Run(seed, make=_on_server(kind, tmp_path, servers)).go()


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 11))
@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_nothing_is_lost_on_a_server_in_many_more(
        kind: str, batch: int, tmp_path: Path, servers: Servers) -> None:
    for seed in range(batch * 1000, batch * 1000 + 20):
        Run(seed, make=_on_server(kind, tmp_path, servers)).go()


def test_a_schedule_can_be_run_again() -> None:
    def steps(seed: int) -> list[tuple[str, str]]:
        run, seen = Run(seed), list[tuple[str, str]]()
        real = run.baton.step

        def step(verb: str, key: str) -> None:
            if run.baton.current is not None:
                seen.append((run.baton.current.name, verb))
            real(verb, key)

        run.baton.step = step  # type: ignore[method-assign]
        run.go()
        return seen

    assert steps(7) == steps(7) != steps(8)


class Anything(int):
    """A number that is equal to any other."""

    def __eq__(self, _other: object) -> bool:
        return True

    def __ne__(self, _other: object) -> bool:
        return False

    __hash__ = int.__hash__


def without_waiting(patch: pytest.MonkeyPatch) -> None:
    """G5: what is condemned is deleted whoever may still refer to it."""
    def hasty(looked: Looked, copied: Copied | None = None) -> Decision:
        sessions = [msgspec.structs.replace(each, generation=1 << 40) for each in looked.sessions]
        return decide(replace(looked, sessions=sessions), copied)

    patch.setattr(collect_module, "decide", hasty)


def without_tombstones(patch: pytest.MonkeyPatch) -> None:
    """G0: a session that is taken for dead is just removed."""
    def remove(storage: Storage, record: SessionRecord) -> None:
        storage.delete([session_key(record.sid)])

    patch.setattr(collect_module, "fence", remove)


def without_looking_at_condemned(patch: pytest.MonkeyPatch) -> None:
    """W3: a writer refers to whatever it finds."""
    real = known.KnownChunks.__init__

    def begin(self: known.KnownChunks, session: session_module.Session, *others: Any) -> None:
        generation = Generation(session.generation.number, None, session.generation.moved)
        real(self, replace(session, generation=generation), *others)

    patch.setattr(known.KnownChunks, "__init__", begin)


def without_anybody_who_vouches(patch: pytest.MonkeyPatch) -> None:
    """W3: what is beneath the parent's nodes is reused unseen, whoever committed the parent and when."""
    patch.setattr(Generation, "may_reuse_unseen", lambda *_: True)


def without_looking_again(patch: pytest.MonkeyPatch) -> None:
    """W2: a session goes by the generation that was the latest before it was registered."""
    patch.setattr(session_module, "latest_number", lambda _: Anything())


def without_keeping_moved(patch: pytest.MonkeyPatch) -> None:
    """Moved slots are forgotten when no snapshot refers to them."""
    def forgetful(looked: Looked, copied: Copied | None = None) -> Decision:
        decision = decide(looked, copied)
        moved = {birth: homes for birth, homes in decision.moved.items() if birth in looked.needed}
        kept = {birth: [(home, slots & looked.needed[birth]) for home, slots in homes
                        if slots & looked.needed[birth]] for birth, homes in moved.items()}
        return replace(decision, moved=kept)

    patch.setattr(collect_module, "decide", forgetful)


def without_a_race(patch: pytest.MonkeyPatch) -> None:
    """G6: a collector that lost deletes all the same."""
    def won(storage: Storage, generation: Generation, key: Any) -> bool:
        create_generation(storage, generation, key)
        return True

    patch.setattr(collect_module, "create_generation", won)
    patch.setattr(collect_module, "latest_number", lambda _: Anything())


def without_order(patch: pytest.MonkeyPatch) -> None:
    """G3 before G2: what is referred to is looked at before who may still add to it."""
    real_sessions, real_names = session_module.list_sessions, catalog.list_snapshots
    held: list[list[SnapshotName]] = []

    def names_first(storage: Storage, key: DomainKey) -> list[SessionRecord]:
        held.append(real_names(storage))
        return real_sessions(storage, key)

    patch.setattr(collect_module, "list_sessions", names_first)
    patch.setattr(collect_module, "list_snapshots", lambda _: held[-1])


def with_a_late_generation(patch: pytest.MonkeyPatch) -> None:
    """G0b: the latest generation is read after the sessions."""
    def look(self: Any, _latest: Generation, *args: Any) -> Looked:
        looked = real(self, _latest, *args)
        return replace(looked, generation=latest_generation(self._storage, self._repository.key))

    real = collect_module._Collector._look
    patch.setattr(collect_module._Collector, "_look", look)


def without_moving(patch: pytest.MonkeyPatch) -> None:
    """Compaction: the generation does not say where slots went."""
    def silent(looked: Looked, copied: Copied | None = None) -> Decision:
        decision = decide(looked, copied)
        gone: set[PackName] = set(copied or ())
        return replace(decision, moved={birth: homes for birth, homes in decision.moved.items()
                                        if birth not in gone})

    patch.setattr(collect_module, "decide", silent)


def without_looking_at_what_was_adopted(patch: pytest.MonkeyPatch) -> None:
    """W4: a generation says where slots of elsewhere are, and nobody looks whether it is the latest."""
    def once(storage: Storage, key: DomainKey, copied: Copied, by: str, at: str) -> None:
        latest = latest_generation(storage, key)
        create_generation(storage, Generation(latest.number + 1, latest.condemned, latest.moved_with(copied),
                                              by, at, latest.marked), key)

    patch.setattr(move_module, "adopt", once)


def with_commits_over_tombstones(patch: pytest.MonkeyPatch) -> None:
    """W5: the manifest replaces what is at its key."""
    def commit(self: session_module.Session, manifest: bytes) -> None:
        self.storage.replace(self.record.manifest_key, manifest)

    patch.setattr(session_module.Session, "commit", commit)


@pytest.mark.parametrize("keeps_the_rule", [True, False])
def test_a_late_parent_is_not_reused_unseen(keeps_the_rule: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """W3 beneath, step by step: random schedules come across it too seldom.

    A writer finds chunks of a forgotten snapshot by hints, a collector condemns their pack meanwhile, and the
    snapshot is committed late. The next one is built upon it while it is forgotten and a collection runs.
    """
    if not keeps_the_rule:
        without_anybody_who_vouches(monkeypatch)
    world, hints = World(TINY), SharedHints({})
    old, new = (b"".join(map(chunk, numbers)) for numbers in (range(1, 9), range(9, 13)))
    forgotten = world.backup(new + old, "other", hints=hints)
    world.forget(forgotten)

    late = SourceDisk(old + new)
    meanwhile = iter([world.prune])

    def before_read(_: int) -> None:
        for collection in meanwhile:
            collection()

    late.before_read = before_read
    names = [SnapshotName("host", "web", World.moment(hour), "") for hour in (1, 2)]
    first = make_snapshot(world.repository, late, names[0], world.clock, hints=hints)
    condemned = latest_generation(world.repository.storage, world.repository.key).condemned
    assert {ref.place.pack for ref in hints.known.values()} & condemned.keys()
    world.expected[first] = old + new

    def changes(parent: SnapshotName) -> list[Extent]:
        assert parent == first
        world.forget(first)
        world.prune()
        return [Extent(0, TINY.leaf_chunks * CHUNK, Kind.DATA)]  # what a leaf inherits is looked at

    after = chunk(13) + (old + new)[CHUNK:]
    second = make_snapshot(world.repository, SourceDisk(after), names[1], world.clock, hints=SharedHints({}),
                           changes=changes, audit=Audit(least_chunks=0))
    if keeps_the_rule:
        assert read_snapshot(world.repository, second) == after
    else:
        with pytest.raises((SlotDamaged, KeyError)):
            read_snapshot(world.repository, second)


_LONG = Cast("bccff", stays=0.85, crashes=0.0)


@pytest.mark.parametrize(("rule", "cast"), [
    (without_waiting, Cast("bcf")),
    (without_tombstones, Cast("bcfc", wrongly_dead=0.5)),
    (without_looking_at_condemned, Cast("bcfb")),
    (without_keeping_moved, Cast("bccf")),
    (with_a_late_generation, _LONG),
    (without_moving, Cast("cf")),
    pytest.param(without_looking_at_what_was_adopted, Cast("mccf"), marks=pytest.mark.slow),
    pytest.param(without_looking_again, _LONG, marks=pytest.mark.slow),
    pytest.param(without_a_race, _LONG, marks=pytest.mark.slow),
    pytest.param(without_order, _LONG, marks=pytest.mark.slow),
    pytest.param(with_commits_over_tombstones, Cast("bcf", wrongly_dead=0.5), marks=pytest.mark.slow),
], ids=lambda each: each.__name__ if callable(each) else each.actors)
def test_each_rule_is_needed(rule: Rule, cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(HISTORIES):
        history(number)  # made by the rules
    rule(monkeypatch)
    for seed in range(_TRIES):
        try:
            Run(seed, cast).go()
        except Lost as lost:
            print(f"run {seed}: {lost}")
            return
        except Broken:
            continue
    pytest.fail(f"nothing is lost without it in {_TRIES} runs")
