"""Any sequence of writes, backups, forgetting, collections, crashes and damage against a dictionary.

The model of a repository is what each kept snapshot read when it was made.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stillframe.repository.catalog import list_snapshots
from stillframe.repository.heal import read_bad
from stillframe.repository.layout import Parameters, new_sid
from stillframe.repository.verify import Level, verify
from stillframe.storage.memory import MemoryStorage
from tests.unit.repository_disks import CHUNK
from tests.unit.repository_snapshots import World, read_snapshot

TINY = Parameters(id=new_sid(), created_at="", chunk_bytes=CHUNK, slot_chunks=4, leaf_chunks=4, inner_nodes=4,
                  pack_bytes=8 * CHUNK)
GUESTS = st.sampled_from(["web", "db"])
CHUNKS = st.integers(0, 39)
MOST_CHUNKS = 40


class Killed(BaseException):
    """The process died."""


class Repositories(RuleBasedStateMachine):
    """Two guests' disks, and the repository that they are backed up to."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(TINY)
        self.disks: dict[str, bytearray] = {}

    @initialize(seed=st.integers(0, 3))
    def disks_begin(self, seed: int) -> None:
        # What the guests have in common is stored once.
        common = random.Random(seed).randbytes(20 * CHUNK)
        for guest in ("web", "db"):
            own = random.Random(f"{guest}{seed}").randbytes(10 * CHUNK + 77)
            self.disks[guest] = bytearray(common + own)

    @rule(guest=GUESTS, chunk=CHUNKS, count=st.integers(1, 8), seed=st.integers(0, 5))
    def write(self, guest: str, chunk: int, count: int, seed: int) -> None:
        disk = self.disks[guest]
        begin = min(chunk * CHUNK, len(disk))
        end = min(begin + count * CHUNK, len(disk))
        disk[begin:end] = random.Random(f"{seed}{chunk}").randbytes(end - begin)

    @rule(guest=GUESTS, chunk=CHUNKS, count=st.integers(1, 20), offset=st.integers(0, CHUNK - 1))
    def zero(self, guest: str, chunk: int, count: int, offset: int) -> None:
        disk = self.disks[guest]
        begin = min(chunk * CHUNK + offset, len(disk))
        end = min(begin + count * CHUNK, len(disk))
        disk[begin:end] = bytes(end - begin)

    @rule(guest=GUESTS, chunks=st.integers(1, MOST_CHUNKS))
    def resize(self, guest: str, chunks: int) -> None:
        disk = self.disks[guest]
        self.disks[guest] = bytearray(bytes(disk[: chunks * CHUNK]).ljust(chunks * CHUNK, b"\0"))

    @rule(guest=GUESTS)
    def backup(self, guest: str) -> None:
        self.world.backup(bytes(self.disks[guest]), guest)

    @precondition(lambda self: self.world.expected)
    @rule(which=st.integers(0, 1000))
    def forget(self, which: int) -> None:
        names = sorted(self.world.expected)
        self.world.forget(names[which % len(names)])

    @rule()
    def prune(self) -> None:
        self.world.prune()
        assert self.world.rubbish() == set()

    @rule()
    def compact(self) -> None:
        self.world.prune(0.0, 1.0)
        assert self.world.rubbish() == set()

    @rule(guest=GUESTS, after=st.integers(1, 40))
    def crash_in_backup(self, guest: str, after: int) -> None:
        before = dict(self.world.expected)
        self._killed(after, lambda: self.world.backup(bytes(self.disks[guest]), guest))
        # Killed behind the commit, it is a snapshot.
        committed = {*list_snapshots(self.world.repository.storage)} - before.keys()
        self.world.expected = {**before, **{name: bytes(self.disks[guest]) for name in committed}}

    @rule(after=st.integers(1, 60), compact=st.booleans())
    def crash_in_prune(self, after: int, compact: bool) -> None:
        self._killed(after, lambda: self.world.prune(0.0, 1.0 if compact else 0.0))

    @precondition(lambda self: self.world.data_packs())
    @rule(which=st.integers(0, 1000), guest=GUESTS)
    def damage_and_heal(self, which: int, guest: str) -> None:
        """Damage a byte of a pack; verify; put it right again: nothing that was good may be lost by that."""
        packs = self.world.data_packs()
        pack = packs[which % len(packs)]
        at = which * 97 % self.world.packs()[pack]
        self.world.flip(pack.key, at)
        verify(self.world.repository, self.world.clock, Level.FULL)
        self.world.backup(bytes(self.disks[guest]), guest)
        self.world.flip(pack.key, at)
        verify(self.world.repository, self.world.clock, Level.FULL)
        found = verify(self.world.repository, self.world.clock, Level.FULL)
        assert found.is_sound, found

    @invariant()
    def the_newest_reads_back(self) -> None:
        assert list_snapshots(self.world.repository.storage) == sorted(self.world.expected)
        for name in sorted(self.world.expected)[-1:]:
            assert read_snapshot(self.world.repository, name) == self.world.expected[name]

    def teardown(self) -> None:
        self.world.check()
        found = verify(self.world.repository, self.world.clock, Level.FULL)
        assert found.is_sound, found
        self.world.prune(0.0, 1.0)
        self.world.prune(0.0, 1.0)
        assert self.world.rubbish() == set()
        self.world.check()
        for name in list(self.world.expected):
            self.world.forget(name)
        self.world.prune()
        assert self.world.packs() == {}
        assert not read_bad(self.world.repository.storage)

    def _killed(self, after: int, work: Callable[[], object]) -> None:
        """Do *work* in a process that is killed at its operation number *after*."""
        storage = self.world.repository.storage
        assert isinstance(storage, MemoryStorage)
        left = after

        def kill(_verb: str, _key: str) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                raise Killed

        storage.before = kill
        try:
            work()
        except Killed:
            self.world.all_are_dead = True
        finally:
            storage.before = None


TestRepositories = Repositories.TestCase
TestRepositories.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])

