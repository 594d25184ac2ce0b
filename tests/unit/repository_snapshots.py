"""Real snapshots in a small repository in memory, for tests of what lists, verifies and collects them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from stillframe.clock import Clock, SystemClock
from stillframe.errors import SlotDamaged
from stillframe.extent import Extent
from stillframe.repository import collect as collect_module
from stillframe.repository.catalog import forget, list_snapshots, plan_forget
from stillframe.repository.collect import collect, list_packs
from stillframe.repository.collection import COMPACT_BELOW, MAX_UNUSED, Collected
from stillframe.repository.decide import homes_of
from stillframe.repository.generation import latest_generation
from stillframe.repository.heal import read_bad, read_heals, write_heals
from stillframe.repository.hints import ChunkHints
from stillframe.repository.hurt import read_manifest
from stillframe.repository.layout import PackKind, PackName, Parameters, SnapshotName
from stillframe.repository.manifest import DiskEntry, Manifest, Root, Versions, encode_manifest
from stillframe.repository.mark import Marker
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.repository.session import open_session
from stillframe.repository.tree import Tree
from stillframe.repository.writer import Audit, Since, SnapshotWriter
from tests.unit.repository_disks import SMALL, SourceDisk, small_repository

#: Says what a disk has that the snapshot of that name has not, None if that is not known.
Changes = Callable[[SnapshotName], list[Extent] | None]
BEGAN = datetime(2026, 11, 20, tzinfo=UTC)
DAY_S = 86400.0


class World:
    """A repository, the moments of its snapshots (one an hour), and what each must read."""

    def __init__(self, parameters: Parameters = SMALL) -> None:
        self.repository = small_repository(parameters=parameters)
        self.clock: Clock = SystemClock()
        self.hours = 0
        self.expected: dict[SnapshotName, bytes] = {}
        #: Sessions that are still registered are those of killed processes.
        self.all_are_dead = False

    def backup(self, content: bytes, guest: str = "web", host: str = "alpha", *,
               parent: SnapshotName | None = None, hints: ChunkHints | None = None,
               changes: Changes = lambda _: None, audit: Audit | None = None) -> SnapshotName:
        """Back up one disk, upon the guest's last snapshot."""
        self.hours += 1
        name = make_snapshot(
            self.repository, SourceDisk(content), SnapshotName(host, guest, self.moment(self.hours), ""),
            self.clock, parent=parent, hints=hints, changes=changes, audit=audit)
        self.expected[name] = content
        return name

    @staticmethod
    def moment(hours: int) -> datetime:
        return BEGAN + timedelta(hours=hours)

    def forget(self, *names: SnapshotName) -> None:
        for name in names:
            del self.expected[name]
        forget(self.repository.storage, plan_forget(names))

    def prune(self, max_unused: float = MAX_UNUSED, compact_below: float = COMPACT_BELOW) -> Collected:
        with pytest.MonkeyPatch.context() as patch:
            if self.all_are_dead:
                patch.setattr(collect_module, "is_dead", lambda *_: True)
            return collect(self.repository, "alpha", self.clock, fence_after_s=DAY_S, max_unused=max_unused,
                           compact_below=compact_below)

    def check(self) -> None:
        """Every kept snapshot is listed and reads back equal."""
        assert list_snapshots(self.repository.storage) == sorted(self.expected)
        for name, content in self.expected.items():
            assert read_snapshot(self.repository, name) == content

    def packs(self) -> dict[PackName, int]:
        return list_packs(self.repository.storage)

    def data_packs(self) -> list[PackName]:
        return [pack for pack in self.packs() if pack.kind == PackKind.DATA.value]

    def flip(self, key: str, at: int) -> None:
        content = bytearray(self.repository.storage.get(key))
        content[at] ^= 1
        self.repository.storage.replace(key, content)

    def rubbish(self) -> set[PackName]:
        return rubbish(self.repository)


