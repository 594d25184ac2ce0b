"""The journal: what a run is about to do, written down durably before it does it.

An SQLite database `journal.db` in the state folder, on the hypervisor's own disk, in WAL
mode with synchronous=FULL: each call of Journal that changes something has reached the
disk when it returns. Tables:

    run(id, uuid, name, body)          one run; body is the RunRecord as JSON
    step(run, seq, at, state, phase, detail)   intent and outcome of each step, for people

A run that is neither DONE nor STANDING is *open*: somebody still has to bring the guest back. Of a standing
run the guest keeps the overlays, by intention; there is one at most for each guest.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from stillframe.block.image import FileIdentity, ImagePlace
from stillframe.capture.method import Method
from stillframe.capture.states import TRANSITIONS, DiskPhase, Quiesce, State
from stillframe.clock import Clock, utc_text
from stillframe.errors import GuestState, StateFolderUnusable
from stillframe.hypervisor.model import Source

_SCHEMA_VERSION = 1
_SCHEMA = """
create table if not exists run (
    id text primary key, uuid text not null, name text not null, state text not null, body text not null
);
create table if not exists step (
    run text not null references run(id), seq integer not null, at text not null,
    state text not null, phase text not null, detail text not null, primary key (run, seq)
);
create index if not exists run_by_uuid on run(uuid, state);
"""
_BUSY_TIMEOUT_S = 10.0
#: What the destination of a backup begins with, before the repository's address.
_REPOSITORY = "repository "
_KEPT_RUNS = 1000


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a run: where it was before, and the overlay that was made for it.

    *lower_path* is the older overlay between base and overlay, which a standing run commits
    into the base; *lowered*: its data is in the base, durably.
    """

    target: str
    base: ImagePlace
    base_source_xml: str
    base_kind: str
    base_format: str
    base_key: str
    base_qemu_file: str
    size_bytes: int
    overlay_path: str
    overlay_identity: FileIdentity | None = None
    base_identity: FileIdentity | None = None
    phase: DiskPhase = DiskPhase.PLANNED
    lower_path: str = ""
    lower_identity: FileIdentity | None = None
    lowered: bool = False

    def with_phase(self, phase: DiskPhase) -> DiskRecord:
        """Return the same disk in *phase*."""
        return msgspec.structs.replace(self, phase=phase)

    def source(self) -> Source:
        """Return the base as libvirt names it, for the domain's definition."""
        return Source(self.base_kind, self.base_format, "", xml=self.base_source_xml)


class PullRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of the bitmap method makes in the guest, and which checkpoints it leaves behind.

    *checkpoint* is made by the run; once its copy is durable, those in *older* are deleted (all made by runs
    for the same destination), else the new one. *folder* is made for the socket, "" if libvirt's own is
    used. *scratch* are the scratch files, *qemu_files* QEMU's names for the disks' images. *begun*: the job
    may have been begun.
    """

    checkpoint: str
    older: tuple[str, ...]
    socket: str
    folder: str
    scratch: tuple[str, ...]
    qemu_files: tuple[str, ...]
    begun: bool = False


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as the journal knows it. Times are RFC 3339 in UTC.

    *boot_id*: the boot of the machine that it began in. *qemu_mark*: the QEMU process that the
    last pivot was sent to (process.start_mark). *destination*: the folder of the mirror, or `in_repository`.
    *follows*: the standing run whose overlays this one takes the place of.
    """

    id: str
    uuid: str
    name: str
    uri: str
    destination: str
    quiesce: Quiesce
    state: State
    began_at: str
    pid: int
    disks: tuple[DiskRecord, ...]
    method: Method = Method.OVERLAY
    pull: PullRecord | None = None
    snapshot_begun: bool = False
    freeze_begun: bool = False
    thaw_verified: bool = False
    shutdown_begun_at: str = ""
    shutdown_timeout_s: float = 0.0
    start_verified: bool = False
    suspended: bool = False
    boot_id: str = ""
    qemu_mark: str = ""
    given_up: str = ""
    consistency: str = ""
    captured_at: str = ""
    ended_at: str = ""
    follows: str = ""

    @property
    def mirror_folder(self) -> str:
        """The folder of the mirror that the run writes to, "" if it writes to a repository."""
        return "" if self.repository else self.destination

    @property
    def repository(self) -> str:
        """The address of the repository that the run writes to, "" if it writes a mirror."""
        found = self.destination.startswith(_REPOSITORY)
        return self.destination.removeprefix(_REPOSITORY) if found else ""

    def disk(self, target: str) -> DiskRecord:
        """Return the disk called *target*; raises KeyError."""
        for disk in self.disks:
            if disk.target == target:
                return disk
        raise KeyError(target)


