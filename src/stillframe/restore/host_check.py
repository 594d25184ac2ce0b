"""What a host lacks that a guest's definition names, found before a byte is written, with the nearest choice.

`lacking` is pure: it compares the definition with what libvirt says of the host (`host_facts`). A finding
with a *nearest* can be accepted; one without is fatal, unless the guest starts without it.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import libvirt

from stillframe.errors import HypervisorError
from stillframe.hypervisor.backup_xml import machine_of
from stillframe.hypervisor.connection import Connection
from stillframe.restore.definition import Place, chardevs

_VERSION = re.compile(r"^(.*?)-(\d+)\.(\d+)(?:\.(\d+))?$")
_TERMINAL = "a terminal instead of that file"
_REMOVABLE = ("cdrom", "floppy")



@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the definition names and the host lacks.

    *what* is the kind ("machine", "cpu", "virt-type", "emulator", "architecture", "firmware", "file",
    "network", "bridge", "folder", "medium", "device"), *named* what the definition says, *nearest* what the
    host has instead ("" for nothing).
    """

    what: str
    named: str
    nearest: str = ""
    is_fatal: bool = True

    @property
    def text(self) -> str:
        """The finding as a person reads it."""
        instead = f"; the nearest here is {self.nearest}" if self.nearest else ""
        return f"this host has no {self.what} {self.named}{instead}"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What libvirt says of the host. *domain_capabilities* are by (emulator, arch, machine, virt type)."""

    capabilities: str
    networks: frozenset[str]
    exists: Callable[[str], bool]
    domain_capabilities: Callable[[str, str, str, str], str]


def host_facts(connection: Connection) -> HostFacts:
    """Return what *connection*'s host has. Raises HypervisorError."""
    def ask(emulator: str, arch: str, machine: str, virt_type: str) -> str:
        try:
            return connection.look(lambda connect: str(connect.getDomainCapabilities(
                emulator or None, arch or None, machine or None, virt_type or None)))
        except HypervisorError:
            return ""

    def networks(connect: libvirt.virConnect) -> frozenset[str]:
        return frozenset(network.name() for network in connect.listAllNetworks())

    capabilities = connection.look(lambda connect: str(connect.getCapabilities()))
    return HostFacts(capabilities, connection.look(networks), os.path.exists, ask)


def lacking(definition: str, host: HostFacts) -> list[Finding]:
    """Return what the host lacks for a guest of that *definition*, which is made over for it already."""
    root = ET.fromstring(definition)
    found = list(_machine(definition, host))
    if any(finding.what == "architecture" for finding in found):
        return found  # nothing else can be told
    found += _firmware(root, host)
    found += _files(root, host)
    found += _networks(root, host)
    return found


def accept(place: Place, findings: list[Finding]) -> Place:
    """Return *place* with the nearest choice for each of the findings that has one."""
    nearest = {finding.what: finding.nearest for finding in findings if finding.nearest}
    unwritable = tuple(finding.named for finding in findings if finding.what == "folder")
    ejected = tuple(finding.named for finding in findings if finding.what == "medium")
    files = {finding.named: finding.nearest for finding in findings
             if finding.what == "firmware" and finding.nearest}
    return replace(
        place, machine=nearest.get("machine", place.machine),
        virt_type=nearest.get("virt-type", place.virt_type), emulator=nearest.get("emulator", place.emulator),
        cpu_mode=nearest.get("cpu", place.cpu_mode),
        network=nearest.get("network", nearest.get("bridge", place.network)),
        ejected=(*place.ejected, *ejected),
        unwritable=(*place.unwritable, *unwritable), files={**place.files, **files})


def _machine(definition: str, host: HostFacts) -> Iterator[Finding]:
    emulator, arch, machine, virt_type = machine_of(definition)
    capabilities = ET.fromstring(host.capabilities)
    guest = next((each for each in capabilities.iterfind("guest/arch") if each.get("name") == arch), None)
    if guest is None:
        here = ", ".join(sorted({each.get("name", "") for each in capabilities.iterfind("guest/arch")}))
        yield Finding("architecture", f"{arch} (it has {here})")
        return
    kinds = {each.get("type", ""): each for each in guest.iterfind("domain")}
    if virt_type not in kinds:
        nearest = "kvm" if "kvm" in kinds else "qemu" if "qemu" in kinds else ""
        yield Finding("virt-type", virt_type, nearest)
        virt_type = nearest
    if emulator and not host.exists(emulator):
        nearest = guest.findtext("emulator", "")
        yield Finding("emulator", emulator, nearest)
        emulator = nearest
    machines = _machines(guest, kinds.get(virt_type))
    if machine and machine not in machines:
        nearest = _nearest_machine(machine, machines)
        yield Finding("machine", machine, nearest)
        machine = nearest
    yield from _cpu(definition, host.domain_capabilities(emulator, arch, machine, virt_type))


