"""Looking whether all that snapshots need is there, and is what was stored.

    structure   all trees decode, and every slot they name is where it should be
    stored      besides, the bytes of packs have the hashes that were stored with them; no key is needed
    full        besides, slots can be opened, and their chunks have the IDs that slots and trees say

All trees are walked each time; of packs, those that were verified least recently, as many as asked for.
Damage is written down (heal.py), so that the next backup that sees the same data stores it again. What
vanishes because a prune runs at the same time is no damage.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stillframe.clock import Clock
from stillframe.errors import ObjectMissing, ObjectTruncated, RepositoryDamaged, RepositoryNewer
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.check import content_checker
from stillframe.repository.collect import list_packs
from stillframe.repository.decide import held_by
from stillframe.repository.generation import decode_generation, latest_generation
from stillframe.repository.heal import BadSlots, bits, clear_bad, read_bad, read_heals, record_bad
from stillframe.repository.hurt import Trunk
from stillframe.repository.keyslots import decode_slot
from stillframe.repository.layout import (
    GENERATIONS,
    HEALED,
    KEY_SLOTS,
    SESSIONS,
    PackKind,
    PackName,
    SnapshotName,
)
from stillframe.repository.manifest import is_tombstone
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.repository.scrub import Finding, Progress, Scrub, named
from stillframe.repository.survey import Hit, HitSearch, Survey, expect, hits_of, read_snapshots
from stillframe.repository.verified import Subset
from stillframe.storage.model import Storage

#: Chunks whose IDs are compared with the trees in one go, which takes a walk and about 16 bytes for each.
_EXPECTED_CHUNKS = 1 << 22


class Level(enum.Enum):
    """How thoroughly; each does what those before it do."""

    STRUCTURE = "structure"
    STORED = "stored"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Hurt:
    """What can't be read of one disk of a snapshot: byte ranges (begin, end), in order.

    *disk* is a disk's target or a file's path. With *is_tree*, a node of the tree is damaged: a later
    backup makes whole snapshots again, but can't heal this one. Else the next backup that sees
    the same data heals it.
    """

    snapshot: SnapshotName
    disk: str
    ranges: tuple[tuple[int, int], ...]
    is_tree: bool

    @property
    def size_bytes(self) -> int:
        """How much of it is lost."""
        return sum(end - begin for begin, end in self.ranges)


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification did and found.

    `findings`: objects that are damaged, whoever needs them. `hurt`: what of which snapshot can't be read
    until it is healed. `unreadable`: snapshots whose manifests are damaged. `healed`: what is damaged where
    it was stored first, and read from where a later backup stored it. `is_complete`: whether all that is hurt
    is named.
    """

    level: Level
    snapshots: int = 0
    packs: int = 0
    checked_packs: int = 0
    checked_slots: int = 0
    checked_bytes: int = 0
    findings: tuple[Finding, ...] = ()
    hurt: tuple[Hurt, ...] = ()
    healed: tuple[Hurt, ...] = ()
    unreadable: tuple[SnapshotName, ...] = ()
    is_complete: bool = True

    @property
    def is_sound(self) -> bool:
        """Whether every snapshot can be read in full, and nothing is damaged that could hurt one."""
        return not (self.hurt or self.unreadable) and all(finding.is_mended for finding in self.findings)


def verify(
    repository: Repository, clock: Clock, level: Level = Level.STRUCTURE, subset: Subset | None = None,
    progress: Progress = lambda _done, _all: None,
) -> Verification:
    """Verify, and write down what is bad. Raises StorageError."""
    return _Verifier(repository, clock, level, subset or Subset(), progress).run()


def verify_stored(
    storage: Storage, clock: Clock, subset: Subset | None = None,
    progress: Progress = lambda _done, _all: None,
) -> Verification:
    """Check the stored bytes of packs, and write down what is bad; no key is needed. Raises StorageError.

    Nothing can be said about snapshots, nor about packs that are missing; what no snapshot needs is
    checked like the rest.
    """
    scrub = Scrub(storage, clock, progress)
    packs = list_packs(storage)
    due = scrub.verified.due(packs, subset or Subset(), full=False) if packs else []
    scrub.expect(sum(packs[pack] for pack in due))
    scrub.run([(pack, packs[pack]) for pack in due], None)
    scrub.record()
    scrub.save(packs)
    return Verification(Level.STORED, 0, len(packs), scrub.packs, scrub.slots, scrub.size_bytes,
                        tuple(scrub.findings()))


