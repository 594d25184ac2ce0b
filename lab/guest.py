"""What all test guests share: being defined, started, ended and removed without a trace."""

from __future__ import annotations

import contextlib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Self

import libvirt

from lab.daemons import UNDEFINE_WHOLLY, LibvirtDaemons
from lab.disks import Disk, remove_folder
from lab.images import to_raw
from lab.monitor import SideMonitor


class Guest:
    """A domain with its disks in a folder of its own."""

    def __init__(self, daemons: LibvirtDaemons, folder: Path, name: str, *, transient: bool = False) -> None:
        self.daemons = daemons
        self.name = name
        self.folder = folder / name
        self.folder.mkdir(mode=0o755)
        self.transient = transient
        self.disks: dict[str, Disk] = {}
        self.monitor = SideMonitor(name)
        self._reads = 0

    def xml(self) -> str:
        """Return the domain's definition as the lab made it."""
        raise NotImplementedError

    def domain(self) -> libvirt.virDomain:
        """Return the domain over a new connection, so that a killed libvirtd does not matter."""
        return self.daemons.connect().lookupByName(self.name)

    def define(self) -> None:
        """Define the domain (a transient one is made by start)."""
        if not self.transient:
            self.daemons.connect().defineXML(self.xml())

    def start(self) -> None:
        """Start the guest."""
        if self.transient:
            self.daemons.connect().createXML(self.xml())
        else:
            self.domain().create()

    def running(self) -> bool:
        """Return whether libvirt says that the guest is active."""
        try:
            return bool(self.domain().isActive())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return False
            raise

    def destroy(self) -> None:
        """End the guest the hard way, as libvirt does it (QEMU gets SIGTERM and closes its images)."""
        if self.running():
            self.domain().destroy()

    def remove(self) -> None:
        """End the guest and delete everything that belongs to it; never raises for what is gone."""
        self.daemons.start()
        self.daemons.kill_qemu(self.name)
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().destroy()
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().undefineFlags(UNDEFINE_WHOLLY)
        for disk in self.disks.values():
            disk.remove()
        remove_folder(self.folder)

    def read_disk(self, target: str, to: Path | None = None) -> Path:
        """Write what *target* holds to a raw file and return its path.

        It is read through the image that the domain's XML names now, overlays and chain included;
        on a running guest the content may be in motion.
        """
        self._reads += 1
        live = self.running()
        source, image_format = self.disk_source(target)
        raw = to or self.folder / f"{target}.read-{self._reads}.raw"
        if source.startswith("/"):
            source = self.disks[target].opened_at(source)
        return to_raw(source, image_format, raw, shared=live)

    def disk_source(self, target: str, *, inactive: bool = False) -> tuple[str, str]:
        """Return (path or NBD address, format) that the live XML, or the inactive one, names."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        disk = ET.fromstring(self.domain().XMLDesc(flags)).find(f".//disk/target[@dev='{target}']/..")
        assert disk is not None, f"{self.name} has no disk {target}"
        source, driver = disk.find("source"), disk.find("driver")
        assert source is not None
        assert driver is not None
        path = source.get("file") or source.get("dev") or self.disks[target].address
        return path, driver.get("type", "raw")

    def __enter__(self) -> Self:
        """Define and start the guest for the length of a block."""
        self.define()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the guest."""
        self.remove()
