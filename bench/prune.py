"""How long listing, a dry run and a prune take in a repository with many snapshots of a large disk.

    python -m bench.prune [--storage folder|s3] [--snapshots 1000] [--size-gib 1024] [--dirty 200] [--keep 30]
                          [--folder FOLDER]

The trees are real, made of random chunk IDs: the first snapshot has every chunk of the disk, each
further one has so many chunks anew, scattered over ten times as many. A collector reads nothing of data packs
but their names and sizes (compaction, which copies, is off here): in a folder they are sparse files of the
right size, on a server (SeaweedFS on loopback, started for it) objects of a few bytes. Printed: what was
built, and for each step seconds, the peak of memory so far, and the requests.
"""

from __future__ import annotations

import argparse
import random
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lab.s3 import BUCKET, S3Server
from stillframe.clock import SystemClock
from stillframe.repository.catalog import forget, list_snapshots, plan_forget
from stillframe.repository.collect import collect, list_packs, plan_collection
from stillframe.repository.keyslots import Kdf, SlotKind
from stillframe.repository.layout import PackKind, PackName, Parameters, SnapshotName, new_sid
from stillframe.repository.manifest import DiskEntry, Manifest, Root, Versions, encode_manifest
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.opened import Repository, Secret, init_repository
from stillframe.repository.pack import PackBuilder, SlotRef
from stillframe.repository.places import Places
from stillframe.repository.tree import Tree, TreeBuilder
from stillframe.storage.local import LocalStorage
from stillframe.storage.model import Storage
from stillframe.storage.s3 import S3Storage
from stillframe.storage.wrappers import Counted, VerbCount
from stillframe.units import GIB, KIB, MIB, size_text

_CLOCK = SystemClock()
#: What a slot of 16 chunks takes at a common ratio.
_SLOT_BYTES = 340 * KIB
#: How many times more chunks are ever written to than are in one go.
_HOT = 10
_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
_DAY_S = 86400.0
#: Data packs on their way to a server.
_AT_ONCE = 8


#: Stores something under the names of data packs, of the size that is said if that costs nothing.
PutData = Callable[[Sequence[tuple[PackName, int]]], None]


@contextmanager
def in_folder(folder: Path) -> Iterator[tuple[Storage, PutData]]:
    """Give a storage in a folder, where data packs are sparse files."""
    def put(packs: Sequence[tuple[PackName, int]]) -> None:
        for name, size_bytes in packs:
            path = folder / name.key
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(size_bytes)

    yield LocalStorage(folder, make=True), put


@contextmanager
def on_s3(folder: Path) -> Iterator[tuple[Storage, PutData]]:
    """Give a storage on a server of its own, where data packs are small objects."""
    with S3Server(folder) as server, ThreadPoolExecutor(_AT_ONCE) as pool:
        storage = S3Storage(BUCKET, "bench", server.access)

        def put(packs: Sequence[tuple[PackName, int]]) -> None:
            list(pool.map(lambda pack: storage.create(pack[0].key, b"data"), packs))

        yield storage, put


_STORAGES = {"folder": in_folder, "s3": on_s3}


