"""The definition of a guest that is drilled: what it needs to boot, and no way out of it.

Pure: text in, text out. Whatever reaches the host, the network, another guest or hardware goes. Its disks are
served copies whose writes are thrown away; an I/O error stops it, so that none passes unseen.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable

from stillframe.hypervisor.domain_xml import with_source
from stillframe.restore.boot_record import BootDisk
from stillframe.restore.boot_xml import served_source, with_policies

AGENT_CHANNEL = "org.qemu.guest_agent.0"
#: Devices that end outside of the guest.
_WAYS_OUT = ("hostdev", "filesystem", "redirdev", "redirfilter", "shmem", "smartcard", "vsock", "lease",
             "interface")
_QUIET_GRAPHICS = ("vnc", "spice")
_COMMAND_LINE = "{http://libvirt.org/schemas/domain/qemu/1.0}commandline"


def isolated(
    text: str, disks: Iterable[BootDisk], console: str, network: str,
) -> tuple[str, tuple[str, ...]]:
    """Return the definition for a drill, and what was left out of it, in words.

    Its disks are the served ones; its first serial port is written to the file *console*. Interfaces stay
    only where there is a *network*, which the caller knows to be isolated.
    """
    disks = tuple(disks)
    for disk in disks:
        text = with_source(text, disk.target, served_source(disk))
    root = ET.fromstring(with_policies(text, disks, pauses=True))
    left_out = _close(root, keeps_interfaces=bool(network))
    _put_console(root, console)
    return ET.tostring(root, encoding="unicode"), left_out


def has_agent(text: str) -> bool:
    """Return whether a definition has a channel for the guest agent."""
    return ET.fromstring(text).find(f"devices/channel/target[@name='{AGENT_CHANNEL}']") is not None


def reaches_beyond(network: str) -> bool:
    """Return whether a network of libvirt, by its XML, leads anywhere but to its own guests and this host."""
    return ET.fromstring(network).find("forward") is not None


def _close(root: ET.Element, *, keeps_interfaces: bool) -> tuple[str, ...]:
    left_out = []
    devices = root.find("devices")
    for device in [] if devices is None else list(devices):
        if device.tag == "interface" and keeps_interfaces:
            continue
        passes_through = device.tag == "tpm" and device.find("backend[@type='passthrough']") is not None
        if device.tag in _WAYS_OUT or passes_through:
            assert devices is not None
            devices.remove(device)
            left_out.append(f"{device.tag} is left out: it leads out of the guest")
    for line in root.findall(_COMMAND_LINE):
        root.remove(line)
        left_out.append("QEMU's own arguments are left out: nobody knows what they reach")
    for graphics in root.iterfind("devices/graphics"):
        _hide(graphics)
    return tuple(dict.fromkeys(left_out))


def _hide(graphics: ET.Element) -> None:
    """Let a screen be reached through a socket in libvirt's own folder alone."""
    if graphics.get("type") not in _QUIET_GRAPHICS:
        return
    for name in ("listen", "port", "tlsPort", "websocket", "autoport", "socket"):
        graphics.attrib.pop(name, None)
    for listen in graphics.findall("listen"):
        graphics.remove(listen)
    graphics.insert(0, ET.Element("listen", type="socket"))


def _put_console(root: ET.Element, path: str) -> None:
    devices = root.find("devices")
    if devices is None:
        return
    serial = devices.find("serial")
    if serial is None:
        serial = ET.SubElement(devices, "serial")
        ET.SubElement(serial, "target", port="0")
    for console in devices.findall("console"):
        target = console.find("target")
        if target is None or target.get("type", "serial") == "serial":
            devices.remove(console)  # it is the first serial port once more, and libvirt adds it
    serial.attrib.clear()
    serial.set("type", "file")
    for name in ("source", "protocol", "log"):
        for child in serial.findall(name):
            serial.remove(child)
    serial.insert(0, ET.Element("source", path=path))
