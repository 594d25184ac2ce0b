"""Measure how long one small file of a snapshot takes, against guestfish on the raw image.

    .venv/bin/python -m lab.enter -- .venv/bin/python -m bench.files [--size 8G] [--rounds 5] [--dir /var/tmp]

An ext4 image with this machine's /usr/bin is backed up. In each round, in turns: `stillframe files get` of
one file into a folder, and guestfish, which downloads it from the image; both are told the file system. Both
start a new appliance of the same kind each time (in the lab without KVM); its parts are made before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.peers import Sample, timed
from bench.repository import make_image
from bench.verdict import target
from lab.images import run
from stillframe.block.image import file_place
from stillframe.block.reader import open_reader
from stillframe.clock import SystemClock
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.opened import Secret, open_repository
from stillframe.storage.local import LocalStorage
from stillframe.units import parse_size_bytes, size_text
from tests.fault.driver import PASSPHRASE
from tests.fault.harness import Place
from tests.integration.repositories import make_repo, store_disks

FILE = "/bash"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="8G")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--quick", action="store_true", help="1 GiB, one round: only to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds = "1G", 1
    folder = Path(tempfile.mkdtemp(prefix="stillframe-bench-", dir=options.dir))
    try:
        measure(folder, parse_size_bytes(options.size), options.rounds)
    finally:
        shutil.rmtree(folder)
    return 0


def measure(folder: Path, size_bytes: int, rounds: int) -> None:
    """Take one file out in two ways, in turns."""
    image = folder / "disk.raw"
    make_image(image, size_bytes, Path("/usr/bin"))
    repo = make_repo(Place(folder / "mirror", folder / "state", folder / "overlays"), folder)
    repository = open_repository(LocalStorage(repo.path), Secret(SlotKind.PASSPHRASE, PASSPHRASE))
    with open_reader(file_place(str(image), "raw"), clock=SystemClock()) as reader:
        store_disks(repository, {"vda": reader})
    expected = folder / "expected"
    run("debugfs", "-R", f"dump {FILE} {expected}", image)

    def ours(to: Path) -> Sample:
        words = repo.command("files", "get", "web", FILE, "--to", to, "--filesystem", "/dev/sda",
                             "--timeout", "10m")
        return timed(words, {**repo.environment(), "PYTHONPATH": os.pathsep.join(sys.path)}, folder)

    def guestfish(to: Path) -> Sample:
        to.mkdir()
        return timed(["guestfish", "--ro", "--format=raw", "-a", str(image), "-m", "/dev/sda",
                      "download", FILE, str(to / FILE.strip("/"))], {}, folder)

    ways: dict[str, Callable[[Path], Sample]] = {"files get": ours, "guestfish": guestfish}
    found: dict[str, list[Sample]] = {who: [] for who in ways}
    print(f"files: {FILE} ({size_text(expected.stat().st_size)}) of a disk of {size_text(size_bytes)}; "
          f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; {rounds} rounds", flush=True)
    for number in range(-1, rounds):  # the first one makes the appliance's parts, and does not count
        for who in list(ways)[:: 1 - number % 2 * 2]:
            to = folder / "out"
            sample = ways[who](to)
            if (to / FILE.strip("/")).read_bytes() != expected.read_bytes():
                raise SystemExit(f"{who}: the file is not the image's")
            shutil.rmtree(to)
            if number >= 0:
                found[who].append(sample)
    medians = {who: statistics.median(sample.seconds for sample in samples) for who, samples in found.items()}
    for who, samples in found.items():
        print(f"  {who:12}{medians[who]:8.2f} s   "
              + " ".join(f"{sample.seconds:.2f} ({sample.cpu_s:.1f} CPU s)" for sample in samples))
    share = medians["files get"] / medians["guestfish"]
    target("files get, of guestfish on the image", share, 1.3, most=True)


if __name__ == "__main__":
    sys.exit(main())
