"""What all disks of a run share: the threads, the buffers, the packs that grow, and what is known."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from stillframe.block.reader import DiskReader
from stillframe.errors import StillframeError
from stillframe.repository.hints import ChunkHints
from stillframe.repository.jobs import keep_freed_memory
from stillframe.repository.known import Bad, KnownChunks
from stillframe.repository.layout import PackKind
from stillframe.repository.opened import Repository
from stillframe.repository.pack import SlotRef
from stillframe.repository.pipeline import UPLOADS, NewSlot, PackSeries, SlotPipeline, Uploads
from stillframe.repository.scan import Scanner, unit_chunks
from stillframe.repository.session import Session

_READERS = 2
#: Units that are read or wait to be looked at, and slots that are compressed or wait to be placed.
UNITS = 6
_SLOTS = 6


class Stages:
    """See above. Used by the one thread that decides; close it in the end."""

    def __init__(
        self, repository: Repository, session: Session, bad: Bad, hints: ChunkHints, threads: int
    ) -> None:
        keep_freed_memory()
        self._repository = repository
        self.parameters = repository.parameters
        self.known = KnownChunks(session, bad, hints)
        self.readers = ThreadPoolExecutor(_READERS, "read")
        self._packers = ThreadPoolExecutor(threads, "pack")
        self._uploaders = ThreadPoolExecutor(UPLOADS, "upload")
        self._uploads = Uploads(repository, self._uploaders, self.ask_stop)
        #: Asked while the run goes on and while it waits; what it returns ends the run.
        self.stop: Callable[[], StillframeError | None] = lambda: None
        self._data = PackSeries(repository, session.sid, PackKind.DATA, self._uploads)
        self._trees = PackSeries(repository, session.sid, PackKind.TREE, self._uploads)
        self.slots = SlotPipeline(repository, self._data, self._packers, _SLOTS, self._placed)
        self._free: list[bytearray] = []
        self._buffer_bytes = self.parameters.chunk_bytes * max(
            unit_chunks(self.parameters), self.parameters.slot_chunks)
        self._slots_begun = 0
        self.closed = False

    @property
    def stored_bytes(self) -> int:
        """What all slots take that were placed so far."""
        return self._data.stored_bytes + self._trees.stored_bytes

    def finish(self) -> int:
        """Make all packs durable in the storage; return what they take there. Raises StorageError."""
        self._data.close()
        self._trees.close()
        self._uploads.finish()
        return self._uploads.stored_bytes

    def close(self) -> None:
        """End all threads. What is not finished is given up."""
        self.closed = True
        self.slots.drop()
        ended = self._uploads.drop()
        for pool in (self.readers, self._packers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._uploaders.shutdown(wait=ended, cancel_futures=True)
        self._free.clear()

    def ask_stop(self) -> None:
        """Raise the reason to stop, if there is one."""
        reason = self.stop()
        if reason is not None:
            raise reason

    def check(self) -> None:
        """Take what is ready, and raise what went wrong elsewhere meanwhile."""
        self.slots.check()
        self._uploads.check()

    def new_slot(self, buffer: bytearray | None = None) -> NewSlot:
        """Begin the next slot, in a buffer of its own or in *buffer*, which holds its chunks already."""
        self._slots_begun += 1
        return NewSlot(self._slots_begun - 1, self.buffer() if buffer is None else buffer)

    def buffer(self) -> bytearray:
        """Return a buffer for a unit or a slot."""
        return self._free.pop() if self._free else bytearray(self._buffer_bytes)

    def free(self, buffer: bytearray) -> None:
        """Give a buffer back."""
        self._free.append(buffer)

    def put_node(self, node: bytes) -> SlotRef:
        """Store a node of a tree."""
        return self._trees.add(self._repository.codec.node_content(node), len(node))

    def scanner(self, source: DiskReader) -> Scanner:
        """Return what reads *source*, on the threads of `readers`."""
        return Scanner(source, self.parameters, self._repository.key, _READERS)

    def _placed(self, slot: NewSlot) -> None:
        self.known.placed(slot)
        self.free(slot.buffer)
