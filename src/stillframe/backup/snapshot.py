"""Writing one capture into a repository, in a thread that may hang without taking the guest with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from stillframe.backup.machine import Machine, MachineFile, versions_of
from stillframe.backup.watching import WatchedReader, WatchedStorage
from stillframe.block.reader import DiskReader
from stillframe.capture.plan import Plan, why_due
from stillframe.capture.run import Capture, StillDisk
from stillframe.capture.watched import STALL_TIMEOUT_S, Watch, Watched
from stillframe.clock import Clock, utc_text
from stillframe.errors import StillframeError
from stillframe.repository.heal import read_bad, write_heals
from stillframe.repository.hints import ChunkHints
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import (
    Content,
    DiskEntry,
    FileEntry,
    Manifest,
    Root,
    encode_manifest,
)
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.repository.session import Session, open_session
from stillframe.repository.snapshots import still_there
from stillframe.repository.writer import Progress, Since, SnapshotWriter

#: How long the end of the session is waited for when the guest is back. Left behind, it is fenced one day.
_CLOSE_TIMEOUT_S = 30.0
#: Sessions whose storage hangs. Were they let go of, their end would run, and hang, in that very thread.
_LEFT_OPEN: list[contextlib.ExitStack] = []


@dataclass(frozen=True, slots=True)
class DiskResult:
    """What became of one disk. All numbers are bytes; see writer.Written.

    *method* is how it was captured, *note* why it was read whole although its changes are known or were to
    be, "" if there is no such reason. *fell_back*: they were to be known, and were not. *audited_chunks* that
    were said not to have changed were compared; *audit_differs_at_bytes* is where one differs, None if none.
    """

    target: str
    size_bytes: int
    read_bytes: int
    data_bytes: int
    changed_bytes: int
    stored_bytes: int
    compared: bool
    seconds: float
    method: str
    note: str
    fell_back: bool
    audited_chunks: int
    audit_differs_at_bytes: int | None


@dataclass(frozen=True, slots=True)
class Parent:
    """The snapshot to build upon, if there is one, and what stood in the way of newer ones."""

    name: SnapshotName | None
    manifest: Manifest | None
    problems: tuple[str, ...] = ()

    def disk(self, target: str) -> DiskEntry | None:
        """Return the parent's disk of that name. It may have another size: trees grow and shrink."""
        disks = self.manifest.disks if self.manifest is not None else ()
        return next((disk for disk in disks if disk.target == target), None)

    def since(self, target: str) -> Since | None:
        """Return that a reader's changes count from the parent, if it left an anchor for that disk."""
        disk, manifest = self.disk(target), self.manifest
        if disk is None or manifest is None or manifest.anchor is None:
            return None
        return Since.of(manifest, disk) if target in manifest.anchor.sizes else None

    def file(self, file: MachineFile) -> FileEntry | None:
        """Return the parent's file at the same path."""
        files = self.manifest.files if self.manifest is not None else ()
        return next((each for each in files if each.path == file.path), None)


