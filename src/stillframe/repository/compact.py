"""Copying slots into new packs: out of packs that mostly are not needed, or out of another repository.

Stored bytes are copied as they are; a compaction needs no key for it. A slot keeps its birth, for its key and
for all references; the next generation says where it is. What is not what was stored is left where it is: a
copy with a new hash would look good. Memory: one pack and one read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from stillframe.errors import ObjectTruncated, RepositoryDamaged
from stillframe.repository.generation import Generation
from stillframe.repository.layout import PackName
from stillframe.repository.pack import PackBuilder, SlotRow, read_footer
from stillframe.storage.model import Storage
from stillframe.storage.own import create_own
from stillframe.units import KIB, MIB

_GAP_BYTES = 64 * KIB
_READ_BYTES = 4 * MIB


@dataclass(slots=True)
class Copies:
    """What was copied: where to (by birth: new packs with their slots), and what was found bad."""

    moved: dict[PackName, dict[PackName, int]] = field(default_factory=dict)
    copied_bytes: int = 0
    damaged: list[tuple[PackName, int]] = field(default_factory=list)

    def put(self, birth: PackName, slot: int, target: PackName) -> None:
        """Note that a slot is in the stored pack *target*."""
        targets = self.moved.setdefault(birth, {})
        targets[target] = targets.get(target, 0) | 1 << slot


#: Told of what is not what was stored: birth, a bitset of its slots (None: the pack itself), why.
OnBad = Callable[[PackName, int | None, str], None]


class SlotCopier:
    """Copies slots out of packs of *source* into packs of *target* that the session *sid* creates.

    *on_bad* may raise, which ends the copying. *is_true* is asked of slots that were copied before: their row
    says only what whoever made that copy put there. *tick* is told of each stretch that was copied, in bytes,
    and may raise, too.
    """

    def __init__(self, source: Storage, target: Storage, sid: str, pack_bytes: int, on_bad: OnBad,
                 tick: Callable[[int], None] = lambda _: None,
                 is_true: Callable[[SlotRow, memoryview], bool] = lambda _row, _stored: True) -> None:
        self._source = source
        self._target = target
        self._sid = bytes.fromhex(sid)
        self._pack_bytes = pack_bytes
        self._on_bad = on_bad
        self._tick = tick
        self._is_true = is_true
        self._numbers: dict[str, int] = {}
        self._builder: PackBuilder | None = None
        self._held: list[tuple[PackName, int]] = []
        self.copies = Copies()

    def copy(
        self, sources: Iterable[tuple[PackName, int]], live: Mapping[PackName, int], generation: Generation
    ) -> Copies:
        """Copy the *live* slots whose home is one of *sources* (packs and their sizes).

        Return all that was copied so far. Raises ObjectMissing if a source is gone, which means that another
        collector went on; StorageError.
        """
        for source, size_bytes in sorted(sources):
            if self._builder is not None and self._builder.name.kind != source.kind:
                self._close()
            try:
                rows = read_footer(self._source, source, size_bytes)
            except RepositoryDamaged as error:
                self._on_bad(source, None, error.message)
                self.copies.damaged.append((source, 0))
                continue
            wanted = [row for row in rows if live.get(row.birth, 0) >> row.slot & 1
                      and generation.home(row.birth, row.slot) == source]
            self._copy_rows(source, wanted)
        self._close()
        return self.copies

    def take_moved(self) -> dict[PackName, dict[PackName, int]]:
        """Return what was copied into stored packs since this was called last."""
        moved, self.copies.moved = self.copies.moved, {}
        return moved

    def _copy_rows(self, source: PackName, wanted: list[SlotRow]) -> None:
        for run in _runs(sorted(wanted, key=lambda row: row.offset_bytes)):
            begin = run[0].offset_bytes
            end = max(row.offset_bytes + row.stored_bytes for row in run)
            try:
                stored = memoryview(self._source.get(source.key, begin, end - begin))
            except ObjectTruncated:
                stored = memoryview(b"")
            for row in run:
                at = row.offset_bytes - begin
                self._add(source, row, stored[at : at + row.stored_bytes])
            self._tick(sum(row.stored_bytes for row in run))

    def _add(self, source: PackName, row: SlotRow, stored: memoryview) -> None:
        if not row.is_intact(stored) or (row.birth != source and not self._is_true(row, stored)):
            self._on_bad(row.birth, 1 << row.slot, f"its bytes in {source.text} are not what was stored")
            self.copies.damaged.append((row.birth, row.slot))
            return
        if self._builder is None:
            number = self._numbers.get(source.kind, 0)
            self._numbers[source.kind] = number + 1
            self._builder = PackBuilder(PackName(source.kind, self._sid, number))
        self._builder.add_moved(row, stored)
        self._held.append((row.birth, row.slot))
        self.copies.copied_bytes += row.stored_bytes
        if self._builder.size_bytes >= self._pack_bytes:
            self._close()

    def _close(self) -> None:
        if self._builder is None:
            return
        create_own(self._target, self._builder.name.key, self._builder.finished())
        for birth, slot in self._held:
            self.copies.put(birth, slot, self._builder.name)
        self._builder, self._held = None, []


def _runs(rows: list[SlotRow]) -> Iterator[list[SlotRow]]:
    """Yield stretches of a pack that are worth one read."""
    run: list[SlotRow] = []
    for row in rows:
        if run:
            gap = row.offset_bytes - run[-1].offset_bytes - run[-1].stored_bytes
            length = row.offset_bytes + row.stored_bytes - run[0].offset_bytes
            if gap > _GAP_BYTES or length > _READ_BYTES:
                yield run
                run = []
        run.append(row)
    if run:
        yield run
