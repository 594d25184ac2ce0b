"""Copying snapshots into another repository: a second site, another key, another kind of storage.

A copy is a snapshot like any other there. With another key, or other sizes, it is opened with the one key and
sealed with the other: of a guest's first all is read; of the next ones only what differs from the one before,
as the trees of the two say, if the target holds a copy of that one; what the target has by its ID moves no
byte. With the same key and sizes its slots move as they are stored (move.py); where that can't be, because
something is damaged that may be healed, or generations may not be written, it is opened all the same. A copy
keeps host, guest and moment, and by them it is known to be there already, if it can be read. So copying goes
on where it ended, a snapshot at a time.

Drills come along (`missing_drills`): what booted there has the same bytes here.

The anchor (what a guest's next backup counts from) is not copied: it belongs to backups into the first
repository.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from stillframe.block.reader import Connection
from stillframe.clock import Clock, utc_text
from stillframe.errors import (
    ObjectMissing,
    RepositoryDamaged,
    RepositoryNewer,
    SnapshotUnknown,
    StillframeError,
    StorageRefused,
)
from stillframe.extent import Extent
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.difference import changed_extents
from stillframe.repository.drills import DrillName, list_drills, read_drill, record_drill
from stillframe.repository.heal import read_bad, write_heals
from stillframe.repository.held import held_snapshot
from stillframe.repository.hints import ChunkHints
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import Content, DiskEntry, FileEntry, Manifest, Root, encode_manifest
from stillframe.repository.move import Mover
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView, read_whole
from stillframe.repository.session import Session, open_session
from stillframe.repository.snapshots import read_snapshot, snapshots_of
from stillframe.repository.tree import Tree
from stillframe.repository.writer import Progress, Since, SnapshotWriter
from stillframe.storage.model import Storage

#: Told of the disk and of how far it is.
Report = Callable[[str, Progress], None]
Stop = Callable[[], StillframeError | None]


@dataclass(frozen=True, slots=True)
class Copied:
    """A snapshot that was copied. *read_bytes* of the disks were read, *stored_bytes* stored anew.

    *moved*: as it was stored, and nothing was opened; then what was read is what was stored.
    """

    name: SnapshotName
    read_bytes: int
    stored_bytes: int
    moved: bool


@dataclass(frozen=True, slots=True)
class _Before:
    """The copy to build upon: the original's manifest in the source, and its own in the target."""

    original: Manifest
    copy: Manifest


def missing(source: Iterable[SnapshotName], target: Iterable[SnapshotName]) -> list[SnapshotName]:
    """Return those of *source* that *target* has no snapshot of, the oldest first."""
    there = {_moment(name) for name in target}
    return sorted(
        (name for name in source if _moment(name) not in there), key=lambda each: (each.utc, each.sid))


def no_copies(
    source: Iterable[SnapshotName], listed: Iterable[SnapshotName], target: Repository,
) -> list[SnapshotName]:
    """Return what is *listed* in *target* as copies of *source*, and is none: its manifest can't be read.

    Who may only add can put anything beside a snapshot; what is damaged by itself is no copy, either. Raises
    StorageError.
    """
    moments, found = {_moment(name) for name in source}, []
    for name in listed:
        if _moment(name) in moments:
            try:
                with contextlib.suppress(RepositoryNewer, SnapshotUnknown):  # it was forgotten just now
                    read_snapshot(target, name)
            except RepositoryDamaged:
                found.append(name)
    return found


class Copier:
    """Copies snapshots from *source* to *target*. *host* is this host, *hints* are those of the target."""

    def __init__(
        self, source: Repository, target: Repository, hints: ChunkHints, clock: Clock, host: str,
    ) -> None:
        self._source = source
        self._target = target
        self._hints = hints
        self._clock = clock
        self._host = host
        self._moves = target.stores_like(source)

    def copy(
        self, name: SnapshotName, *, stop: Stop = lambda: None, report: Report = lambda *_: None,
    ) -> Copied:
        """Copy one snapshot that the target has not.

        Raises SlotDamaged where data is lost in the source, SnapshotUnknown if it is forgotten, StorageError,
        and what *stop* returns; then nothing new is listed.
        """
        if self._moves:
            with contextlib.suppress(RepositoryDamaged, ObjectMissing):  # opened, it may be healed
                try:
                    return self._copy(name, stop, report, moves=True)
                except StorageRefused:
                    self._moves = False  # an account that may only add snapshots may not write generations
        return self._copy(name, stop, report, moves=False)

    def _copy(self, name: SnapshotName, stop: Stop, report: Report, *, moves: bool) -> Copied:
        with (
            held_snapshot(self._source, name, self._clock, self._host) as manifest,
            open_session(
                self._target.storage, self._target.key, self._clock, self._host,
                lambda sid: SnapshotName(name.host, name.guest, name.utc, sid).key) as session,
        ):
            one = _One(self._source, self._target, session, self._clock, stop, report)
            return one.move(name, manifest) if moves else one.seal(name, manifest, self._hints)


