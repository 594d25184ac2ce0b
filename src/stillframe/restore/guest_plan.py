"""What restoring a whole guest is going to make, and all that is in the way, before anything is made."""

from __future__ import annotations

import difflib
import os
import random
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import libvirt

from stillframe.errors import (
    DefinitionMissing,
    DestinationUnwritable,
    GuestExists,
    HostLacks,
    HypervisorError,
    SnapshotUnknown,
    TargetSmall,
)
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import all_domains
from stillframe.repository.manifest import DiskEntry, Manifest
from stillframe.restore.claim import Claim
from stillframe.restore.definition import (
    Identity,
    Place,
    block_disk,
    domain_for,
    file_disk,
    new_identity,
    same_identity,
    stored_definition,
)
from stillframe.restore.host_check import Finding, HostFacts, accept, host_facts, lacking
from stillframe.restore.machine_files import (
    MachineTarget,
    machine_targets,
    missing_folders,
    nvram_path,
    refuse_existing,
)
from stillframe.restore.target import Wishes, check_room, look, open_file_target
from stillframe.units import size_text

_IMAGES = "/var/lib/libvirt/images"
_DEFAULT_POOL = "default"
_ARGUMENTS = "<qemu:commandline>"
#: A warning; a guest that has them taken away again does not need it.
KEEPS_ARGUMENTS = ("the definition has arguments for QEMU itself (qemu:commandline): they are as they were, "
                   "whatever of the original they name")


@dataclass(frozen=True, slots=True)
class GuestWish:
    """What a user asked for.

    *pool* is a folder, a pool of libvirt, or "" for libvirt's default one. *devices* are block devices
    by target, *format* is "" for that of the original. *network*: see Place. *nearest* takes what the host
    has instead of what it lacks.
    """

    name: str
    pool: str = ""
    devices: Mapping[str, str] = field(default_factory=dict)
    format: str = ""
    force: bool = False
    keeps_identity: bool = False
    network: str | None = None
    nearest: bool = False


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """One disk, and what it is written to. *is_done*: a run that was killed has finished it."""

    entry: DiskEntry
    wishes: Wishes
    is_device: bool
    is_done: bool

    @property
    def needed_bytes(self) -> int:
        """How much room it takes that is not taken yet."""
        return 0 if self.is_device or self.is_done else self.entry.data_bytes


@dataclass(frozen=True, slots=True)
class GuestPlan:
    """All that will be made. *earlier* is what a killed restore to that name left."""

    claim: Claim
    earlier: Claim | None
    original: str
    definition: str
    disks: tuple[PlannedDisk, ...]
    files: tuple[MachineTarget, ...]
    findings: tuple[Finding, ...]
    lacking: tuple[Finding, ...]
    warnings: tuple[str, ...]

    @property
    def needed_bytes(self) -> int:
        """How much room what is not there yet takes."""
        return sum(disk.needed_bytes for disk in self.disks)

    def difference(self) -> str:
        """Return how the definition differs from the snapshot's, as a unified diff; without passwords."""
        old, new = (_shown(text).splitlines(keepends=True) for text in (self.original, self.definition))
        return "".join(difflib.unified_diff(old, new, "in the snapshot", "on this host"))

    def check(self, *, room: bool = True) -> None:
        """Raise what speaks against it; without *room*, its disks need not fit. Changes nothing.

        HostLacks, TargetExists, TargetSmall, TargetInUse, NotPermitted, DestinationUnwritable.
        """
        if self.lacking:
            raise _lacks(self.lacking)
        for disk in self.disks:
            if disk.is_device:
                look(disk.wishes)  # whether it may be overwritten comes first
                with open_file_target(disk.wishes, disk.entry.size_bytes, disk.entry.data_bytes):
                    pass  # a device is only opened: in use, mounted, too small
            elif not self._is_left(disk.wishes.path):
                refuse_existing(disk.wishes.path)
        for target in self.files:
            if not self._is_left(target.path):
                refuse_existing(target.path)
        if room:
            _check_room(self.disks)

    def _is_left(self, path: str) -> bool:
        return self.earlier is not None and self.earlier.finished(path)


