"""Measure the ways back from a repository, against each other in the same run.

    .venv/bin/python -m bench.restore [serve ...] [--size 8G] [--rounds 3] [--dir /var/tmp] [--quick]

serve   An ext4 image with this machine's /usr is backed up. In each round, in turns: the disk is restored
        into a new file, and copied into one by nbdcopy from a server of its own (starts and fsyncs count;
        what comes out is compared with the disk). Then 4 KiB are read from random places of a server: in what
        its cache holds, one request at a time and with 16 on their way, and all over the disk.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbd

from bench.peers import Sample, timed
from bench.repository import SECRET, check_equal, data_blocks, load, make_image, run, settle, warm
from bench.verdict import target
from stillframe.clock import SystemClock
from stillframe.repository.opened import open_repository
from stillframe.restore.export import Export, exported
from stillframe.restore.export_order import CACHE_BYTES, Order, order_for
from stillframe.storage.local import LocalStorage
from stillframe.units import KIB, MIB, parse_size_bytes, size_text

READ_BYTES = 4 * KIB
READS = 50_000
WORKING_SET_BYTES = CACHE_BYTES // 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    parser.add_argument("--size", default="8G")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--quick", action="store_true", help="1 GiB, one round: only to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds = "1G", 1
    for name in options.sections or SECTIONS:
        folder = Path(tempfile.mkdtemp(prefix="stillframe-bench-", dir=options.dir))
        try:
            SECTIONS[name](folder, options)
        finally:
            shutil.rmtree(folder)
    return 0


def serve(folder: Path, options: argparse.Namespace) -> None:
    """Measure reading through an export."""
    image, repository = folder / "disk.raw", folder / "repository"
    make_image(image, parse_size_bytes(options.size), Path("/usr/bin" if options.quick else "/usr"))
    data = run("backup", image, repository, folder / "result.json").facts["data"]
    content = load(folder / "result.json")
    order = order_for(open_repository(LocalStorage(repository), SECRET), "vda", content)
    print(f"serve: {size_text(image.stat().st_size)} disk, {size_text(data)} of data, on {folder}; "
          f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; {options.rounds} rounds", flush=True)
    restored: list[Sample] = []
    copied: list[Sample] = []
    for number in range(options.rounds):
        settle(image)
        warm(repository)
        ways: list[tuple[list[Sample], Callable[[Path], Sample]]] = [
            (restored, lambda to: run("restore", repository, folder / "result.json", to)),
            (copied, lambda to: copy(order, to))]
        for samples, way in ways[:: 1 - number % 2 * 2]:
            to = folder / "out" / "disk.raw"
            to.parent.mkdir()
            samples.append(way(to))
            check_equal(image, to)
            shutil.rmtree(to.parent)
            settle(image)
    for who, samples in (("restore", restored), ("nbdcopy from serve", copied)):
        print(f"  {who:20}{_median(samples):8.2f} s {data / _median(samples) / 1e6:7.0f} MB/s   "
              + " ".join(f"{sample.seconds:.2f} ({sample.cpu_s:.1f} CPU s)" for sample in samples))
    target("sequential through serve, of a restore's speed", _median(restored) / _median(copied), 0.5)
    random_reads(order, image)


def random_reads(order: Order, image: Path) -> None:
    """Read 4 KiB at a time at random places, and compare each."""
    blocks = data_blocks(image, MIB)
    chance = random.Random(1)
    near = chance.sample(blocks, min(len(blocks), WORKING_SET_BYTES // MIB))
    with exported(order, SystemClock()) as export, image.open("rb") as disk:
        handle = nbd.NBD()
        handle.connect_uri(export.uri)
        for block in near:
            handle.pread(MIB, block)
        warm_one = _rate(handle, disk.fileno(), near, chance, READS // 5, 1)
        before_s = cpu_of(export)
        warm_many = _rate(handle, disk.fileno(), near, chance, READS, 16)
        server_s = (cpu_of(export) - before_s) / READS
        cold = _rate(handle, disk.fileno(), blocks, chance, READS // 25, 16)
        peak_bytes = peak_of(export)
    print(f"  4 KiB at random: warm, one at a time {warm_one:,.0f}/s; 16 on their way {warm_many:,.0f}/s "
          f"({server_s * 1e6:.0f} us of the server's CPU each); all over the disk {cold:,.0f}/s; "
          f"the server's peak memory {size_text(peak_bytes)} with a cache of {size_text(order.cache_bytes)}")
    target("random 4 KiB reads a second, warm, 16 on their way", warm_many, 5000)


def _rate(
    handle: Any, disk: int, blocks: Sequence[int], chance: random.Random, count: int, flying: int
) -> float:
    """Return how many reads a second were answered; all are compared afterwards."""
    places = [block + chance.randrange(MIB // READ_BYTES) * READ_BYTES
              for block in chance.choices(blocks, k=count)]
    buffers = [nbd.Buffer(READ_BYTES) for _ in places]
    began = time.monotonic()
    cookies: set[int] = set()
    for place, buffer in zip(places, buffers, strict=True):
        while len(cookies) >= flying:
            handle.poll(-1)
            cookies -= {cookie for cookie in cookies if handle.aio_command_completed(cookie)}
        cookies.add(handle.aio_pread(buffer, place))
    while cookies:
        handle.poll(-1)
        cookies -= {cookie for cookie in cookies if handle.aio_command_completed(cookie)}
    seconds = time.monotonic() - began
    for place, buffer in zip(places, buffers, strict=True):
        if buffer.to_bytearray() != os.pread(disk, READ_BYTES, place):
            raise SystemExit(f"the {READ_BYTES} bytes at {place} are not the disk's")
    return count / seconds


def copy(order: Order, to: Path) -> Sample:
    """Copy a disk from a server of its own, whose start counts."""
    began = time.monotonic()
    with exported(order, SystemClock()) as export:
        sample = timed(["nbdcopy", export.uri, str(to)], {}, to.parent, sync=True)
        cpu_s = cpu_of(export)
        seconds = time.monotonic() - began
    return Sample(seconds, sample.cpu_s + cpu_s, sample.rss_bytes, {})


def cpu_of(export: Export) -> float:
    """Return the processor time that a server took so far, in seconds."""
    fields = Path(f"/proc/{export.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def peak_of(export: Export) -> int:
    """Return the most memory that a server took so far."""
    lines = Path(f"/proc/{export.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * KIB


def _median(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


#: By name: what measures in a folder of its own.
SECTIONS: dict[str, Callable[[Path, argparse.Namespace], None]] = {"serve": serve}


if __name__ == "__main__":
    sys.exit(main())
