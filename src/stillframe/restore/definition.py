"""A domain's definition made over for another place: what a restored guest is defined by.

Pure: text in, text out. What belongs to the guest stays as it is, down to the PCI addresses (a guest that
finds its network card elsewhere configures it anew). What belonged to the old host or to one run of the guest
goes: its images and their chains, sockets, log files, ports, labels. Whatever two guests can't have at a time
is new, unless the guest is the original.
"""

from __future__ import annotations

import random
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", _QEMU_NAMESPACE)

_MAC_PREFIX = (0x52, 0x54, 0x00)  # QEMU's own
#: Of a disk: where it was on the old host, and what one run of the guest had of it.
_OF_OLD_IMAGE = ("source", "backingStore", "mirror", "auth", "encryption", "alias")
#: Character devices that end outside the guest, where another guest may sit.
_SHARED_CHARDEVS = ("file", "unix", "tcp", "udp", "dev", "pipe")
_BOOT_FILES = ("kernel", "initrd", "dtb", "loader")
_USER_ALIAS = "ua-"
_RUN_CHANNELS = ("/var/lib/libvirt/qemu/channel/", "/run/libvirt/qemu/channel/")
_RUN_TAP = "vnet"


@dataclass(frozen=True, slots=True)
class NewDisk:
    """What a disk reads from. *source* is the text of a <source>, *backing* that of a <backingStore>."""

    kind: str
    image_format: str
    source: str
    backing: str = "<backingStore/>"


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a guest from others. *macs* are in the order of its interfaces."""

    uuid: str
    macs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a guest is to live.

    *disks* are by target; a disk that is not among them leaves the definition, unless it is removable: then
    its medium stays, but for those in *ejected*. *network*: None as it was, "" no interface at all, else the
    network of libvirt that all are on. *nvram* is the file with the firmware's variables. *files* maps boot
    files (kernel, initrd, dtb, loader) of the old host to those of this one. *is_original*: the guest is
    itself, not beside itself, and keeps what two guests can't share, but for character devices that write to
    one of *unwritable*. The rest is what this host has instead, "" for as it was.
    """

    name: str
    identity: Identity
    disks: Mapping[str, NewDisk]
    ejected: tuple[str, ...] = ()
    network: str | None = None
    nvram: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    is_original: bool = False
    unwritable: tuple[str, ...] = ()
    machine: str = ""
    virt_type: str = ""
    emulator: str = ""
    cpu_mode: str = ""


def file_disk(path: str, image_format: str) -> NewDisk:
    """Return a disk in a file."""
    return NewDisk("file", image_format, _text(ET.Element("source", file=path)))


def block_disk(path: str, image_format: str = "raw") -> NewDisk:
    """Return a disk on a block device."""
    return NewDisk("block", image_format, _text(ET.Element("source", dev=path)))


def stored_definition(inactive: str, live: str) -> str:
    """Return what defines the guest of a snapshot that has these definitions, "" if it has none."""
    if not (inactive and live):
        return inactive or live
    # libvirt decides at the start where a guest's NVRAM is, if the definition does not.
    root, nvram = ET.fromstring(inactive), ET.fromstring(live).find("os/nvram")
    mine = root.find("os")
    if nvram is None or mine is None or mine.find("nvram") is not None:
        return inactive
    mine.append(nvram)
    return _text(root)


def same_identity(xml_text: str) -> Identity:
    """Return the identity that the definition has."""
    root = ET.fromstring(xml_text)
    return Identity(root.findtext("uuid", ""), tuple(mac.get("address", "") for mac in _macs(root)))


def new_identity(xml_text: str, chance: random.Random) -> Identity:
    """Return an identity that no guest has, for the guest of that definition."""
    count = sum(1 for _ in _macs(ET.fromstring(xml_text)))
    numbers = ((*_MAC_PREFIX, *chance.randbytes(3)) for _ in range(count))
    return Identity(str(uuid.UUID(int=chance.getrandbits(128), version=4)),
                    tuple(":".join(f"{number:02x}" for number in mac) for mac in numbers))


def domain_for(xml_text: str, place: Place) -> str:
    """Return the definition for *place* of the guest that *xml_text* (live or inactive) describes."""
    root = ET.fromstring(xml_text)
    root.attrib.pop("id", None)
    _name(root, place)
    _clean(root)
    _put_disks(root, place)
    _put_firmware(root, place)
    _connect(root, place)
    if not place.is_original:
        _part_from_original(root)
    for device in chardevs(root):
        source = device.find("source")
        if source is not None and source.get("path") in place.unwritable:
            _to_terminal(device)
    _adapt(root, place)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _name(root: ET.Element, place: Place) -> None:
    old_uuid = root.findtext("uuid", "")
    _set_text(root, "name", place.name)
    _set_text(root, "uuid", place.identity.uuid)
    for entry in root.iterfind("sysinfo/system/entry[@name='uuid']"):
        if entry.text == old_uuid:
            entry.text = place.identity.uuid
    genid = root.find("genid")
    if genid is not None:
        genid.text = ""  # a guest that goes back in time must notice: libvirt makes another one
    for mac, address in zip(_macs(root), place.identity.macs, strict=False):
        mac.set("address", address)