class _Verifier:
    """One verification with the key."""

    def __init__(
        self, repository: Repository, clock: Clock, level: Level, subset: Subset, progress: Progress
    ) -> None:
        self._repository = repository
        self._storage = repository.storage
        self._clock = clock
        self._level = level
        self._subset = subset
        self._scrub = Scrub(repository.storage, clock, progress)
        self._findings: list[Finding] = []

    def run(self) -> Verification:
        """Do it."""
        self._findings.extend(_small_objects(self._repository))
        # Snapshots first: what they refer to was stored before they were listed.
        names = list_snapshots(self._storage)
        every, unreadable = read_snapshots(self._repository, names)
        self._findings.extend(Finding(name.key, why) for name, why in unreadable.items())
        try:
            places = Places(self._repository, latest_generation(self._storage, self._repository.key))
        except (RepositoryDamaged, RepositoryNewer, ObjectTruncated):
            # Named above. What was moved can't be found: nothing more can be told, and nothing recorded.
            return Verification(self._level, len(names), findings=tuple(self._findings),
                                unreadable=tuple(unreadable), is_complete=False)
        packs = list_packs(self._storage)
        survey = Survey(places, packs)
        survey.run(every)
        if self._level is not Level.STRUCTURE:
            self._check_packs(places, packs, every, survey.live)
        suspects = self._suspects(places, survey)
        search, hurt = self._hurt(suspects, names if suspects or survey.nodes else ())
        self._record(survey, search, hurt)
        self._scrub.save(packs)
        return Verification(
            self._level, len(names), len(packs), self._scrub.packs, self._scrub.slots,
            self._scrub.size_bytes, (*self._findings, *self._scrub.findings(search.unhealed)),
            self._ranges(hurt, healed=False), self._ranges(hurt, healed=True), tuple(unreadable),
            search.is_complete)

    def _check_packs(self, places: Places, packs: Mapping[PackName, int], every: Sequence[Trunk],
                     live: Mapping[PackName, int]) -> None:
        """Check the packs that are due, of those that hold something that is needed."""
        born: dict[PackName, list[PackName]] = {}
        chunks: dict[PackName, int] = {}
        for birth, slots in live.items():
            for home, held in held_by(places.generation, birth, slots):
                born.setdefault(home, []).append(birth)
                most = held.bit_count() * self._repository.parameters.slot_chunks
                chunks[home] = chunks.get(home, 0) + (most if birth.kind == PackKind.DATA.value else 0)
        needed = {pack: size for pack, size in packs.items() if pack in born}
        if not needed:
            return
        full = self._level is Level.FULL
        due = self._scrub.verified.due(needed, self._subset, full=full)
        self._scrub.expect(sum(needed[pack] for pack in due))
        for batch in _batches(due, chunks) if full else [due]:
            check = None
            if full:
                births = {birth for pack in batch for birth in born[pack] if chunks[pack]}
                check = content_checker(self._repository, expect(places, every if births else (), births))
            self._scrub.run([(pack, needed[pack]) for pack in batch], check)

    def _suspects(self, places: Places, survey: Survey) -> BadSlots:
        """Return the slots that may be lost: found bad, recorded earlier, or in packs that are not whole."""
        suspects: dict[PackName, int | None] = dict(read_bad(self._storage).packs)

        def add(birth: PackName, slots: int) -> None:
            known = suspects.get(birth, 0)
            suspects[birth] = None if known is None else known | slots

        for found in (survey.missing, self._scrub.bad):
            for birth, slots in found.items():
                add(birth, slots)
        doubtful = {*self._scrub.vanished, *self._scrub.unreadable}
        if doubtful:
            for birth, slots in survey.live.items():
                for home, held in held_by(places.generation, birth, slots):
                    if home in doubtful:
                        add(birth, held)
        return BadSlots(suspects)

    def _hurt(
        self, suspects: BadSlots, names: Iterable[SnapshotName],
    ) -> tuple[HitSearch, list[tuple[Trunk, list[Hit]]]]:
        """Return which trees of *names* are hurt, and where, and the search that found them.

        By what is there now: a prune may have run meanwhile. If snapshots were forgotten during the search
        as well, what they needed may be gone: then it is done again without them.
        """
        while True:
            every, _ = read_snapshots(self._repository, names)
            search = HitSearch(Places(self._repository), suspects, read_heals(self._repository))
            hits = search.run(every)
            hurt = [(trunk, found) for trunk in every if (found := hits_of(search.places, trunk, hits))]
            names = {trunk.snapshot for trunk in every}
            if not (hits or search.lost) or names <= set(list_snapshots(self._storage)):
                return search, hurt

    def _record(self, survey: Survey, search: HitSearch, hurt: Sequence[tuple[Trunk, list[Hit]]]) -> None:
        """Write down what is bad, and report what the check of packs has not found by itself."""
        known = read_bad(self._storage)
        self._scrub.record()
        lost: dict[PackName, int] = {}
        nodes = {hit.place for _, hits in hurt for hit in hits if hit.is_node}
        for slot in search.lost | nodes:
            lost[slot.pack] = lost.get(slot.pack, 0) | 1 << slot.slot
        for pack, why in survey.damaged.items():
            if pack not in self._scrub.unreadable:
                self._findings.append(Finding(pack.key, why))
                record_bad(self._storage, pack, None, why, self._clock.now())
        for pack, slots in sorted(lost.items()):
            if new := slots & ~self._scrub.bad.get(pack, 0):
                why = f"{named(bits(new))} can't be read"
                is_mended = not any((pack, slot) in search.unhealed for slot in bits(new))
                self._findings.append(Finding(pack.key, why, is_mended))
                if known.within(pack, new) != new:
                    record_bad(self._storage, pack, new, why, self._clock.now())
        if self._level is Level.FULL:
            # Put right by hand, say from a copy of the repository.
            for pack in known.packs.keys() & self._scrub.sound - lost.keys() - self._scrub.bad.keys():
                clear_bad(self._storage, pack, None, self._clock.now())

    def _ranges(self, every: Sequence[tuple[Trunk, list[Hit]]], *, healed: bool) -> tuple[Hurt, ...]:
        found = []
        for trunk, hits in every:
            for is_tree in (True, False):
                stretches = [(first, last) for hit in hits if hit.is_node is is_tree
                             for first, last, is_healed in hit.stretches if is_healed is healed]
                ranges = _joined(stretches, self._repository.parameters.chunk_bytes, trunk.size_bytes)
                if ranges:
                    found.append(Hurt(trunk.snapshot, trunk.disk, ranges, is_tree))
        return tuple(found)


