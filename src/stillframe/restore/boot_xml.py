"""The definition of a guest that runs from a snapshot: overlays of its own over served disks."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from xml.sax.saxutils import quoteattr

from stillframe.hypervisor.domain_xml import with_source
from stillframe.hypervisor.model import Disk, Source
from stillframe.restore.boot_decide import Stand
from stillframe.restore.boot_record import BootDisk

#: The attributes of a disk's driver that say what QEMU does about an I/O error.
_POLICIES = ("error_policy", "rerror_policy")
#: QEMU tries for so long to reach a server that died, before the guest notices. libvirt before 9.1
#: does not know it and drops it: the guest is paused, or gets errors, at once.
_RECONNECT_S = 30


def policies_of(text: str, target: str) -> dict[str, str]:
    """Return the error policies that a definition gives a disk."""
    driver = _disk(ET.fromstring(text), target).find("driver")
    found = {} if driver is None else driver.attrib
    return {name: found[name] for name in _POLICIES if name in found}


def with_snapshot(text: str, disks: Iterable[BootDisk]) -> str:
    """Return a definition with each disk on its overlay, with the snapshot's disk below."""
    for disk in disks:
        text = _on(text, disk, disk.overlay_path)
    return text


def with_policies(text: str, disks: Iterable[BootDisk], *, pauses: bool) -> str:
    """Return a definition that says what comes of I/O errors: the guest is paused, or gets them."""
    for disk in disks:
        text = _with_policies(text, disk.target, dict.fromkeys(_POLICIES, "stop" if pauses else "report"))
    return text


def kept_on_snapshot(text: str, disks: Iterable[BootDisk], running: Mapping[str, str]) -> str:
    """Return a definition that keeps naming the snapshot when QEMU has pulled all of it.

    *running* is what the live XML calls each overlay. At the end of a pull libvirt takes what was below from
    the definition, too, if that names the image by the same text; but by then QEMU has not written down
    what it pulled, and if it dies, the overlay alone lacks it (measured with QEMU 7.2). So the
    definition names it by another text.
    """
    for disk in disks:
        text = _on(text, disk, _otherwise(disk.overlay_path, running.get(disk.target, "")))
    return text


def on_image_alone(text: str, disks: Iterable[BootDisk]) -> str:
    """Return a definition with each disk on its own image and nothing below, and its own error policies."""
    for disk in disks:
        image = _file(disk.image_path, disk.image_format)
        text = with_source(_without_chain(text, disk.target), disk.target, image)
        text = _with_policies(text, disk.target, disk.policies)
    return text


def stand_of(disk: Disk | None, known: BootDisk) -> Stand:
    """Return what a disk of an XML stands on."""
    if disk is None:
        return Stand.NONE
    place = os.path.normpath(disk.top.place)
    if known.copy is not None and place == known.copy.path:
        return Stand.COPY
    if place != known.overlay_path:
        return Stand.OTHER
    served = any(source.socket == known.socket for source in disk.chain[1:])
    return Stand.SNAPSHOT if served else Stand.WHOLE


def _on(text: str, disk: BootDisk, path: str) -> str:
    return with_source(_without_chain(text, disk.target), disk.target, _file(path), served_source(disk))


def _file(path: str, image_format: str = "qcow2") -> Source:
    return Source("file", image_format, path, xml=f"<source file={quoteattr(path)}/>")


def served_source(disk: BootDisk) -> Source:
    """Return what is served for a disk, as a source for QEMU."""
    host = f"<host transport='unix' socket={quoteattr(disk.socket)}/><reconnect delay='{_RECONNECT_S}'/>"
    return Source(
        "network", "raw", "", protocol="nbd", socket=disk.socket, export=disk.target,
        xml=f"<source protocol='nbd' name={quoteattr(disk.target)}>{host}</source>")


def _otherwise(path: str, running: str) -> str:
    if running != path:
        return path
    folder, name = os.path.split(path)
    return f"{folder}/./{name}"


def _disk(root: ET.Element, target: str) -> ET.Element:
    for element in root.iterfind("./devices/disk"):
        found = element.find("target")
        if found is not None and found.get("dev") == target:
            return element
    return ET.Element("disk")


def _without_chain(text: str, target: str) -> str:
    root = ET.fromstring(text)
    disk = _disk(root, target)
    for below in disk.findall("backingStore"):
        disk.remove(below)
    return ET.tostring(root, encoding="unicode")


def _with_policies(text: str, target: str, policies: Mapping[str, str]) -> str:
    root = ET.fromstring(text)
    driver = _disk(root, target).find("driver")
    if driver is not None:
        for name in _POLICIES:
            driver.attrib.pop(name, None)
        driver.attrib.update(policies)
    return ET.tostring(root, encoding="unicode")
