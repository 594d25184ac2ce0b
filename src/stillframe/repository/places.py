"""Getting slots from where they are now: their birth pack, or where a compaction moved them.

A reference says where a slot was born. The generation that was loaded may know a newer home; a home
that is gone, or has something else, means that the next home or a later generation may know better: it is
loaded and asked again, until there is no later one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeVar

from stillframe.errors import ObjectMissing, ObjectTruncated, RepositoryDamaged, SlotDamaged
from stillframe.repository.generation import (
    Generation,
    older_generations,
    readable_generation,
    with_older,
)
from stillframe.repository.layout import PackName
from stillframe.repository.opened import Repository
from stillframe.repository.pack import SlotRef, SlotRow, read_footer
from stillframe.repository.slots import Chunks
from stillframe.units import MIB

T = TypeVar("T")

_KEPT_FOOTERS = 64
_KEPT_CHUNKS_BYTES = 48 * MIB


class Places:
    """Reads slots of a repository. For several threads; memory is bounded."""

    def __init__(self, repository: Repository, generation: Generation | None = None) -> None:
        self.repository = repository
        self._generation = generation or readable_generation(repository.storage, repository.key)
        self._knows_older = False
        self._lock = threading.Lock()
        self._footers = lru_cache(_KEPT_FOOTERS)(self._read_rows)
        self._opened: OrderedDict[tuple[PackName, int], Chunks] = OrderedDict()
        self._most = max(2, _KEPT_CHUNKS_BYTES // (repository.parameters.slot_chunks
                                                   * repository.parameters.chunk_bytes))

    @property
    def generation(self) -> Generation:
        """The generation that is gone by now."""
        return self._generation

    def node(self, place: SlotRef) -> bytes:
        """Return a node of a tree. Raises SlotDamaged, StorageError."""
        return self._opened_with(place, self.repository.codec.open_node)

    def chunks(self, place: SlotRef) -> Chunks:
        """Return the chunks of a data slot; the last ones used are kept. Raises SlotDamaged, StorageError."""
        at = (place.pack, place.slot)
        with self._lock:
            if at in self._opened:
                self._opened.move_to_end(at)
                return self._opened[at]
        chunks = self._opened_with(place, self.repository.codec.open_chunks)
        with self._lock:
            self._opened[at] = chunks
            while len(self._opened) > self._most:
                self._opened.popitem(last=False)
        return chunks

    def row(self, place: SlotRef) -> SlotRow:
        """Return what the footer of a slot's home, by the loaded generation, says of it.

        Raises SlotDamaged, StorageError.
        """
        return self._row(self._generation.home(place.pack, place.slot), place)

    def located(self, place: SlotRef) -> SlotRef:
        """Return where the bytes of a slot are by the loaded generation (the pack is where they lie).

        Raises SlotDamaged, StorageError. What is read there must be opened by the birth in *place*.
        """
        home = self._generation.home(place.pack, place.slot)
        if home == place.pack:
            return place
        row = self._row(home, place)
        return SlotRef(home, place.slot, row.offset_bytes, row.stored_bytes)

    def _opened_with(self, place: SlotRef, opener: Callable[[PackName, int, bytes], T]) -> T:
        known, why = self._generation, ""
        while True:
            for stored in self._from_homes(known, place):
                try:
                    return opener(place.pack, place.slot, stored)
                except ValueError as error:  # a forged generation may name a home that has something else
                    why = why or str(error)
            newer = self._reloaded(known)
            if newer is known:
                raise SlotDamaged(place, why or "its pack is missing or cut short")
            known = newer

    def _from_homes(self, generation: Generation, place: SlotRef) -> Iterator[bytes]:
        """Yield the slot's stored bytes, unchecked, from each home that has them."""
        for home in generation.homes(place.pack, place.slot):
            try:
                offset, stored = place.offset_bytes, place.stored_bytes
                if home != place.pack:
                    row = self._row(home, place)
                    offset, stored = row.offset_bytes, row.stored_bytes
                content = self.repository.storage.get(home.key, offset, stored)
            except (ObjectMissing, ObjectTruncated, SlotDamaged):
                continue
            yield content

    def _row(self, home: PackName, place: SlotRef) -> SlotRow:
        try:
            row = self._footers(home).get((place.pack, place.slot))
        except ObjectMissing:
            raise
        except RepositoryDamaged as error:
            raise SlotDamaged(place, error.message.rstrip(".")) from error
        if row is None:
            raise SlotDamaged(place, f"the pack {home.text}, where it was moved to, does not have it")
        return row

    def _read_rows(self, name: PackName) -> dict[tuple[PackName, int], SlotRow]:
        size_bytes = self.repository.storage.stat(name.key).size_bytes
        rows = read_footer(self.repository.storage, name, size_bytes)
        return {(row.birth, row.slot): row for row in rows}

    def _reloaded(self, known: Generation) -> Generation:
        with self._lock:
            if self._generation is known:
                storage, key = self.repository.storage, self.repository.key
                latest = readable_generation(storage, key)
                if latest.number != known.number:
                    self._generation, self._knows_older = latest, False
                elif not self._knows_older:  # a forged one may leave out what those before it say
                    self._generation = with_older(latest, older_generations(storage, key, latest.number))
                    self._knows_older = True
            return self._generation
