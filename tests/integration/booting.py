"""What tests of booted guests share: one snapshot of a guest with two disks, and booting it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.booted import BootedGuest
from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.enter import IMAGES_DIR
from lab.images import MIB, run, to_raw
from lab.waiting import PATIENCE_S, wait_for
from stillframe.hypervisor.model import BOOT_SOCKETS
from stillframe.restore.boot_record import BootState
from tests.fault.harness import Place, Run
from tests.integration.repositories import Repo, make_repo

ORIGIN = "origin"
SIZE_BYTES = 24 * MIB


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of ORIGIN, which is gone, and what its disks held."""

    repo: Repo
    sid: str
    moment: dict[str, Path]


@dataclass(frozen=True)
class Booting:
    """One test's places, and the snapshot."""

    daemons: LibvirtDaemons
    snapshot: Snapshot
    repo: Repo
    pool: Path
    folder: Path

    def guest(self, name: str) -> BootedGuest:
        """Return a guest of that name, booted or not yet."""
        return BootedGuest(self.daemons, name, ORIGIN, self.snapshot.moment, self.folder)

    def boot(self, name: str, *options: str) -> BootedGuest:
        """Boot the snapshot."""
        self.repo.json("boot", self.snapshot.sid, "--as", name, "--pool", self.pool, *options)
        return self.guest(name)

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the guest's record, None if there is none."""
        for path in self.repo.place.state_dir.glob("booted/*/record.json"):
            found: dict[str, Any] = json.loads(path.read_text())
            if found["name"] == name:
                return found
        return None

    def assert_nothing_is_left(self, name: str) -> None:
        """Check that nothing of a guest is left: definition, overlays, record, servers, sockets."""
        assert not self.guest(name).is_defined()
        assert not [path for path in self.pool.iterdir() if name in path.name]
        self.assert_no_servers()

    def assert_no_servers(self) -> None:
        """Check that no server, socket or record of a booted guest is left."""
        assert not list(self.repo.place.state_dir.glob("booted/*"))
        assert not list(BOOT_SOCKETS.glob("*"))
        assert not servers()

    def assert_landed(
        self, guest: BootedGuest, pool: Path | None = None, image_format: str = "qcow2",
    ) -> None:
        """Check that a guest stands on its own image alone, in XML and header, and holds what it must.

        Its images are in *pool*, if not where they were, and nothing of it is left elsewhere.
        """
        self.assert_no_servers()
        for target in guest.targets():
            for inactive in (False, True):
                below = guest.disk_xml(target, inactive=inactive).find("backingStore/source")
                assert below is None or not (inactive or guest.running())
        if guest.running():
            guest.flush()
            guest.domain().destroy()
        for target in guest.targets():
            image = guest.image(target)
            suffix = "qcow2" if image_format == "qcow2" else "img"
            assert image == (pool or self.pool) / f"{guest.name}-{target}.{suffix}"
            info = json.loads(run("qemu-img", "info", "--output=json", image))
            assert "backing-filename" not in info
            assert info["format"] == image_format
            if image_format == "qcow2":
                run("qemu-img", "check", image)
            guest.model(target).assert_equal(to_raw(image, image_format, self.folder / f"{target}.raw"))
        for folder in {self.pool, pool or self.pool}:
            made = {path.name for path in folder.iterdir() if guest.name in path.name}
            assert made == {guest.image(target).name for target in guest.targets()
                            if guest.image(target).parent == folder}


class BootRun(Run):
    """A command, stopped at a step of a booted guest's record."""

    def __init__(self, booting: Booting, state: BootState, phase: str, number: int, *words: str) -> None:
        line = booting.repo.command(*words)[3:]
        self._start(
            [sys.executable, "-m", "tests.fault.boot_driver", state.value, phase, str(number), *line],
            booting.repo.environment())


def start_uefi_guest(daemons: LibvirtDaemons, images_dir: Path) -> tuple[DiskGuest, Path]:
    """Start a guest with UEFI and a TPM; return it and the file with its variables, which nobody else has."""
    nvram = images_dir / "uefi_VARS.fd"
    nvram.write_bytes(Path("/usr/share/OVMF/OVMF_VARS_4M.fd").read_bytes()[:-4096] + b"\xab" * 4096)
    guest = DiskGuest(
        daemons, images_dir, "uefi", (DiskSpec("vda", size_bytes=8 * MIB),), memory_mib=128,
        devices="<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>")
    firmware = ("<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
                f"<nvram>{nvram}</nvram></os><features><acpi/></features>")
    daemons.connect().defineXML(guest.xml().replace("</os>", firmware))
    guest.start()
    return guest, nvram


def servers() -> list[int]:
    """Return the process numbers of the servers of booted guests."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"nbdkit" in words.split(b"\0")[0] and str(BOOT_SOCKETS).encode() in words:
            found.append(int(path.parent.name))
    return found


def end_servers() -> None:
    """Kill the servers of booted guests, and take their sockets away: as a restart of the host does."""
    for pid in servers():
        os.kill(pid, signal.SIGKILL)
    wait_for("the servers are gone", lambda: not servers(), PATIENCE_S)
    shutil.rmtree(BOOT_SOCKETS, ignore_errors=True)


def take_snapshot(daemons: LibvirtDaemons, folder: Path) -> Snapshot:
    """Make a guest with two disks, back it up and remove it."""
    specs = DiskSpec("vda", size_bytes=SIZE_BYTES), DiskSpec("vdb", Kind.RAW, size_bytes=SIZE_BYTES)
    guest = DiskGuest(daemons, IMAGES_DIR, ORIGIN, specs)
    repo = make_repo(Place(folder, folder / "state", IMAGES_DIR), folder)
    try:
        guest.define()
        guest.start()
        sid = str(repo.backup(guest, "--method", "overlay")["snapshot"])
        moment = {
            target: guest.model(target).copy_at_moment(folder / f"{target}.moment") for target in guest.disks}
    finally:
        guest.remove()
    return Snapshot(repo, sid, moment)