class Synthetic:
    """Makes snapshots of one disk, as the writer does, out of chunks that nobody ever saw."""

    def __init__(self, repository: Repository, put_data: PutData, size_bytes: int, dirty: int) -> None:
        self._repository = repository
        self._put_data = put_data
        self._size_bytes = size_bytes
        self._dirty = dirty
        self._chance = random.Random(1)
        self._root: SlotRef | None = None
        self.nodes = 0
        self._begin(new_sid())

    def snapshot(self, number: int) -> SnapshotName:
        """Store one more snapshot; the first one is full."""
        self._begin(new_sid())
        parameters = self._repository.parameters
        parent = None if self._root is None else Tree(Places(self._repository), self._size_bytes, self._root)
        builder = TreeBuilder(parameters, self._size_bytes, self._put_node, parent, lambda _: True,
                              inherit=parent is not None)
        chunks, width = parameters.chunks(self._size_bytes), parameters.leaf_chunks
        if parent is None:
            for index in range(chunks // width):
                builder.put_leaf(index, [self._new_chunk() for _ in range(width)])
        else:
            changed: dict[int, list[int]] = {}
            hot = range(0, chunks, max(1, chunks // (_HOT * self._dirty)))
            for chunk in sorted(self._chance.sample(hot, min(self._dirty, len(hot)))):
                changed.setdefault(chunk // width, []).append(chunk % width)
            for index, positions in changed.items():
                leaf = parent.leaf_at(index)
                assert leaf is not None
                entries = list(leaf.entries)
                for position in positions:
                    entries[position] = self._new_chunk()
                builder.put_leaf(index, entries)
        self._root = builder.finish()
        self._close_data()
        self._put_data(self._closed)
        self._close_tree()
        return self._commit(number)

    def _begin(self, sid: str) -> None:
        self._sid = sid
        self._data_packs = self._data_slots = self._filled = self._tree_packs = 0
        self._closed: list[tuple[PackName, int]] = []
        self._tree: PackBuilder | None = None

    def _new_chunk(self) -> ChunkRef:
        """Return a chunk in the next place of this session's data packs."""
        parameters = self._repository.parameters
        if self._filled == parameters.slot_chunks:
            self._filled = 0
            self._data_slots += 1
            if (self._data_slots + 1) * _SLOT_BYTES > parameters.pack_bytes:
                self._close_data()
        pack = PackName(PackKind.DATA.value, bytes.fromhex(self._sid), self._data_packs)
        place = SlotRef(pack, self._data_slots, 28 + self._data_slots * _SLOT_BYTES, _SLOT_BYTES)
        self._filled += 1
        return ChunkRef(self._chance.randbytes(32), place, self._filled - 1)

    def _close_data(self) -> None:
        slots = self._data_slots + (1 if self._filled else 0)
        if slots:
            name = PackName(PackKind.DATA.value, bytes.fromhex(self._sid), self._data_packs)
            self._closed.append((name, 28 + slots * (_SLOT_BYTES + 68) + 40))
            self._data_packs += 1
        self._data_slots = self._filled = 0

    def _put_node(self, node: bytes) -> SlotRef:
        self.nodes += 1
        if self._tree is None:
            self._tree = PackBuilder(
                PackName(PackKind.TREE.value, bytes.fromhex(self._sid), self._tree_packs))
        tree, codec = self._tree, self._repository.codec
        place = tree.add(codec.seal_node(tree.name, tree.slots, node), len(node))
        if tree.size_bytes >= self._repository.parameters.pack_bytes:
            self._close_tree()
        return place

    def _close_tree(self) -> None:
        if self._tree is not None:
            self._repository.storage.create(self._tree.name.key, self._tree.finished())
            self._tree_packs += 1
            self._tree = None

    def _commit(self, number: int) -> SnapshotName:
        moment = _BEGAN + timedelta(hours=number)
        name = SnapshotName("alpha", "large", moment, self._sid)
        text = moment.isoformat()
        disk = DiskEntry(
            target="vda", format="raw", source="/dev/vg/large", method="overlay", size_bytes=self._size_bytes,
            root=Root.of(self._root), read_bytes=0, data_bytes=0, changed_bytes=0, stored_bytes=0)
        manifest = Manifest(
            sid=self._sid, guest="large", uuid="", host="alpha", captured_at=text, began_at=text,
            ended_at=text, consistency="crash", quiesce="none", parent="", live_xml="", inactive_xml="",
            disks=(disk,), excluded=(), files=(), versions=Versions("", "", "", ""), warnings=(),
            frozen_s=0.0, stored_bytes=0)
        self._repository.storage.create(
            name.key, encode_manifest(manifest, name.key, self._repository.key))
        return name


@contextmanager
def timed(what: str, counted: Counted, say: Callable[[str], None]) -> Iterator[None]:
    """Say how long the block took, the peak of memory so far, and the calls of the storage."""
    before, began_s = counted.counts(), _CLOCK.monotonic_s()
    processor_s = time.process_time()
    yield
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    calls = {verb: count.calls - before.get(verb, VerbCount()).calls
             for verb, count in counted.counts().items()}
    said = ", ".join(f"{count} {verb}" for verb, count in calls.items() if count)
    took_s, worked_s = _CLOCK.monotonic_s() - began_s, time.process_time() - processor_s
    say(f"{what:<42} {took_s:8.1f} s   {worked_s:7.1f} s of CPU   peak {peak_mib:5.0f} MiB   {said}")


def measure(storage: Storage, put_data: PutData, snapshots: int, size_bytes: int, dirty: int, keep: int,
            say: Callable[[str], None] = print) -> None:
    """Build the repository in *storage*, and time what is done with it."""
    counted = Counted(storage, _CLOCK)
    repository = init_repository(
        counted, Secret(SlotKind.PASSPHRASE, secrets.token_bytes(8)), "bench", _CLOCK,
        costs=Kdf("", memory_kib=8, iterations=1, lanes=1),
        parameters=Parameters(id=new_sid(), created_at="", pack_bytes=32 * MIB))
    synthetic = Synthetic(repository, put_data, size_bytes, dirty)
    with timed(f"(building {snapshots} snapshots of {size_text(size_bytes)})", counted, say):
        for number in range(snapshots):
            synthetic.snapshot(number)
    packs = list_packs(repository.storage)
    trees = sum(size for pack, size in packs.items() if pack.kind == PackKind.TREE.value)
    say(f"{len(packs)} packs, {size_text(sum(packs.values()))}; trees: {synthetic.nodes} nodes, "
        f"{size_text(trees)}")
    with timed("list", counted, say):
        names = list_snapshots(repository.storage)
    with timed("prune --dry-run", counted, say):
        plan = plan_collection(repository, _CLOCK, fence_after_s=_DAY_S, compact_below=0.0)
    assert plan.is_empty, "nothing is to be done yet"
    with timed(f"forget {snapshots - keep}", counted, say):
        forget(repository.storage, plan_forget(names[: snapshots - keep]))
    with timed(f"prune, {keep} snapshots left, both rounds", counted, say):
        done = collect(repository, "alpha", _CLOCK, fence_after_s=_DAY_S, compact_below=0.0)
    say(f"deleted {done.deleted_packs} packs, {size_text(done.deleted_bytes)}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=_STORAGES, default="folder")
    parser.add_argument("--snapshots", type=int, default=1000)
    parser.add_argument("--size-gib", type=int, default=1024)
    parser.add_argument("--dirty", type=int, default=200)
    parser.add_argument("--keep", type=int, default=30)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        _STORAGES[options.storage](Path(folder) / "repository") as (storage, put_data),
    ):
        measure(storage, put_data, options.snapshots, options.size_gib * GIB, options.dirty, options.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
