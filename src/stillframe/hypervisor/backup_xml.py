"""XML of backup jobs and checkpoints, out to libvirt and in again."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Container, Iterable, Mapping

from stillframe.hypervisor.domain_xml import read_domain_xml
from stillframe.hypervisor.model import Checkpoint, PulledDisk

_WORDS = "stillframe "


def pull_xml(socket: str, disks: Iterable[PulledDisk], others: Iterable[str]) -> str:
    """Return the XML of a backup job in pull mode, served on a unix socket; *others* are left out."""
    root = ET.Element("domainbackup", mode="pull")
    ET.SubElement(root, "server", transport="unix", socket=socket)
    listed = ET.SubElement(root, "disks")
    for disk in disks:
        mode: dict[str, str] = {"backupmode": "incremental", "incremental": disk.since} if disk.since else {
            "backupmode": "full"}
        # libvirt 9 refuses a disk without type=, and a block device without a scratch of its own.
        element = ET.SubElement(listed, "disk", name=disk.target, backup="yes", type="file")
        element.attrib.update(mode)
        ET.SubElement(element, "driver", type="qcow2")
        ET.SubElement(element, "scratch", file=disk.scratch)
    for target in others:
        ET.SubElement(listed, "disk", name=target, backup="no")
    return ET.tostring(root, encoding="unicode")


def checkpoint_xml(
    name: str, targets: Iterable[str], others: Iterable[str], about: Mapping[str, str]
) -> str:
    """Return the XML of a checkpoint with a bitmap on *targets*; *about* goes into its description."""
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "description").text = _WORDS + json.dumps(about, sort_keys=True)
    disks = ET.SubElement(root, "disks")
    for target in targets:
        ET.SubElement(disks, "disk", name=target, checkpoint="bitmap")
    for target in others:
        ET.SubElement(disks, "disk", name=target, checkpoint="no")
    return ET.tostring(root, encoding="unicode")


def read_checkpoint_xml(text: str) -> Checkpoint | None:
    """Return what *text* says, None if it is no checkpoint's XML."""
    try:
        root = ET.fromstring(text)
        domain = root.find("domain")
        if root.tag != "domaincheckpoint":
            return None
        disks = {} if domain is None else read_domain_xml(ET.tostring(domain, encoding="unicode")).disks
    except (ET.ParseError, ValueError):
        return None
    targets = tuple(
        disk.get("name", "") for disk in root.iterfind("./disks/disk") if disk.get("checkpoint") == "bitmap")
    return Checkpoint(
        root.findtext("name", ""), targets, {target: disk.top.key for target, disk in disks.items()},
        read_about(root.findtext("description", "")),
    )


def read_about(description: str) -> Mapping[str, str]:
    """Return what checkpoint_xml put into the description; empty if it is not from there."""
    try:
        found = json.loads(description.removeprefix(_WORDS))
    except ValueError:
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def redefinition(text: str, keep: Container[str], known: Container[str]) -> str:
    """Return checkpoint XML *text* for disks *keep* alone, without a parent that is not among *known*.

    Each checkpoint's bitmap records by itself, so a parent that is gone takes nothing with it.
    """
    root = ET.fromstring(text)
    parent = root.find("parent")
    if parent is not None and parent.findtext("name", "") not in known:
        root.remove(parent)
    disks = root.find("disks")
    for disk in [] if disks is None else list(disks):
        if disk.get("name") not in keep:
            for name in ("bitmap", "size"):
                disk.attrib.pop(name, None)
            disk.set("checkpoint", "no")
    return ET.tostring(root, encoding="unicode")


def job_socket(text: str) -> str:
    """Return the unix socket that the backup job with XML *text* serves on, "" if none."""
    server = ET.fromstring(text).find("server") if text else None
    return "" if server is None else server.get("socket", "")


def machine_of(text: str) -> tuple[str, str, str, str]:
    """Return emulator, architecture, machine and virtualization type of a domain's XML."""
    root = ET.fromstring(text)
    kind = root.find("os/type")
    attributes = kind.attrib if kind is not None else {}
    return (root.findtext("devices/emulator", ""), attributes.get("arch", ""), attributes.get("machine", ""),
            root.get("type", ""))


def tells_backup(text: str) -> bool:
    """Return whether libvirt's domain capabilities have backup jobs (with bitmaps: libvirt has no others)."""
    backup = ET.fromstring(text).find("features/backup")
    return backup is not None and backup.get("supported") == "yes"
