"""How many requests the daily incremental backup to a real S3 server needs."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lab.s3 import BUCKET
from stillframe.clock import SystemClock
from stillframe.repository.heal import read_bad, write_heals
from stillframe.repository.hints import ChunkHints
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.layout import Parameters, SnapshotName, new_sid
from stillframe.repository.manifest import Manifest, encode_manifest
from stillframe.repository.opened import Repository, Secret, open_repository, with_cache
from stillframe.repository.places import Places
from stillframe.repository.session import open_session
from stillframe.repository.snapshots import newest_of, still_there
from stillframe.repository.verify import Level, verify_repository
from stillframe.repository.writer import Since, SnapshotWriter
from stillframe.storage.s3 import S3Storage
from stillframe.storage.wrappers import Counted
from stillframe.units import KIB, MIB
from tests.contract.drivers import Servers
from tests.unit.changed_disks import ChangedDisk
from tests.unit.repository_disks import noise, small_repository, whole
from tests.unit.repository_snapshots import manifest_of, view_of

_CHUNK = 4 * KIB
_PARAMETERS = Parameters(id=new_sid(), created_at="", chunk_bytes=_CHUNK, pack_bytes=8 * MIB)
_BEGAN = datetime(2026, 11, 20, tzinfo=UTC)
_REQUESTS_MAX = 12
