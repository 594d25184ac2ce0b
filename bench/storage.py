"""Measure backup and restore to each server, against the plainest client of its protocol, in the same run.

    python -m lab.enter -- python -m bench.storage [s3 sftp smb] [--size 1G] [--rounds 3] [--dir DIR]

A guest that is off has a raw disk full of bytes that don't compress. Each round backs it up into a new
repository on a server on loopback and restores it, and moves as many bytes to the same server and back as
the plainest client does: obstore's `put` and `get` of objects as large as a pack, four at once, for S3;
OpenSSH's `sftp` and Samba's `smbclient`, each with one large file. Bytes are compared. What the same command
takes with a repository in a folder, once, is the bound: what no driver can do anything about.
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
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import obstore
from obstore.store import S3Store

from bench.own import Own
from bench.verdict import target
from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import assert_equal_images
from lab.s3 import BUCKET, S3Server
from lab.server import Server
from lab.sftp import SftpDaemon
from lab.smb import SHARE, SmbDaemon
from stillframe.repository.layout import Parameters
from stillframe.units import MIB, parse_size_bytes, size_text

_GUEST = "storage"
_PACK_BYTES = Parameters(id="", created_at="").pack_bytes
_AT_ONCE = 4
_WANTED = 0.7


@dataclass
class Found:
    """Seconds of each round: stillframe's, and the plain client's."""

    backup: list[float] = field(default_factory=list)
    restore: list[float] = field(default_factory=list)
    put: list[float] = field(default_factory=list)
    get: list[float] = field(default_factory=list)


# --- the plainest clients: put a file there, and get it back ---


def by_obstore(server: Server, image: Path, to: Path) -> tuple[float, float]:
    assert isinstance(server, S3Server)
    access = server.access
    store = S3Store(
        BUCKET, prefix="plain", endpoint=access.endpoint, region=access.region, access_key_id=access.user,
        secret_access_key=access.secret, client_options={"allow_http": True})
    starts = range(0, image.stat().st_size, _PACK_BYTES)

    def put(start: int) -> None:
        with image.open("rb") as file:
            file.seek(start)
            obstore.put(store, str(start), file.read(_PACK_BYTES))

    def get(start: int) -> None:
        content = obstore.get(store, str(start)).bytes()
        with to.open("r+b") as file:
            file.seek(start)
            file.write(content)

    def all_of(one: Callable[[int], None]) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(one, starts))

    put_s = seconds(lambda: all_of(put))
    to.touch()
    return put_s, seconds(lambda: all_of(get), lambda: synced(to))


def by_sftp(server: Server, image: Path, to: Path) -> tuple[float, float]:
    assert isinstance(server, SftpDaemon)
    place = server.place("plain")
    options = [f"-P{place.port}", f"-i{place.identity}", f"-oUserKnownHostsFile={place.known_hosts}", "-b-"]

    def batch(line: str) -> None:
        subprocess.run(["sftp", *options, f"{place.user}@{place.host}"], input=line, text=True, check=True,
                       stdout=subprocess.DEVNULL)

    there = f"{place.path}.bin"
    return seconds(lambda: batch(f"put -f {image} {there}")), seconds(
        lambda: batch(f"get {there} {to}"), lambda: synced(to))


def by_smbclient(server: Server, image: Path, to: Path) -> tuple[float, float]:
    assert isinstance(server, SmbDaemon)
    credentials = to.with_name("smb-credentials")
    credentials.write_text(server.credentials)
    place = server.place("")

    def batch(line: str) -> None:
        subprocess.run(
            ["smbclient", f"//{place.host}/{SHARE}", f"--port={place.port}",
             f"--authentication-file={credentials}", "--command", line], check=True, capture_output=True)

    return seconds(lambda: batch(f"put {image} plain.bin")), seconds(
        lambda: batch(f"get plain.bin {to}"), lambda: synced(to))


def synced(path: Path) -> None:
    """Have it on the disk, as a restored image is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def seconds(*works: Callable[[], object]) -> float:
    began = time.monotonic()
    for work in works:
        work()
    return time.monotonic() - began


