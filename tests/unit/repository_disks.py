"""Disks in memory and a small repository for tests of what writes and reads snapshots."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from stillframe.block.reader import Connection, OneByOne
from stillframe.clock import SystemClock
from stillframe.errors import StillframeError
from stillframe.extent import Extent, Kind, merged
from stillframe.repository.heal import read_bad
from stillframe.repository.hints import ChunkHints
from stillframe.repository.keyslots import Kdf, SlotKind
from stillframe.repository.layout import Parameters, new_sid
from stillframe.repository.manifest import Content, Root
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.opened import Repository, Secret, init_repository
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView
from stillframe.repository.session import Session, open_session
from stillframe.repository.writer import Audit, Since, SnapshotWriter, Written
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.model import Storage

CHUNK = 4096
SMALL = Parameters(id=new_sid(), created_at="", chunk_bytes=CHUNK, slot_chunks=4, leaf_chunks=4,
                   inner_nodes=4, pack_bytes=64 * 1024)
CHEAP = Kdf("", memory_kib=8, iterations=1, lanes=1)


def small_repository(storage: Storage | None = None, parameters: Parameters = SMALL) -> Repository:
    return init_repository(
        MemoryStorage() if storage is None else storage, Secret(SlotKind.PASSPHRASE, b"secret"), "test",
        SystemClock(), costs=CHEAP, parameters=parameters)


class SourceDisk(OneByOne):
    """A DiskReader over bytes. *holes* (offset, length) read as zero and must never be read."""

    def __init__(self, content: bytes | bytearray, holes: list[tuple[int, int, Kind]] | None = None) -> None:
        self.content = bytearray(content)
        self.holes = sorted(holes or [])
        for offset, length, _ in self.holes:
            self.content[offset : offset + length] = bytes(length)
        self.size_bytes = len(content)
        self.reads: list[tuple[int, int]] = []
        self.before_read: Callable[[int], None] = lambda _: None
        self.connected = 0
        #: What `changed` says; None: nothing is known.
        self.changes: list[Extent] | None = None

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        end = self.size_bytes if length_bytes is None else min(offset_bytes + length_bytes, self.size_bytes)
        return merged(self._extents(offset_bytes, end))

    def _extents(self, at: int, end: int) -> Iterator[Extent]:
        for offset, length, kind in self.holes:
            begin, until = max(offset, at), min(offset + length, end)
            if begin < until:
                if begin > at:
                    yield Extent(at, begin - at, Kind.DATA)
                yield Extent(begin, until - begin, kind)
                at = until
        if at < end:
            yield Extent(at, end - at, Kind.DATA)

    def changed(self) -> Iterator[Extent] | None:
        return None if self.changes is None else iter(self.changes)

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        self.connected += 1
        try:
            yield self
        finally:
            self.connected -= 1

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        self.before_read(offset_bytes)
        self.reads.append((offset_bytes, len(buffer)))
        buffer[:] = self.content[offset_bytes : offset_bytes + len(buffer)]


class Book:
    """A repository with the snapshots of one disk, and what each must read."""

    def __init__(self, storage: Storage | None = None, parameters: Parameters = SMALL,
                 hints: Path | None = None) -> None:
        self.repository = small_repository(storage, parameters)
        self.hints = hints
        self.kept: list[tuple[Content, bytes]] = []
        self.healed: dict[bytes, ChunkRef] = {}

    @contextlib.contextmanager
    def writer(self, audit: Audit | None = None) -> Iterator[SnapshotWriter]:
        with self.session() as session, contextlib.closing(self.index()) as hints:
            bad = read_bad(self.repository.storage)
            places = Places(self.repository, session.generation)
            with SnapshotWriter(self.repository, session, places, bad=bad, hints=hints,
                                audit=audit) as writer:
                yield writer

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        with open_session(self.repository.storage, self.repository.key, SystemClock(), "host",
                          lambda sid: f"main/m/host/guest/20260101T000000Z-{sid}") as session:
            yield session

    def index(self) -> ChunkHints:
        return ChunkHints(self.repository.parameters.id, self.hints)

    def backup(self, disk: SourceDisk, parent: Content | None = None, *, since: Since | None = None,
               audit: Audit | None = None,
               stop: Callable[[], StillframeError | None] = lambda: None) -> Written:
        """Write *disk*; without *parent*, upon the last snapshot. With *since*, by its changes."""
        parent = parent or (self.kept[-1][0] if self.kept else None)
        with self.writer(audit) as writer:
            written = writer.write(disk, parent, since=since, stop=stop, report=lambda _: None)
            writer.finish()
            self.healed = dict(writer.healed)
        self.kept.append((content_of(written), bytes(disk.content)))
        return written

    def view(self, content: Content) -> DiskView:
        return DiskView(Places(self.repository), content)

    def check(self) -> None:
        """Every snapshot reads back equal, in two ways."""
        for content, expected in self.kept:
            with self.view(content) as view:
                assert whole(view) == expected
                assert in_pieces(view) == expected

    def objects(self, prefix: str) -> list[str]:
        return [listed.key for listed in self.repository.storage.list(prefix)]


def content_of(written: Written) -> Content:
    return Content(size_bytes=written.size_bytes, root=Root.of(written.root))


def whole(view: DiskView) -> bytes:
    buffer = bytearray(view.size_bytes)
    view.read_into(memoryview(buffer), 0)
    return bytes(buffer)


def in_pieces(view: DiskView) -> bytes:
    buffer = bytearray(view.size_bytes)
    for piece in view.pieces():
        assert piece.content is not None, piece.damage
        assert len(piece.content) == piece.length_bytes > 0
        buffer[piece.offset_bytes : piece.offset_bytes + piece.length_bytes] = piece.content
    return bytes(buffer)


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)
