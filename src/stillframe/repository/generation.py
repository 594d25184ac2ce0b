"""Generations: what the collectors agreed on. A sealed object, created once at each number.

A generation says which packs are *condemned* (nothing referred to them; since which generation), and
where slots were *moved* by compactions, or by copies out of another repository. A session names the
generation that it read: it refers to nothing condemned in it, so a pack condemned in g can go once no session
is older than g.

    moved   {"p/<sid>/<n>": [["p/<sid>/<n>" of the pack they are in now, hex bitset of slots], ...]}
    marked  [sid of a snapshot, ...]

The newest home comes first. A slot's home is the first that has it, else the pack it was born in. An
entry stays as long as the pack it names may exist: a writer that read an older generation may commit a
reference to the slot at any time, and then only this entry knows where it is.

*Marked* are the newest snapshots of the guests, all of whose slots the collector saw to be needed: so none of
them is in a pack that this generation condemns. Nothing like that is known of a snapshot that was committed
meanwhile by a session of an older generation.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import msgspec

from stillframe.errors import (
    ObjectExists,
    ObjectMissing,
    ObjectTruncated,
    RepositoryDamaged,
    RepositoryNewer,
    StorageLost,
)
from stillframe.repository.crypto import DomainKey
from stillframe.repository.layout import (
    FORMAT_VERSION,
    GENERATIONS,
    MAX_GENERATION,
    PackName,
    check_version,
    generation_key,
    generation_number,
    pack_name,
)
from stillframe.storage.model import Storage
from stillframe.storage.own import create_own

_TRIES = 8
_ADOPT_TRIES = 100
#: Where each slot was copied to: by birth, the new packs with a bitset of its slots in each.
Copied = Mapping[PackName, Mapping[PackName, int]]


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    n: int
    condemned: Mapping[str, int]
    moved: Mapping[str, list[tuple[str, str]]]
    by: str
    at: str
    marked: Sequence[str] = ()
    version: int = FORMAT_VERSION


class Generation:
    """One generation, as the collector *by* made it *at* a time. Number 0 is the one before any."""

    def __init__(
        self, number: int, condemned: Mapping[PackName, int] | None = None,
        moved: Mapping[PackName, list[tuple[PackName, int]]] | None = None, by: str = "", at: str = "",
        marked: Iterable[str] = (),
    ) -> None:
        self.number = number
        self.condemned = dict(condemned or {})
        self.moved = {birth: list(homes) for birth, homes in (moved or {}).items()}
        self.by = by
        self.at = at
        #: The SIDs of snapshots.
        self.marked = frozenset(marked)

    def homes(self, birth: PackName, slot: int) -> Iterator[PackName]:
        """Yield the packs that may hold a slot, the right one first; the last is where it was born."""
        for home, slots in self.moved.get(birth, ()):
            if slots >> slot & 1:
                yield home
        yield birth

    def home(self, birth: PackName, slot: int) -> PackName:
        """Return the pack that holds a slot by this generation."""
        return next(self.homes(birth, slot))

    def may_reuse(self, birth: PackName, slot: int) -> bool:
        """Return whether a session of this generation may refer to a slot."""
        return self.home(birth, slot) not in self.condemned

    def may_reuse_unseen(self, sid: str, generation: int | None) -> bool:
        """Return whether a session of this generation may refer to all that a listed snapshot refers to.

        *sid* is the snapshot's, *generation* what its session went by, None if that is not known. Then
        `may_reuse` is true of every slot beneath it: the collector of this generation saw that they are
        needed, or the snapshot's own session asked the same of this generation.
        """
        return not self.condemned or sid in self.marked or generation == self.number

    def saying(self, moved: Mapping[PackName, list[tuple[PackName, int]]]) -> Generation:
        """Return this generation, but for where slots were *moved* to."""
        return Generation(self.number, self.condemned, moved, self.by, self.at, self.marked)

    def moved_with(self, copied: Copied) -> dict[PackName, list[tuple[PackName, int]]]:
        """Return `moved` with what was *copied* since."""
        moved = {birth: list(homes) for birth, homes in self.moved.items()}
        for birth, targets in copied.items():
            moved[birth] = [*targets.items(), *moved.get(birth, ())]
        return moved

    @cached_property
    def targets(self) -> frozenset[PackName]:
        """Every pack that something was moved to."""
        return frozenset(home for homes in self.moved.values() for home, _ in homes)


def latest_number(storage: Storage) -> int:
    """Return the number of the latest generation, 0 if there is none. One listing."""
    return max(generation_numbers(storage), default=0)


def generation_numbers(storage: Storage) -> Iterator[int]:
    """Yield the numbers of the generations that there are. What has another name is not ours."""
    for listed in storage.list(GENERATIONS):
        with contextlib.suppress(ValueError):
            yield generation_number(listed.key)


def latest_generation(storage: Storage, domain_key: DomainKey) -> Generation:
    """Return the latest generation. Raises RepositoryDamaged, RepositoryNewer."""
    for _ in range(_TRIES):
        number = latest_number(storage)
        if number == 0:
            return Generation(0)
        key = generation_key(number)
        try:
            return decode_generation(storage.get(key), key, domain_key)
        except ObjectMissing:
            continue  # a collector went on meanwhile and removed it: it is not the latest any more
        except RepositoryDamaged as error:  # nobody knows what may be referred to, or deleted
            error.next_command = _moving_out(storage)
            raise
    raise RepositoryDamaged("The latest generation vanishes each time it is read.",
                            "stillframe prune --repo REPO --dry-run   # is another prune running?")


def readable_generation(storage: Storage, domain_key: DomainKey) -> Generation:
    """Return the latest generation, or the last one before if that is damaged. For reading snapshots alone.

    By the one before, slots are where they were before the last compaction: those packs are only condemned
    by the latest, so they are still there, but for a few that had been condemned earlier. Who writes
    or deletes must know what the latest condemns. Raises RepositoryDamaged, RepositoryNewer.
    """
    try:
        return latest_generation(storage, domain_key)
    except (RepositoryDamaged, ObjectTruncated):
        before = next(older_generations(storage, domain_key, latest_number(storage)), None)
        if before is None:
            raise
        return before


def older_generations(storage: Storage, domain_key: DomainKey, number: int) -> Iterator[Generation]:
    """Yield the generations before *number* that can be read, the newest first. Raises StorageError."""
    for each in sorted((each for each in generation_numbers(storage) if each < number), reverse=True):
        key = generation_key(each)
        with contextlib.suppress(ObjectMissing, ObjectTruncated, RepositoryDamaged, RepositoryNewer):
            yield decode_generation(storage.get(key), key, domain_key)


def with_older(latest: Generation, older: Iterable[Generation]) -> Generation:
    """Return *latest* with the homes that *older* ones name, too, behind those that it names itself."""
    moved: dict[PackName, dict[PackName, int]] = {}
    for said in (latest, *older):
        for birth, homes in said.moved.items():
            known = moved.setdefault(birth, {})
            for home, slots in homes:
                known[home] = known.get(home, 0) | slots
    return latest.saying({birth: list(known.items()) for birth, known in moved.items()})


def create_generation(storage: Storage, generation: Generation, domain_key: DomainKey) -> bool:
    """Create the generation; return False if another collector was first with its number.

    Raises RepositoryDamaged if there is no such number: no repository is pruned so often, so somebody who has
    the key made the one before. Numbers can't begin anew, since sessions go by them.
    """
    if generation.number > MAX_GENERATION:
        raise RepositoryDamaged(
            f"No generation can come after {generation_key(MAX_GENERATION)}, which somebody with the key "
            "must have written. Nothing is lost, and backups go on, but nothing can be pruned here any more.",
            _moving_out(storage))
    key = generation_key(generation.number)
    try:
        create_own(storage, key, encode_generation(generation, key, domain_key))
    except ObjectExists:
        return False
    return True


def _moving_out(storage: Storage) -> str:
    """Return what to do where no next generation can be made: snapshots are read without one."""
    address = shlex.quote(storage.address)
    return (f"stillframe init NEW --same-keys-as {address}, then: stillframe copy --from {address} --to NEW"
            "   # and back up to NEW from then on")


def adopt(storage: Storage, domain_key: DomainKey, copied: Copied, by: str, at: str) -> None:
    """Make the latest generation say where slots are that were copied into new packs, and nothing else new.

    What was copied may be referred to once this returns. Whoever decided by an older generation loses the
    next number to this one, and decides again. *by* is the session of those packs. Raises StorageError.
    """
    packs = {pack for targets in copied.values() for pack in targets}
    for _ in range(_ADOPT_TRIES):
        latest = latest_generation(storage, domain_key)
        # Looked at after creating, too: a number that was taken, superseded and removed can be created again.
        if packs <= latest.targets:
            return
        create_generation(
            storage, Generation(latest.number + 1, latest.condemned, latest.moved_with(copied), by, at,
                                latest.marked), domain_key)
    raise StorageLost(f"The storage {storage.address} is changed by prunes faster than this run can follow.",
                      "run the same command again when they are done")


def encode_generation(generation: Generation, key: str, domain_key: DomainKey) -> bytes:
    """Return the object *key* that says it."""
    body = _Body(
        n=generation.number, by=generation.by, at=generation.at, marked=sorted(generation.marked),
        condemned={pack.text: since for pack, since in generation.condemned.items()},
        moved={birth.text: [(home.text, f"{slots:x}") for home, slots in homes]
               for birth, homes in generation.moved.items()},
    )
    return domain_key.seal_object(key, msgspec.json.encode(body, order="sorted"))


def decode_generation(content: bytes, key: str, domain_key: DomainKey) -> Generation:
    """Return the generation of the object *key*. Raises RepositoryDamaged, RepositoryNewer."""
    try:
        body = msgspec.json.decode(domain_key.open_object(key, content), type=_Body)
        check_version(body.version, f"{key} is a generation")
        if body.n != generation_number(key):
            raise ValueError(f"it says that it is number {body.n}")
        return Generation(
            body.n, {pack_name(pack): since for pack, since in body.condemned.items()},
            {pack_name(birth): [(pack_name(home), int(slots, 16)) for home, slots in homes]
             for birth, homes in body.moved.items()}, body.by, body.at, body.marked,
        )
    except (msgspec.DecodeError, ValueError) as error:
        raise RepositoryDamaged(f"The generation {key} is not valid: {error}.",
                                "stillframe verify --repo REPO") from error
