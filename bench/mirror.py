"""Measure mirroring against qemu-img convert and rsync, side by side, on this machine.

    .venv/bin/python bench/mirror.py [--size 8G] [--data 6G] [--rounds 3] [--cold] [--quick]

First copy: a new mirror against `qemu-img convert -n -W -m 8` into a new raw file. Update: 1 % of
the 64 KiB blocks that hold data are changed at random places, then the mirror against plain
rsync and `rsync --inplace --no-whole-file`, each on its own copy of the old state. Every
measurement ends with an fsync; the contenders take turns and start with clean caches of dirty
pages (and, with --cold, with nothing cached); medians are shown. All results are compared
with the source. A 1 TiB disk, nearly empty, shows the memory that a large disk takes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stillframe.block.image import file_place
from stillframe.block.reader import open_reader
from stillframe.clock import SystemClock
from stillframe.mirror.folder import MirrorFolder
from stillframe.mirror.place import LocalPlace
from stillframe.mirror.record import CaptureFacts
from stillframe.units import KIB, MIB, TIB, parse_size_bytes, size_text

BLOCK = 64 * KIB
CHANGED_SHARE = 0.01
POOL_BYTES = 192 * MIB


@dataclass(frozen=True)
class Sample:
    seconds: float
    rss_bytes: int = 0
    changed_bytes: int = 0
    written_bytes: int = 0


class Measured:
    """What one contender took, round by round."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples: list[Sample] = []

    @property
    def seconds(self) -> float:
        return statistics.median(sample.seconds for sample in self.samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="8G")
    parser.add_argument("--data", default="6G")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default="/var/tmp")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each (root)")
    parser.add_argument("--quick", action="store_true", help="1 GiB, one round: only to see that it works")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(Path(options.worker[0]), Path(options.worker[1]))
    if options.quick:
        options.size, options.data, options.rounds = "1G", "768M", 1
    folder = Path(tempfile.mkdtemp(prefix="stillframe-bench-", dir=options.dir))
    try:
        bench(folder, parse_size_bytes(options.size), parse_size_bytes(options.data), options)
    finally:
        shutil.rmtree(folder)
    return 0


def bench(folder: Path, size: int, data: int, options: argparse.Namespace) -> None:
    source = folder / "source.raw"
    places = make_image(source, size, data)
    print(f"{size_text(size)} raw image, {size_text(len(places) * BLOCK)} allocated, on {folder}; "
          f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; medians of {options.rounds}; "
          f"{'cold' if options.cold else 'warm'} page cache")
    first = first_copies(folder, source, size, options)
    update = updates(folder, source, places, options)
    table("First copy", first, first[1], data)
    speed = first[1].seconds / first[0].seconds
    print(f"  stillframe has {speed:.2f} times the speed of {first[1].name}")
    table("Update, 1 % of the blocks changed", update, update[0], data)
    for contender in update[1:]:
        ratio = contender.seconds / update[0].seconds
        print(f"  stillframe is {ratio:.1f} times as fast as {contender.name}")
    huge = huge_disk(folder)
    peak = max(sample.rss_bytes for sample in first[0].samples + update[0].samples)
    print(f"Peak memory of the mirroring process: {size_text(peak)}; with a 1 TiB disk: first copy "
          f"{size_text(huge[0].rss_bytes)} in {huge[0].seconds:.1f} s, update {size_text(huge[1].rss_bytes)} "
          f"in {huge[1].seconds:.1f} s")


def first_copies(folder: Path, source: Path, size: int, options: argparse.Namespace) -> list[Measured]:
    ours, theirs = Measured("stillframe, first copy"), Measured("qemu-img convert -n -W -m 8")
    target = folder / "converted.raw"
    mirror = folder / "mirror"
    for number in range(options.rounds):
        def convert() -> Sample:
            target.unlink(missing_ok=True)
            with target.open("wb") as file:
                file.truncate(size)
            return timed(["qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw",
                          str(source), str(target)], target)

        def copy() -> Sample:
            shutil.rmtree(mirror, ignore_errors=True)
            return mirrored(source, mirror)

        turns: list[tuple[Measured, Callable[[], Sample]]] = [(ours, copy), (theirs, convert)]
        for measured, run in turns if number % 2 == 0 else reversed(turns):
            settle(options.cold)
            measured.samples.append(run())
    check_equal(source, mirror / "vda.img")
    check_equal(source, target)
    target.unlink()
    return [ours, theirs]


