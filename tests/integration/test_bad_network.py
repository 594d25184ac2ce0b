"""Real servers behind a proxy that cuts, delays, loses and repeats: nothing is lost or made up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from lab.proxy import Chances, CuttingProxy, HttpProxy, hours_ahead
from lab.s3 import BUCKET
from stillframe.clock import SystemClock
from stillframe.errors import ObjectExists, ObjectMissing, StillframeError, StorageLost
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.layout import SnapshotName
from stillframe.repository.opened import retried
from stillframe.repository.session import is_dead, open_session
from stillframe.storage.files import FileStorage
from stillframe.storage.model import Storage
from stillframe.storage.s3 import S3Storage
from stillframe.storage.sftp import SftpServer
from stillframe.storage.smb import SmbServer
from tests.contract.drivers import Servers
from tests.unit.repository_disks import SourceDisk, noise, small_repository
from tests.unit.repository_snapshots import make_snapshot, read_snapshot

_ALL = Chances(cut_request=0.06, lost_reply=0.06, cut_reply=0.06, busy=0.06, late=0.03, twice=0.06)
_OBJECTS = {f"main/t/{number:03}": noise(200 + 137 * number, number) for number in range(25)}


def patient(storage: Storage) -> Storage:
    """Tried again as the command does, but at once."""
    return retried(storage, SystemClock(), first_pause_s=0.001, longest_pause_s=0.01, attempts=12)


def s3_behind(servers: Servers, proxy: HttpProxy, prefix: str) -> S3Storage:
    return S3Storage(BUCKET, prefix, msgspec.structs.replace(servers.s3.access, endpoint=proxy.endpoint))


def exercise(storage: Storage, direct: Storage) -> None:
    """Each verb does what it says, and what is there in the end is what was stored."""
    for key, content in _OBJECTS.items():
        storage.create(key, content)
    assert [(each.key, each.size_bytes) for each in direct.list("")] == [
        (key, len(content)) for key, content in _OBJECTS.items()]
    assert list(storage.list("main/t/")) == list(direct.list("main/t/"))
    for key, content in _OBJECTS.items():
        assert direct.get(key) == content
        assert storage.get(key) == content
        assert storage.get(key, 100, 57) == content[100:157]
        assert storage.stat(key).size_bytes == len(content)
        with pytest.raises(ObjectExists):
            storage.create(key, content[::-1])
    storage.replace("main/s/x", b"one")
    storage.replace("main/s/x", b"two")
    assert storage.get("main/s/x") == b"two"
    storage.delete([*_OBJECTS, "main/s/x"])
    assert list(direct.list("")) == []
    with pytest.raises(ObjectMissing):
        storage.get("main/t/000")


@pytest.fixture
def s3_proxy(servers: Servers) -> Iterator[HttpProxy]:
    with HttpProxy(servers.s3.port, _ALL, seed=6) as proxy:
        yield proxy


def test_verbs_of_s3_on_a_bad_network(servers: Servers, s3_proxy: HttpProxy) -> None:
    prefix = servers.unused
    exercise(patient(s3_behind(servers, s3_proxy, prefix)), S3Storage(BUCKET, prefix, servers.s3.access))
    assert {"cut_request", "lost_reply", "cut_reply", "busy", "twice"} <= set(s3_proxy.met)


def test_verbs_of_sftp_on_a_bad_network(servers: Servers) -> None:
    place = servers.sftp.place(servers.unused)
    direct = FileStorage(SftpServer(place), make=True)
    with CuttingProxy(servers.sftp.port, 8_000, 60_000, seed=7) as proxy:
        # The known host is the server behind it.
        hosts = servers.sftp.known_hosts_for(proxy.port)
        exercise(patient(FileStorage(SftpServer(
            msgspec.structs.replace(place, port=proxy.port, known_hosts=str(hosts))))), direct)
        assert proxy.met["cut"]


def test_verbs_of_smb_on_a_bad_network(servers: Servers) -> None:
    place, access, clock = servers.smb.place(servers.unused), servers.smb.access, SystemClock()
    direct = FileStorage(SmbServer(place, access, clock), make=True)
    with CuttingProxy(servers.smb.port, 8_000, 60_000, seed=8) as proxy:
        behind = msgspec.structs.replace(place, port=proxy.port)
        exercise(patient(FileStorage(SmbServer(behind, access, clock))), direct)
        assert proxy.met["cut"]


def test_a_create_whose_reply_is_lost_succeeds_only_with_our_own_bytes(servers: Servers) -> None:
    prefix = servers.unused
    direct = S3Storage(BUCKET, prefix, servers.s3.access)
    with HttpProxy(servers.s3.port, Chances(lost_reply=0.5), seed=2) as proxy:
        storage = patient(s3_behind(servers, proxy, prefix))
        for number in range(12):
            key, theirs = f"main/t/{number}", number % 2 == 1
            if theirs:
                direct.create(key, b"theirs")
                with pytest.raises(ObjectExists):
                    storage.create(key, b"ours")
            else:
                storage.create(key, b"ours")
            assert direct.get(key) == (b"theirs" if theirs else b"ours")
        assert proxy.met["lost_reply"] >= 4


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_backups_on_a_bad_network_restore_every_byte(servers: Servers, seed: int) -> None:
    """The commit is sent once: a backup whose commit is harmed may fail, and then has made no snapshot."""
    chances = replace(_ALL, written_twice=0.15)
    with HttpProxy(servers.s3.port, chances, seed) as proxy:
        _back_up_and_restore(servers, proxy)
        assert proxy.met["written_twice"]


def test_replies_that_are_short_and_say_so_are_noticed(servers: Servers) -> None:
    """A cache gives half of what was asked for as all of it. A range is asked for again until it is whole;
    of a whole object only those who read it know: what they return is right, or there is an error."""
    prefix = servers.unused
    direct = S3Storage(BUCKET, prefix, servers.s3.access)
    repository = small_repository(direct)
    disk = SourceDisk(noise(200_000))
    wanted = SnapshotName("host", "guest", datetime(2026, 11, 1, tzinfo=UTC), "")
    name = make_snapshot(repository, disk, wanted, SystemClock())
    with HttpProxy(servers.s3.port, Chances(short=0.3), seed=3) as proxy:
        storage = patient(s3_behind(servers, proxy, prefix))
        (pack, *_) = direct.list("main/p/")
        content = direct.get(pack.key)
        for at in range(20):
            assert storage.get(pack.key, at, 57) == content[at:at + 57]
        assert proxy.met["short"] >= 3
        for _ in range(5):
            with contextlib.suppress(StillframeError):
                assert read_snapshot(replace(repository, storage=storage), name) == disk.content


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_server_with_another_time_takes_no_run_for_dead(servers: Servers, hours: int) -> None:
    """How long a session of another host gave no sign is told by the server's clock alone."""
    repository = small_repository(S3Storage(BUCKET, servers.unused, servers.s3.access))
    with HttpProxy(servers.s3.port, Chances(), answered=hours_ahead(hours)) as proxy, open_session(
        repository.storage, repository.key, SystemClock(), "host", lambda sid: f"main/m/h/g/x-{sid}",
    ) as session:
        behind = s3_behind(servers, proxy, repository.storage.address.rpartition("/")[2])
        off = behind.now() - SystemClock().now()
        assert abs(off - timedelta(hours=hours)) < timedelta(hours=1)
        elsewhere = msgspec.structs.replace(session.record, space="another host")
        assert not is_dead(elsewhere, behind, 3600.0)
        assert is_dead(elsewhere, behind, -60.0)


def _back_up_and_restore(servers: Servers, proxy: HttpProxy) -> None:
    prefix = servers.unused
    direct = S3Storage(BUCKET, prefix, servers.s3.access)
    repository = small_repository(direct)
    harmed = replace(repository, storage=patient(s3_behind(servers, proxy, prefix)))
    disk, kept = SourceDisk(noise(600_000)), dict[SnapshotName, bytes]()
    for day in range(1, 6):
        disk.content[day * 5000 : day * 5000 + 9000] = noise(9000, day)
        wanted = SnapshotName("host", "guest", datetime(2026, 11, day, tzinfo=UTC), "")
        with contextlib.suppress(StorageLost):
            kept[make_snapshot(harmed, disk, wanted, SystemClock())] = bytes(disk.content)
    assert list_snapshots(direct) == sorted(kept)
    assert len(kept) >= 3
    for name, moment in kept.items():
        assert read_snapshot(repository, name) == moment
        assert read_snapshot(harmed, name) == moment
