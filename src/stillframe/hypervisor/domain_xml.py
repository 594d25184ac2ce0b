"""Domain XML in and out: which disks there are, what their chains look like.

Live XML lists a running disk's whole chain as nested <backingStore> elements with
indexes; inactive XML usually names only the top.
"""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping

from stillframe.errors import NeedsAttention
from stillframe.hypervisor.model import Disk, DomainXml, ExcludedDisk, Mirror, Source

#: Parts of a source that older XML has beside it, in the disk. They go where the source goes.
_OF_SOURCE = ("auth", "encryption")
_UNSUPPORTED = "disks of type"
_CAPTURABLE_KINDS = ("file", "block", "network")


def read_domain_xml(text: str) -> DomainXml:
    """Return what *text*, a domain's XML from libvirt, says."""
    root = ET.fromstring(text)
    disks: dict[str, Disk] = {}
    bystanders: dict[str, Disk] = {}
    excluded: list[ExcludedDisk] = []
    for element in root.iterfind("./devices/disk"):
        reason = _why_excluded(element)
        if reason:
            unsupported = reason.startswith(_UNSUPPORTED)
            excluded.append(ExcludedDisk(_target(element), reason, unsupported))
            if element.find("source") is not None:
                bystanders[_target(element)] = _read_disk(element)
        else:
            disk = _read_disk(element)
            disks[disk.target] = disk
    return DomainXml(
        text=text,
        name=root.findtext("name", ""),
        uuid=root.findtext("uuid", ""),
        disks=disks,
        excluded=tuple(excluded),
        bystanders=bystanders,
        has_agent_channel=root.find(
            "./devices/channel/target[@name='org.qemu.guest_agent.0']"
        ) is not None,
    )


def nvram_file(domain: ET.Element) -> str | None:
    """Return the file with the firmware's variables, "" if libvirt chooses it; None if there are none."""
    nvram = domain.find("./os/nvram")
    if nvram is None:
        return None
    source = nvram.find("./source")
    return source.get("file", "") if source is not None else (nvram.text or "").strip()


def snapshot_xml(overlays: Mapping[str, str], others: Iterable[str]) -> str:
    """Return a disk-only snapshot's XML: *overlays* maps a target to its overlay's path.

    Every other disk of the domain must be in *others*: libvirt snapshots disks that are
    not listed, too.
    """
    root = ET.Element("domainsnapshot")
    disks = ET.SubElement(root, "disks")
    for target, path in overlays.items():
        disk = ET.SubElement(disks, "disk", name=target, snapshot="external", type="file")
        ET.SubElement(disk, "driver", type="qcow2")
        ET.SubElement(disk, "source", file=path)
    for target in others:
        ET.SubElement(disks, "disk", name=target, snapshot="no")
    return ET.tostring(root, encoding="unicode")


def copy_xml(path: str, image_format: str) -> str:
    """Return what a block copy is told of the file that it writes to."""
    disk = ET.Element("disk", type="file")
    ET.SubElement(disk, "driver", type=image_format)
    ET.SubElement(disk, "source", file=path)
    return ET.tostring(disk, encoding="unicode")


def with_source(domain_text: str, target: str, top: Source, below: Source | None = None) -> str:
    """Return *domain_text* (inactive XML) with disk *target* reading from *top*, which stands on *below*.

    Without *below*, what it stands on is what the XML has below it now, if anything; else its own header
    tells. Where an image there opens only for a user, the XML must: no header names libvirt's secret. What a
    person changed elsewhere in the XML meanwhile is kept. Raises NeedsAttention if the disk is not there.
    """
    root = ET.fromstring(domain_text)
    for element in root.iterfind("./devices/disk"):
        if _target(element) == target:
            _point_to(element, top, below)
            return ET.tostring(root, encoding="unicode")
    raise NeedsAttention(
        f"The domain's definition has no disk {target} any more.",
        f"virsh edit {root.findtext('name', '')}",
    )