def _small_objects(repository: Repository) -> Iterator[Finding]:
    """Yield what is wrong with key slots, sessions, generations and heals."""
    storage, key = repository.storage, repository.key
    readers: tuple[tuple[str, Callable[[str, bytes], object]], ...] = (
        (KEY_SLOTS, decode_slot),
        (SESSIONS, key.open_object),
        (GENERATIONS, lambda name, content: decode_generation(content, name, key)),
        (HEALED, lambda name, content: is_tombstone(len(content)) or key.open_object(name, content)),
    )
    for prefix, read in readers:
        for listed in list(storage.list(prefix)):
            try:
                read(listed.key, storage.get(listed.key))
            except ObjectMissing:
                continue
            except (RepositoryDamaged, RepositoryNewer, ObjectTruncated) as error:
                yield Finding(listed.key, error.message)


def _batches(due: Iterable[PackName], chunks: Mapping[PackName, int]) -> Iterator[list[PackName]]:
    batch: list[PackName] = []
    room = _EXPECTED_CHUNKS
    for pack in due:
        if batch and chunks[pack] > room:
            yield batch
            batch, room = [], _EXPECTED_CHUNKS
        batch.append(pack)
        room -= chunks[pack]
    if batch:
        yield batch


def _joined(
    stretches: Iterable[tuple[int, int]], chunk_bytes: int, size_bytes: int
) -> tuple[tuple[int, int], ...]:
    """Return stretches of chunks (first, last) as ranges of bytes, in order, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for first, last in sorted(stretches):
        begin, end = first * chunk_bytes, min((last + 1) * chunk_bytes, size_bytes)
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        elif begin < end:
            ranges.append((begin, end))
    return tuple(ranges)
