"""Measure the repository: first and second backup, restore, and the memory that they take.

    .venv/bin/python bench/repository.py [--image PATH] [--size 8G] [--rounds 3] [--dir /var/tmp] [--huge]

The disk is an ext4 image with this machine's /usr (made once and kept, or any raw image with --image).
Each round, in turns: the bound (zero test, BLAKE3, zstd 1 and AES-GCM of warm memory on two threads, the
work that no backup can do without), the first backup into a new repository, a second one after 1 % of the
64 KiB blocks with data were changed, the restore into a new raw file, and `qemu-img convert` of the raw image
with an fsync. What is restored is compared with the disk. --huge: a sparse disk of 1 TiB with 10 GiB.
Each measurement is a process of its own; its peak memory is its own, qemu-nbd's is not counted.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stillframe.block.image import file_place
from stillframe.block.reader import open_reader
from stillframe.clock import SystemClock
from stillframe.repository.heal import read_bad
from stillframe.repository.hints import ChunkHints
from stillframe.repository.jobs import keep_freed_memory
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.manifest import Content, DiskEntry, Root
from stillframe.repository.opened import Secret, init_repository, open_repository
from stillframe.repository.places import Places
from stillframe.repository.session import open_session
from stillframe.repository.writer import SnapshotWriter
from stillframe.restore.run import restore_disk
from stillframe.restore.target import Wishes
from stillframe.storage.local import LocalStorage
from stillframe.units import GIB, KIB, MIB, TIB, parse_size_bytes, size_text

BLOCK = 64 * KIB
CHANGED_SHARE = 0.01
SECRET = Secret(SlotKind.KEY_FILE, b"bench")
SAMPLE_BYTES = 1024 * MIB


@dataclass(frozen=True)
class Sample:
    seconds: float
    cpu_s: float
    rss_bytes: int
    facts: dict[str, int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--size", default="8G")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--huge", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    folder = options.dir / "stillframe-bench"
    folder.mkdir(exist_ok=True)
    image = options.image or make_image(options.dir / "stillframe-bench.raw", parse_size_bytes(options.size))
    if options.huge:
        image = huge_disk(folder / "huge.raw")
    try:
        measure(image, folder, options.rounds)
    finally:
        shutil.rmtree(folder)
    return 0


def measure(image: Path, folder: Path, rounds: int) -> None:
    """Run all contenders in turns, and print the medians."""
    found: dict[str, list[Sample]] = {}
    data = 0
    for number in range(rounds):
        for name, sample in one_round(image, folder, number):
            found.setdefault(name, []).append(sample)
            data = data or sample.facts.get("data", 0)
            print(f"{name:12}{sample.seconds:8.2f} s  {sample.cpu_s:8.2f} CPU s  "
                  f"{size_text(sample.rss_bytes):>12}  {sample.facts}", flush=True)
    print(f"\n{size_text(data)} of data; medians, MB/s of data (the bound: of its sample)")
    for name, samples in found.items():
        seconds = statistics.median(sample.seconds for sample in samples)
        amount = samples[0].facts.get("sample", data)
        print(f"  {name:12}{seconds:8.2f} s {amount / seconds / 1e6:8.0f} MB/s "
              f"  peak {size_text(max(sample.rss_bytes for sample in samples))}")


def one_round(image: Path, folder: Path, number: int) -> Iterator[tuple[str, Sample]]:
    repository, restored, work = folder / "repository", folder / "restored.raw", folder / "disk.raw"
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", image, work], check=True)
    settle()
    yield "bound", run("bound", work)
    settle()
    first = run("backup", work, repository, folder / "first.json")
    yield "first", first
    settle()
    yield "restore", run("restore", repository, folder / "first.json", restored)
    check_equal(work, restored)
    restored.unlink()
    settle()
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "raw", str(work), str(restored)]
    yield "convert", timed(convert, restored)
    restored.unlink()
    change_blocks(work, number)
    settle()
    yield "second", run("backup", work, repository, folder / "second.json", folder / "first.json")
    run("restore", repository, folder / "second.json", restored)
    check_equal(work, restored)
    restored.unlink()
    shutil.rmtree(repository)
    work.unlink()


def run(*arguments: str | Path) -> Sample:
    """Measure in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--worker", *map(str, arguments)], check=True,
                          capture_output=True)
    result = json.loads(done.stdout)
    return Sample(result["seconds"], result["cpu"], result["rss"], result["facts"])


def worker(job: str, *arguments: str) -> int:
    jobs: dict[str, Callable[..., dict[str, int]]] = {"bound": bound, "backup": backup, "restore": restore}
    began = time.monotonic()
    facts = jobs[job](*map(Path, arguments))
    seconds = facts.pop("microseconds", 0) / 1e6 or time.monotonic() - began
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps({"seconds": seconds, "cpu": cpu, "rss": int(peak.split()[1]) * KIB, "facts": facts}))
    return 0


