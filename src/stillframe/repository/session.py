"""Sessions: whoever writes packs has one, so that no collector takes them for rubbish.

Who reads a snapshot for so long that it may be forgotten meanwhile has one, too, with no key to commit at:
what is condemned after it was registered stays until it ends.

    main/s/<sid>   sealed JSON: version, sid, generation, host, manifest_key, pid, mark, space,
                   began_at, beat

`generation` is the number of the generation that the writer goes by; `manifest_key` the one key at which
it may commit ("" for a collector, which commits by creating a generation, and for a reader). `space` says
who can see its process (boot and namespace), `mark` tells that process from any other there. Where the
writer may do so, the object is replaced every minute with a higher `beat`; its time of change, by the
storage's clock, is what a collector goes by when it takes a session for dead. Being wrong there costs a
backup, never data: see `fence`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import msgspec

from stillframe.clock import Clock, utc_text
from stillframe.errors import (
    ObjectExists,
    ObjectMissing,
    RepositoryDamaged,
    SessionFenced,
    StorageError,
    StorageLost,
)
from stillframe.process import is_alive, process_space, start_mark
from stillframe.repository.crypto import DomainKey
from stillframe.repository.generation import Generation, latest_generation, latest_number
from stillframe.repository.layout import FORMAT_VERSION, SESSIONS, check_version, new_sid, session_key
from stillframe.repository.manifest import tombstone
from stillframe.storage.model import Storage
from stillframe.storage.own import create_own, holds

_BEAT_S = 60.0


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A session as it is stored."""

    sid: str
    generation: int
    host: str
    manifest_key: str
    pid: int
    mark: str
    space: str
    began_at: str
    beat: int = 0
    version: int = FORMAT_VERSION

    def encode(self, domain_key: DomainKey) -> bytes:
        """Return the session as an object."""
        return domain_key.seal_object(session_key(self.sid), msgspec.json.encode(self, order="sorted"))


@dataclass(slots=True)
class Session:
    """A live session, valid within the block of `open_session`. *generation* is what it goes by."""

    record: SessionRecord
    generation: Generation
    storage: Storage
    #: The commit was sent and nobody knows whether it will take effect: the session must stay.
    in_doubt: bool = False

    @property
    def sid(self) -> str:
        """The session's ID."""
        return self.record.sid

    def commit(self, manifest: bytes) -> None:
        """Create the manifest: the commit (W5). When this returns, the snapshot is there.

        Raises SessionFenced if a collector closed its place, StorageError if it is not there for certain.
        """
        self.in_doubt = True
        try:
            # Sent once (see opened.retried): a first request could take effect long after a second one.
            create_own(self.storage, self.record.manifest_key, manifest)
        except ObjectExists as error:
            self.in_doubt = False
            raise _fenced() from error
        except StorageError as error:
            self._settle(manifest, error)
        self.in_doubt = False

    def _settle(self, manifest: bytes, error: StorageError) -> None:
        """Find out what became of a commit whose reply was lost, and see to it that it stays so.

        The request may still be on its way, and take effect when this session is gone and its packs are
        deleted. So the place is taken by a tombstone, unless the manifest was faster. If not even that can
        be done, the session stays, and whoever takes it for dead closes the place.
        """
        try:
            is_there = self._takes_its_place(manifest)
        except SessionFenced:
            self.in_doubt = False
            raise
        except StorageError as unsettled:
            raise _in_doubt(unsettled) from error
        self.in_doubt = False
        if not is_there:
            raise error

    def _takes_its_place(self, manifest: bytes) -> bool:
        """Close the place of the manifest; return whether the manifest is there. Raises SessionFenced."""
        key = self.record.manifest_key
        try:
            # One that a collector made is the same to the byte, and closes the place as well.
            create_own(self.storage, key, tombstone(self.sid))
        except ObjectExists as error:
            if not holds(self.storage, key, manifest):
                raise _fenced() from error
            return True
        return False


@contextlib.contextmanager
def open_session(
    storage: Storage, domain_key: DomainKey, clock: Clock, host: str, manifest_key: Callable[[str], str],
) -> Iterator[Session]:
    """Register a session for the length of the block (W1, W2), and keep it alive; remove it behind (W6).

    *manifest_key* makes the key of the manifest from the session's ID. When the block is left without a
    commit, what the session wrote is rubbish for the next collector. Raises StorageError.
    """
    record, generation = _register(storage, domain_key, clock, host, manifest_key)
    session = Session(record, generation, storage)
    ended = threading.Event()
    beating = threading.Thread(
        target=_beat, args=(storage, domain_key, clock, record, ended), name="heartbeat", daemon=True)
    beating.start()
    try:
        yield session
    finally:
        ended.set()
        beating.join()
        if not session.in_doubt:
            _end(storage, record.sid)


