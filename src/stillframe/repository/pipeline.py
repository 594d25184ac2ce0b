"""From chunks to packs in the storage: compress on threads, seal and place in order, upload two at a time.

Slots are compressed by a pool, in any order, and taken back in theirs. Only then is a slot given its
pack and number, sealed and appended: so packs hold slots in the order of the disk, their sizes are
known when they are closed, and the same disk makes the same packs however threads were scheduled.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

from stillframe.direct import aligned_buffer
from stillframe.repository.crypto import TAG_BYTES, DomainKey
from stillframe.repository.jobs import InOrder
from stillframe.repository.layout import PackKind, PackName
from stillframe.repository.opened import Repository
from stillframe.repository.pack import (
    END_BYTES,
    ROW_BYTES,
    SlotRef,
    SlotRow,
    end_of_pack,
    head_of_pack,
    stored_digest,
)
from stillframe.storage.own import create_own

#: Packs on their way to the storage, besides the one that grows: memory for three in all.
UPLOADS = 2
#: A run that is given up waits so long for uploads, and no longer: a guest may stand on an overlay meanwhile.
_GIVE_UP_S = 10.0


@dataclass(slots=True, eq=False)
class NewSlot:
    """Chunks that will be one slot; *place* is known once it is sealed. *number* counts them in a run."""

    number: int
    buffer: bytearray
    ids: list[bytes] = field(default_factory=list)
    place: SlotRef | None = None


class GrowingPack:
    """A pack that is sealed in place, in memory that is used again for later ones. For one thread."""

    def __init__(self, name: PackName, key: DomainKey, buffer: mmap.mmap) -> None:
        self.name = name
        self._key = key
        self.buffer = buffer
        self._rows: list[SlotRow] = []
        #: Without the end, before that is written.
        self.size_bytes = 0
        self._put(head_of_pack(name))

    @property
    def finished_bytes(self) -> int:
        """How large it would be with its end, which is half of a pack of very small nodes."""
        return self.size_bytes + len(self._rows) * ROW_BYTES + END_BYTES

    def add(self, content: bytes, plain_bytes: int) -> SlotRef:
        """Seal *content* as the next slot."""
        offset, slot, stored = self.size_bytes, len(self._rows), len(content) + TAG_BYTES
        self._reserve(stored)
        with memoryview(self.buffer) as whole, whole[offset : offset + stored] as view:
            self._key.seal_slot_into(self.name, slot, content, view)
            self._rows.append(SlotRow(self.name, slot, offset, stored, plain_bytes, stored_digest(view)))
        self.size_bytes += stored
        return SlotRef(self.name, slot, offset, stored)

    def finish(self) -> None:
        """Write the end; the object is the first *size_bytes* of the buffer then."""
        self._put(end_of_pack(self.name, self._rows))

    def _put(self, content: bytes) -> None:
        self._reserve(len(content))
        self.buffer[self.size_bytes : self.size_bytes + len(content)] = content
        self.size_bytes += len(content)

    def _reserve(self, length: int) -> None:
        if self.size_bytes + length > len(self.buffer):
            self.buffer.resize(self.size_bytes + length)


class Uploads:
    """Puts whole packs into the storage, and lends the buffers that they grow in. For one thread."""

    def __init__(self, repository: Repository, pool: Executor, idle: Callable[[], None]) -> None:
        self._storage = repository.storage
        self._running: InOrder[mmap.mmap, None] = InOrder(pool, UPLOADS, idle)
        self._free: list[mmap.mmap] = []
        # With its end and the slot that fills it, a pack is somewhat larger.
        parameters = repository.parameters
        self._buffer_bytes = parameters.pack_bytes + 2 * parameters.slot_chunks * parameters.chunk_bytes
        self.stored_bytes = 0

    def buffer(self) -> mmap.mmap:
        """Return a buffer for the next pack."""
        return self._free.pop() if self._free else aligned_buffer(self._buffer_bytes)

    def put(self, pack: GrowingPack) -> None:
        """Begin to upload a pack; waits while too many are on their way. Raises what an earlier one did."""
        self.check()
        if self._running.full:
            self._take()
        pack.finish()
        self.stored_bytes += pack.size_bytes
        self._running.put(pack.buffer, partial(self._upload, pack))

    def check(self) -> None:
        """Raise what an upload raised, if one has ended."""
        while self._running.ready:
            self._take()

    def finish(self) -> None:
        """Wait until all packs are durable in the storage. Raises StorageError."""
        while self._running:
            self._take()

    def drop(self) -> bool:
        """Give up what is on its way. Return whether no upload is left that the storage doesn't end."""
        self._free.clear()
        return self._running.drop(_GIVE_UP_S)

    def _take(self) -> None:
        buffer, _ = self._running.take()
        self._free.append(buffer)

    def _upload(self, pack: GrowingPack) -> None:
        with memoryview(pack.buffer) as whole, whole[: pack.size_bytes] as content:
            create_own(self._storage, pack.name.key, content)


class PackSeries:
    """The packs of one kind of a session, one after the other. For one thread."""

    def __init__(self, repository: Repository, sid: str, kind: PackKind, uploads: Uploads) -> None:
        self._key = repository.key
        self._pack_bytes = repository.parameters.pack_bytes
        self._sid = bytes.fromhex(sid)
        self._kind = kind
        self._uploads = uploads
        self._pack: GrowingPack | None = None
        self._packs = 0
        #: What all slots so far take, with their rows in the footer.
        self.stored_bytes = 0

    def add(self, content: bytes, plain_bytes: int) -> SlotRef:
        """Seal *content* as the next slot and return its place. May wait for an upload."""
        if self._pack is None:
            name = PackName(self._kind.value, self._sid, self._packs)
            self._pack = GrowingPack(name, self._key, self._uploads.buffer())
            self._packs += 1
        place = self._pack.add(content, plain_bytes)
        self.stored_bytes += place.stored_bytes + ROW_BYTES
        if self._pack.finished_bytes >= self._pack_bytes:
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
