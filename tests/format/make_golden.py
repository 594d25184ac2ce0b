"""Make the golden repository of the format that is current: `python -m tests.format.make_golden`.

It is made once for each version of the format and then kept for ever: every later version must read
it. It holds snapshots of two guests with shared and changed content, zeroes, chunks that don't compress,
slots that a compaction moved, a tombstone, and a damaged slot that a later backup healed.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

from stillframe.repository.layout import FORMAT_VERSION, GENERATIONS, HEALED, MANIFESTS, SnapshotName
from stillframe.repository.manifest import tombstone
from stillframe.repository.pack import footer_of
from stillframe.repository.verify import Level, verify
from tests.unit.repository_disks import CHUNK, noise
from tests.unit.repository_snapshots import World

HERE = Path(__file__).resolve().parent
PASSPHRASE = "secret"


def main() -> None:
    """Make it."""
    world = golden_world()
    folder = HERE / f"golden-{FORMAT_VERSION}"
    folder.mkdir()
    with tarfile.open(folder / "repository.tar.gz", "w:gz") as archive:
        for key, content in sorted(world.repository.storage.contents().items()):  # type: ignore[attr-defined]  # in memory
            entry = tarfile.TarInfo(key)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    expected = {name.sid: hashlib.sha256(content).hexdigest() for name, content in world.expected.items()}
    (folder / "sha256.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def golden_world() -> World:
    """Return a repository with everything in it that the format knows."""
    world = World()
    disk = bytearray(noise(40 * CHUNK, 1) + bytes(30 * CHUNK) + b"text " * (4 * CHUNK) + noise(1000, 2))
    first = world.backup(bytes(disk))
    for number in range(4):
        disk[number * 9 * CHUNK : (number * 9 + 2) * CHUNK] = noise(2 * CHUNK, 10 + number)
        disk[(20 + number) * CHUNK : (21 + number) * CHUNK] = bytes(CHUNK)
        world.backup(bytes(disk))
    world.backup(bytes(disk[: 50 * CHUNK]) + noise(3 * CHUNK, 3), guest="database", host="beta.example")
    world.backup(bytes(200 * CHUNK), guest="empty")
    world.forget(first)
    for _ in range(2):
        world.prune(max_unused=0.0, compact_below=0.99)
    _damage_and_heal(world, bytes(disk))
    gone = SnapshotName("alpha", "web", World.moment(99), "ab" * 16)
    world.repository.storage.create(gone.key, tombstone(gone.sid))
    contents = [listed.key for listed in world.repository.storage.list("")]
    for prefix in (GENERATIONS, HEALED, MANIFESTS):
        assert any(key.startswith(prefix) for key in contents), prefix
    world.check()
    return world


def _damage_and_heal(world: World, disk: bytes) -> None:
    sealed = max(world.data_packs(), key=lambda pack: world.packs()[pack])
    rows = footer_of(sealed, world.repository.storage.get(sealed.key))
    world.flip(sealed.key, rows[0].offset_bytes + 5)
    assert not verify(world.repository, world.clock, Level.FULL).is_sound
    world.backup(disk)
    world.backup(disk[: 50 * CHUNK] + noise(3 * CHUNK, 3), guest="database", host="beta.example")
    assert verify(world.repository, world.clock, Level.FULL).is_sound


if __name__ == "__main__":
    main()