def _register(
    storage: Storage, domain_key: DomainKey, clock: Clock, host: str, manifest_key: Callable[[str], str],
) -> tuple[SessionRecord, Generation]:
    """Register a session that goes by the latest generation, and return both. Raises StorageError.

    A collector that listed the sessions before this one was there does not wait for it: so its generation
    must be read after that. Until no newer one appears, none was made without seeing this. A session that is
    behind is not brought up to date but followed by another: who may only create (an append-only host) can
    do that, too.
    """
    generation = latest_generation(storage, domain_key)
    while True:
        sid = new_sid()
        record = SessionRecord(
            sid=sid, generation=generation.number, host=host, manifest_key=manifest_key(sid), pid=os.getpid(),
            mark=start_mark(os.getpid()), space=process_space(), began_at=utc_text(clock.now()))
        create_own(storage, session_key(sid), record.encode(domain_key))
        if latest_number(storage) == generation.number:
            return record, generation
        _end(storage, sid)
        generation = latest_generation(storage, domain_key)


def _end(storage: Storage, sid: str) -> None:
    """Remove a session; left behind (who may only create must leave it), it is fenced one day."""
    with contextlib.suppress(StorageError):
        storage.delete([session_key(sid)])


def list_sessions(storage: Storage, domain_key: DomainKey) -> list[SessionRecord]:
    """Return the sessions that are registered. Raises RepositoryDamaged, RepositoryNewer."""
    found = []
    for listed in storage.list(SESSIONS):
        with contextlib.suppress(ObjectMissing):  # it ended meanwhile
            found.append(_decode(listed.key, storage.get(listed.key), domain_key))
    return found


def is_dead(record: SessionRecord, storage: Storage, fence_after_s: float) -> bool:
    """Return whether a session's process is gone, or gave no sign of life for *fence_after_s*.

    Where its process could be seen it is looked at; from elsewhere only the storage's times tell.
    """
    if record.space == process_space():
        return not is_alive(record.pid, record.mark)
    try:
        changed_at = storage.stat(session_key(record.sid)).modified_at
    except ObjectMissing:
        return False  # it ended meanwhile: nobody needs to end it
    return storage.now() - changed_at > timedelta(seconds=fence_after_s)


def fence(storage: Storage, record: SessionRecord) -> None:
    """Make sure that a dead session can't commit any more, then remove it (G0).

    A writer's manifest key is taken by a tombstone; if a manifest is there already, it had committed.
    A collector's commit is creating the next generation, which the caller will take or lose.
    """
    if record.manifest_key:
        with contextlib.suppress(ObjectExists):
            storage.create(record.manifest_key, tombstone(record.sid))
    storage.delete([session_key(record.sid)])


def _beat(
    storage: Storage, domain_key: DomainKey, clock: Clock, record: SessionRecord, ended: threading.Event
) -> None:
    while not clock.wait(ended, _BEAT_S):
        record = msgspec.structs.replace(record, beat=record.beat + 1)
        try:
            storage.stat(session_key(record.sid))  # a fenced session must not come back by its own beat
            storage.replace(session_key(record.sid), record.encode(domain_key))
        except ObjectMissing:
            return
        except StorageError:
            continue  # the next beat may come through; the work itself will say what is wrong


def _fenced() -> SessionFenced:
    return SessionFenced(
        "A prune on another host took this run for dead and closed the place of its snapshot; "
        "no snapshot was made.",
        "run the same command again; prune with a longer --fence-after",
    )


def _in_doubt(error: StorageError) -> StorageLost:
    return StorageLost(
        f"Whether the snapshot was made is not known: the storage failed in the commit, and when it was "
        f"asked what came of it. {error.message}",
        "stillframe list --repo REPO   # if it is listed it is whole; if not, run again")


class _Version(msgspec.Struct):
    version: int = 0


def _decode(key: str, sealed: bytes, domain_key: DomainKey) -> SessionRecord:
    try:
        content = domain_key.open_object(key, sealed)
        check_version(msgspec.json.decode(content, type=_Version).version, f"{key} is a session")
        return msgspec.json.decode(content, type=SessionRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RepositoryDamaged(
            f"The session {key} can't be read: {error}. As long as it is there nothing can be pruned.",
            "see that no backup is running anywhere, then delete that object; its snapshot never came to be",
        ) from error
