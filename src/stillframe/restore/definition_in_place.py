"""The snapshot's definition, made over for the guest that is restored in place. Pure: text in, text out.

The guest keeps what tells it from others, and where its images and its NVRAM are. One that is not the
snapshot's own also keeps its network addresses, and gets nothing that only one of both can have.
"""

from __future__ import annotations

import copy
import os
import random
import xml.etree.ElementTree as ET

from stillframe.hypervisor.domain_xml import nvram_file, read_domain_xml, with_source
from stillframe.hypervisor.model import DomainXml
from stillframe.repository.manifest import Manifest
from stillframe.restore.definition import (
    Identity,
    NewDisk,
    Place,
    domain_for,
    new_identity,
    same_identity,
    stored_definition,
)
from stillframe.restore.machine_files import nvram_path

#: Where libvirt has images if it is not told.
_IMAGES = "/var/lib/libvirt/images"


def definition_in_place(manifest: Manifest, now: DomainXml, chance: random.Random) -> str:
    """Return the snapshot's definition for the guest that is defined as *now*, "" if it has none."""
    text = stored_definition(manifest.inactive_xml, manifest.live_xml)
    if not text:
        return ""
    text = _named(text, now.name) if now.uuid == manifest.uuid else _for_other(text, now, chance)
    for target in read_domain_xml(text).disks.keys() & now.disks.keys():
        text = with_source(text, target, now.disks[target].top)
    return _with_nvram_of(text, now.text)


def _named(text: str, name: str) -> str:
    root = ET.fromstring(text)
    for element in root.iterfind("name"):
        element.text = name
    return ET.tostring(root, encoding="unicode")


def _for_other(text: str, now: DomainXml, chance: random.Random) -> str:
    own, fresh = same_identity(now.text).macs, new_identity(text, chance).macs
    folders = (os.path.dirname(disk.top.place) for disk in now.disks.values() if disk.top.kind == "file")
    return domain_for(text, Place(
        now.name, Identity(now.uuid, (*own[:len(fresh)], *fresh[len(own):])),
        {target: NewDisk(disk.top.kind, disk.top.format, disk.top.xml, "")
         for target, disk in now.disks.items()},
        nvram=nvram_path(text, now.name, next(folders, _IMAGES))))


def _with_nvram_of(text: str, own_text: str) -> str:
    """Return *text* with its NVRAM where that of *own_text* is, if both have one."""
    root, own_root = ET.fromstring(text), ET.fromstring(own_text)
    nvram, own = root.find("os/nvram"), own_root.find("os/nvram")
    if nvram is None or own is None or nvram_file(own_root) == "":
        return text
    for source in nvram.findall("source"):
        nvram.remove(source)
    nvram.attrib.pop("type", None)
    nvram.text = own.text
    # Template and format are the content's, which is the snapshot's.
    nvram.attrib.update({"type": own.attrib["type"]} if "type" in own.attrib else {})
    nvram.extend(copy.deepcopy(source) for source in own.findall("source"))
    return ET.tostring(root, encoding="unicode")