class SnapshotRun:
    """One snapshot being made. `write` within the capture, `close` when the guest is back.

    *tags* are the user's words for it. *manifest* is set once the snapshot is durable. Nobody but threads of
    its own touches the storage: where that hangs, `write` raises within ten seconds of a reason to stop, or
    when nothing moved for `stall_timeout_s`.
    """

    def __init__(
        self, repository: Repository, plan: Plan, parent: Parent, host: str, hints_folder: Path, clock: Clock,
        report: Callable[[str, int, int], None],
    ) -> None:
        self.stall_timeout_s = STALL_TIMEOUT_S
        self.tags: tuple[str, ...] = ()
        self.manifest: Manifest | None = None
        self.disks: list[DiskResult] = []
        self.late_warnings: list[str] = []
        self._found: list[str] = []
        self.parent_note = "" if parent.name is not None else "it is the first of this guest on this host"
        self._repository = repository
        self._plan = plan
        self._parent = parent
        self._host = host
        self._hints_folder = hints_folder
        self._clock = clock
        self._report = report
        self._open = contextlib.ExitStack()
        self._hung = False
        self._progress: tuple[str, int, int] | None = None

    def write(self, capture: Capture, machine: Machine, warnings: tuple[str, ...]) -> None:
        """Write the snapshot and commit it. Raises CopyFailed, DestinationLost, StorageError, and others."""
        with contextlib.ExitStack() as opened:
            # Opened here and not in the thread: were that to hang, its servers would hold the bases' locks,
            # and nothing could be committed back into them.
            readers = {disk.target: opened.enter_context(disk.read()) for disk in capture.disks}
            watched = Watched(
                lambda watch: self._write(watch, capture, readers, machine, warnings), self._clock, "backup")
            try:
                watched.result(capture.stop, each_look=self._look, stall_timeout_s=self.stall_timeout_s)
            except StillframeError as error:
                # Committed, it is a snapshot, whatever went wrong behind that.
                if self.manifest is None:
                    raise
                self.late_warnings.append(f"the snapshot is durable, but then: {error.message}")
            finally:
                self._hung = watched.watch.hung
                self._look()

    def close(self) -> None:
        """End the session. Never raises; leaves a storage alone that hangs."""
        if self._hung:
            _LEFT_OPEN.append(self._open)
            return
        try:
            Watched(lambda _: self._open.close(), self._clock, "session").result(
                lambda: None, stall_timeout_s=_CLOSE_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 -- the snapshot is durable or given up, and the guest is back
            self.late_warnings.append(f"the session was not ended (the next prune does that): {error}")

    def _look(self) -> None:
        progress = self._progress
        if progress is not None:
            self._report(*progress)

    # --- in the thread ------------------------------------------------------------------------

    def _write(
        self, watch: Watch, capture: Capture, readers: Mapping[str, DiskReader], machine: Machine,
        warnings: tuple[str, ...],
    ) -> None:
        storage = WatchedStorage(self._repository.storage, watch)
        repository = replace(self._repository, storage=storage)
        moment = datetime.fromisoformat(capture.captured_at)
        name = SnapshotName(self._host, self._plan.domain.name, moment, "")
        began_at = utc_text(self._clock.now())
        watch.tick()
        # Not through the watched storage: a session must end also when its copy is not wanted any more.
        session = self._open.enter_context(open_session(
            self._repository.storage, repository.key, self._clock, self._host,
            lambda sid: replace(name, sid=sid).key))
        watch.tick()
        parent = self._confirmed(repository)
        known = ChunkHints(self._repository.parameters.id, self._hints_folder)
        with contextlib.closing(known) as hints, SnapshotWriter(
            repository, session, Places(repository, session.generation), bad=read_bad(storage), hints=hints,
        ) as writer:
            disks = tuple(
                self._disk(writer, watch, disk, readers[disk.target], parent, capture)
                for disk in capture.disks)
            files = tuple(_file(writer, file, parent) for file in machine.files)
            capture.check_still()
            stored_bytes = writer.finish()
            write_heals(repository, session.sid, writer.healed)
        manifest = Manifest(
            sid=session.sid, guest=self._plan.domain.name, uuid=self._plan.domain.uuid, host=self._host,
            captured_at=capture.captured_at, began_at=began_at, ended_at=utc_text(self._clock.now()),
            consistency=capture.consistency.value, quiesce=self._plan.quiesce.value,
            parent=parent.name.sid if parent.name is not None else "", live_xml=self._plan.live.text,
            inactive_xml=self._plan.definition,
            disks=disks, excluded=tuple(f"{each.target}: {each.reason}" for each in self._plan.excluded),
            files=files, versions=versions_of(self._plan.domain.connection, self._plan.live.text),
            warnings=(*warnings, *self._found), frozen_s=capture.frozen_s,
            stored_bytes=stored_bytes, tags=self.tags, anchor=capture.anchor,
            generation=session.generation.number,
        )
        self._commit(session, manifest, watch)

    def _commit(self, session: Session, manifest: Manifest, watch: Watch) -> None:
        content = encode_manifest(manifest, session.record.manifest_key, self._repository.key)
        watch.tick()
        session.commit(content)
        self.manifest = manifest

    def _confirmed(self, repository: Repository) -> Parent:
        """Return the parent if it is still there now that the session is registered; else none.

        Only of a snapshot that was listed after that is it known that nothing it needs is gone.
        """
        if self._parent.name is None or still_there(repository, self._parent.name):
            return self._parent
        self.parent_note = "its parent was forgotten just now"
        return Parent(None, None)

    def _disk(
        self, writer: SnapshotWriter, watch: Watch, disk: StillDisk, reader: DiskReader, parent: Parent,
        capture: Capture,
    ) -> DiskEntry:
        began_s = self._clock.monotonic_s()

        def report(progress: Progress) -> None:
            watch.tick()
            self._progress = (disk.target, progress.done_bytes, progress.size_bytes)

        old, since = parent.disk(disk.target), parent.since(disk.target)
        due = "" if old is None or since is None else why_due(
            self._clock, old.read_whole_at, self._plan.wishes.full_read_every_s)
        # Whoever waits for this thread asks the capture for reasons to stop (a call to libvirt), and says so.
        written = writer.write(WatchedReader(reader, watch), old, since=None if due else since,
                               stop=watch.check, report=report)
        differs_at = written.mismatch_offset_bytes
        if differs_at is not None:
            self._found.append(
                f"AUDIT: {disk.target} differs from its parent at {differs_at}, where it was said to be as "
                "it was: it was read whole, and this snapshot is right; the ones before it may not be")
        self._progress = (disk.target, written.size_bytes, written.size_bytes)
        self.disks.append(DiskResult(
            disk.target, written.size_bytes, written.read_bytes, written.data_bytes, written.changed_bytes,
            written.stored_bytes, compared=old is not None, seconds=self._clock.monotonic_s() - began_s,
            method=disk.method.value, note=disk.note or due or written.why_whole,
            fell_back=disk.fell_back or differs_at is not None,
            audited_chunks=written.audited_chunks, audit_differs_at_bytes=differs_at))
        return DiskEntry(
            target=disk.target, format=disk.base.driver, source=disk.base.text(), method=disk.method.value,
            note=disk.note or due or written.why_whole, size_bytes=written.size_bytes,
            root=Root.of(written.root), read_bytes=written.read_bytes, data_bytes=written.data_bytes,
            changed_bytes=written.changed_bytes, stored_bytes=written.stored_bytes,
            read_whole_at=capture.captured_at if written.whole or old is None else old.read_whole_at)


def _file(writer: SnapshotWriter, file: MachineFile, parent: Parent) -> FileEntry:
    old: Content | None = parent.file(file)
    written = writer.write_bytes(file.content, old)
    return FileEntry(
        role=file.role, path=file.path, mode=file.mode, uid=file.uid, gid=file.gid, taken_at=file.taken_at,
        size_bytes=written.size_bytes, root=Root.of(written.root))