def bound(image: Path) -> dict[str, int]:
    """Do the work that no backup can do without, on warm memory: as fast as it goes in Python."""
    keep_freed_memory()
    slots = list(sample_slots(image))
    lock, todo = threading.Lock(), iter(slots)
    began = time.monotonic()
    threads = [threading.Thread(target=fused, args=(todo, lock)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"sample": len(slots) * MIB, "microseconds": int((time.monotonic() - began) * 1e6)}


def fused(todo: Iterator[bytes], lock: threading.Lock) -> None:
    cipher, compressor = AESGCM(bytes(32)), zstandard.ZstdCompressor(level=1)
    zeroes, key = bytes(BLOCK), bytes(32)
    out = bytearray(2 * MIB)
    while True:
        with lock:
            slot = next(todo, None)
        if slot is None:
            return
        for at in range(0, MIB, BLOCK):
            if not slot.startswith(zeroes, at):
                blake3(memoryview(slot)[at : at + BLOCK], key=key).digest()
        packed = compressor.compress(slot)
        with memoryview(out) as view:
            cipher.encrypt_into(bytes(12), packed, b"", view[: len(packed) + 16])


def sample_slots(image: Path) -> Iterator[bytes]:
    """Yield mebibytes of data, evenly from the whole image."""
    chosen = data_blocks(image, MIB)
    step = max(1, len(chosen) * MIB // SAMPLE_BYTES)
    with image.open("rb") as file:
        for place in chosen[::step]:
            file.seek(place)
            yield file.read(MIB).ljust(MIB, b"\0")


def backup(image: Path, folder: Path, result: Path, parent: Path | None = None) -> dict[str, int]:
    clock = SystemClock()
    storage = LocalStorage(folder, make=parent is None)
    repository = init_repository(storage, SECRET, "bench", clock) if parent is None else open_repository(
        storage, SECRET)
    session = open_session(storage, repository.key, clock, "bench", lambda sid: f"main/m/bench/bench/{sid}")
    with (
        session as opened,
        closing(ChunkHints(repository.parameters.id)) as hints,
        open_reader(file_place(str(image), "raw"), clock=clock) as reader,
        SnapshotWriter(repository, opened, Places(repository, opened.generation), bad=read_bad(storage),
                       hints=hints) as writer,
    ):
        written = writer.write(reader, load(parent) if parent else None)
        stored = writer.finish()
    root = Root.of(written.root)
    assert root is not None
    result.write_text(json.dumps({"size": written.size_bytes, "root": [
        root.sid, root.number, root.slot, root.offset, root.stored]}))
    return {"data": written.data_bytes, "changed": written.changed_bytes, "stored": stored,
            "new": written.new_chunks, "known": written.known_chunks}


def restore(folder: Path, result: Path, target: Path) -> dict[str, int]:
    clock = SystemClock()
    repository = open_repository(LocalStorage(folder), SECRET)
    content = load(result)
    disk = DiskEntry(size_bytes=content.size_bytes, root=content.root, target="vda", format="raw", source="",
                     method="", read_bytes=0, data_bytes=0, changed_bytes=0, stored_bytes=0)
    done = restore_disk(Places(repository), disk, Wishes(str(target)), clock=clock)
    return {"written": done.written_bytes}


def load(result: Path) -> Content:
    facts = json.loads(result.read_text())
    return Content(size_bytes=facts["size"], root=Root(*facts["root"]))


def timed(command: list[str], target: Path) -> Sample:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    subprocess.run(command, check=True)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(time.monotonic() - began, sum(after[:2]) - sum(before[:2]), 0, {})


def settle() -> None:
    os.sync()


def make_image(path: Path, size: int) -> Path:
    """Make an ext4 image with /usr, once."""
    if not path.exists():
        with path.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-d", "/usr", path], check=True)
    return path


def huge_disk(path: Path) -> Path:
    """Make a sparse disk of 1 TiB with 10 GiB of data in stretches of 10 MiB."""
    pool = random.Random(0).randbytes(MIB)
    with path.open("wb") as file:
        file.truncate(TIB)
        for number in range(1024):
            file.seek(number * GIB)
            for part in range(10):
                file.write(number.to_bytes(4, "big") + part.to_bytes(4, "big") + pool[8:])
    return path


def data_blocks(path: Path, block: int) -> list[int]:
    """Return where blocks that hold data begin, by the file's holes."""
    found: list[int] = []
    with path.open("rb") as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            until = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            found += range(-(-at // block) * block, until - block + 1, block)
            at = until
    return found


def change_blocks(path: Path, seed: int) -> None:
    chance, places = random.Random(seed + 1000), data_blocks(path, BLOCK)
    with path.open("r+b") as file:
        for place in chance.sample(places, int(len(places) * CHANGED_SHARE)):
            file.seek(place)
            file.write(chance.randbytes(BLOCK))
        os.fsync(file.fileno())


def check_equal(first: Path, second: Path) -> None:
    if first.stat().st_size > 64 * GIB:
        return
    with first.open("rb") as one, second.open("rb") as other:
        size = os.fstat(one.fileno()).st_size
        if size != os.fstat(other.fileno()).st_size:
            raise SystemExit(f"{second} differs from {first} in length")
        a = mmap.mmap(one.fileno(), 0, access=mmap.ACCESS_READ)
        b = mmap.mmap(other.fileno(), 0, access=mmap.ACCESS_READ)
        for at in range(0, size, 4 * MIB):
            if a[at : at + 4 * MIB] != b[at : at + 4 * MIB]:
                raise SystemExit(f"{second} differs from {first} behind {at}")


if __name__ == "__main__":
    sys.exit(main())
