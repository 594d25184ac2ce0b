"""Measure the repository against other programs, and against what this machine can do at best.

    .venv/bin/python -m bench.repository [--image PATH] [--size 8G] [--rounds 3] [--dir /var/tmp]
                                         [--alone] [--quick]

The disk is an ext4 image with this machine's /usr, or a copy of any raw image with --image. In each round,
in turns: the bound (zero test, BLAKE3, zstd 1 and AES-GCM of warm memory on two threads, the work that no
backup can do without), first backups into new repositories, restores into new files with an fsync, and
`qemu-img convert` of the raw image; then, after 1 % of the 64 KiB blocks with data were changed, second
backups. Peers are those of peers.py (--alone: none). What is restored is compared with the disk. Then the
memory with a sparse disk of 1 TiB, and the time of a list of 10,000 snapshots. Each measurement is a process
of its own, and its start counts; its peak memory is its own, qemu-nbd's is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.peers import Peer, Sample, folder_bytes, peers, timed, uncache
from bench.verdict import show, show_large, show_listing
from stillframe.block.image import file_place
from stillframe.block.reader import open_reader
from stillframe.clock import SystemClock
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.heal import read_bad
from stillframe.repository.hints import ChunkHints
from stillframe.repository.jobs import keep_freed_memory
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.layout import SnapshotName, new_sid
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
OURS, BOUND, CONVERT = "stillframe", "bound", "qemu-img convert"

#: By what was done, by who did it: what each round took.
Found = dict[str, dict[str, list[Sample]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--size", default="8G")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--alone", action="store_true", help="without other programs, disk of 1 TiB and list")
    parser.add_argument("--quick", action="store_true", help="1 GiB, one round: only to see that it works")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    if options.quick:
        options.size, options.rounds = "1G", 1
    folder = Path(tempfile.mkdtemp(prefix="stillframe-bench-", dir=options.dir))
    try:
        image = folder / "disk.raw"
        if options.image:
            subprocess.run(["cp", "--sparse=always", options.image, image], check=True)
        else:
            make_image(image, parse_size_bytes(options.size), Path("/usr/bin" if options.quick else "/usr"))
        show(measure(image, folder, options.rounds, [] if options.alone else peers()))
        image.unlink()
        if not options.alone:
            show_listing(list_many(folder))
            show_large(large_disk(folder, (1 if options.quick else 10) * GIB))
    finally:
        shutil.rmtree(folder)
    return 0


def measure(image: Path, folder: Path, rounds: int, others: list[type[Peer]]) -> Found:
    """Run all contenders in turns."""
    facts = image.stat()
    print(f"{size_text(facts.st_size)} raw image, {size_text(facts.st_blocks * 512)} allocated, on {folder}; "
          f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; {rounds} rounds; "
          "warm page cache", flush=True)
    found: Found = {}
    for number in range(rounds):
        for done, who, sample in one_round(image, folder, number, others):
            found.setdefault(done, {}).setdefault(who, []).append(sample)
            print(f"  {number + 1} {done:8}{who:18}{sample.seconds:8.2f} s {sample.cpu_s:8.2f} CPU s "
                  f"{size_text(sample.rss_bytes):>12}  {sample.facts}", flush=True)
    return found


def one_round(
    image: Path, folder: Path, number: int, others: list[type[Peer]]
) -> Iterator[tuple[str, str, Sample]]:
    contenders: list[type[Peer]] = [Own, *others]
    turns = contenders[number % len(contenders) :] + contenders[: number % len(contenders)]
    settle(image)
    yield "bound", BOUND, run("bound", image)
    running = []
    for cls in turns:
        contender = cls(folder / cls.name.replace(" ", "-"))
        running.append(contender)
        settle(image)
        yield "first", cls.name, contender.first(image)
        settle(image)
        warm(contender.folder)
        sample, restored = contender.restore()
        yield "restore", cls.name, sample
        if number == 0 or cls is Own:
            check_equal(image, restored)
        shutil.rmtree(restored.parent)
        settle(image)
        uncache(contender.folder)
    converted = folder / "converted"
    converted.mkdir()
    settle(image)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "raw", str(image), "converted.raw"]
    yield "restore", CONVERT, timed(convert, {}, converted, sync=True)
    shutil.rmtree(converted)
    change_blocks(image, number)
    for contender in running:
        if contender.has_second:
            settle(image)
            yield "second", contender.name, contender.second(image)
    for contender in running:
        if isinstance(contender, Own) and number == 0:
            check_equal(image, contender.restore("second")[1])
        contender.remove()


class Own(Peer):
    """Stillframe, in the same clothes."""

    name = OURS

    def first(self, image: Path) -> Sample:
        return self._backup(image, self.folder / "first.json")

    def second(self, image: Path) -> Sample:
        return self._backup(image, self.folder / "second.json", self.folder / "first.json")

    def restore(self, which: str = "first") -> tuple[Sample, Path]:
        output = self.folder / "restored" / "disk.raw"
        output.parent.mkdir()
        return run("restore", self.repository, self.folder / f"{which}.json", output), output

    def _backup(self, image: Path, *results: Path) -> Sample:
        before = folder_bytes(self.repository)
        sample = run("backup", image, self.repository, *results)
        sample.facts["stored"] = folder_bytes(self.repository) - before
        return sample


def large_disk(folder: Path, data_bytes: int) -> list[Sample]:
    """Back up, back up again and restore a sparse disk of 1 TiB."""
    image, own = folder / "large.raw", Own(folder / "large")
    fill_large(image, data_bytes)
    samples = [own.first(image)]
    with image.open("r+b") as file:
        file.write(b"changed")
    samples.append(own.second(image))
    image.unlink()
    samples.append(own.restore()[0])
    own.remove()
    return samples


def fill_large(path: Path, data_bytes: int) -> None:
    """Make a disk of 1 TiB with stretches of data all over it, no chunk twice."""
    pool = bytearray(Path(sys.executable).read_bytes()[:MIB].ljust(MIB, b"x"))
    with path.open("wb") as file:
        file.truncate(TIB)
        for number in range(data_bytes // MIB):
            for at in range(0, MIB, BLOCK):
                pool[at : at + 8] = (number * MIB + at).to_bytes(8, "little")
            file.seek(number // 10 * (TIB // (data_bytes // MIB // 10 + 1)) // MIB * MIB + number % 10 * MIB)
            file.write(pool)
        os.fsync(file.fileno())


def list_many(folder: Path, count: int = 10_000) -> float:
    """Return how long `stillframe list` takes, its start included, with so many snapshots of 100 guests."""
    place = folder / "many"
    repository = init_repository(LocalStorage(place, make=True), SECRET, "bench", SystemClock())
    for number in range(count):
        name = SnapshotName(f"host{number % 10}", f"guest{number % 100}",
                            datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=number), new_sid())
        path = place / name.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(2048))
    assert len(list_snapshots(repository.storage)) == count
    command = [sys.executable, "-m", "stillframe", "list", "--repo", str(place)]
    seconds = statistics.median(timed(command, {}, folder / "many").seconds for _ in range(3))
    shutil.rmtree(place)
    return seconds


def run(*arguments: str | Path) -> Sample:
    """Measure in a process of its own, from its start to its end."""
    began = time.monotonic()
    command = [sys.executable, "-m", "bench.repository", "--worker", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result = json.loads(done.stdout)
    seconds = result["facts"].pop("microseconds", 0) / 1e6 or time.monotonic() - began
    return Sample(seconds, result["cpu"], result["rss"], result["facts"])


def worker(job: str, *arguments: str) -> int:
    jobs: dict[str, Callable[..., dict[str, int]]] = {
        "bound": bound, "backup": backup, "backup-into": backup_into, "restore": restore}
    facts = jobs[job](*map(Path, arguments))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps({"cpu": cpu, "rss": int(peak.split()[1]) * KIB, "facts": facts}))
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
    if parent is None:
        init_repository(LocalStorage(folder, make=True), SECRET, "bench", SystemClock())
    return backup_into(image, folder, result, parent)


def backup_into(image: Path, folder: Path, result: Path, parent: Path | None = None) -> dict[str, int]:
    clock = SystemClock()
    storage = LocalStorage(folder)
    repository = open_repository(storage, SECRET)
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


def settle(image: Path) -> None:
    """Begin with nothing to be written back and the disk in the page cache."""
    os.sync()
    buffer = bytearray(4 * MIB)
    with image.open("rb", buffering=0) as file:
        for at in data_blocks(image, 4 * MIB):
            file.seek(at)
            file.readinto(buffer)


def warm(folder: Path) -> None:
    """Have a repository in the page cache: for those as well who write past it."""
    buffer = bytearray(4 * MIB)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def make_image(path: Path, size: int, content: Path) -> None:
    """Make an ext4 image with what is in a folder."""
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", content, path], check=True)


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


def check_equal(image: Path, restored: Path) -> None:
    compare = ["cmp"] if restored.suffix == ".raw" else ["qemu-img", "compare"]
    done = subprocess.run([*compare, str(image), str(restored)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{restored} differs from {image}: {done.stdout}")


if __name__ == "__main__":
    sys.exit(main())
