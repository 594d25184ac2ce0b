"""The real writer, collector, verifier and forgetting, over a storage where every operation may be the last.

The storage is in memory, or on a server.

A run is a seed: a repository with some history, a few actors, a schedule. Afterwards every snapshot that
is there must read back equal, none may be gone that was not forgotten, and two collections must leave nothing
that nobody needs.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import pytest

from stillframe.clock import SystemClock
from stillframe.errors import RepositoryDamaged, SessionFenced, StillframeError, StorageLost
from stillframe.extent import Extent, Kind
from stillframe.repository import collect as collect_module
from stillframe.repository import session
from stillframe.repository.catalog import forget, list_snapshots, plan_forget
from stillframe.repository.collect import collect, list_packs
from stillframe.repository.copy import Copier
from stillframe.repository.generation import latest_generation
from stillframe.repository.hints import ChunkHints
from stillframe.repository.layout import GENERATIONS, Parameters, SnapshotName, new_sid
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.opened import Repository, init_with_keys_of, retried
from stillframe.repository.session import SessionRecord, list_sessions
from stillframe.repository.verify import Level, verify
from stillframe.repository.writer import Audit
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.model import Storage
from tests.model.baton import Actor, Baton, Inline, LossyStorage, Stepped
from tests.unit.repository_disks import CHUNK, SourceDisk
from tests.unit.repository_snapshots import World, make_snapshot, read_snapshot, rubbish

TINY = Parameters(id=new_sid(), created_at="", chunk_bytes=CHUNK, slot_chunks=2, leaf_chunks=4, inner_nodes=4,
                  pack_bytes=4 * CHUNK)
HISTORIES = 12
_CHUNKS = 12
_CONTENTS = 16
_CLOCK = SystemClock()


class Lost(AssertionError):
    """A snapshot is gone or does not read back, or something is left."""


class Broken(AssertionError):
    """An actor ended with an error that it must not have."""


@dataclass(frozen=True)
class Cast:
    """Who takes part; a letter each. None: drawn.

    (b)acks up, (c)ollects, (f)orgets, (m)oves snapshots here from elsewhere, (r)eads, (v)erifies.
    """

    actors: str | None = None
    wrongly_dead: float | None = None
    stays: float | None = None
    crashes: float | None = None


@dataclass(frozen=True)
class History:
    """What lies in the storage before a run, and what its snapshots must read.

    *elsewhere* is another repository with the same key; what its snapshots must read is *expected*, too.
    """

    repository: Repository
    contents: Mapping[str, bytes]
    expected: dict[tuple[str, str], bytes]
    hints: dict[bytes, ChunkRef]
    elsewhere: Repository


#: Makes a storage that holds these objects and nothing else.
Make = Callable[[Mapping[str, bytes]], Storage]


def in_memory(contents: Mapping[str, bytes]) -> Storage:
    return filled(MemoryStorage(), contents)


def filled(storage: Storage, contents: Mapping[str, bytes]) -> Storage:
    """Store *contents* in an empty storage."""
    for key, content in contents.items():
        storage.create(key, content)
    return storage


class SharedHints(ChunkHints):
    """An index that all hosts share, and that never forgets: the most dangerous one there can be."""

    def __init__(self, known: dict[bytes, ChunkRef]) -> None:
        self.known = known

    def find(self, ids: Sequence[bytes]) -> dict[bytes, ChunkRef]:
        return {chunk_id: self.known[chunk_id] for chunk_id in ids if chunk_id in self.known}

    def add(self, refs: Iterable[ChunkRef]) -> None:
        self.known.update((ref.id, ref) for ref in refs)

    def close(self) -> None:
        """Nothing is open."""


@cache
def chunk(number: int) -> bytes:
    return bytes(CHUNK) if number == 0 else random.Random(number).randbytes(CHUNK)


def some_disk(chance: random.Random, before: Sequence[int] | None = None) -> list[int]:
    """Draw what a disk holds; from *before*, only some of it is new."""
    if before is None or chance.random() < 0.2:
        return [chance.randrange(_CONTENTS) for _ in range(_CHUNKS)]
    return [chance.randrange(_CONTENTS) if chance.random() < 0.3 else number for number in before]


def content(numbers: Sequence[int]) -> bytes:
    return b"".join(chunk(number) for number in numbers)


@cache
def history(number: int) -> History:
    """A repository after a few backups, forgettings and collections, undisturbed."""
    chance = random.Random(number)
    world = World(TINY)
    hints: dict[bytes, ChunkRef] = {}
    disks: dict[str, list[int]] = {}
    elsewhere = _elsewhere(world, random.Random(f"elsewhere {number}"))
    for _ in range(chance.randrange(3, 7)):
        guest = chance.choice(("web", "db"))
        disks[guest] = some_disk(chance, disks.get(guest))
        world.backup(content(disks[guest]), guest, hints=SharedHints(hints))
        if chance.random() < 0.4 and len(world.expected) > 1:
            world.forget(chance.choice(sorted(world.expected)))
        if chance.random() < 0.4:
            with one_round(chance.random() < 0.7):
                world.prune(0.0, 0.9)
    storage = world.repository.storage
    assert isinstance(storage, MemoryStorage)
    expected = {(name.guest, name.utc.isoformat()): data
                for name, data in (elsewhere.expected | world.expected).items()}
    return History(world.repository, storage.contents(), expected, hints, elsewhere.repository)


def _elsewhere(world: World, chance: random.Random) -> World:
    """Return another world with the same key, and snapshots of a guest that only it has."""
    other = World(TINY)
    other.repository = init_with_keys_of(world.repository, MemoryStorage(), _CLOCK)
    disk: list[int] | None = None
    for _ in range(3):
        disk = some_disk(chance, disk)
        other.backup(content(disk), "mail")
    return other


def move(source: Repository, target: Repository, name: SnapshotName) -> SnapshotName:
    """Copy a snapshot to a repository with the same key."""
    copied = Copier(source, target, SharedHints({}), _CLOCK, "host").copy(name)
    assert copied.moved
    return copied.name


@contextmanager
def one_round(wanted: bool) -> Iterator[None]:
    """Let collections end after one round, so that condemned packs are left for another."""
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            real = collect_module._Collector._round
            patch.setattr(collect_module._Collector, "_round",
                          lambda *args, **options: real(*args, **options) and False)
        yield


class Run:
    """One seeded run."""

    def __init__(self, seed: int, cast: Cast = Cast(), make: Make = in_memory) -> None:
        self.cast = cast
        self.chance = random.Random(seed)
        before = history(self.chance.randrange(HISTORIES))
        self.storage = make(before.contents)
        self.elsewhere = before.elsewhere
        self.expected = dict(before.expected)
        self.hints = SharedHints(dict(before.hints))
        loses, twice = self.chance.choice((0.0, 0.0, 0.02)), self.chance.choice((0.0, 0.0, 0.02))
        self.baton = Baton(self.chance, self._drawn(cast.stays, (0.0, 0.5, 0.85, 0.95)),
                           self._drawn(cast.crashes, (0.0, 0.0, 0.005, 0.03)))
        stepped = Stepped(self.storage, self.baton)
        self.repository = replace(before.repository, storage=retried(
            LossyStorage(stepped, self.chance, loses, twice), _CLOCK, first_pause_s=0.0))
        self.wrongly_dead = self._drawn(cast.wrongly_dead, (0.0, 0.0, 0.2))
        self.committed = set(list_snapshots(self.storage))
        self.forgotten: set[SnapshotName] = set()
        #: Guest and moment of backups that said that they made no snapshot.
        self.failed: set[tuple[str, str]] = set()
        self.owners: dict[str, Actor] = {}
        self.disks: dict[str, list[int]] = {}
        self.collections = 0

    def go(self) -> None:
        """Run; raises Broken, and Lost if anything is wrong afterwards."""
        letters = self.cast.actors or "bcf" + self.chance.choice("bc") + self.chance.choice("bfmrv")
        works = {"b": self._backs_up, "c": self._collects, "f": self._forgets, "m": self._moves,
                 "r": self._reads, "v": self._verifies}
        kinds = [works[letter] for letter in letters]
        actors = [Actor(f"{kind.__name__}{number}", partial_work(kind, number))
                  for number, kind in enumerate(kinds)]
        with self._patched():
            self.baton.run(actors)
            for actor in actors:
                if actor.error is not None:
                    raise Broken(f"{actor.name} ended with {actor.error!r}") from actor.error
        self.check()

    def check(self) -> None:
        """Look at what is there now, and after two collections that nobody disturbs."""
        self.repository = replace(self.repository, storage=self.storage)
        self._all_reads_back("after the run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collect_module, "is_dead", lambda *_: True)
            for number in ("first", "second"):
                collect(self.repository, "host", _CLOCK, fence_after_s=0.0, max_unused=0.0)
                self._all_reads_back(f"after the {number} collection")
        left = rubbish(self.repository)
        generation = latest_generation(self.storage, self.repository.key)
        left |= generation.condemned.keys() & list_packs(self.storage).keys()
        if left or list_sessions(self.storage, self.repository.key):
            raise Lost(f"left over: {left} {list_sessions(self.storage, self.repository.key)}")
        if len([*self.storage.list(GENERATIONS)]) > 2:
            raise Lost("old generations are left")

    def _all_reads_back(self, when: str) -> None:
        there = list_snapshots(self.storage)
        gone = self.committed - self.forgotten - set(there)
        if gone:
            raise Lost(f"{gone} is gone {when}")
        for name in there:
            if (name.guest, name.utc.isoformat()) in self.failed:
                raise Lost(f"{name} is there {when}, and its backup failed")
            try:
                found = read_snapshot(self.repository, name)
            except (StillframeError, KeyError) as error:
                raise Lost(f"{name} can't be read {when}: {error!r}") from error
            if found != self.expected[name.guest, name.utc.isoformat()]:
                raise Lost(f"{name} reads back otherwise {when}")

    def _drawn(self, wanted: float | None, among: Sequence[float]) -> float:
        drawn = self.chance.choice(among)
        return drawn if wanted is None else wanted

    # --- actors -------------------------------------------------------------------------------

    def _backs_up(self, number: int) -> None:
        for again in range(self.chance.choice((1, 1, 2))):
            guest, hour = self.chance.choice(("web", "db")), 1000 + number * 10 + again
            wanted = SnapshotName("host", guest, World.moment(hour), "")
            data = content(self._next_disk(wanted.guest))
            self.expected[wanted.guest, wanted.utc.isoformat()] = data
            audit = Audit(least_chunks=self.chance.choice((0, 2)), limit_s=1e9,
                          chance=random.Random(self.chance.getrandbits(64)))
            try:
                made = make_snapshot(
                    self.repository, SourceDisk(data), wanted, _CLOCK, hints=self.hints, audit=audit,
                    changes=lambda parent, data=data: self._changes(parent, data))  # type: ignore[misc]
            except (SessionFenced, StorageLost):
                self.failed.add((wanted.guest, wanted.utc.isoformat()))
                continue
            self.committed.add(made)

    def _moves(self, _: int) -> None:
        for name in self.chance.sample(list_snapshots(self.elsewhere.storage), self.chance.choice((1, 2))):
            try:
                self.committed.add(move(self.elsewhere, self.repository, name))
            except (SessionFenced, StorageLost):
                continue

    def _collects(self, _: int) -> None:
        for _ in range(self.chance.choice((1, 2))):
            try:
                collect(self.repository, "host", _CLOCK, fence_after_s=0.0, max_unused=0.0,
                        compact_below=self.chance.choice((0.0, 0.7, 0.9)))
                self.collections += 1
            except StorageLost:
                continue

    def _forgets(self, _: int) -> None:
        for _ in range(self.chance.choice((1, 2))):
            there = list_snapshots(self.repository.storage)
            if there:
                name = self.chance.choice(there)
                self.forgotten.add(name)
                forget(self.repository.storage, plan_forget([name]))

    def _reads(self, _: int) -> None:
        for name in list_snapshots(self.repository.storage)[-2:]:
            try:
                found = read_snapshot(self.repository, name)
            except (AssertionError, KeyError, RepositoryDamaged):
                if name not in self.forgotten:
                    raise
            else:
                assert found == self.expected[name.guest, name.utc.isoformat()]

    def _verifies(self, _: int) -> None:
        try:
            found = verify(self.repository, _CLOCK, Level.FULL)
        except StorageLost:
            return
        assert found.is_sound, found

    # --- what is not real ---------------------------------------------------------------------

    def _changes(self, parent: SnapshotName, data: bytes) -> list[Extent] | None:
        """Return what differs from a snapshot, and more now and then; None as if that were not known."""
        if self.chance.random() < 0.3:
            return None
        old, more = self.expected[parent.guest, parent.utc.isoformat()], self.chance.choice((0.0, 0.0, 0.2))
        changed = []
        for at in range(0, len(data), CHUNK):
            now = data[at : at + CHUNK]
            if now != old[at : at + CHUNK] or self.chance.random() < more:
                kind = Kind.HOLE if not any(now) and self.chance.random() < 0.5 else Kind.DATA
                changed.append(Extent(at, CHUNK, kind))
        return changed

    def _next_disk(self, guest: str) -> list[int]:
        """Draw what a guest's disk holds now: like one of three, or nearly what it held before."""
        if guest in self.disks and self.chance.random() < 0.6:
            disk = list(self.disks[guest])
            disk[self.chance.randrange(_CHUNKS)] = self.chance.randrange(_CONTENTS)
        else:
            disk = some_disk(self.chance, some_disk(random.Random(f"{guest}{self.chance.randrange(3)}")))
        self.disks[guest] = disk
        return disk

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """Inline pools, session IDs from the seed, and death by the schedule instead of by process."""

        def sid() -> str:
            made = self.chance.randbytes(16).hex()
            assert self.baton.current is not None
            self.owners[made] = self.baton.current
            return made

        def is_dead(record: SessionRecord, *_: object) -> bool:
            owner = self.owners[record.sid]
            return owner.crashed or owner.ended or self.chance.random() < self.wrongly_dead

        with pytest.MonkeyPatch.context() as patch:
            for name, module in sys.modules.items():
                if name.startswith("stillframe.repository.") and hasattr(module, "ThreadPoolExecutor"):
                    patch.setattr(module, "ThreadPoolExecutor", Inline)
            patch.setattr(session, "new_sid", sid)
            patch.setattr(session, "process_space", lambda: "model")
            patch.setattr(session, "start_mark", lambda _: "1")
            patch.setattr(collect_module, "is_dead", is_dead)
            yield


def partial_work(kind: Callable[[int], None], number: int) -> Callable[[], None]:
    """Return *kind* as an actor's work."""
    return lambda: kind(number)
