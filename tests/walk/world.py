"""What a walk walks on: a guest, two repositories and a mirror; and what each of them has to be.

The models say what each disk holds; the rest of the state is what the walk itself has done. Only of standing
overlays the journal is asked, and what it says is compared with what libvirt and the folders show.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import libvirt

from lab.diskguest import DiskGuest
from lab.disks import Disk, DiskSpec, Kind
from lab.images import KIB, MIB
from lab.waiting import PATIENCE_S, wait_for
from stillframe.block.tools import image_info
from stillframe.capture.journal import Journal, RunRecord
from stillframe.clock import SystemClock
from tests.fault.harness import Place
from tests.integration.repositories import Repo

#: The disks that every walk begins with, on each of which another way of keeping data is tried.
FIRST_DISKS = (("vda", Kind.QCOW2), ("vdb", Kind.RAW), ("vdc", Kind.CHAIN))
#: QEMU lets go of a virtio-scsi disk without a word of the guest; these may come and go while it runs.
PLUGGED = ("sda", "sdb")
CONTROLLER = "<controller type='scsi' model='virtio-scsi'/>"
BOTH = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
_LIVE_FILES = Path("/var/lib/libvirt")

Moment = dict[str, Path]
#: A write of the guest: what, where, how much, and of which byte.
Write = tuple[str, str, int, int, int]


@dataclass
class World:
    """One guest and what is kept of it. *foreign*: the overlays that somebody else has put on top, by target.

    *their_snapshot* is the snapshot as libvirt knows it, "" if it was made without metadata. *moments* are
    what each snapshot of a repository has to be, *mirrored* what the mirror may be (none: no one looked yet).
    """

    guest: DiskGuest
    place: Place
    repos: dict[str, Repo]
    folder: Path
    running: bool = True
    foreign: dict[str, Path] = field(default_factory=dict)
    their_snapshot: str = ""
    moments: dict[str, dict[str, Moment]] = field(default_factory=dict)
    mirrored: list[Moment] = field(default_factory=list)
    _made: int = 0

    @property
    def domain(self) -> libvirt.virDomain:
        """The guest's domain."""
        return self.guest.domain()

    @cached_property
    def journal(self) -> Journal:
        """The journal of all the walk's runs."""
        return Journal(self.place.state_dir, SystemClock())

    @cached_property
    def _uuid(self) -> str:
        return str(self.domain.UUIDString())

    def standing(self) -> RunRecord | None:
        """Return the run on whose overlays the guest stands."""
        return self.journal.standing(self._uuid)

    def overlays(self) -> dict[str, str]:
        """Return the standing overlay of each disk that has one."""
        record = self.standing()
        return {} if record is None else {disk.target: disk.overlay_path for disk in record.disks}

    def theirs_on_top(self) -> set[str]:
        """Return the disks whose overlay of somebody else is not below one of ours."""
        record = self.standing()
        below = {disk.base.path for disk in record.disks} if record is not None else set()
        return {target for target, path in self.foreign.items() if str(path) not in below}

    def top(self, target: str) -> str:
        """Return the image that the guest's disk has to be on."""
        theirs, ours = self.foreign.get(target), self.overlays().get(target)
        over = theirs if target in self.theirs_on_top() else ours or theirs
        return str(over or self.guest.disks[target].path)

    def top_format(self, target: str) -> str:
        """Return the format of that image."""
        own = self.guest.disks[target].image_format
        return "qcow2" if target in self.foreign or target in self.overlays() else own

    def cut(self) -> dict[str, int]:
        """Return the disks that are smaller than their images below standing overlays, and those' sizes."""
        record = self.standing()
        sizes = {disk.target: image_info(disk.base).virtual_size_bytes
                 for disk in (record.disks if record is not None else ())}
        return {each: size for each, size in sizes.items() if size > self.guest.model(each).size_bytes}

    def moment(self) -> Moment:
        """Keep what the disks hold now."""
        self._made += 1
        return {
            target: self.guest.model(target).copy_at_moment(self.folder / f"moment-{self._made}-{target}")
            for target in self.guest.disks
        }

    # --- the guest ------------------------------------------------------------------------------

    def can_write(self) -> bool:
        """Return whether the guest's processors run, so that it may write."""
        return self.guest.daemons.qemu_pid(self.guest.name) != 0 \
            and self.domain.info()[0] == libvirt.VIR_DOMAIN_RUNNING

    def write(self, writes: tuple[Write, ...]) -> None:
        """Have the guest write, and flush."""
        for what, target, offset, length, pattern in writes:
            if what == "write":
                self.guest.write(target, offset, length, pattern)
            elif what == "discard":
                self.guest.discard(target, offset, length)
            else:
                self.guest.write_zeroes(target, offset, length, unmap=what == "unmap")
        self.guest.flush()

    def start(self) -> None:
        """Start the guest."""
        self.guest.start()
        self.running = True

    def end(self, how: str) -> None:
        """End the guest: by SIGKILL, by libvirt, or as its own shutdown does."""
        if how == "kill":
            self.guest.daemons.kill_qemu(self.guest.name)
        elif how == "destroy":
            self.guest.destroy()
        else:
            self.guest.monitor.human("quit")
        wait_for(f"libvirt sees {self.guest.name} off", lambda: not self.guest.running(), PATIENCE_S)
        self.running = False

    def restart_libvirtd(self, how: str) -> None:
        """End libvirtd and start it again."""
        if how == "kill":
            self.guest.daemons.kill_libvirtd()
        else:
            self.guest.daemons.stop()
        self.guest.daemons.start()

    def resize(self, target: str, size_bytes: int) -> str:
        """Make a disk larger or smaller while the guest runs; return what QEMU said against it, "" if it did.

        It resizes no disk with a bitmap that its own death left inconsistent (docs/CAPTURE.md).
        """
        try:
            self.domain.blockResize(target, size_bytes, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        except libvirt.libvirtError as error:
            if "is inconsistent" not in str(error):
                raise
            return str(error)
        self.guest.model(target).resize(size_bytes)
        return ""

    def has_spoiled_bitmap(self) -> bool:
        """Return whether QEMU's death made a bitmap inconsistent: no image that has one grows."""
        return any(bitmap.get("inconsistent") for bitmap in self._bitmaps())

    def _bitmaps(self) -> list[dict[str, Any]]:
        """Return each bitmap in QEMU."""
        nodes = self.guest.monitor.execute("query-named-block-nodes", flat=True)
        return [bitmap for node in nodes for bitmap in node.get("dirty-bitmaps", ())]

    # --- disks that come and go -----------------------------------------------------------------

    def plug(self, target: str, kind: Kind, size_bytes: int) -> None:
        """Make a disk and give it to the guest, for good."""
        for path in self.guest.folder.glob(f"{target}[.-]*"):
            path.unlink()
        self._made += 1
        disk = Disk(DiskSpec(target, kind, size_bytes, bus="scsi"), self.guest.folder,
                    f"{self.guest.name}-{self._made}")
        self.domain.attachDeviceFlags(disk.xml(), self._affected())
        self.guest.disks[target] = disk
        if self.running:
            self.guest._learn_aliases()

    def unplug(self, target: str) -> None:
        """Take a disk from the guest, for good."""
        self.detach(target)

    def detach(self, target: str) -> Disk:
        """Take a disk from the guest; its image stays."""
        self.domain.detachDeviceFlags(self._disk_xml(target), self._affected())
        wait_for(f"{target} is gone", lambda: target not in self._sources(inactive=False), PATIENCE_S)
        return self.guest.disks.pop(target)

    def attach(self, target: str, path: str, image_format: str, disk: Disk) -> None:
        """Give the guest an image that is there, of the *disk* that it had."""
        self.domain.attachDeviceFlags(
            f"<disk type='file' device='disk'><driver name='qemu' type='{image_format}' discard='unmap'/>"
            f"<source file='{path}'/><target dev='{target}' bus='scsi'/></disk>", self._affected())
        self.guest.disks[target] = disk
        if self.running:
            self.guest._learn_aliases()

    def swap_image(self, target: str, chance: random.Random) -> None:
        """Put another image of the same size where the disk's is, the guest being off."""
        disk = self.guest.disks[target]
        new = disk.path.with_suffix(".new")
        disk.model.zero(0, disk.model.size_bytes)
        disk.model.write(MIB, chance.randbytes(256 * KIB))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", disk.image_format, disk.model.path, new],
                       check=True)
        new.rename(disk.path)

    def _affected(self) -> int:
        return BOTH if self.running else int(libvirt.VIR_DOMAIN_AFFECT_CONFIG)

    def _disk_xml(self, target: str) -> str:
        flags = 0 if self.running else libvirt.VIR_DOMAIN_XML_INACTIVE
        found = ET.fromstring(self.domain.XMLDesc(flags)).find(f".//disk/target[@dev='{target}']/..")
        assert found is not None
        return ET.tostring(found, encoding="unicode")

    # --- overlays of others ---------------------------------------------------------------------

    def put_theirs_on(self, targets: tuple[str, ...], *, metadata: bool) -> None:
        """Make an external snapshot of some disks, as virsh snapshot-create-as --disk-only does."""
        self._made += 1
        paths = {target: self.guest.folder / f"theirs-{self._made}-{target}" for target in targets}
        listed = "".join(
            f"<disk name='{target}' snapshot='external'><source file='{paths[target]}'/></disk>"
            if target in paths else f"<disk name='{target}' snapshot='no'/>" for target in self.guest.disks)
        name = f"theirs-{self._made}"
        self.domain.snapshotCreateXML(
            f"<domainsnapshot><name>{name}</name><disks>{listed}</disks></domainsnapshot>",
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
            | (0 if metadata else libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA))
        self.foreign.update(paths)
        self.their_snapshot = name if metadata else ""

    def commit_theirs(self, meanwhile: Callable[[], None]) -> None:
        """Commit their overlays, as virsh blockcommit --shallow --active --pivot does, and delete them."""
        for target in self.foreign:
            self.domain.blockCommit(
                target, None, None, 0,
                libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW)
        meanwhile()
        for target, path in self.foreign.items():
            wait_for(f"the commit of {target} is ready", partial(self._ready, target), PATIENCE_S)
            self.domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            wait_for(f"{target} is off {path}", partial(self._is_off, target, path), PATIENCE_S)
            path.unlink()
        self.foreign.clear()
        if self.their_snapshot:
            self.domain.snapshotLookupByName(self.their_snapshot).delete(
                libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
            self.their_snapshot = ""

    def _ready(self, target: str) -> bool:
        mirror = ET.fromstring(self.domain.XMLDesc()).find(f".//disk/target[@dev='{target}']/../mirror")
        return mirror is not None and mirror.get("ready") == "yes"

    def _is_off(self, target: str, path: Path) -> bool:
        named = {self._sources(inactive=inactive)[target] for inactive in (False, True)}
        return str(path) not in named and not self.domain.blockJobInfo(target, 0)

    # --- nothing is left ------------------------------------------------------------------------

    def assert_nothing_left(self) -> None:
        """No run is open, nothing of one is left anywhere, and the guest is on the images it has to be on."""
        assert not self.journal.open_runs()
        overlays = self.overlays()
        assert sorted(map(str, self.place.overlays.iterdir())) == sorted(overlays.values())
        left = [path for pattern in ("*stillframe-*.socket", "*.stillframe-*.qcow2")
                for path in _LIVE_FILES.rglob(pattern) if str(path) not in overlays.values()]
        assert not left
        for inactive in (False, True):
            assert self._sources(inactive=inactive) == {each: self.top(each) for each in self.guest.disks}
        state = self.domain.info()[0]
        if not self.running:
            assert state == libvirt.VIR_DOMAIN_SHUTOFF
            return
        assert state == libvirt.VIR_DOMAIN_RUNNING, "the guest does not run"
        assert self.domain.jobInfo()[0] == 0
        assert not self.guest.monitor.execute("query-block-jobs")
        assert not self.guest.monitor.execute("query-jobs")
        self._assert_checkpoints()

    def _assert_checkpoints(self) -> None:
        """Each destination has one checkpoint at most, and no bitmap is without one."""
        names = {each.getName() for each in self.domain.listAllCheckpoints()}
        assert all(name.startswith("stillframe-") for name in names)
        kept = [name.split("-")[1] for name in names]
        assert len(kept) == len(set(kept)), f"a destination has several checkpoints: {sorted(names)}"
        # libvirt has a bitmap of its own on an image while it commits, which a killed libvirtd leaves there.
        bitmaps = {bitmap["name"] for bitmap in self._bitmaps()} - {"libvirt-tmp-activewrite"}
        assert bitmaps <= names, f"bitmaps that belong to no checkpoint: {sorted(bitmaps - names)}"

    def assert_disks(self) -> None:
        """Compare what the guest's disks hold with the models."""
        for target in self.guest.disks:
            self.guest.assert_disk_equals_model(target)

    def _sources(self, *, inactive: bool) -> dict[str, str]:
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        found = {}
        for disk in ET.fromstring(self.domain.XMLDesc(flags)).iterfind(".//disk"):
            target, source = disk.find("target"), disk.find("source")
            if target is not None and source is not None:
                found[target.get("dev", "")] = source.get("file", "")
        return found


def remove(paths: Moment) -> None:
    """Delete a moment that nothing is compared with any more."""
    for path in paths.values():
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