def _point_to(element: ET.Element, top: Source, below: Source | None) -> None:
    beneath = _beneath(element, below or top)
    if below is not None:
        beneath = _backing_store(below, beneath)
    for name in ("source", "backingStore", *_OF_SOURCE):
        for child in element.findall(name):
            element.remove(child)
    element.set("type", top.kind)
    driver = element.find("driver")
    if driver is None:
        driver = ET.SubElement(element, "driver", name="qemu")
    driver.set("type", top.format)
    at = list(element).index(driver) + 1
    if beneath is not None:
        element.insert(at, beneath)
    element.insert(at, _source_element(top))


def _beneath(element: ET.Element, image: Source) -> ET.Element | None:
    """Return what the disk's XML has below *image*; None if it has nothing, or not that image."""
    wanted = _source(image.kind, image.format, _source_element(image), -1).key
    level: ET.Element | None = element
    for found in _chain(element):
        level = None if level is None else level.find("backingStore")
        if found.key == wanted:
            return level
    return None


def _backing_store(source: Source, beneath: ET.Element | None) -> ET.Element:
    element = ET.Element("backingStore", type=source.kind)
    ET.SubElement(element, "format", type=source.format)
    element.append(_source_element(source))
    if beneath is not None:
        element.append(beneath)
    return element


def _source_element(source: Source) -> ET.Element:
    element = ET.fromstring(source.xml)
    element.attrib.pop("index", None)
    return element


def _target(element: ET.Element) -> str:
    target = element.find("target")
    return "?" if target is None else target.get("dev", "?")


def _why_excluded(element: ET.Element) -> str:
    device = element.get("device", "disk")
    kind = element.get("type", "file")
    if device != "disk":
        return f"it is a {device}"
    for name in ("readonly", "shareable", "transient"):
        if element.find(name) is not None:
            return f"it is {name}"
    if element.find("source") is None:
        return "it has no image"
    if kind not in _CAPTURABLE_KINDS:
        return f"{_UNSUPPORTED} {kind} are not supported"
    return ""


def _read_disk(element: ET.Element) -> Disk:
    alias = element.find("alias")
    mirror, written = element.find("mirror"), element.find("mirror/source")
    return Disk(
        target=_target(element),
        alias="" if alias is None else alias.get("name", ""),
        chain=tuple(_chain(element)),
        mirror=None if mirror is None else Mirror(
            mirror.get("job", ""), mirror.get("ready", "") == "yes",
            "" if written is None else written.get("file", "")
        ),
        ends=_ends(element),
    )


def _ends(element: ET.Element) -> bool:
    """Return whether the last image named has an empty <backingStore>: none is below it."""
    below = element.find("backingStore")
    return below is not None and (below.find("source") is None or _ends(below))


def _chain(element: ET.Element) -> Iterable[Source]:
    driver = element.find("driver")
    image_format = "" if driver is None else driver.get("type", "")
    current: ET.Element | None = element
    while current is not None:
        source = current.find("source")
        if source is None:
            return
        # The top carries its index on <source>, the images below on <backingStore>.
        index = source.get("index") or current.get("index") or "-1"
        source = _whole_source(current, source)
        yield _source(current.get("type", "file"), image_format, source, int(index))
        current = current.find("backingStore")
        if current is not None:
            found = current.find("format")
            image_format = "" if found is None else found.get("type", "")


def _whole_source(holder: ET.Element, source: ET.Element) -> ET.Element:
    whole = copy.deepcopy(source)
    for name in _OF_SOURCE:
        part = holder.find(name)
        if part is not None:
            whole.append(part)
    return whole


def _source(kind: str, image_format: str, element: ET.Element, index: int) -> Source:
    text = ET.tostring(element, encoding="unicode").strip()
    image_format = image_format or "raw"
    if kind != "network":
        place = element.get("file") or element.get("dev") or ""
        return Source(kind, image_format, place, index, xml=text)
    found = element.findall("host")
    hosts = tuple((host.get("name", ""), int(host.get("port", "0"))) for host in found if host.get("name"))
    socket = next((host.get("socket", "") for host in found), "")
    protocol, export = element.get("protocol", ""), element.get("name", "")
    server, port = hosts[0] if hosts else ("", 0)
    auth, config = element.find("auth"), element.find("config")
    return Source(
        kind, image_format, f"{protocol}://{socket or f'{server}:{port}'}/{export}", index, protocol, hosts,
        socket, export, text, user="" if auth is None else auth.get("username", ""),
        conf="" if config is None else config.get("file", ""),
    )