def in_repository(address: str) -> str:
    """Return the destination of a run that writes to the repository at *address*."""
    return _REPOSITORY + address


class Step(msgspec.Struct, frozen=True):
    """One line of a run's history."""

    at: str
    state: str
    phase: str
    detail: str


#: Called after each durable write with (state, "intent" or "done"): the fault tests stop here.
StepHook = Callable[[State, str], None]


class Journal:
    """The journal of one state folder. May be used from several threads and processes.

    Raises StateFolderUnusable when the folder or the database can't be used.
    """

    def __init__(self, folder: Path, clock: Clock, hook: StepHook | None = None) -> None:
        self.folder = folder
        self._clock = clock
        self._hook = hook
        self._lock = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                folder / "journal.db", timeout=_BUSY_TIMEOUT_S, isolation_level=None,
                check_same_thread=False,
            )
            self._database.execute("pragma journal_mode=wal")
            self._database.execute("pragma synchronous=full")
            version = self._database.execute("pragma user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                raise StateFolderUnusable(
                    f"The journal in {folder} has format {version}, which this version does not know.",
                    "install the version of stillframe that wrote it, or a newer one",
                )
            if version == 0:
                # Only once: who merely looks must not wait for who writes.
                self._database.executescript(_SCHEMA)
                self._database.execute(f"pragma user_version={_SCHEMA_VERSION}")
        except (OSError, sqlite3.Error) as error:
            raise StateFolderUnusable(
                f"The state folder {folder} can't be used: {error}",
                f"ls -ld {folder}   # it must be a folder on a local disk, writable to you",
            ) from error

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def begin(self, record: RunRecord) -> RunRecord:
        """Write down a new run in state PLANNED and return it."""
        with self._transaction() as database:
            database.execute(
                "insert into run values (?, ?, ?, ?, ?)",
                (record.id, record.uuid, record.name, record.state.value, _encode(record)),
            )
            self._add_step(database, record, "intent", "")
            self._forget_old(database)
        self._after(record.state, "intent")
        return record

    def enter(self, record: RunRecord, state: State, detail: str = "", **changes: object) -> RunRecord:
        """Make the intent to take step *state* durable, with *changes*; return the new record."""
        if state not in TRANSITIONS[record.state]:
            raise AssertionError(f"no way from {record.state} to {state}")  # a bug, not a user's error
        return self._write(record, "intent", detail, state=state, **changes)

    def done(self, record: RunRecord, detail: str = "", **changes: object) -> RunRecord:
        """Write down that the record's step was carried out, with *changes*; return the new record."""
        return self._write(record, "done", detail, **changes)

    def note(self, record: RunRecord, detail: str, **changes: object) -> RunRecord:
        """Write down something seen on the way, with *changes*; return the new record."""
        return self._write(record, "note", detail, **changes)

    def open_runs(self, uuid: str | None = None) -> list[RunRecord]:
        """Return the runs that are neither DONE nor STANDING, oldest first, of one domain or of all."""
        rows = self._read(
            "select body from run where state not in (?, ?) and (? is null or uuid = ?) order by id",
            (State.DONE.value, State.STANDING.value, uuid, uuid),
        )
        return [_decode(row[0]) for row in rows]

    def standing_runs(self) -> list[RunRecord]:
        """Return the runs whose overlays guests stand on by intention, oldest first."""
        rows = self._read("select body from run where state = ? order by id", (State.STANDING.value,))
        return [_decode(row[0]) for row in rows]

    def standing(self, uuid: str) -> RunRecord | None:
        """Return the run whose overlays the domain stands on by intention, None if it stands on none."""
        rows = self._read(
            "select body from run where state = ? and uuid = ? order by id desc limit 1",
            (State.STANDING.value, uuid),
        )
        return _decode(rows[0][0]) if rows else None

    def take_over(self, record: RunRecord, detail: str, **changes: object) -> RunRecord:
        """Make *record* the standing run and the one that it follows DONE, both in one moment."""
        if State.STANDING not in TRANSITIONS[record.state]:
            raise AssertionError(f"no way from {record.state} to a standing run")  # a bug, not a user's error
        changed = msgspec.structs.replace(record, state=State.STANDING, **changes)
        rows = self._read("select body from run where id = ?", (record.follows,))
        ended = [
            msgspec.structs.replace(_decode(row[0]), state=State.DONE, ended_at=utc_text(self._clock.now()))
            for row in rows
        ]
        with self._transaction() as database:
            for each, words in ((changed, detail), *((old, f"run {record.id} stands in its place")
                                                     for old in ended)):
                database.execute(
                    "update run set state = ?, body = ? where id = ?",
                    (each.state.value, _encode(each), each.id),
                )
                self._add_step(database, each, "intent", words)
        self._after(changed.state, "intent")
        return changed

    def current(self, record: RunRecord) -> RunRecord:
        """Return the run as the journal has it now: after a failed step it may know more than *record*."""
        rows = self._read("select body from run where id = ?", (record.id,))
        return _decode(rows[0][0]) if rows else record

    def remark(self, run_id: str, detail: str) -> None:
        """Add a line to a run's history without touching its record. For helper processes."""
        with self._transaction() as database:
            database.execute(
                "insert into step select id, (select coalesce(max(seq), 0) + 1 from step where run = id), "
                "?, state, 'note', ? from run where id = ?",
                (utc_text(self._clock.now()), detail, run_id),
            )

    def last_runs(self, limit: int) -> list[RunRecord]:
        """Return the newest runs, newest first, at most *limit*."""
        rows = self._read("select body from run order by id desc limit ?", (limit,))
        return [_decode(row[0]) for row in rows]

    def runs_for(self, uuid: str, destination: str) -> list[RunRecord]:
        """Return the runs of one domain for one destination, newest first, as far back as they are kept."""
        rows = self._read("select body from run where uuid = ? order by id desc", (uuid,))
        return [run for row in rows if (run := _decode(row[0])).destination == destination]

    def history(self, run_id: str) -> list[Step]:
        """Return all steps of a run in order."""
        rows = self._read(
            "select at, state, phase, detail from step where run = ? order by seq", (run_id,)
        )
        return [Step(*row) for row in rows]

    def _read(self, query: str, values: tuple[object, ...]) -> list[tuple[str, ...]]:
        with self._lock:
            try:
                return self._database.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise StateFolderUnusable(
                    f"The journal in {self.folder} can't be read: {error}", f"ls -l {self.folder}",
                    GuestState.UNKNOWN,
                ) from error

    def _write(self, record: RunRecord, phase: str, detail: str, **changes: object) -> RunRecord:
        changed = msgspec.structs.replace(record, **changes)
        with self._transaction() as database:
            database.execute(
                "update run set state = ?, body = ? where id = ?",
                (changed.state.value, _encode(changed), changed.id),
            )
            self._add_step(database, changed, phase, detail)
        self._after(changed.state, phase)
        return changed

    def _add_step(
        self, database: sqlite3.Connection, record: RunRecord, phase: str, detail: str
    ) -> None:
        database.execute(
            "insert into step select ?, coalesce(max(seq), 0) + 1, ?, ?, ?, ? from step where run = ?",
            (record.id, utc_text(self._clock.now()), record.state.value, phase, detail, record.id),
        )

    def _forget_old(self, database: sqlite3.Connection) -> None:
        old = "select id from run where state = ? order by id desc limit -1 offset ?"
        database.execute(f"delete from step where run in ({old})", (State.DONE.value, _KEPT_RUNS))
        database.execute(f"delete from run where id in ({old})", (State.DONE.value, _KEPT_RUNS))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._database.execute("begin immediate")
                yield self._database
                self._database.execute("commit")
            except sqlite3.Error as error:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("rollback")
                raise StateFolderUnusable(
                    f"The journal in {self.folder} can't be written: {error}",
                    f"df -h {self.folder}", GuestState.UNKNOWN,
                ) from error

    def _after(self, state: State, phase: str) -> None:
        if self._hook is not None:
            self._hook(state, phase)


def new_run_id(clock: Clock, uuid: str) -> str:
    """Return an ID for a run of domain *uuid* that starts now; IDs sort by time."""
    return f"{clock.now().astimezone(UTC):%Y%m%dT%H%M%S%f}-{uuid[:8]}"


def age_s(clock: Clock, since: str) -> float:
    """Return the seconds of wall time since *since* (as utc_text wrote it), never below 0."""
    moment = datetime.strptime(since, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    return max(0.0, (clock.now() - moment).total_seconds())


def _encode(record: RunRecord) -> str:
    return msgspec.json.encode(record).decode()


def _decode(text: str) -> RunRecord:
    try:
        return msgspec.json.decode(text, type=RunRecord)
    except msgspec.DecodeError as error:
        raise StateFolderUnusable(
            f"The journal holds a run that this version can't read: {error}",
            "use the version of stillframe that wrote it, or a newer one", GuestState.UNKNOWN,
        ) from error
