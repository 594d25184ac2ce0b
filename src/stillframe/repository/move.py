"""Moving a snapshot's slots into a repository with the same key and sizes: as they are stored, unopened.

Nodes of the source's trees are read, to see which slots are needed; those that the target lacks are copied
into packs of the target's session as a compaction would (compact.py), each checked by its stored hash. Where
a generation says that a slot was moved, its bytes must open, too: whoever has the key can write one that is
not true (believe.py), and a snapshot is listed only once all of its slots were brought. They
keep their births, so trees and references stay as they are, and a generation says where they are (`adopt`).

What may be referred to in the target is what a writer might (FORMAT, "Writing"): slots in packs that were
listed since the session was opened and are not condemned in its generation, and there the same bytes as in
the source if the generation says that they were moved. Beneath a node that an older copy
has at the same place nothing is looked at, if that copy may be reused unseen.

A run that is ended adopts what it brought; one that is killed loses what it brought since the last time. So
the next one goes on there, as long as no prune came in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from stillframe.clock import Clock, utc_text
from stillframe.errors import ObjectMissing, RepositoryDamaged, SlotDamaged, StillframeError
from stillframe.repository.collect import list_packs
from stillframe.repository.compact import SlotCopier
from stillframe.repository.decide import homes_of
from stillframe.repository.generation import adopt
from stillframe.repository.heal import read_bad
from stillframe.repository.hurt import Trunk, trunks
from stillframe.repository.layout import PackName, SnapshotName
from stillframe.repository.manifest import Manifest
from stillframe.repository.nodes import leaf_slots
from stillframe.repository.opened import Repository
from stillframe.repository.pack import SlotRef, SlotRow
from stillframe.repository.places import Places
from stillframe.repository.session import Session
from stillframe.repository.tree import Tree
from stillframe.repository.walk import At, TreeWalk
from stillframe.units import GIB

#: Adopted at least so often, and then seldom enough that generations, which grow with it, stay few.
_ADOPT_BYTES = GIB
_ADOPT_SHARE = 8

#: Told of how many bytes were brought, of how many.
Report = Callable[[int, int], None]


class Mover:
    """Brings what one snapshot needs from *source* to *target*, where *session* is registered. Used once."""

    def __init__(
        self, source: Places, target: Repository, session: Session, clock: Clock,
        stop: Callable[[], StillframeError | None], report: Report,
    ) -> None:
        self._source = source
        self._target = target
        self._session = session
        self._clock = clock
        self._stop = stop
        self._report = report
        self._bad = read_bad(target.storage)
        self._there = Places(target, session.generation)
        self._listed = list_packs(target.storage).keys()
        #: The slots to bring: a bitset for each pack in which one was born; which are left; what they take.
        self._wanted: dict[PackName, int] = {}
        self._left: dict[PackName, int] = {}
        self._wanted_bytes = self._brought_bytes = 0

    def bring(self, name: SnapshotName, manifest: Manifest, before: tuple[Manifest, Manifest] | None) -> int:
        """Bring all that *manifest* refers to and the target lacks; return how many bytes that was.

        *before* is a snapshot of the source, and its copy that is listed in the target. Raises
        RepositoryDamaged where something is not what was stored, ObjectMissing, StorageError, and what *stop*
        returns.
        """
        known = self._vouched_for(name, before)
        for trunk in trunks(name, manifest):
            self._look(trunk, known.get(trunk.disk))
        copier = SlotCopier(
            self._source.repository.storage, self._target.storage, self._session.sid,
            self._target.parameters.pack_bytes, _refuse_bad, self._tick, self._opens)
        self._left = dict(self._wanted)
        for batch in self._batches():
            try:
                copier.copy(batch, self._wanted, self._source.generation)
            except StillframeError:
                with contextlib.suppress(StillframeError):  # what ended it counts
                    self._adopt(copier)
                raise
            self._adopt(copier)
        for pack, slots in self._left.items():
            if slots:
                _refuse_bad(pack, slots, "it is not where the latest generation says that it was moved to")
        return self._brought_bytes

    # --- what is needed -----------------------------------------------------------------------

    def _vouched_for(
        self, name: SnapshotName, before: tuple[Manifest, Manifest] | None,
    ) -> Mapping[str, Tree]:
        """Return the trees, in the source, beneath which nothing needs a look."""
        if before is None or self._bad:
            return {}
        original, copy = before
        if not self._session.generation.may_reuse_unseen(copy.sid, copy.generation):
            return {}
        there = {(trunk.disk, trunk.root) for trunk in trunks(name, copy)}
        return {trunk.disk: trunk.tree(self._source) for trunk in trunks(name, original)
                if (trunk.disk, trunk.root) in there}

    def _look(self, trunk: Trunk, known: Tree | None) -> None:
        """Add what a tree refers to and the target lacks to what is wanted."""
        parameters = self._target.parameters

        def leaf(_place: SlotRef, _index: int, node: bytes) -> None:
            self._ask_stop()
            for slot in leaf_slots(node, parameters.leaf_chunks):
                self._want(slot)

        walk = TreeWalk(leaf, _refuse_damage, lambda place, _: self._want(place),
                        lambda place, at: known is not None and _has(known, place, at))
        walk.add(trunk.root, parameters.height(trunk.size_bytes))
        walk.run(self._source)

    def _want(self, place: SlotRef) -> None:
        slots, bit = self._wanted.get(place.pack, 0), 1 << place.slot
        if slots & bit or not self._lacks(place):
            return
        self._wanted[place.pack] = slots | bit
        self._wanted_bytes += place.stored_bytes

    def _lacks(self, place: SlotRef) -> bool:
        if (place.pack, place.slot) in self._bad:
            raise SlotDamaged(place, f"it is known to be damaged in {self._target.address}")
        home = self._session.generation.home(place.pack, place.slot)
        if home not in self._listed or home in self._session.generation.condemned:
            return True
        if home != place.pack:
            self._refuse_false(home, place)
        return False

    def _refuse_false(self, home: PackName, place: SlotRef) -> None:
        """Raise RepositoryDamaged unless *home*, in the target, has what the source has.

        Nothing is brought then: beside a false home, a prune would not believe the true one.
        """
        there = self._there.row(place)
        try:
            is_true = there.digest == self._source.row(place).digest
        except (SlotDamaged, ObjectMissing):
            return  # what the source has lost can't be compared
        if not is_true:
            _refuse_bad(place.pack, 1 << place.slot,
                        f"{self._target.address} has other bytes in {home.text}, where it says that it is")

    # --- bringing it --------------------------------------------------------------------------

    def _batches(self) -> Iterator[list[tuple[PackName, int]]]:
        """Yield the packs of the source to copy out of, with their sizes: as many as are adopted together."""
        batch: list[tuple[PackName, int]] = []
        batch_bytes = 0
        for pack in sorted(homes_of(self._source.generation, self._wanted)):
            size_bytes = self._source.repository.storage.stat(pack.key).size_bytes
            batch.append((pack, size_bytes))
            batch_bytes += size_bytes
            if batch_bytes >= max(_ADOPT_BYTES, self._brought_bytes // _ADOPT_SHARE):
                yield batch
                batch, batch_bytes = [], 0
        if batch:
            yield batch

    def _adopt(self, copier: SlotCopier) -> None:
        moved = copier.take_moved()
        for birth, targets in moved.items():
            for slots in targets.values():
                self._left[birth] &= ~slots
        if moved:
            adopt(self._target.storage, self._target.key, moved, self._session.sid,
                  utc_text(self._clock.now()))

    def _opens(self, row: SlotRow, stored: memoryview) -> bool:
        try:
            self._target.key.open_slot(row.birth, row.slot, stored)
        except ValueError:
            return False
        return True

    def _tick(self, copied_bytes: int) -> None:
        self._brought_bytes += copied_bytes
        self._report(self._brought_bytes, self._wanted_bytes)
        self._ask_stop()

    def _ask_stop(self) -> None:
        if error := self._stop():
            raise error


def _has(known: Tree, place: SlotRef, at: At) -> bool:
    try:
        return known.node_at(at.level, at.index) == place
    except SlotDamaged:
        return False


def _refuse_damage(damage: SlotDamaged, _at: At) -> None:
    raise damage


def _refuse_bad(pack: PackName, _slots: int | None, why: str) -> None:
    raise RepositoryDamaged(f"A slot of the pack {pack.text} can't be moved: {why}.",
                            "stillframe verify --repo REPO   # names what is hurt")
