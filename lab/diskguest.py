"""A guest without an operating system: the test itself writes to its disks, through QEMU.

Nothing in it writes on its own, so a model of what each disk holds can be exact: every write
is applied to the disk and then, once QEMU reported it done, to the model.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import libvirt

from lab.daemons import LibvirtDaemons
from lab.disks import Disk, DiskSpec
from lab.guest import Guest
from lab.written import WrittenDisks

LOG_DIR = Path("/var/log/libvirt/qemu")


class DiskGuest(Guest, WrittenDisks):
    """A domain of 32 MiB whose disks are written to by `write`, `write_zeroes` and `discard`.

    `devices` is XML put among the devices as it is (a cdrom, a transient disk).
    """

    def __init__(
        self, daemons: LibvirtDaemons, folder: Path, name: str, disks: Sequence[DiskSpec] = (DiskSpec(),),
        *, devices: str = "", transient: bool = False, memory_mib: int = 32,
        io_thread: bool = False,
    ) -> None:
        Guest.__init__(self, daemons, folder, name, transient=transient)
        WrittenDisks.__init__(self, LOG_DIR / f"{name}.log")
        self._devices = devices
        self._memory_mib = memory_mib
        self._io_thread = io_thread
        self._aliases: dict[str, str] = {}
        for spec in disks:
            self.disks[spec.target] = Disk(spec, self.folder, name)

    def xml(self) -> str:
        """See Guest."""
        disks = "".join(disk.xml() for disk in self.disks.values())
        if self._io_thread:
            disks = disks.replace("<driver name='qemu'", "<driver name='qemu' iothread='1'")
        return (
            f"<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
            f"<name>{self.name}</name><memory unit='MiB'>{self._memory_mib}</memory><vcpu>1</vcpu>"
            f"{'<iothreads>1</iothreads>' if self._io_thread else ''}"
            f"<os><type arch='x86_64' machine='q35'>hvm</type></os>"
            f"<cpu mode='custom'><model>qemu64</model></cpu><on_crash>destroy</on_crash>"
            f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>"
            f"<controller type='usb' model='none'/><memballoon model='none'/>{disks}{self._devices}</devices>"
            f"{self.monitor.commandline_xml()}</domain>"
        )

    def start(self) -> None:
        """See Guest."""
        super().start()
        # Asked for now, because a write must be possible while libvirtd is dead or hangs.
        self._learn_aliases()

    def device(self, target: str) -> str:
        """See WrittenDisks."""
        if target not in self._aliases:
            self._learn_aliases()
        return self._aliases[target]

    def _learn_aliases(self) -> None:
        self._aliases |= disk_devices(self.domain())


def disk_devices(domain: libvirt.virDomain) -> dict[str, str]:
    """Return what QEMU calls the device of each disk of a running domain."""
    devices: dict[str, str] = {}
    for disk in ET.fromstring(domain.XMLDesc()).iterfind(".//disk"):
        name, alias = disk.find("target"), disk.find("alias")
        if name is not None and alias is not None:
            backend = "/virtio-backend" if name.get("bus") == "virtio" else ""
            devices[name.get("dev", "")] = f"/machine/peripheral/{alias.get('name')}{backend}"
    return devices