def plan_guest(
    manifest: Manifest, wish: GuestWish, connection: Connection, earlier: Claim | None,
    chance: random.Random,
) -> GuestPlan:
    """Return the plan. Changes nothing.

    Raises DefinitionMissing, GuestExists, SnapshotUnknown, DestinationUnwritable, HypervisorError.
    """
    original = _definition(manifest)
    folder = pool_folder(connection, wish.pool)
    goes_on = earlier is not None and earlier.sid == manifest.sid
    identity = _identity(original, wish, connection, chance, earlier if goes_on else None)
    refuse_guest(connection, wish.name, identity.uuid)
    disks = tuple(_disks(manifest, wish, folder))
    place = Place(
        wish.name, identity, {disk.entry.target: (block_disk if disk.is_device else file_disk)(
            disk.wishes.path, disk.wishes.format) for disk in disks},
        network=wish.network, nvram=nvram_path(original, wish.name, folder),
        is_original=wish.keeps_identity and wish.name == manifest.guest)
    definition, findings, left = _fitted(original, place, host_facts(connection), nearest=wish.nearest)
    files = machine_targets(manifest, identity.uuid, place.nvram)
    folders = (*_missing_pool(folder, disks), *missing_folders(files))
    claim = Claim(
        name=wish.name, sid=manifest.sid, uuid=identity.uuid, macs=identity.macs,
        places={**{disk.entry.target: disk.wishes.path for disk in disks},
                **{target.entry.path: target.path for target in files}},
        formats={disk.entry.target: disk.wishes.format for disk in disks}, folders=folders)
    if earlier is not None and earlier.same_work(claim):
        disks = tuple(replace(disk, is_done=not disk.is_device and earlier.finished(disk.wishes.path))
                      for disk in disks)
    warnings = [*_left_out(original, definition), *_unreachable(folder, disks)]
    if _ARGUMENTS in definition and not place.is_original:
        warnings.append(KEEPS_ARGUMENTS)
    return GuestPlan(claim, earlier, original, definition, disks, files, tuple(findings), tuple(left),
                     tuple(warnings))


def pool_folder(connection: Connection, pool: str) -> str:
    """Return the folder that *pool* (a path, a pool's name, "" for the default) names.

    Raises DestinationUnwritable.
    """
    if "/" in pool:
        return str(Path(pool).absolute())
    try:
        text = connection.look(
            lambda connect: str(connect.storagePoolLookupByName(pool or _DEFAULT_POOL).XMLDesc(0)))
    except HypervisorError as error:
        if error.libvirt_code not in (libvirt.VIR_ERR_NO_STORAGE_POOL, libvirt.VIR_ERR_NO_SUPPORT):
            raise
        if not pool and Path(_IMAGES).is_dir():
            return _IMAGES
        raise DestinationUnwritable(
            f"libvirt has no storage pool {pool or _DEFAULT_POOL}.",
            "name a folder for the disks: --pool /PATH (for a folder here: --pool ./NAME)") from error
    root = ET.fromstring(text)
    if root.get("type") not in ("dir", "fs", "netfs"):
        raise DestinationUnwritable(
            f"The pool {pool} holds no files but {root.get('type')} volumes.",
            "make a volume for each disk and name it: --disk vda=/dev/…")
    return root.findtext("target/path", _IMAGES)


def refuse_guest(connection: Connection, name: str, uuid: str) -> None:
    """Raise GuestExists if libvirt knows a guest of that name or UUID."""
    for known in all_domains(connection):
        if known.name == name:
            raise GuestExists(f"There is a guest called {name} already (UUID {known.uuid}).",
                              "restore under another name: --as NAME")
        if known.uuid == uuid:
            raise GuestExists(f"The guest {known.name} has the UUID {uuid}.",
                              "leave --same-identity out: the restored guest gets a UUID of its own")


def _definition(manifest: Manifest) -> str:
    text = stored_definition(manifest.inactive_xml, manifest.live_xml)
    if not text:
        raise DefinitionMissing(
            f"The snapshot of {manifest.guest} has no definition: no libvirt ran the guest.",
            f"stillframe restore {manifest.sid[:12]} --to FOLDER/ --repo REPO   # its disks")
    return text


def _identity(
    original: str, wish: GuestWish, connection: Connection, chance: random.Random, earlier: Claim | None,
) -> Identity:
    if wish.keeps_identity:
        return same_identity(original)
    if earlier is not None and earlier.uuid != same_identity(original).uuid:
        return Identity(earlier.uuid, earlier.macs)
    taken = connection.look(lambda connect: "".join(each.XMLDesc(0) for each in connect.listAllDomains()))
    while True:
        identity = new_identity(original, chance)
        if not any(word in taken for word in (identity.uuid, *identity.macs)):
            return identity


