"""Work on a repository in a process of its own, to be killed at any moment or to run beside others.

    python -m tests.fault.repository_driver REPO HINTS backup GUEST FIRST COUNT
    python -m tests.fault.repository_driver REPO HINTS prune COUNT

The first makes COUNT snapshots and forgets old ones, the second makes COUNT collections, with compaction.
REPO is an address as the command takes it, with its environment; HINTS is a folder for what each guest's
backups remember.

`go` is printed once everything is loaded. What snapshot number N of a guest holds is `content(guest, N)`,
so that anybody can tell whether it reads back equal. The moment in a snapshot's name says its number.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from stillframe.clock import SystemClock
from stillframe.config import RepositorySettings, access_to, storage_of
from stillframe.repository.catalog import forget, list_snapshots, plan_forget
from stillframe.repository.collect import collect
from stillframe.repository.hints import ChunkHints
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.layout import SnapshotName
from stillframe.repository.opened import Repository, Secret, open_repository
from stillframe.storage.model import Storage
from tests.unit.repository_disks import CHUNK, SourceDisk, noise
from tests.unit.repository_snapshots import BEGAN, DAY_S, World, make_snapshot

SECRET = Secret(SlotKind.PASSPHRASE, b"secret")
KEPT = 3
_CHUNKS = 300


def content(guest: str, number: int) -> bytes:
    """Return what snapshot *number* of *guest* holds: shared, old, changed and zero chunks."""
    disk = bytearray(noise(_CHUNKS * CHUNK, 7))
    draw = random.Random(guest)
    for _ in range(12 * (number + 1)):
        place = draw.randrange(_CHUNKS) * CHUNK
        is_zero, seed = draw.random() < 0.2, draw.randrange(40)
        disk[place : place + CHUNK] = bytes(CHUNK) if is_zero else noise(CHUNK, seed)
    return bytes(disk)


def number_of(name: SnapshotName) -> int:
    """Return the number of a snapshot."""
    return round((name.utc - BEGAN).total_seconds() / 3600)


def storage_at(address: str, *, make: bool = False) -> Storage:
    """Return the storage at an address, as the command does."""
    settings = RepositorySettings(address)
    return storage_of(settings, address, access_to(settings, address), SystemClock(), make=make)


def opened(address: str) -> Repository:
    """Open the repository."""
    return open_repository(storage_at(address), SECRET)


def main() -> None:
    """Do the work."""
    address, hints_folder, what, *rest = sys.argv[1:]
    repository, clock = opened(address), SystemClock()
    print("go", flush=True)
    if what == "prune":
        for _ in range(int(rest[0])):
            collect(repository, "here", clock, fence_after_s=DAY_S, max_unused=0.0, compact_below=0.9)
        return
    guest, first, count = rest[0], int(rest[1]), int(rest[2])
    hints = ChunkHints(repository.parameters.id, Path(hints_folder) / guest)
    for number in range(first, first + count):
        make_snapshot(repository, SourceDisk(content(guest, number)),
                      SnapshotName("here", guest, World.moment(number), ""), clock, hints=hints)
        mine = [name for name in list_snapshots(repository.storage) if name.guest == guest]
        forget(repository.storage, plan_forget(mine[:-KEPT]))
    hints.close()


if __name__ == "__main__":
    main()
