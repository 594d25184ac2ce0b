"""Whether slots are where a generation says that they were moved to.

Whoever has the key can write a generation: a stolen host, too. Of all that one says, only *moved* could
make a collector delete what is needed: by naming a pack that does not have the slots, or by leaving out the
one that has. So a collector believes neither. What any generation that is still there says counts as well;
and a copy counts only if it is the same to the byte as an older one that is still there.

Usually this reads nothing: what slots were copied from is deleted by the prune that copied them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillframe.errors import ObjectMissing, ObjectTruncated, RepositoryDamaged, RepositoryNewer
from stillframe.repository.decide import with_known_homes
from stillframe.repository.generation import Copied, Generation, older_generations, with_older
from stillframe.repository.layout import PackName
from stillframe.repository.opened import Repository
from stillframe.repository.pack import SlotRow, footer_of, read_footer

#: So many times the usual size, with a slot more, a pack may have.
_LARGEST = 2


@dataclass(frozen=True, slots=True)
class _Claim:
    """That *slots* of *birth* were copied; *sources* have them, too, if they are whole."""

    birth: PackName
    slots: int
    sources: Sequence[PackName]


def believed(
    repository: Repository, latest: Generation, packs: Mapping[PackName, int], own: Copied,
) -> tuple[Generation, tuple[PackName, ...]]:
    """Return *latest* as a collector may go by it, and the packs that do not have what it says of them.

    *packs* are those listed, with their sizes; what is in *own* the collector has copied itself. Homes that
    are gone are left out. Of a pack that is not as it should be, only those slots are that another has:
    what nobody else has may be there still. Raises StorageError.
    """
    older = older_generations(repository.storage, repository.key, latest.number)
    all_said = with_older(latest, older)
    moved = {birth: dict(homes) for birth, homes in all_said.moved.items()}
    seen = with_known_homes(all_said, packs)
    false = [(home, birth, slots) for home, claims in _claims(seen, packs, own).items()
             for birth, slots in _false_slots(repository, packs, home, claims).items()]
    for home, birth, slots in false:
        moved[birth][home] &= ~slots
    true = latest.saying({birth: [(home, slots) for home, slots in known.items() if slots]
                          for birth, known in moved.items()})
    return with_known_homes(true, packs), tuple(sorted({home for home, _, _ in false}))


def _claims(
    generation: Generation, packs: Mapping[PackName, int], own: Copied,
) -> dict[PackName, list[_Claim]]:
    """Return what can be checked of each pack that is said to have copies."""
    found: dict[PackName, list[_Claim]] = {}
    for birth, homes in generation.moved.items():
        for index, (home, slots) in enumerate(homes):
            unknown = slots & ~own.get(birth, {}).get(home, 0)
            sources = [each for each in (*(other for other, _ in homes[index + 1:]), birth)
                       if each in packs and each != home]
            if unknown and sources:
                found.setdefault(home, []).append(_Claim(birth, unknown, sources))
    return found


def _false_slots(
    repository: Repository, packs: Mapping[PackName, int], home: PackName, claims: Sequence[_Claim],
) -> dict[PackName, int]:
    """Return, by birth, the slots that a source has and that *home* has not, byte for byte."""
    content, copies = _content(repository, home, packs[home])
    rows: dict[PackName, tuple[SlotRow, ...]] = {}
    found: dict[PackName, int] = {}
    for claim in claims:
        for source in claim.sources:
            if source not in rows:
                rows[source] = _rows(repository, source, packs[source])
            for row in rows[source]:
                if row.birth != claim.birth or not claim.slots >> row.slot & 1:
                    continue
                copy = copies.get((row.birth, row.slot))
                if copy is None or not row.is_intact(content[copy.offset_bytes:][:copy.stored_bytes]):
                    found[row.birth] = found.get(row.birth, 0) | 1 << row.slot
    return found


def _content(
    repository: Repository, home: PackName, size_bytes: int,
) -> tuple[memoryview, dict[tuple[PackName, int], SlotRow]]:
    """Return a pack and the rows of its slots; nothing if it is none that could be read."""
    parameters = repository.parameters
    if size_bytes <= _LARGEST * (parameters.pack_bytes + parameters.slot_chunks * parameters.chunk_bytes):
        with contextlib.suppress(ObjectMissing, ObjectTruncated, RepositoryDamaged, RepositoryNewer):
            content = memoryview(repository.storage.get(home.key))
            return content, {(row.birth, row.slot): row for row in footer_of(home, content)}
    return memoryview(b""), {}


def _rows(repository: Repository, source: PackName, size_bytes: int) -> tuple[SlotRow, ...]:
    try:
        return read_footer(repository.storage, source, size_bytes)
    except (ObjectMissing, RepositoryDamaged, RepositoryNewer):
        return ()