SERVERS: dict[str, tuple[type[Server], Callable[[Server, Path, Path], tuple[float, float]]]] = {
    "s3": (S3Server, by_obstore), "sftp": (SftpDaemon, by_sftp), "smb": (SmbDaemon, by_smbclient)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("servers", nargs="*", choices=[[], *SERVERS], default=[])
    parser.add_argument("--size", default="1G")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    size = parse_size_bytes(options.size)
    with disk_of_a_guest(options.dir, size) as (folder, image):
        print(f"{size_text(size)} that don't compress; {options.rounds} rounds; "
              f"load {os.getloadavg()[0]:.1f}", flush=True)
        show_bound(folder, image, size)
        for name in options.servers or SERVERS:
            show(name, measure(name, folder, image, options.rounds), size)
    return 0


@contextmanager
def disk_of_a_guest(parent: Path, size: int) -> Iterator[tuple[Path, Path]]:
    """Give a folder, and the image of a guest that is off."""
    folder = Path(tempfile.mkdtemp(prefix="stillframe-bench-", dir=parent))
    folder.chmod(0o755)
    chance, content = random.Random(20261128), folder / "content.raw"
    with content.open("wb") as file:
        for _ in range(size // MIB):
            file.write(chance.randbytes(MIB))
    daemons = LibvirtDaemons()
    daemons.start()
    guest = DiskGuest(daemons, folder, _GUEST, (DiskSpec("vda", Kind.RAW, size, content=content),))
    guest.define()
    try:
        yield folder, guest.disks["vda"].path
    finally:
        guest.remove()
        shutil.rmtree(folder, ignore_errors=True)


def measure(name: str, folder: Path, image: Path, rounds: int) -> Found:
    found = Found()
    kind, plain = SERVERS[name]
    for number in range(rounds):
        place = folder / f"{name}-{number}"
        (place / "server").mkdir(parents=True)
        with kind(place / "server") as server:
            own = Own(_GUEST, place, server.url("repository"), settings(server, place))
            backup_s, restore_s = there_and_back(own, image, place / "restored")
            put_s, get_s = plain(server, image, place / "got")
            assert_equal_images(image, place / "got")
        for samples, taken in ((found.backup, backup_s), (found.restore, restore_s), (found.put, put_s),
                               (found.get, get_s)):
            samples.append(taken)
        shutil.rmtree(place)
    return found


def there_and_back(own: Own, image: Path, restored: Path) -> tuple[float, float]:
    """Return the seconds of a first backup, and of restoring it."""
    own.init()
    os.sync()
    backup_s, result = own.backup("offline")
    restore_s, _ = own.call("restore", str(result["snapshot"]), "--to", str(restored))
    assert_equal_images(image, restored)
    restored.unlink()
    os.sync()
    return backup_s, restore_s


def show_bound(folder: Path, image: Path, size: int) -> None:
    place = folder / "bound"
    place.mkdir()
    backup_s, restore_s = there_and_back(Own(_GUEST, place), image, place / "restored")
    print(f"  into a folder {size / backup_s / 1e6:.0f} MB/s, and from it {size / restore_s / 1e6:.0f} MB/s",
          flush=True)
    shutil.rmtree(place)


def settings(server: Server, place: Path) -> dict[str, str]:
    """Return by what the command learns who we are."""
    if isinstance(server, SftpDaemon):
        return {}
    assert isinstance(server, S3Server | SmbDaemon)
    path = place / "credentials"
    path.touch(0o600)
    path.write_text(server.credentials)
    return {"STILLFRAME_CREDENTIALS_FILE": str(path)}


def show(name: str, found: Found, size: int) -> None:
    for what, own, plain in (("backup", found.backup, found.put), ("restore", found.restore, found.get)):
        own_s, plain_s = statistics.median(own), statistics.median(plain)
        each = " ".join(f"{one:.1f}/{other:.1f}" for one, other in zip(own, plain, strict=True))
        print(f"  {name:5}{what:8}{size / own_s / 1e6:7.0f} MB/s, plain {size / plain_s / 1e6:7.0f} MB/s "
              f"  {each}")
        target(f"{what} to {name}, of the plainest client's speed", plain_s / own_s, _WANTED)


if __name__ == "__main__":
    sys.exit(main())