def updates(folder: Path, source: Path, places: list[int], options: argparse.Namespace) -> list[Measured]:
    mirror = folder / "mirror"
    plain, inplace = folder / "plain.raw", folder / "inplace.raw"
    for copy in (plain, inplace):
        subprocess.run(["cp", "--sparse=always", "--preserve=timestamps", source, copy], check=True)
    ours = Measured("stillframe, update")
    contenders: list[tuple[Measured, Callable[[], Sample]]] = [
        (ours, lambda: mirrored(source, mirror)),
        (Measured("rsync"), lambda: timed(["rsync", "--times", str(source), str(plain)], plain)),
        (Measured("rsync --inplace --no-whole-file"), lambda: timed(
            ["rsync", "--times", "--inplace", "--no-whole-file", str(source), str(inplace)], inplace)),
    ]
    for number in range(options.rounds):
        change_blocks(source, places, seed=number)
        for measured, run in contenders[number % 3 :] + contenders[: number % 3]:
            settle(options.cold)
            measured.samples.append(run())
        for copy in (mirror / "vda.img", plain, inplace):
            check_equal(source, copy)
    return [measured for measured, _ in contenders]


def huge_disk(folder: Path) -> list[Sample]:
    source = folder / "huge.raw"
    with source.open("wb") as file:
        file.truncate(TIB)
        for at in range(0, TIB, TIB // 256):
            file.seek(at)
            file.write(random.Random(at).randbytes(BLOCK))
    mirror = folder / "huge-mirror"
    first = mirrored(source, mirror)
    with source.open("r+b") as file:
        file.write(b"changed")
    return [first, mirrored(source, mirror)]


def mirrored(source: Path, mirror: Path) -> Sample:
    """Mirror in a process of its own, so that its peak memory is its own."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--worker", str(source), str(mirror)], check=True, capture_output=True)
    result = json.loads(done.stdout)
    # What it takes to start the interpreter counts, too.
    return Sample(time.monotonic() - began, result["rss"], result["changed"], result["written"])


def worker(source: Path, mirror: Path) -> int:
    clock = SystemClock()
    folder = MirrorFolder(LocalPlace(mirror), clock=clock)
    with folder.lock("bench"):
        folder.recover()
        update = folder.begin("bench", "00000000-0000-0000-0000-000000000000")
        with open_reader(file_place(str(source), "raw"), clock=clock) as reader:
            result = update.copy_disk("vda", reader, source=str(source))
        update.publish(CaptureFacts("2025-01-01T00:00:00Z", "crash", "<domain/>"))
        update.finish()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps({"rss": int(peak.split()[1]) * KIB, "changed": result.changed_bytes,
                      "written": result.written_bytes, "seconds": result.seconds}))
    return 0


def timed(command: list[str], target: Path) -> Sample:
    began = time.monotonic()
    subprocess.run(command, check=True)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return Sample(time.monotonic() - began)


def settle(cold: bool) -> None:
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")


def make_image(path: Path, size: int, data: int) -> list[int]:
    """Write what a disk holds (this machine's /usr, no block twice); return where the data blocks are."""
    pool = usr_pool()
    chance = random.Random(0)
    stretch = 32 * MIB
    count = size // stretch
    filled = sorted(chance.sample(range(count), min(count, data // stretch)))
    places = []
    with path.open("wb") as file:
        file.truncate(size)
        for number in filled:
            start = chance.randrange(len(pool) - stretch)
            content = bytearray(pool[start : start + stretch])
            for at in range(0, stretch, BLOCK):
                content[at : at + 16] = chance.randbytes(16)
                places.append(number * stretch + at)
            file.seek(number * stretch)
            file.write(content)
        os.fsync(file.fileno())
    return places


def usr_pool() -> bytes:
    pool = bytearray()
    for path in sorted(Path("/usr").rglob("*")):
        if path.is_file() and not path.is_symlink():
            pool += path.read_bytes()[: 8 * MIB]
        if len(pool) >= POOL_BYTES:
            break
    return bytes(pool)


def change_blocks(path: Path, places: list[int], seed: int) -> None:
    chance = random.Random(seed + 1000)
    with path.open("r+b") as file:
        for place in chance.sample(places, int(len(places) * CHANGED_SHARE)):
            file.seek(place)
            file.write(chance.randbytes(BLOCK))
        os.fsync(file.fileno())


def check_equal(first: Path, second: Path) -> None:
    with first.open("rb") as a, second.open("rb") as b:
        if os.fstat(a.fileno()).st_size != os.fstat(b.fileno()).st_size:
            raise SystemExit(f"{second} differs from {first} in length")
        while left := a.read(4 * MIB):
            if left != b.read(4 * MIB):
                raise SystemExit(f"{second} differs from {first} before {a.tell()}")


def table(title: str, rows: list[Measured], baseline: Measured, data: int) -> None:
    print(f"\n{title}")
    print(f"  {'':34}{'seconds':>9}{'times':>8}{'MiB/s':>8}   each")
    for row in rows:
        each = " ".join(f"{sample.seconds:.2f}" for sample in row.samples)
        print(f"  {row.name:34}{row.seconds:9.2f}{row.seconds / baseline.seconds:8.2f}"
              f"{data / row.seconds / MIB:8.0f}   {each}")
    sample = rows[0].samples[-1]
    print(f"  (stillframe: {size_text(sample.changed_bytes)} changed, {size_text(sample.written_bytes)} "
          f"written to the destination, peak memory {size_text(sample.rss_bytes)})")


if __name__ == "__main__":
    sys.exit(main())