class _One:
    """One snapshot on its way."""

    def __init__(
        self, source: Repository, target: Repository, session: Session, clock: Clock, stop: Stop,
        report: Report,
    ) -> None:
        self._source = source
        self._target = target
        self._session = session
        self._clock = clock
        self._stop = stop
        self._report = report
        self._places = Places(source)
        self._began_at = utc_text(clock.now())

    def move(self, name: SnapshotName, manifest: Manifest) -> Copied:
        """Copy it as it is stored."""
        before = self._before(name)
        mover = Mover(
            self._places, self._target, self._session, self._clock, self._stop,
            lambda done, of: self._report("packs", Progress(done, of, read_bytes=done, stored_bytes=done)))
        moved_bytes = mover.bring(
            name, manifest, (before.original, before.copy) if before is not None else None)
        copied = msgspec.structs.replace(manifest, stored_bytes=moved_bytes)
        return Copied(self._commit(name, copied, before), moved_bytes, moved_bytes, moved=True)

    def seal(self, name: SnapshotName, manifest: Manifest, hints: ChunkHints) -> Copied:
        """Open it, and seal it anew."""
        before = self._before(name)
        with SnapshotWriter(
            self._target, self._session, Places(self._target, self._session.generation),
            bad=read_bad(self._target.storage), hints=hints,
        ) as writer:
            disks = tuple(self._disk(writer, disk, before) for disk in manifest.disks)
            files = tuple(self._file(writer, file) for file in manifest.files)
            stored_bytes = writer.finish(self._stop)
            write_heals(self._target, self._session.sid, writer.healed)
        copied = msgspec.structs.replace(manifest, disks=disks, files=files, stored_bytes=stored_bytes)
        read_bytes = sum(disk.read_bytes for disk in disks)
        return Copied(self._commit(name, copied, before), read_bytes, stored_bytes, moved=False)

    def _commit(self, name: SnapshotName, copied: Manifest, before: _Before | None) -> SnapshotName:
        session = self._session
        made = msgspec.structs.replace(
            copied, sid=session.sid, origin=copied.origin or copied.sid,
            parent="" if before is None else before.copy.sid, began_at=self._began_at,
            ended_at=utc_text(self._clock.now()), anchor=None, generation=session.generation.number)
        session.commit(encode_manifest(made, session.record.manifest_key, self._target.key))
        return SnapshotName(name.host, name.guest, name.utc, session.sid)

    def _before(self, name: SnapshotName) -> _Before | None:
        """Return the newest copy in the target, no newer than *name*, whose original is still in the source.

        The session is registered, so what is listed now keeps all that it needs.
        """
        originals = {_moment(each): each for each in snapshots_of(self._source, name.host, name.guest)}
        older = [each for each in snapshots_of(self._target, name.host, name.guest) if each.utc < name.utc]
        for each in sorted(older, key=lambda one: one.utc, reverse=True):
            original = originals.get(_moment(each))
            if original is None:
                continue
            with contextlib.suppress(RepositoryDamaged, SnapshotUnknown):  # damaged, or forgotten just now
                copy, first = read_snapshot(self._target, each), read_snapshot(self._source, original)
                if copy.origin == (first.origin or first.sid):
                    return _Before(first, copy)
        return None

    def _disk(self, writer: SnapshotWriter, disk: DiskEntry, before: _Before | None) -> DiskEntry:
        original = _of(before.original, disk.target) if before is not None else None
        copy = _of(before.copy, disk.target) if before is not None else None
        since = Since.of(before.copy, copy) if before is not None and copy is not None else None
        with DiskView(self._places, disk) as view:
            reader = _Reader(view, self._tree(original) if original is not None else None, self._tree(disk))
            written = writer.write(
                reader, copy, since=since if original is not None else None, stop=self._stop,
                report=lambda progress: self._report(disk.target, progress))
        return msgspec.structs.replace(
            disk, root=Root.of(written.root), read_bytes=written.read_bytes,
            changed_bytes=written.changed_bytes, stored_bytes=written.stored_bytes)

    def _file(self, writer: SnapshotWriter, file: FileEntry) -> FileEntry:
        content = read_whole(self._places, file)
        return msgspec.structs.replace(file, root=Root.of(writer.write_bytes(content).root))

    def _tree(self, content: Content) -> Tree:
        return Tree(self._places, content.size_bytes, content.place)


def missing_drills(source: Storage, target: Storage, guest: str | None) -> list[tuple[DrillName, str]]:
    """Return the drills of snapshots that *target* has copies of and that it lacks, and the SID of each copy.

    No key is needed. Raises StorageError.
    """
    originals = {name.sid: _moment(name) for name in list_snapshots(source)}
    copies: dict[tuple[str, str, str], list[str]] = {}
    for name in list_snapshots(target):  # there may be several, not all of which can be read
        copies.setdefault(_moment(name), []).append(name.sid)
    there = {(each.sid, each.utc) for each in list_drills(target)}
    return [(each, sid) for each in list_drills(source) if guest in (None, each.guest)
            for sid in copies.get(originals.get(each.sid, ("", "", "")), ()) if (sid, each.utc) not in there]


def copy_drill(source: Repository, target: Repository, name: DrillName, sid: str) -> None:
    """Let *target* have a drill, as one of the snapshot *sid*. Raises RepositoryDamaged, StorageError."""
    drill = read_drill(source.storage, name, source.key)
    record_drill(target, name.utc, msgspec.structs.replace(drill, sid=sid))


class _Reader:
    """A snapshot's disk as a DiskReader that knows what differs from an older one."""

    def __init__(self, view: DiskView, old: Tree | None, new: Tree) -> None:
        self._view = view
        self._old = old
        self._new = new
        self.size_bytes = view.size_bytes

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """See DiskReader."""
        return self._view.extents(offset_bytes, length_bytes)

    def changed(self) -> Iterator[Extent] | None:
        """See DiskReader. Raises SlotDamaged."""
        return None if self._old is None else changed_extents(self._old, self._new)

    def connect(self) -> contextlib.AbstractContextManager[Connection]:
        """See DiskReader."""
        return self._view.connect()


def _of(manifest: Manifest, target: str) -> DiskEntry | None:
    return next((disk for disk in manifest.disks if disk.target == target), None)


def _moment(name: SnapshotName) -> tuple[str, str, str]:
    return name.host, name.guest, name.utc.isoformat()