def _clean(root: ET.Element) -> None:
    """Remove what one run of the guest, or libvirt for it, has put there."""
    for label in root.findall("seclabel"):
        if label.get("type", "dynamic") == "dynamic":
            root.remove(label)
    for holder in root.iter():
        for alias in holder.findall("alias"):
            if not alias.get("name", "").startswith(_USER_ALIAS):
                holder.remove(alias)
    for interface in root.iterfind("devices/interface"):
        _clean_interface(interface)
    for channel in root.iterfind("devices/channel[@type='unix']"):
        source = channel.find("source")
        if source is not None and source.get("path", "").startswith(_RUN_CHANNELS):
            channel.remove(source)  # libvirt makes the path of the guest's name, or of its number
        for target in channel.findall("target"):
            target.attrib.pop("state", None)
    for device in root.findall("devices/*[@type='pty']"):
        _drop(device, "source")
        device.attrib.pop("tty", None)


def _clean_interface(interface: ET.Element) -> None:
    tap, source = interface.find("target"), interface.find("source")
    if tap is not None and tap.get("dev", "").startswith(_RUN_TAP):
        interface.remove(tap)
    if source is not None and interface.get("type") == "network":
        for name in ("bridge", "portid"):
            source.attrib.pop(name, None)


def _put_disks(root: ET.Element, place: Place) -> None:
    devices = root.find("devices")
    for disk in [] if devices is None else list(devices.findall("disk")):
        target = _target(disk)
        if target in place.disks:
            _point(disk, place.disks[target])
        elif disk.get("device", "disk") == "disk" or disk.get("device") == "lun":
            assert devices is not None
            devices.remove(disk)  # else the copy and the original would write to one image
        elif target in place.ejected:
            for name in _OF_OLD_IMAGE:
                _drop(disk, name)


def _point(disk: ET.Element, new: NewDisk) -> None:
    for name in _OF_OLD_IMAGE:
        _drop(disk, name)
    disk.set("type", new.kind)
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver", name="qemu")
        disk.insert(0, driver)
    driver.set("type", new.image_format)
    at = list(disk).index(driver) + 1
    disk.insert(at, ET.fromstring(new.source))
    if new.backing:
        disk.insert(at + 1, ET.fromstring(new.backing))


def _put_firmware(root: ET.Element, place: Place) -> None:
    nvram = root.find("os/nvram")
    if nvram is not None and place.nvram:
        for source in nvram.findall("source"):
            nvram.remove(source)
        nvram.attrib.pop("type", None)
        nvram.text = place.nvram
    for name in _BOOT_FILES:
        for element in root.iterfind(f"os/{name}"):
            element.text = place.files.get(element.text or "", element.text)


def _connect(root: ET.Element, place: Place) -> None:
    devices = root.find("devices")
    if devices is None or place.network is None:
        return
    for interface in list(devices.findall("interface")):
        if not place.network:
            devices.remove(interface)
            continue
        interface.set("type", "network")
        for name in ("source", "virtualport", "portForward", "backend"):
            _drop(interface, name)
        interface.insert(0, ET.Element("source", network=place.network))


def _part_from_original(root: ET.Element) -> None:
    """Take from the guest what the original has, too, and only one can have."""
    for channel in root.iterfind("devices/channel"):
        _drop(channel, "log")
        if channel.get("type") == "unix":
            _drop(channel, "source")  # one socket can't be both guests'
    for device in chardevs(root):
        _drop(device, "log")
        if device.get("type") in _SHARED_CHARDEVS:
            _to_terminal(device)
    for graphics in root.iterfind("devices/graphics"):
        for name in ("port", "tlsPort", "websocket", "socket"):
            graphics.attrib.pop(name, None)
        if graphics.get("type") in ("vnc", "spice"):
            graphics.set("autoport", "yes")
        for listen in graphics.findall("listen[@type='socket']"):
            listen.attrib.pop("socket", None)
    for interface in root.iterfind("devices/interface"):
        tap = interface.find("target")
        if tap is not None:
            tap.attrib.pop("dev", None)


def _adapt(root: ET.Element, place: Place) -> None:
    """Put in what this host has instead of what it lacks."""
    kind = root.find("os/type")
    if kind is not None and place.machine:
        kind.set("machine", place.machine)
    if place.virt_type:
        root.set("type", place.virt_type)
    if place.emulator:
        for emulator in root.iterfind("devices/emulator"):
            emulator.text = place.emulator
    if place.cpu_mode:
        old = root.find("cpu")
        new = ET.Element("cpu", mode=place.cpu_mode)
        if old is not None:
            new.extend([child for child in old if child.tag in ("topology", "numa")])
            root.insert(list(root).index(old), new)
            root.remove(old)
        else:
            root.append(new)


def chardevs(root: ET.Element) -> Iterator[ET.Element]:
    """Yield the character devices that a guest has for people."""
    for kind in ("serial", "console", "parallel"):
        yield from root.iterfind(f"devices/{kind}")


def _to_terminal(device: ET.Element) -> None:
    """Let a character device end in a terminal of this host, where anybody may look, or nobody."""
    for name in ("source", "protocol"):
        _drop(device, name)
    device.set("type", "pty")


def _macs(root: ET.Element) -> Iterator[ET.Element]:
    for interface in root.iterfind("devices/interface"):
        mac = interface.find("mac")
        if mac is not None:
            yield mac


def _target(disk: ET.Element) -> str:
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")


def _drop(parent: ET.Element, name: str) -> None:
    for child in parent.findall(name):
        parent.remove(child)


def _set_text(root: ET.Element, name: str, text: str) -> None:
    element = root.find(name)
    if element is None:
        element = ET.Element(name)
        root.insert(0, element)
    element.text = text


def _text(element: ET.Element) -> str:
    return ET.tostring(element, encoding="unicode")
