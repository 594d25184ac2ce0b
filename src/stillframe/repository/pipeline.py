"""From chunks to packs in the storage: compress on threads, seal and place in order, upload two at a time.

Slots are compressed by a pool, in any order, and taken back in theirs. Only then is a slot given its
pack and number, sealed and appended: so packs hold slots in the order of the disk, their sizes are
known when they are closed, and the same disk makes the same packs however threads were scheduled.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

from stillframe.repository.jobs import InOrder
from stillframe.repository.layout import PackKind, PackName
from stillframe.repository.opened import Repository
from stillframe.repository.pack import ROW_BYTES, PackBuilder, SlotRef

#: Packs on their way to the storage, besides the one that grows: memory for three in all.
UPLOADS = 2


@dataclass(slots=True, eq=False)
class NewSlot:
    """Chunks that will be one slot; *place* is known once it is sealed. *number* counts them in a run."""

    number: int
    buffer: bytearray
    ids: list[bytes] = field(default_factory=list)
    place: SlotRef | None = None


class Uploads:
    """Puts whole packs into the storage. For one thread."""

    def __init__(self, repository: Repository, pool: Executor) -> None:
        self._storage = repository.storage
        self._running: InOrder[None, None] = InOrder(pool, UPLOADS)
        self.stored_bytes = 0

    def put(self, pack: PackBuilder) -> None:
        """Begin to upload a pack; waits while too many are on their way. Raises what an earlier one did."""
        self.check()
        if self._running.full:
            self._running.take()
        content = pack.finished()
        self.stored_bytes += len(content)
        self._running.put(None, partial(self._storage.create, pack.name.key, content))

    def check(self) -> None:
        """Raise what an upload raised, if one has ended."""
        while self._running.ready:
            self._running.take()

    def finish(self) -> None:
        """Wait until all packs are durable in the storage. Raises StorageError."""
        while self._running:
            self._running.take()

    def drop(self) -> None:
        """Give up: wait for what can't be called back, and forget it."""
        self._running.drop()


class PackSeries:
    """The packs of one kind of a session, one after the other. For one thread."""

    def __init__(self, repository: Repository, sid: str, kind: PackKind, uploads: Uploads) -> None:
        self._key = repository.key
        self._pack_bytes = repository.parameters.pack_bytes
        self._sid = bytes.fromhex(sid)
        self._kind = kind
        self._uploads = uploads
        self._pack: PackBuilder | None = None
        self._packs = 0
        #: What all slots so far take, with their rows in the footer.
        self.stored_bytes = 0

    def add(self, content: bytes, plain_bytes: int) -> SlotRef:
        """Seal *content* as the next slot and return its place. May wait for an upload."""
        if self._pack is None:
            self._pack = PackBuilder(PackName(self._kind.value, self._sid, self._packs))
            self._packs += 1
        pack = self._pack
        place = pack.add(self._key.seal_slot(pack.name, pack.slots, content), plain_bytes)
        self.stored_bytes += place.stored_bytes + ROW_BYTES
        if pack.size_bytes >= self._pack_bytes:
            self.close()
        return place

    def close(self) -> None:
        """Upload the pack that has begun, if there is one."""
        if self._pack is not None:
            pack, self._pack = self._pack, None
            self._uploads.put(pack)


class SlotPipeline:
    """Compresses slots on a pool and places them in the order in which they came. For one thread.

    *placed* is called for each, in order, with its place set; its buffer is free again then.
    """

    def __init__(
        self, repository: Repository, packs: PackSeries, pool: Executor, most: int,
        placed: Callable[[NewSlot], None],
    ) -> None:
        self._codec = repository.codec
        self._chunk_bytes = repository.parameters.chunk_bytes
        self._packs = packs
        self._running: InOrder[NewSlot, bytes] = InOrder(pool, most)
        self._placed = placed
        #: How many slots have their place by now.
        self.count = 0

    def put(self, slot: NewSlot) -> None:
        """Take a slot; may wait for an earlier one."""
        while self._running.full or self._running.ready:
            self._take()
        self._running.put(slot, partial(self._compressed, slot))

    def check(self) -> None:
        """Place those that are compressed, without waiting for others."""
        while self._running.ready:
            self._take()

    def finish(self) -> None:
        """Place all that have come."""
        while self._running:
            self._take()

    def drop(self) -> None:
        """Give up what has not been placed."""
        self._running.drop()

    def _compressed(self, slot: NewSlot) -> bytes:
        with memoryview(slot.buffer) as view:
            return self._codec.chunks_content(slot.ids, view[: len(slot.ids) * self._chunk_bytes])

    def _take(self) -> None:
        slot, content = self._running.take()
        slot.place = self._packs.add(content, len(slot.ids) * self._chunk_bytes)
        self.count += 1
        self._placed(slot)
