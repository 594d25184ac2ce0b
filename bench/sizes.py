"""The table by which the sizes of chunks, slots, leaves and packs are chosen.

    .venv/bin/python -m bench.sizes [--data 2G] [--rounds 1] [--dir /var/tmp]

For each size of chunk and slot: the speed and the ratio of a full backup of an ext4 image with as much of
this machine's /usr as fits; and for 10,000 writes of 4 KiB, scattered over a disk of 100 GiB, what is read of
the disk, what is stored in data slots (compressed chunks of that image), and what is fetched
to read one chunk. For each size of chunk and leaf: what a tree grows by for those writes, and for 200
dirty chunks on a disk of 1 TiB (the tree alone, made of random IDs, with its parent's other leaves
in place). For each size of pack: the speed of a full backup.
"""

from __future__ import annotations

import argparse
import random
import secrets
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from bench.peers import Sample, folder_bytes
from bench.repository import SECRET, data_blocks, run, settle
from stillframe.clock import SystemClock
from stillframe.repository.crypto import TAG_BYTES
from stillframe.repository.layout import PackKind, PackName, Parameters, new_sid
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.opened import init_repository
from stillframe.repository.pack import ROW_BYTES, PackBuilder, SlotRef
from stillframe.repository.places import Places
from stillframe.repository.tree import Tree, TreeBuilder
from stillframe.storage.local import LocalStorage
from stillframe.units import GIB, KIB, MIB, TIB, parse_size_bytes, size_text

CHUNKS = (32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB)
SLOTS = (256 * KIB, MIB, 2 * MIB)
LEAVES = (32, 64, 128, 256)
PACKS = (8 * MIB, 16 * MIB, 32 * MIB, 64 * MIB)
WRITES, WRITTEN_DISK = 10_000, 100 * GIB
DIRTY, DIRTY_DISK = 200, TIB
SAMPLED_SLOTS = 150
USUAL = Parameters(id="", created_at="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="2G")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stillframe-sizes-", dir=options.dir))
    try:
        image = folder / "disk.raw"
        make_image(image, parse_size_bytes(options.data))
        show_slots(folder, image, options.rounds)
        show_leaves(folder)
        show_packs(folder, image, options.rounds)
    finally:
        shutil.rmtree(folder)
    return 0


def make_image(path: Path, size: int) -> None:
    """Make an ext4 image with programs, libraries and texts, as much of /usr as surely fits."""
    staging, room = path.with_name("staging"), int(size * 0.85)
    for name in ("bin", "lib/python3", "share/doc", "lib/x86_64-linux-gnu", "share", "lib"):
        source = Path("/usr") / name
        used = int(subprocess.check_output(["du", "-sB1", source]).split()[0]) if source.is_dir() else room
        if used < room:
            room -= used
            staging.mkdir(exist_ok=True)
            subprocess.run(["cp", "-a", source, staging / name.replace("/", "-")], check=True)
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", staging, path], check=True)
    shutil.rmtree(staging)


def show_slots(folder: Path, image: Path, rounds: int) -> None:
    print(f"{'chunk':>8}{'slot':>10}{'MB/s':>8}{'ratio':>8}   {WRITES} writes: read, stored; fetched for one")
    sizes = [(chunk, slot) for chunk in CHUNKS for slot in SLOTS]
    # Round by round, so that no size has the good or the bad minutes.
    taken: dict[tuple[int, int], list[Sample]] = {}
    for _ in range(rounds):
        for chunk, slot in sizes:
            taken.setdefault((chunk, slot), []).append(full_backup(folder, image, parameters(chunk, slot)))
    for chunk, slot in sizes:
        speed, ratio = speed_and_ratio(taken[chunk, slot])
        # Writes at random places of a disk so large hardly ever meet: a chunk each.
        stored = stored_for_scattered(image, folder, parameters(chunk, slot))
        fetched = stored // -(-WRITES // (slot // chunk))
        moved = "".join(f"{size_text(each):>12}" for each in (WRITES * chunk, stored, fetched))
        print(f"{size_text(chunk):>8}{size_text(slot):>10}{speed:8.0f}{ratio:8.3f}   {moved}", flush=True)


def show_leaves(folder: Path) -> None:
    print(f"\n{'chunk':>8}{'leaf':>6}   tree for {WRITES} chunks of {size_text(WRITTEN_DISK)}, "
          f"for {DIRTY} of {size_text(DIRTY_DISK)}")
    for chunk in CHUNKS:
        for width in LEAVES:
            sizes = parameters(chunk, MIB, leaf_chunks=width)
            grown = [tree_growth(folder, sizes, *each) for each in
                     ((WRITTEN_DISK, WRITES), (DIRTY_DISK, DIRTY))]
            print(f"{size_text(chunk):>8}{width:6}   " + "".join(f"{size_text(each):>12}" for each in grown),
                  flush=True)


def show_packs(folder: Path, image: Path, rounds: int) -> None:
    print(f"\n{'pack':>8}{'MB/s':>8}   peak memory")
    for pack in PACKS:
        samples = [full_backup(folder, image, parameters(USUAL.chunk_bytes, MIB, pack_bytes=pack))
                   for _ in range(rounds)]
        peak = max(sample.rss_bytes for sample in samples)
        print(f"{size_text(pack):>8}{speed_and_ratio(samples)[0]:8.0f}   {size_text(peak)}", flush=True)


