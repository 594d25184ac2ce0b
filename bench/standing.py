"""What a standing overlay costs the guest that writes to it, for different options of the overlay.

    python -m bench.standing [--size 2G] [--rounds 3] [--dir /var/tmp]

A raw base full of data, and for each choice of options a fresh overlay on it. `qemu-img bench`, past the page
cache as a guest's disk with cache='none' is, does what a guest does:

    first 4K     4 KiB into each mebibyte, where the overlay has nothing yet: the cost of copying the rest
    again 4K     the same once more: the steady state
    first 64K    64 KiB next to one another, where the overlay has nothing yet
    again 64K    the same once more

Shown is the time as a multiple of the same writes to the base itself (median of the rounds, taken in turns),
and how large the overlay is for each byte that was written to it in the first pass of 4 KiB.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from stillframe.units import KIB, MIB, parse_size_bytes

_DEPTH = 16
_BASE = "base itself"


@dataclass(frozen=True)
class Pass:
    """A series of writes: *size* bytes at every *step*."""

    name: str
    size: int
    step: int


FIRST_SMALL, SMALL = Pass("first 4K", 4 * KIB, MIB), Pass("again 4K", 4 * KIB, MIB)
FIRST_LARGE, LARGE = Pass("first 64K", 64 * KIB, 64 * KIB), Pass("again 64K", 64 * KIB, 64 * KIB)

OVERLAYS = {
    "64K (qemu-img's own)": "",
    "32K": "cluster_size=32k",
    "16K": "cluster_size=16k",
    "128K": "cluster_size=128k",
    "64K, lazy refcounts": "lazy_refcounts=on",
    "64K, subclusters of 2K": "extended_l2=on",
    "128K, subclusters of 4K": "extended_l2=on,cluster_size=128k",
    "... and metadata ahead": "extended_l2=on,cluster_size=128k,preallocation=metadata",
}


class Bench:
    """A base and its folder."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self.base = folder / "base.raw"
        self.overlay = folder / "overlay.qcow2"
        with self.base.open("wb") as file:
            block = bytes(range(1, 256)) * (MIB // 255 + 1)
            for _ in range(size // MIB):
                file.write(block[:MIB])

    def fresh(self, options: str) -> None:
        self.overlay.unlink(missing_ok=True)
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", self.base, "-F", "raw",
             *(["-o", options] if options else []), self.overlay, str(self.size)], check=True)

    def time_s(self, each: Pass, *, on_base: bool) -> float:
        image, driver = (self.base, "raw") if on_base else (self.overlay, "qcow2")
        count = self.size // each.step
        command = ["qemu-img", "bench", "-q", "-w", "-t", "none", "-d", str(_DEPTH), "-f", driver,
                   "-c", str(count), "-s", str(each.size), "-S", str(each.step), "--flush-interval", "64",
                   str(image)]
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - began

    def round(self, times: dict[tuple[str, str], list[float]], growth: dict[str, float]) -> None:
        """Measure all overlays once, and the base."""
        for each in (SMALL, LARGE):
            times[_BASE, each.name].append(self.time_s(each, on_base=True))
        for name, options in OVERLAYS.items():
            for first, again in ((FIRST_SMALL, SMALL), (FIRST_LARGE, LARGE)):
                self.fresh(options)
                before = self.overlay.stat().st_blocks * 512
                times[name, first.name].append(self.time_s(first, on_base=False))
                if first is FIRST_SMALL:
                    written = self.size // first.step * first.size
                    growth[name] = (self.overlay.stat().st_blocks * 512 - before) / written
                times[name, again.name].append(self.time_s(again, on_base=False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="2G")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stillframe-bench-", dir=options.dir))
    try:
        bench = Bench(folder, parse_size_bytes(options.size))
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        growth: dict[str, float] = {}
        for _ in range(options.rounds):
            bench.round(times, growth)
        show(times, growth)
    finally:
        shutil.rmtree(folder)
    return 0


def show(times: dict[tuple[str, str], list[float]], growth: dict[str, float]) -> None:
    passes = (FIRST_SMALL, SMALL, FIRST_LARGE, LARGE)
    print(f"{'times the base itself':26}" + "".join(f"{each.name:>11}" for each in passes) + f"{'growth':>9}")
    for name in OVERLAYS:
        row = f"{name:26}"
        for each, of_base in zip(passes, (SMALL, SMALL, LARGE, LARGE), strict=True):
            base_s = statistics.median(times[_BASE, of_base.name])
            row += f"{statistics.median(times[name, each.name]) / base_s:11.2f}"
        print(row + f"{growth[name]:9.1f}")


if __name__ == "__main__":
    sys.exit(main())