def _machines(guest: ET.Element, kind: ET.Element | None) -> list[str]:
    own = [] if kind is None else [each.text or "" for each in kind.iterfind("machine")]
    return [*own, *(each.text or "" for each in guest.iterfind("machine"))]


def _nearest_machine(wanted: str, machines: list[str]) -> str:
    """Return the newest machine of the same kind: pc-q35-7.2 for pc-q35-9.1."""
    found = _VERSION.match(wanted)
    kind = found[1] if found else wanted
    alike = [match for match in map(_VERSION.match, machines) if match and match[1] == kind]
    if alike:
        return max(alike, key=lambda match: tuple(int(part or 0) for part in match.groups()[1:]))[0]
    return next((short for short in (kind.removeprefix("pc-"), "q35", "pc", "virt") if short in machines), "")


def _cpu(definition: str, text: str) -> Iterator[Finding]:
    cpu = ET.fromstring(definition).find("cpu")
    if cpu is None or not text:
        return
    modes = {mode.get("name", ""): mode for mode in ET.fromstring(text).iterfind("cpu/mode")
             if mode.get("supported") == "yes"}
    nearest = next((mode for mode in ("host-model", "maximum") if mode in modes), "")
    mode = cpu.get("mode", "custom")
    if mode != "custom":
        if mode not in modes:
            yield Finding("cpu", mode, nearest)
        return
    model = cpu.findtext("model", "")
    custom = modes.get("custom")
    if not model or custom is None:
        return
    usable = {each.text: each.get("usable") for each in custom.iterfind("model")}
    if model not in usable:
        yield Finding("cpu", model, nearest)


def _firmware(root: ET.Element, host: HostFacts) -> Iterator[Finding]:
    system = root.find("os")
    if system is None:
        return
    emulator, arch, _, _ = machine_of(ET.tostring(root, encoding="unicode"))
    text = host.domain_capabilities(emulator if host.exists(emulator) else "", arch, "", "")
    here = ET.fromstring(text) if text else None
    loaders = [] if here is None else [each.text or "" for each in here.iterfind("os/loader/value")]
    wanted = system.get("firmware")
    if wanted and here is not None and wanted not in [
            value.text for value in here.iterfind("os/enum[@name='firmware']/value")]:
        yield Finding("firmware", wanted)
    loader = system.findtext("loader", "")
    if loader and not wanted and not host.exists(loader):
        yield Finding("firmware", loader, loaders[0] if loaders else "")


def _files(root: ET.Element, host: HostFacts) -> Iterator[Finding]:
    for name in ("kernel", "initrd", "dtb"):
        path = root.findtext(f"os/{name}", "")
        if path and not host.exists(path):
            yield Finding("file", path)
    for disk in root.iterfind("devices/disk"):
        source, target = disk.find("source"), disk.find("target")
        if source is None or target is None or disk.get("device") not in _REMOVABLE:
            continue
        path = source.get("file") or source.get("dev") or ""
        if not path or not host.exists(path):
            yield Finding("medium", target.get("dev", ""), is_fatal=False)
    for device in chardevs(root):
        source = device.find("source")
        path = "" if source is None else source.get("path", "")
        if device.get("type") == "file" and not host.exists(os.path.dirname(path)):
            yield Finding("folder", path, _TERMINAL, is_fatal=False)
    for device in root.iterfind("devices/hostdev"):
        yield Finding("device", f"of {device.get('type', '?')} that is handed through", is_fatal=False)


def _networks(root: ET.Element, host: HostFacts) -> Iterator[Finding]:
    nearest = "default" if "default" in host.networks else next(iter(sorted(host.networks)), "")
    for interface in root.iterfind("devices/interface"):
        source = interface.find("source")
        kind = interface.get("type", "")
        if source is None:
            continue
        network, bridge = source.get("network", ""), source.get("bridge", "")
        if kind == "network" and network not in host.networks:
            yield Finding("network", network, nearest)
        elif kind == "bridge" and not host.exists(f"/sys/class/net/{bridge}"):
            yield Finding("bridge", bridge, nearest)
