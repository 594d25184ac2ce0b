"""Measure a restore in place of a guest of which little changed, against a full restore in the same run.

    python -m lab.enter -- python -m bench.restore_in_place [--size 8G] [--content /usr] [--share 1]
                                                            [--rounds 3] [--quick] [--dir /var/tmp]

A guest with an ext4 image of a folder as a raw or qcow2 disk is backed up (qcow2 by bitmap) and shut off.
In each round *share* percent of what is not zero is overwritten in scattered pieces of 64 KiB, other places
each time, and the snapshot restored: in place (`--no-backup-first`), in place with `--read-all`, and into a
new file of the same format, in turns; commands from start to end. The image is in the page cache before
each, as what was just written is. What comes out is compared with the disk.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers import Sample, timed
from bench.repository import data_blocks, make_image, settle
from bench.verdict import target
from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import assert_equal_images, run
from lab.waiting import PATIENCE_S, wait_for
from stillframe.units import KIB, parse_size_bytes, size_text

PIECE = 64 * KIB
_TIMES = 5.0


@dataclass
class Found:
    """What each way took, round by round."""

    in_place: list[Sample] = field(default_factory=list)
    read_all: list[Sample] = field(default_factory=list)
    full: list[Sample] = field(default_factory=list)


class Bench:
    """One guest with one disk, its repository, and how the command is called."""

    def __init__(self, folder: Path, daemons: LibvirtDaemons, content: Path, kind: Kind) -> None:
        self.folder = folder
        folder.mkdir()
        folder.chmod(0o755)
        self.guest = DiskGuest(daemons, folder, f"in-place-{kind.name.lower()}", (
            DiskSpec("vda", kind, content.stat().st_size, content=content),))
        self.disk = self.guest.disks["vda"]
        self.content = content
        self.pieces = data_blocks(content, PIECE)
        self.chance = random.Random(kind.name)
        (folder / "key").write_bytes(self.chance.randbytes(32))
        (folder / "key").chmod(0o600)
        self.call("init")
        self.guest.define()
        # A raw disk is read whole in any case.
        if kind is Kind.QCOW2:
            self.guest.start()
            self.call("backup", self.guest.name, "--quiesce", "none", "--method", "bitmap")
            self.guest.domain().shutdown()
            self.guest.monitor.human("quit")
            wait_for("the guest is off", lambda: not self.guest.running(), PATIENCE_S)
        else:
            self.call("backup", self.guest.name, "--quiesce", "none")

    def call(self, *words: str | Path) -> Sample:
        """Run the command and return what it took."""
        command = [sys.executable, "-m", "stillframe", *map(str, words), "--quiet",
                   "--repo", str(self.folder / "repository"), "--key-file", str(self.folder / "key"),
                   "--state-dir", str(self.folder / "state")]
        return timed(command, {"STILLFRAME_CONFIG": "/dev/null"}, self.folder)

    def change(self, share: float) -> None:
        """Overwrite a share of the pieces that hold data."""
        chosen = self.chance.sample(self.pieces, max(1, round(len(self.pieces) * share)))
        script = "".join(
            f"write -q -P {self.chance.randrange(1, 256)} {at} {PIECE}\n" for at in sorted(chosen))
        subprocess.run(["qemu-io", "-f", self.disk.image_format, self.disk.path], input=script, text=True,
                       check=True, stdout=subprocess.DEVNULL)

    def in_place(self, share: float, *words: str) -> Sample:
        """Change something and restore in place; compare."""
        self.change(share)
        settle(self.disk.path)
        sample = self.call("restore", "latest", "--in-place", "--no-backup-first", *words)
        self.check(self.disk.path)
        return sample

    def full(self) -> Sample:
        """Restore into a new file; compare."""
        settle(self.disk.path)
        to = self.folder / f"new.{self.disk.image_format}"
        sample = self.call("restore", "latest:vda", "--to", to)
        self.check(to)
        to.unlink()
        return sample

    def check(self, image: Path) -> None:
        """Compare an image with the disk."""
        raw = self.folder / "compare.raw"
        run("qemu-img", "convert", "-f", self.disk.image_format, "-O", "raw", image, raw)
        assert_equal_images(raw, self.content)
        raw.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="8G")
    parser.add_argument("--content", type=Path, default=Path("/usr"))
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--quick", action="store_true", help="1 GiB, one round: only to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds = "1G", 1
    folder = Path(tempfile.mkdtemp(prefix="stillframe-bench-", dir=options.dir))
    folder.chmod(0o755)
    daemons = LibvirtDaemons()
    daemons.start()
    try:
        content = folder / "content.raw"
        folder_of = Path("/usr/bin") if options.quick else options.content
        make_image(content, parse_size_bytes(options.size), folder_of)
        print(f"in place: {options.size} disk, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
        for kind in (Kind.RAW, Kind.QCOW2):
            measure(Bench(folder / kind.name, daemons, content, kind), options)
            shutil.rmtree(folder / kind.name)
    finally:
        daemons.remove_all_domains()
        daemons.terminate()
        shutil.rmtree(folder)
    return 0


def measure(bench: Bench, options: argparse.Namespace) -> None:
    """Measure both ways in turns, and print it."""
    found, share = Found(), options.share / 100
    for number in range(options.rounds):
        ways: list[tuple[list[Sample], Callable[[], Sample]]] = [
            (found.in_place, lambda: bench.in_place(share)),
            (found.read_all, lambda: bench.in_place(share, "--read-all")), (found.full, bench.full)]
        for samples, way in ways[:: 1 - number % 2 * 2]:
            samples.append(way())
    print(f" {bench.disk.spec.kind.value}: {size_text(len(bench.pieces) * PIECE)} of data, "
          f"{options.share:g} % of it changed", flush=True)
    for who, samples in (("in place", found.in_place), ("in place, --read-all", found.read_all),
                         ("into a new file", found.full)):
        print(f"  {who:20}{_median(samples):8.2f} s   "
              + " ".join(f"{sample.seconds:.2f} ({sample.cpu_s:.1f} CPU s)" for sample in samples))
    target("in place, times as fast as a full restore", _median(found.full) / _median(found.in_place), _TIMES)
    target("the same with --read-all", _median(found.full) / _median(found.read_all), _TIMES)


def _median(samples: list[Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


if __name__ == "__main__":
    sys.exit(main())
