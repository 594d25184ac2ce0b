"""Other programs that back up an image, made to do what stillframe does.

    restic               0.14 as it comes: content-defined chunks, zstd, encrypted
    borg 64K, borg 4M    fixed chunks of 64 KiB and 4 MiB, zstd 1, sparse, encrypted (`repokey`)
    virtnbdbackup        a copy of the disk of a guest that is off, lz4; neither encrypted nor deduplicated

The last one needs a libvirt, which is the lab's; its backups of guests that are off have no second one.
Each command's time is from its start to its end, an fsync of what it restored included.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.daemons import URI, LibvirtDaemons
from lab.enter import inside_lab
from stillframe.units import KIB, MIB

_GUEST = "bench"
_DOMAIN_XML = """
<domain type='qemu'><name>{guest}</name><memory unit='MiB'>64</memory>
  <os><type arch='x86_64'>hvm</type></os>
  <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>
    <target dev='vda' bus='virtio'/></disk></devices></domain>
"""


@dataclass(frozen=True)
class Sample:
    """What one run took. *facts* are bytes and numbers of its own."""

    seconds: float
    cpu_s: float
    rss_bytes: int
    facts: dict[str, int] = field(default_factory=dict)


class Peer:
    """One program and its repository, a new folder."""

    name = ""
    has_second = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        self.environment: dict[str, str] = {}
        folder.mkdir()

    def first(self, image: Path) -> Sample:
        raise NotImplementedError

    def second(self, image: Path) -> Sample:
        raise NotImplementedError

    def restore(self) -> tuple[Sample, Path]:
        """Restore the first backup; return where the image is, too."""
        output = self.folder / "restored"
        output.mkdir()
        sample = timed(self.restore_command(output), self.environment, output, sync=True)
        return sample, max((path for path in output.rglob("*") if path.is_file()),
                           key=lambda path: path.stat().st_size)

    def restore_command(self, output: Path) -> list[str]:
        raise NotImplementedError

    def backed_up(self, command: Sequence[str]) -> Sample:
        before = folder_bytes(self.repository)
        sample = timed(command, self.environment, self.folder)
        sample.facts["stored"] = folder_bytes(self.repository) - before
        return sample

    def remove(self) -> None:
        shutil.rmtree(self.folder)


class Restic(Peer):
    name = "restic"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environment = {"RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": str(self.repository),
                            "RESTIC_CACHE_DIR": str(folder / "cache")}
        timed(["restic", "init"], self.environment, folder)

    def first(self, image: Path) -> Sample:
        return self.backed_up(["restic", "backup", "--quiet", str(image)])

    second = first

    def restore_command(self, output: Path) -> list[str]:
        return ["restic", "restore", "--quiet", "latest", "--target", str(output)]


class Borg(Peer):
    name = "borg 64K"
    chunk_bytes = 64 * KIB

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environment = {"BORG_PASSPHRASE": "bench", "BORG_REPO": str(self.repository),
                            "BORG_BASE_DIR": str(folder / "home")}
        timed(["borg", "init", "--encryption", "repokey"], self.environment, folder)

    def first(self, image: Path) -> Sample:
        return self._create("first", image)

    def second(self, image: Path) -> Sample:
        return self._create("second", image)

    def restore_command(self, output: Path) -> list[str]:  # noqa: ARG002 - into the current folder
        return ["borg", "extract", "--sparse", "::first"]

    def _create(self, name: str, image: Path) -> Sample:
        return self.backed_up(["borg", "create", "--chunker-params", f"fixed,{self.chunk_bytes}",
                               "--compression", "zstd,1", "--sparse", f"::{name}", str(image)])


class BorgLarge(Borg):
    name = "borg 4M"
    chunk_bytes = 4 * MIB


class VirtNbdBackup(Peer):
    name = "virtnbdbackup lz4"
    has_second = False

    def first(self, image: Path) -> Sample:
        daemons = LibvirtDaemons()
        daemons.start()
        connection = daemons.connect()
        # Of a raw disk it would store every zero, and compress nothing.
        disk = self.folder / "disk.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image), str(disk)]
        subprocess.run(create, check=True)
        connection.defineXML(_DOMAIN_XML.format(guest=_GUEST, disk=disk))
        try:
            return self.backed_up(["virtnbdbackup", "-U", URI, "-d", _GUEST, "-l", "copy", "-z", "-n",
                                   "-f", str(self.folder / "nbd"), "-o", str(self.repository)])
        finally:
            connection.lookupByName(_GUEST).undefine()
            connection.close()

    def restore_command(self, output: Path) -> list[str]:
        return ["virtnbdrestore", "-n", "-f", str(self.folder / "nbd"), "-a", "restore",
                "-i", str(self.repository), "-o", str(output)]


def peers() -> list[type[Peer]]:
    """Return those that can be run here, and say which can't."""
    found: list[type[Peer]] = []
    wanted: list[tuple[str, list[type[Peer]]]] = [
        ("restic", [Restic]), ("borg", [Borg, BorgLarge]), ("virtnbdbackup", [VirtNbdBackup])]
    for program, classes in wanted:
        if shutil.which(program) is None:
            print(f"(left out: {program} is not installed)")
        elif program == "virtnbdbackup" and not inside_lab():
            print("(left out: virtnbdbackup, whose libvirt is the lab's: python -m lab.enter -- ...)")
        else:
            found += classes
    return found


def timed(command: Sequence[str], environment: Mapping[str, str], folder: Path, *, sync: bool = False
          ) -> Sample:
    """Run *command* in *folder*; its output is shown only if it fails. *sync*: with an fsync of all there."""
    log = folder.parent / "peer.log"
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(list(command), env={**os.environ, **environment}, cwd=folder,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{log.read_text()[-4000:]}")
    for path in folder.rglob("*") if sync else ():
        if path.is_file():
            sync_file(path)
    return Sample(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * KIB)


def sync_file(path: Path) -> None:
    """Make a file durable."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def uncache(folder: Path) -> None:
    """Give up the page cache of all files in *folder*, which are synced."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def folder_bytes(folder: Path) -> int:
    """Return how long the files in *folder* are."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