def _disks(manifest: Manifest, wish: GuestWish, folder: str) -> Iterator[PlannedDisk]:
    known = {disk.target for disk in manifest.disks}
    for target in wish.devices:
        if target not in known:
            raise SnapshotUnknown(f"The snapshot has no disk {target}; it has {', '.join(sorted(known))}.",
                                  f"stillframe show {manifest.sid[:12]} --repo REPO")
    for disk in manifest.disks:
        device = wish.devices.get(disk.target)
        if device is not None:
            yield PlannedDisk(disk, Wishes(device, "raw", wish.force), is_device=True, is_done=False)
            continue
        image_format = wish.format or ("qcow2" if disk.format == "qcow2" else "raw")
        suffix = "qcow2" if image_format == "qcow2" else "img"
        path = os.path.join(folder, f"{wish.name}-{disk.target}.{suffix}")
        yield PlannedDisk(disk, Wishes(path, image_format), is_device=False, is_done=False)


def _fitted(
    original: str, place: Place, host: HostFacts, *, nearest: bool,
) -> tuple[str, list[Finding], list[Finding]]:
    """Return the definition, what the host lacks for it, and what of that stands in the way."""
    found = lacking(domain_for(original, place), host)
    place = accept(place, [each for each in found if nearest or not each.is_fatal])
    definition = domain_for(original, place)
    return definition, found, [each for each in lacking(definition, host) if each.is_fatal]


def _lacks(findings: Sequence[Finding]) -> HostLacks:
    message = ". ".join(f"{finding.text[0].upper()}{finding.text[1:]}" for finding in findings)
    kinds = {finding.what for finding in findings}
    if kinds & {"network", "bridge"} and not all(finding.nearest for finding in findings):
        advice = "name a network that is here: --network NET (virsh net-list --all), or none: --no-network"
    elif all(finding.nearest for finding in findings):
        advice = "run it again with --nearest to take what is here instead (--dry-run shows the definition)"
    else:
        advice = "install what is missing, or get the disks alone: stillframe restore SNAPSHOT --to FOLDER/"
    return HostLacks(f"{message}.", advice)


def _missing_pool(folder: str, disks: Iterable[PlannedDisk]) -> tuple[str, ...]:
    if all(disk.is_device for disk in disks) or Path(folder).is_dir():
        return ()
    if not Path(folder).parent.is_dir():
        raise DestinationUnwritable(f"The folder {Path(folder).parent} does not exist.", f"mkdir -p {folder}")
    return (folder,)


def _check_room(disks: Iterable[PlannedDisk]) -> None:
    """Raise TargetSmall if the folder of the disks has no room for all that are not there yet."""
    new = [disk for disk in disks if not (disk.is_device or disk.is_done)]
    needed = sum(disk.needed_bytes for disk in new)
    folder = os.path.dirname(new[0].wishes.path) if new else ""
    if folder:
        there = folder if os.path.isdir(folder) else os.path.dirname(folder)
        try:
            check_room(os.path.join(there, "disks"), needed)
        except TargetSmall as error:
            facts = os.statvfs(there)
            free = size_text(facts.f_bavail * facts.f_frsize)
            raise TargetSmall(
                f"{folder} is on a file system with {free} left; the guest's disks need {size_text(needed)}.",
                "choose another folder: --pool DIR") from error


def _left_out(original: str, definition: str) -> list[str]:
    old, new = ({target.get("dev", "") for target in ET.fromstring(text).iterfind("devices/disk/target")}
                for text in (original, definition))
    return [f"{target} is not in the snapshot: the guest is defined without it"
            for target in sorted(old - new)]


def _unreachable(folder: str, disks: Iterable[PlannedDisk]) -> list[str]:
    """Return a warning if QEMU's user can't get into the folder of the disks: libvirt opens none for it."""
    in_files = any(not disk.is_device for disk in disks)
    for place in (Path(folder), *Path(folder).parents) if in_files else ():
        if place.exists() and not place.stat().st_mode & 0o001:
            return [f"{place} lets only some users in: if QEMU's user is none of them, it can't start"]
    return []


def _shown(text: str) -> str:
    root = ET.fromstring(text)
    for element in root.iter():
        if "passwd" in element.attrib:
            element.set("passwd", "…")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"
