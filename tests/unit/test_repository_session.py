"""Sessions: what a writer registers, how it commits, and how a dead one is kept from committing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec
import pytest

from stillframe.clock import SystemClock
from stillframe.errors import SessionFenced, StorageLost
from stillframe.repository.crypto import DomainKey
from stillframe.repository.generation import Generation, create_generation
from stillframe.repository.layout import SnapshotName, session_key
from stillframe.repository.manifest import TOMBSTONE_BYTES
from stillframe.repository.opened import retried
from stillframe.repository.session import Session, fence, is_dead, list_sessions, open_session
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.model import Storage
from stillframe.storage.wrappers import Counted
from tests.storage_faults import CarriedOutTwice, Failing, LostReply, verb_is

_KEY = DomainKey.new()
_MANIFEST = b"a manifest" * 10


def _manifest_key(sid: str) -> str:
    return SnapshotName("host", "guest", datetime(2026, 11, 24, tzinfo=UTC), sid).key


@contextlib.contextmanager
def _session(storage: Storage) -> Iterator[Session]:
    with open_session(storage, _KEY, SystemClock(), "host", _manifest_key) as session:
        yield session


def test_a_session_is_registered_as_long_as_it_lasts() -> None:
    storage = MemoryStorage()
    with _session(storage) as session:
        assert [each.sid for each in list_sessions(storage, _KEY)] == [session.sid]
        assert not is_dead(session.record, storage, 0.0), "its process can be seen"
        session.commit(_MANIFEST)
    assert list_sessions(storage, _KEY) == []
    assert storage.get(session.record.manifest_key) == _MANIFEST


def test_a_session_goes_by_the_generation_that_came_while_it_registered() -> None:
    storage = MemoryStorage()

    def before(verb: str, key: str) -> None:
        if verb == "create" and key.startswith("main/s/"):
            storage.before = None
            assert create_generation(storage, Generation(1), _KEY)

    storage.before = before
    with _session(storage) as session:
        assert session.generation.number == 1
        assert list_sessions(storage, _KEY)[0].generation == 1


def test_a_fenced_session_can_not_commit() -> None:
    storage = MemoryStorage()
    with _session(storage) as session:
        fence(storage, session.record)
        assert list_sessions(storage, _KEY) == []
        with pytest.raises(SessionFenced):
            session.commit(_MANIFEST)
    assert storage.stat(session.record.manifest_key).size_bytes == TOMBSTONE_BYTES


def test_fencing_a_session_that_had_committed_leaves_its_snapshot() -> None:
    storage = MemoryStorage()
    with _session(storage) as session:
        session.commit(_MANIFEST)
        fence(storage, session.record)
    assert storage.get(session.record.manifest_key) == _MANIFEST


def test_a_session_of_elsewhere_is_dead_by_its_age_alone() -> None:
    storage = MemoryStorage()
    with _session(storage) as session:
        elsewhere = msgspec.structs.replace(session.record, space="another machine", pid=1)
        assert not is_dead(elsewhere, storage, 3600.0)
        assert is_dead(elsewhere, storage, -1.0)
        gone = msgspec.structs.replace(session.record, mark="another process")
        assert is_dead(gone, storage, 3600.0)


def _is_commit(verb: str, key: str) -> bool:
    return verb == "create" and key.startswith("main/m/")


def test_a_commit_whose_reply_was_lost_is_a_commit() -> None:
    inner = MemoryStorage()
    with _session(LostReply(inner, _is_commit)) as session:
        session.commit(_MANIFEST)
    assert inner.get(session.record.manifest_key) == _MANIFEST
    assert list_sessions(inner, _KEY) == []


def test_a_commit_that_was_lost_closes_its_own_place() -> None:
    inner = MemoryStorage()
    with _session(Failing(inner, _is_commit)) as session, pytest.raises(StorageLost):
        session.commit(_MANIFEST)
    assert inner.stat(session.record.manifest_key).size_bytes == TOMBSTONE_BYTES, "it can never come now"
    assert list_sessions(inner, _KEY) == []


def test_a_commit_in_doubt_leaves_its_session_for_fencing() -> None:
    inner = MemoryStorage()
    with _session(Failing(inner, _is_commit, times=2)) as session, pytest.raises(
            StorageLost, match="not known"):
        session.commit(_MANIFEST)
    assert [each.sid for each in list_sessions(inner, _KEY)] == [session.sid]


def test_a_commit_that_was_carried_out_twice_is_a_commit() -> None:
    inner = MemoryStorage()
    with _session(CarriedOutTwice(inner, _is_commit)) as session:
        session.commit(_MANIFEST)
    assert inner.get(session.record.manifest_key) == _MANIFEST
    assert list_sessions(inner, _KEY) == []


def test_a_lost_commit_whose_tombstone_was_carried_out_twice_was_fenced_by_nobody() -> None:
    inner = MemoryStorage()
    with _session(Failing(CarriedOutTwice(inner, _is_commit), _is_commit)) as session, pytest.raises(
            StorageLost):
        session.commit(_MANIFEST)
    assert inner.stat(session.record.manifest_key).size_bytes == TOMBSTONE_BYTES
    assert list_sessions(inner, _KEY) == []


def test_what_became_of_a_commit_is_asked_more_than_once() -> None:
    """The reply to the commit is lost, and so are those to two tombstones and to a look at what is there."""
    inner = MemoryStorage()
    bad = Failing(LostReply(inner, _is_commit), lambda verb, key: key.startswith("main/m/") and (
        verb == "get" or inner.contents().get(key) is not None), times=3)
    with _session(retried(bad, SystemClock(), first_pause_s=0.0)) as session:
        session.commit(_MANIFEST)
    assert bad.left == 0
    assert inner.get(session.record.manifest_key) == _MANIFEST


def test_a_generation_that_was_created_twice_is_ones_own() -> None:
    storage = CarriedOutTwice(MemoryStorage(), verb_is("create"), times=1)
    assert create_generation(storage, Generation(1), _KEY)
    assert not create_generation(storage, Generation(1), _KEY), "another made this one"


def test_a_commit_is_sent_once_although_all_else_is_retried() -> None:
    inner = MemoryStorage()
    counted = Counted(Failing(inner, _is_commit), SystemClock())
    with _session(retried(counted, SystemClock(), first_pause_s=0.0)) as session, pytest.raises(StorageLost):
        session.commit(_MANIFEST)
    # The session itself, the manifest once, the tombstone.
    assert counted.counts()["create"].calls == 3


def test_the_end_of_a_session_may_fail() -> None:
    inner = MemoryStorage()
    with _session(Failing(inner, verb_is("delete"))) as session:
        session.commit(_MANIFEST)
    assert session_key(session.sid) in inner.contents()
