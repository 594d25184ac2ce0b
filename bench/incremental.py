"""Measure incremental backups of a running guest, against other programs, side by side.

    python -m lab.enter -- python -m bench.incremental [--size 100G] [--data 10G] [--changed 256M] [--quick]
                                                       [--only NAME ...] [--dir /var/tmp]

A guest with a qcow2 disk, *data* of it filled with bytes that don't compress. For each contender in turn: a
full backup, *changed* bytes written in scattered pieces of 64 KiB (other places each time), and
the incremental backup, which is what counts. What it read of the guest and what it stored is shown beside.
What stillframe made is restored and compared with the disk, byte by byte. restic, borg and rsync
read the image file, as people use them for guests; the guest writes nothing meanwhile.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import libvirt

from bench.own import Own
from bench.peers import timed
from lab.daemons import URI, LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import assert_equal_images
from stillframe.direct import aligned_buffer
from stillframe.units import KIB, MIB, parse_size_bytes, size_text

PIECE = 64 * KIB
_GUEST = "incremental"


@dataclass(frozen=True)
class Found:
    """What a contender took. Bytes are 0 where it does not tell."""

    full_s: float
    incremental_s: float
    read_bytes: int = 0
    stored_bytes: int = 0


class Bench:
    """The guest, its disk and its folder."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.size = parse_size_bytes(options.size)
        self.data = parse_size_bytes(options.data)
        self.changed = parse_size_bytes(options.changed)
        self.chance = random.Random(20261124)
        self.daemons = LibvirtDaemons()
        self.daemons.start()
        content = folder / "content.raw"
        self.places = fill(content, self.size, self.data, self.chance)
        self.guest = DiskGuest(self.daemons, folder, _GUEST, (
            DiskSpec("vda", Kind.QCOW2, self.size, content=content),))
        content.unlink()
        self.guest.define()
        self.guest.start()

    @property
    def image(self) -> Path:
        return self.guest.disks["vda"].path

    def change(self) -> list[int]:
        """Write pieces at random places that hold data; return the places."""
        chosen = sorted(self.chance.sample(self.places, self.changed // PIECE))
        source = self.folder / "piece"
        for place in chosen:
            data = self.chance.randbytes(PIECE)
            source.write_bytes(data)
            self.guest.monitor.human(
                f'qemu-io -d {self.guest.device("vda")} "write -q -s {source} {place} {PIECE}"')
            self.guest.model("vda").write(place, data)
        self.guest.flush()
        return chosen

    def fresh(self, name: str) -> Path:
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        os.sync()
        return place


def fill(path: Path, size: int, data: int, chance: random.Random) -> list[int]:
    """Make a sparse raw file with stretches of a mebibyte of random data; return the places of its pieces."""
    places: list[int] = []
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(data // MIB):
            at = number * (size // (data // MIB)) // MIB * MIB
            file.seek(at)
            file.write(chance.randbytes(MIB))
            places += range(at, at + MIB, PIECE)
    return places


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="100G")
    parser.add_argument("--data", default="10G")
    parser.add_argument("--changed", default="256M")
    parser.add_argument("--only", nargs="+", choices=sorted(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="8, 1 GiB, 32 MiB: only to see that it works")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    if options.quick:
        options.size, options.data, options.changed = "8G", "1G", "32M"
    folder = Path(tempfile.mkdtemp(prefix="stillframe-bench-", dir=options.dir))
    folder.chmod(0o755)
    bench = None
    try:
        bench = Bench(folder, options)
        print(f"{size_text(bench.size)} qcow2, {size_text(bench.data)} allocated, {size_text(bench.changed)} "
              f"changed in pieces of 64 KiB; load {os.getloadavg()[0]:.1f}", flush=True)
        found: dict[str, Found] = {}
        for name, contender in CONTENDERS.items():
            if options.only and name not in options.only:
                continue
            found[name] = contender(bench)
            show(name, found[name], bench)
        verdict(found, bench)
    finally:
        if bench is not None:
            bench.guest.remove()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


# --- contenders ---


def by_method(method: str) -> Callable[[Bench], Found]:
    def run(bench: Bench) -> Found:
        place = bench.fresh(method)
        own = Own(bench.guest.name, place)
        own.init()
        full_s, _ = own.backup(method)
        bench.change()
        seconds, result = own.backup(method)
        disk = result["disks"][0]
        restored = place / "restored.raw"
        own.call("restore", result["snapshot"], "--to", str(restored))
        assert_equal_images(bench.guest.model("vda").path, restored)
        if method == "standing-overlay":
            own.call("settle", bench.guest.name, repository=False)
        drop_checkpoints(bench)
        shutil.rmtree(place)
        return Found(full_s, seconds, disk["read_bytes"], result["stored_bytes"])

    return run


def mirror(bench: Bench) -> Found:
    place = bench.fresh("mirror")
    own = Own(bench.guest.name, place)
    words = ("mirror", bench.guest.name, str(place), "--quiesce", "none", "--method", "bitmap")
    full_s, _ = own.call(*words, repository=False)
    bench.change()
    seconds, body = own.call(*words, repository=False)
    disk = body["guests"][0]["disks"][0]
    image = next(place.glob(f"{bench.guest.name}/*.img"))
    assert_equal_images(bench.guest.model("vda").path, image)
    drop_checkpoints(bench)
    shutil.rmtree(place)
    return Found(full_s, seconds, disk["data_bytes"], disk["written_bytes"])


def virtnbdbackup(bench: Bench) -> Found:
    place = bench.fresh("virtnbdbackup")
    place.chmod(0o777)  # QEMU makes the socket in it
    command = ["virtnbdbackup", "-U", URI, "-d", bench.guest.name, "-z", "-n", "-f", str(place / "nbd"),
               "-o", str(place / "backup")]
    full = timed([*command, "-l", "full"], {}, place)
    bench.change()
    before = used_bytes(place)
    increment = timed([*command, "-l", "inc"], {}, place)
    stored = used_bytes(place) - before
    drop_checkpoints(bench)
    shutil.rmtree(place)
    return Found(full.seconds, increment.seconds, 0, stored)


def restic(bench: Bench) -> Found:
    place = bench.fresh("restic")
    environment = {"RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": str(place / "repository"),
                   "RESTIC_CACHE_DIR": str(place / "cache")}
    timed(["restic", "init"], environment, place)
    return over_image(bench, place, lambda _: ["restic", "backup", "--quiet", str(bench.image)], environment)


def borg(bench: Bench) -> Found:
    place = bench.fresh("borg")
    environment = {"BORG_PASSPHRASE": "bench", "BORG_REPO": str(place / "repository"),
                   "BORG_BASE_DIR": str(place / "home")}
    timed(["borg", "init", "--encryption", "repokey"], environment, place)
    return over_image(bench, place, lambda name: [
        "borg", "create", "--chunker-params", f"fixed,{PIECE}", "--compression", "zstd,1", "--sparse",
        f"::{name}", str(bench.image)], environment)


def rsync(bench: Bench) -> Found:
    place = bench.fresh("rsync")
    return over_image(bench, place, lambda _: [
        "rsync", "--inplace", "--no-whole-file", "--sparse", str(bench.image), str(place / "copy.qcow2")], {})


def over_image(
    bench: Bench, place: Path, command: Callable[[str], list[str]], environment: dict[str, str]
) -> Found:
    full = timed(command("first"), environment, place)
    bench.change()
    before = used_bytes(place)
    increment = timed(command("second"), environment, place)
    stored = used_bytes(place) - before
    shutil.rmtree(place)
    return Found(full.seconds, increment.seconds, bench.data, stored)


CONTENDERS: dict[str, Callable[[Bench], Found]] = {
    "bitmap": by_method("bitmap"), "standing-overlay": by_method("standing-overlay"), "mirror": mirror,
    "virtnbdbackup": virtnbdbackup, "restic": restic, "borg": borg, "rsync": rsync,
}


# --- around them ---


def drop_checkpoints(bench: Bench) -> None:
    """Remove all checkpoints of the guest: the next contender begins anew."""
    with connected(bench) as domain:
        for checkpoint in domain.listAllCheckpoints():
            checkpoint.delete()


@contextmanager
def connected(bench: Bench) -> Iterator[libvirt.virDomain]:
    connection = bench.daemons.connect()
    try:
        yield connection.lookupByName(bench.guest.name)
    finally:
        connection.close()


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def read_changed_s(bench: Bench) -> float:
    """Return how long it takes to read what the guest has just changed, piece after piece, from its image.

    Past the page cache, as the guest's QEMU has to (cache='none').
    """
    chosen = bench.change()
    command = ["qemu-img", "map", "-U", "--output=json", str(bench.image)]
    extents = [each for each in json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
               if each["data"]]
    starts = [each["start"] for each in extents]
    places = []
    for place in chosen:
        extent = extents[bisect.bisect_right(starts, place) - 1]
        places.append(extent["offset"] + place - extent["start"])
    buffer = aligned_buffer(PIECE)
    fd = os.open(bench.image, os.O_RDONLY | os.O_DIRECT)
    began = time.monotonic()
    for at in places:
        os.preadv(fd, [buffer], at)
    seconds = time.monotonic() - began
    os.close(fd)
    return seconds


def show(name: str, found: Found, bench: Bench) -> None:
    share = f"{found.stored_bytes / bench.changed:8.2f}" if found.stored_bytes else ""
    read = f"{found.read_bytes / bench.changed:8.2f}" if found.read_bytes else f"{'':8}"
    print(f"  {name:18}{found.full_s:9.2f} s full {found.incremental_s:9.2f} s incremental;  "
          f"read, stored / changed: {read} {share}", flush=True)


def verdict(found: dict[str, Found], bench: Bench) -> None:
    read_s = read_changed_s(bench)
    allowed_s = 1.5 + 2 * read_s
    print(f"Allowed: {allowed_s:.2f} s (1.5 s and twice the {read_s:.2f} s that reading what changed takes)")
    for own in ("bitmap", "standing-overlay", "mirror"):
        if own not in found:
            continue
        taken = found[own].incremental_s
        print(f"  {own}: {taken:.2f} s, {'met' if taken <= allowed_s else 'MISSED'}; as fast as "
              + ", ".join(f"{each.incremental_s / taken:.1f} x {name}" for name, each in found.items()
                          if name not in ("bitmap", "standing-overlay", "mirror")))
    if "bitmap" in found and "virtnbdbackup" in found:
        print(f"  full: {found['virtnbdbackup'].full_s / found['bitmap'].full_s:.2f} times virtnbdbackup")


if __name__ == "__main__":
    sys.exit(main())