def parameters(chunk: int, slot: int, *, leaf_chunks: int = USUAL.leaf_chunks,
               pack_bytes: int = USUAL.pack_bytes) -> Parameters:
    return Parameters(id=new_sid(), created_at="", chunk_bytes=chunk, slot_chunks=slot // chunk,
                      leaf_chunks=leaf_chunks, pack_bytes=pack_bytes)


def full_backup(folder: Path, image: Path, sizes: Parameters) -> Sample:
    place = folder / "repository"
    init_repository(LocalStorage(place, make=True), SECRET, "bench", SystemClock(), parameters=sizes)
    settle(image)
    sample = run("backup-into", image, place, folder / "result.json")
    sample.facts["stored"] = folder_bytes(place)
    shutil.rmtree(place)
    return sample


def speed_and_ratio(samples: list[Sample]) -> tuple[float, float]:
    data = samples[0].facts["data"]
    seconds = statistics.median(sample.seconds for sample in samples)
    return data / seconds / 1e6, samples[0].facts["stored"] / data


def stored_for_scattered(image: Path, folder: Path, sizes: Parameters) -> int:
    """Return what the data slots of the writes take: measured on some, of chunks from anywhere."""
    place = folder / "codec"
    repository = init_repository(
        LocalStorage(place, make=True), SECRET, "bench", SystemClock(), parameters=sizes)
    chance, places, taken = random.Random(0), data_blocks(image, sizes.chunk_bytes), 0
    with image.open("rb") as file:
        for _ in range(SAMPLED_SLOTS):
            body = bytearray()
            for at in chance.choices(places, k=sizes.slot_chunks):
                file.seek(at)
                body += file.read(sizes.chunk_bytes)
            ids = [chance.randbytes(32) for _ in range(sizes.slot_chunks)]
            taken += len(repository.codec.chunks_content(ids, body)) + TAG_BYTES + ROW_BYTES
    shutil.rmtree(place)
    return taken * WRITES // (SAMPLED_SLOTS * sizes.slot_chunks)


class TreeGrowth:
    """Builds two trees of one disk: a first one with just the leaves that will change, and the next one."""

    def __init__(self, folder: Path, sizes: Parameters) -> None:
        self._repository = init_repository(
            LocalStorage(folder, make=True), SECRET, "bench", SystemClock(), parameters=sizes)
        self._sizes = sizes
        self._chance = random.Random(0)
        self._pack = self._new_pack()
        self.stored_bytes = 0

    def grow(self, size_bytes: int, dirty: int) -> int:
        """Return what *dirty* chunks at random places make the tree grow by."""
        sizes, width = self._sizes, self._sizes.leaf_chunks
        changed: dict[int, list[int]] = {}
        for chunk in sorted(self._chance.sample(range(sizes.chunks(size_bytes)), dirty)):
            changed.setdefault(chunk // width, []).append(chunk % width)
        first = TreeBuilder(sizes, size_bytes, self._put_node, None, lambda _: True)
        elsewhere = PackName(PackKind.TREE.value, secrets.token_bytes(16), 0)
        leaves = {index: self._old_leaf(index) for index in changed}
        for index in range(sizes.chunks(size_bytes) // width):
            if index in leaves:
                first.put_leaf(index, leaves[index])
            else:
                first.keep_leaf(index, SlotRef(elsewhere, index % 8192, index % 8192 * 3000, 3000))
        root = first.finish()
        self._close()
        before = self.stored_bytes
        tree = Tree(Places(self._repository), size_bytes, root)
        following = TreeBuilder(sizes, size_bytes, self._put_node, tree, lambda _: True, inherit=True)
        data = PackName(PackKind.DATA.value, secrets.token_bytes(16), 0)
        for number, (index, positions) in enumerate(changed.items()):
            for position in positions:
                leaves[index][position] = self._chunk(data, number)
            following.put_leaf(index, leaves[index])
        following.finish()
        return self.stored_bytes - before

    def _old_leaf(self, index: int) -> list[ChunkRef]:
        pack = PackName(PackKind.DATA.value, bytes(16), index)
        return [self._chunk(pack, number) for number in range(self._sizes.leaf_chunks)]

    def _chunk(self, pack: PackName, number: int) -> ChunkRef:
        slot, position = divmod(number, self._sizes.slot_chunks)
        place = SlotRef(pack, slot, 28 + slot * 340_000, 340_000)
        return ChunkRef(self._chance.randbytes(32), place, position)

    def _put_node(self, node: bytes) -> SlotRef:
        sealed = self._repository.codec.seal_node(self._pack.name, self._pack.slots, node)
        self.stored_bytes += len(sealed) + ROW_BYTES
        place = self._pack.add(sealed, len(node))
        if self._pack.size_bytes >= self._sizes.pack_bytes:
            self._close()
        return place

    def _close(self) -> None:
        self._repository.storage.create(self._pack.name.key, self._pack.finished())
        self._pack = self._new_pack()

    def _new_pack(self) -> PackBuilder:
        return PackBuilder(PackName(PackKind.TREE.value, secrets.token_bytes(16), 0))


def tree_growth(folder: Path, sizes: Parameters, size_bytes: int, dirty: int) -> int:
    place = folder / "trees"
    grown = TreeGrowth(place, sizes).grow(size_bytes, dirty)
    shutil.rmtree(place)
    return grown


if __name__ == "__main__":
    raise SystemExit(main())
