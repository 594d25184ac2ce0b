"""A guest without an operating system that was booted from a snapshot: the test writes to its disks.

It has the definition of the guest that the snapshot is of, and so that guest's side monitor: the two can't
run at the same time.
"""

from __future__ import annotations

import contextlib
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import libvirt

from lab.daemons import LibvirtDaemons
from lab.diskguest import LOG_DIR, disk_devices
from lab.images import Model, to_raw
from lab.monitor import SideMonitor
from lab.written import WrittenDisks


class BootedGuest(WrittenDisks):
    """The guest *name*, booted from a snapshot of *origin* whose disks held *moment*."""

    def __init__(
        self, daemons: LibvirtDaemons, name: str, origin: str, moment: Mapping[str, Path], folder: Path,
    ) -> None:
        super().__init__(LOG_DIR / f"{name}.log")
        self.daemons = daemons
        self.name = name
        self.folder = folder
        self.monitor = SideMonitor(origin)
        self._models: dict[str, Model] = {}
        for target, raw in moment.items():
            copy = folder / f"{name}-{target}.model"
            shutil.copy(raw, copy)
            self._models[target] = Model(copy)

    def targets(self) -> list[str]:
        """See WrittenDisks."""
        return list(self._models)

    def model(self, target: str = "vda") -> Model:
        """See WrittenDisks."""
        return self._models[target]

    def domain(self) -> libvirt.virDomain:
        """Return the domain over a new connection."""
        return self.daemons.connect().lookupByName(self.name)

    def is_defined(self) -> bool:
        """Return whether libvirt has it."""
        with contextlib.suppress(libvirt.libvirtError):
            return bool(self.domain().name())
        return False

    def running(self) -> bool:
        """See WrittenDisks."""
        return self.is_defined() and bool(self.domain().isActive())

    def device(self, target: str) -> str:
        """See WrittenDisks."""
        return disk_devices(self.domain())[target]

    def disk_xml(self, target: str, *, inactive: bool = False) -> ET.Element:
        """Return what the live XML, or the inactive one, says of a disk."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        disk = ET.fromstring(self.domain().XMLDesc(flags)).find(f".//disk/target[@dev='{target}']/..")
        assert disk is not None
        return disk

    def image(self, target: str) -> Path:
        """Return the image that the definition names."""
        source = self.disk_xml(target, inactive=True).find("source")
        assert source is not None
        return Path(source.get("file", ""))

    def read_disk(self, target: str, to: Path | None = None) -> Path:
        """See WrittenDisks. What is below the image is found by the image's own header."""
        raw = to or self.folder / f"{self.name}-{target}.read.raw"
        driver = self.disk_xml(target, inactive=True).find("driver")
        assert driver is not None
        return to_raw(self.image(target), driver.get("type", ""), raw, shared=self.running())