def make_snapshot(
    repository: Repository, disk: SourceDisk, wanted: SnapshotName, clock: Clock, *,
    parent: SnapshotName | None = None, hints: ChunkHints | None = None,
    changes: Changes = lambda _: None, audit: Audit | None = None,
) -> SnapshotName:
    """Back up as `stillframe backup` does, the guest left out. *wanted* is without the session's ID.

    *changes* says what differs from the parent, when it is known which that is.
    """

    def key(sid: str) -> str:
        return SnapshotName(wanted.host, wanted.guest, wanted.utc, sid).key

    storage = repository.storage
    with open_session(storage, repository.key, clock, wanted.host, key) as session:
        older = [name for name in list_snapshots(storage)
                 if parent in (None, name) and name.guest == wanted.guest]
        manifest = read_manifest(repository, older[-1]) if older else None
        with contextlib.ExitStack() as stack:
            index = hints or stack.enter_context(contextlib.closing(ChunkHints(repository.parameters.id)))
            writer = stack.enter_context(SnapshotWriter(
                repository, session, Places(repository, session.generation), bad=read_bad(storage),
                hints=index, audit=audit))
            old = manifest.disks[0] if manifest else None
            disk.changes = changes(older[-1]) if older else None
            written = writer.write(disk, old, since=Since.of(manifest, old) if manifest and old else None)
            stored = writer.finish()
            write_heals(repository, session.sid, writer.healed)
        entry = DiskEntry(
            target="vda", format="raw", source="/vda.img", method="overlay", size_bytes=disk.size_bytes,
            root=Root.of(written.root), read_bytes=written.read_bytes, data_bytes=written.data_bytes,
            changed_bytes=written.changed_bytes, stored_bytes=written.stored_bytes)
        session.commit(encode_manifest(
            manifest_of(session.sid, wanted, (entry,), stored, session.generation.number),
            session.record.manifest_key, repository.key))
        return SnapshotName(wanted.host, wanted.guest, wanted.utc, session.sid)


def manifest_of(sid: str, name: SnapshotName, disks: tuple[DiskEntry, ...],
                stored_bytes: int = 0, generation: int | None = None) -> Manifest:
    moment = name.utc.isoformat()
    return Manifest(
        sid=sid, guest=name.guest, uuid="", host=name.host, captured_at=moment, began_at=moment,
        ended_at=moment, consistency="crash", quiesce="none", parent="", live_xml="", inactive_xml="",
        disks=disks, excluded=(), files=(), versions=Versions("", "", "", ""), warnings=(), frozen_s=0.0,
        stored_bytes=stored_bytes, generation=generation)


def read_snapshot(repository: Repository, name: SnapshotName) -> bytes:
    """Read a snapshot's disk chunk by chunk, on this thread alone. Raises SlotDamaged."""
    manifest = read_manifest(repository, name)
    assert manifest is not None
    (disk,) = manifest.disks
    places = Places(repository)
    tree = Tree(places, disk.size_bytes, disk.place)
    parameters = repository.parameters
    content = bytearray(parameters.chunks(disk.size_bytes) * parameters.chunk_bytes)
    for index, place in tree.places_of_leaves():
        for number, entry in enumerate(tree.leaf(place).entries, index * parameters.leaf_chunks):
            if entry is not None:
                at = number * parameters.chunk_bytes
                content[at : at + parameters.chunk_bytes] = _chunk(places, entry)
    return bytes(content[: disk.size_bytes])


def _chunk(places: Places, entry: ChunkRef) -> memoryview:
    try:
        chunks = places.chunks(entry.place)
    except SlotDamaged:
        entry = read_heals(places.repository)[entry.id]
        chunks = places.chunks(entry.place)
    assert chunks.ids[entry.position] == entry.id
    return chunks.chunk(entry.position)


def rubbish(repository: Repository) -> set[PackName]:
    """Return the packs in which no slot is that a snapshot needs."""
    places = Places(repository)
    marker = Marker(places)
    marker.mark(list_snapshots(repository.storage))
    live = {birth: marker.live.get(birth, 0) | marker.healing.get(birth, 0)
            for birth in {*marker.live, *marker.healing}}
    generation = latest_generation(repository.storage, repository.key)
    return set(list_packs(repository.storage)) - homes_of(generation, live)
