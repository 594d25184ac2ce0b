"""How many requests the daily incremental backup to a real S3 server needs."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lab.s3 import BUCKET
from stillframe.clock import SystemClock
from stillframe.repository.hints import ChunkHints
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.layout import Parameters, SnapshotName, new_sid
from stillframe.repository.opened import Secret, open_repository, with_cache
from stillframe.storage.s3 import S3Storage
from stillframe.storage.wrappers import Counted, VerbCount
from stillframe.units import KIB, MIB
from tests.contract.drivers import Servers
from tests.unit.changed_disks import ChangedDisk
from tests.unit.repository_disks import noise, small_repository
from tests.unit.repository_snapshots import make_snapshot, read_snapshot

_CHUNK = 4 * KIB
_PARAMETERS = Parameters(id=new_sid(), created_at="", chunk_bytes=_CHUNK, pack_bytes=1 * MIB)
_SIZE_BYTES = 32 * MIB
_CHANGED_CHUNKS = 100
_REQUESTS_MAX = 12
_BEGAN = datetime(2026, 11, 20, tzinfo=UTC)
_SECRET = Secret(SlotKind.PASSPHRASE, b"secret")


@dataclass
class Daily:
    """One guest's disk, backed up to S3 each day by a new run of the command."""

    bucket: S3Storage
    state: Path
    disk: ChangedDisk
    days: int = 0

    def change(self) -> None:
        chance = random.Random(self.days)
        for chunk in chance.sample(range(_SIZE_BYTES // _CHUNK), _CHANGED_CHUNKS):
            self.disk.write(chunk * _CHUNK, noise(_CHUNK, chunk + self.days))

    def backup(self, *, cache: bool = True) -> tuple[SnapshotName, dict[str, VerbCount]]:
        """Return the snapshot, and the requests that it took."""
        counted = Counted(self.bucket, SystemClock())
        repository = open_repository(counted, _SECRET)
        if cache:
            repository = with_cache(repository, self.state / "cache")
        self.days += 1
        hints = ChunkHints(repository.parameters.id, self.state)
        wanted = SnapshotName("host", "guest", _BEGAN + timedelta(days=self.days), "")
        changes = list(self.disk.changes or ())
        name = make_snapshot(repository, self.disk, wanted, SystemClock(), hints=hints,
                             changes=lambda _: changes)
        hints.close()
        self.disk.settle()
        return name, counted.counts()


def requests(counts: dict[str, VerbCount]) -> int:
    return sum(count.calls for verb, count in counts.items() if verb != "list")


@pytest.fixture
def daily(servers: Servers, tmp_path: Path) -> Daily:
    bucket = S3Storage(BUCKET, servers.unused, servers.s3.access)
    small_repository(bucket, _PARAMETERS)
    return Daily(bucket, tmp_path, ChangedDisk(noise(_SIZE_BYTES)))


def test_a_daily_incremental_needs_few_requests(daily: Daily) -> None:
    first, _ = daily.backup()
    moments = {first: bytes(daily.disk.content)}
    for _ in range(2):
        daily.change()
        moment = bytes(daily.disk.content)
        name, counts = daily.backup()
        moments[name] = moment
        assert requests(counts) <= _REQUESTS_MAX, counts
    # Without its cache it costs more, once.
    shutil.rmtree(daily.state / "cache")
    daily.change()
    name, counts = daily.backup()
    moments[name] = bytes(daily.disk.content)
    assert requests(counts) > _REQUESTS_MAX
    daily.change()
    name, counts = daily.backup()
    moments[name] = bytes(daily.disk.content)
    assert requests(counts) <= _REQUESTS_MAX, counts
    # What it is worth, and that the snapshots are the same without it.
    daily.change()
    name, counts = daily.backup(cache=False)
    moments[name] = bytes(daily.disk.content)
    assert requests(counts) > 5 * _REQUESTS_MAX
    repository = open_repository(daily.bucket, _SECRET)
    for name, moment in moments.items():
        assert read_snapshot(repository, name) == moment
