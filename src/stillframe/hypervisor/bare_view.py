"""What a QEMU without libvirt says of itself, read into the same plain data as libvirt's XML.

A disk is named by what its owner called it: the ID of its device, else that of its drive, else the name of
the uppermost node of its chain that was given one (an overlay that is put on must not rename the disk).
"""

from __future__ import annotations

import os
import re
import stat
import uuid as uuids
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stillframe.errors import GuestUnfit
from stillframe.hypervisor.model import (
    ACTIVE_COMMIT,
    OVERLAY_SUFFIX,
    OWN_COMMIT,
    BlockJob,
    Disk,
    DomainXml,
    ExcludedDisk,
    Mirror,
    Power,
    QemuJob,
    QemuNode,
    Source,
)
from stillframe.hypervisor.monitor import format_node, options_in, plain_file

#: What the names of all nodes, exports and jobs begin with that stillframe makes in QEMU.
OURS = "stillframe-"
_PERIPHERAL = "/machine/peripheral/"
_FLASH = "/machine/system.flash"
#: QEMU's names for nodes that nobody named.
_NAMELESS = "#"
#: A commit in one of these is a job on its disk; one that is over waits to be dismissed, and is none.
_AT_WORK = ("created", "running", "paused", "ready", "standby")
_OVER = "concluded"
_KIND_ACTIVE_COMMIT = 4
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")

Device = Mapping[str, Any]


def power_of(status: str) -> Power:
    """Return what query-status's *status* comes to: QEMU is there, whatever it is."""
    if status == "running":
        return Power.RUNNING
    return Power.PAUSED_ON_IO_ERROR if status == "io-error" else Power.PAUSED


def guest_devices(devices: Sequence[Device], nodes: tuple[QemuNode, ...]) -> dict[str, Device]:
    """Return the devices that the guest has, by the target that each is called."""
    found: dict[str, Device] = {}
    for device in devices:
        if not device.get("qdev"):
            continue  # a drive that no device of the guest's uses
        target = _target(device, nodes)
        if target in found:
            raise GuestUnfit(
                f"Two disks of the guest go by the name {target!r}.",
                "give each an ID of its own on QEMU's command line (-device …,id=NAME)")
        found[target] = device
    return dict(sorted(found.items()))  # QEMU lists those with a drive's ID first


def _target(device: Device, nodes: tuple[QemuNode, ...]) -> str:
    qdev = str(device["qdev"])
    if qdev.startswith(_PERIPHERAL):
        return qdev.removeprefix(_PERIPHERAL).split("/")[0]
    if device.get("device"):
        return str(device["device"])
    inserted = device.get("inserted", {})
    names = [str(inserted.get("node-name", "")), *_names_beneath(inserted, nodes)]
    for name in names:
        if name and not name.startswith((_NAMELESS, OURS)):
            return name
    return _UNSAFE.sub("-", qdev.removeprefix("/machine/"))


def _names_beneath(inserted: Mapping[str, Any], nodes: tuple[QemuNode, ...]) -> Iterator[str]:
    files = {node.file for node in nodes}
    for image in list(_images(inserted))[1:]:
        file = plain_file(str(image["filename"]))
        if file in files:
            yield format_node(nodes, file)


def _images(inserted: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    image = inserted.get("image")
    while image is not None:
        yield image
        image = image.get("backing-image")


def description(
    name: str, uuid: str, devices: Mapping[str, Device], jobs: tuple[QemuJob, ...], folder: str
) -> DomainXml:
    """Return the guest as QEMU runs it. *folder* is what its relative file names count from."""
    disks: dict[str, Disk] = {}
    bystanders: dict[str, Disk] = {}
    excluded: list[ExcludedDisk] = []
    for target, device in devices.items():
        chain = tuple(_chain(device.get("inserted", {}), folder))
        reason, unsupported = _why_excluded(device, chain)
        if not reason:
            disks[target] = Disk(target, target, chain, _mirror(target, jobs))
            continue
        excluded.append(ExcludedDisk(target, reason, unsupported))
        if chain:
            bystanders[target] = Disk(target, target, chain)
    return DomainXml("", name, uuid, disks, tuple(excluded), bystanders, has_agent_channel=False)


def _chain(inserted: Mapping[str, Any], folder: str) -> Iterator[Source]:
    for index, image in enumerate(_images(inserted)):
        name = plain_file(str(image["filename"]))
        # As QEMU reads a name: what comes before a colon is a protocol, unless it is part of a path.
        if ":" in name.split("/", maxsplit=1)[0]:
            yield Source("network", image["format"], name, index)
            continue
        path = os.path.join(folder, name)
        yield Source("block" if _is_device(path) else "file", image["format"], path, index)


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _why_excluded(device: Device, chain: tuple[Source, ...]) -> tuple[str, bool]:
    """Return why the disk is not captured ("" if it is), and whether it has data of the guest's own."""
    inserted = device.get("inserted", {})
    network = [source.place for source in chain if source.kind == "network"]
    reasons = (
        (device.get("removable"), "it is a removable medium", False),
        (not chain, "it has no image", False),
        (inserted.get("ro"), "it is readonly", False),
        (str(device["qdev"]).startswith(_FLASH),
         "it is the firmware's flash, which no snapshot holds: copy its file yourself", False),
        (inserted.get("encrypted"), "it is encrypted by QEMU, which is not supported", True),
        (network, f"its image is neither a file nor a device of this host ({', '.join(network)})", True),
        (any(map(_is_slice, _images(inserted))), "it is a slice of its image", True),
        (not all(source.place.startswith("/") for source in chain),
         "its image has a relative name, and QEMU's folder is not to be seen", True),
    )
    return next(((reason, unsupported) for found, reason, unsupported in reasons if found), ("", False))


def _is_slice(image: Mapping[str, Any]) -> bool:
    options: Any = options_in(str(image["filename"]))
    while isinstance(options, dict):
        if options.get("driver") == "raw" and ("offset" in options or "size" in options):
            return True
        options = options.get("file")
    return False


def _mirror(target: str, jobs: tuple[QemuJob, ...]) -> Mirror | None:
    for job in jobs:
        if job.name == OWN_COMMIT.format(target) and job.status in _AT_WORK:
            return Mirror(ACTIVE_COMMIT, job.status == "ready")
    return None


def jobs_at_work(jobs: tuple[QemuJob, ...]) -> tuple[QemuJob, ...]:
    """Return the jobs without those of stillframe's that are over: whatever comes next dismisses them."""
    return tuple(job for job in jobs if not (job.name.startswith(OURS) and job.status == _OVER))


def commits(targets: Mapping[str, Device], jobs: tuple[QemuJob, ...]) -> dict[str, BlockJob]:
    """Return stillframe's own commits by target, as libvirt would tell of them."""
    by_name = {job.name: job for job in jobs if job.status in _AT_WORK}
    return {
        target: BlockJob(_KIND_ACTIVE_COMMIT, job.done, job.total)
        for target in targets if (job := by_name.get(OWN_COMMIT.format(target))) is not None
    }


def name_of(told: str, socket_path: str) -> str:
    """Return what to call the guest: its own name, else that of its socket, fit for the name of a file."""
    name = told or os.path.basename(socket_path).partition(".")[0]
    return _UNSAFE.sub("-", name).strip(".-") or "guest"


def uuid_of(told: str, name: str, devices: Sequence[Device]) -> str:
    """Return what tells the guest from others: its own UUID, else one that is made of what it has.

    That is its name and the image of its first disk, below overlays of stillframe: what is the same at each
    start of the same command line.
    """
    if told.strip("0-"):
        return told
    for device in devices:
        if not device.get("qdev") or device.get("removable"):  # a medium is changed while the guest runs
            continue
        for image in _images(device.get("inserted", {})):
            file = plain_file(str(image["filename"]))
            if not file.endswith(OVERLAY_SUFFIX):
                return str(uuids.uuid5(uuids.NAMESPACE_URL, f"stillframe:{name}:{file}"))
    return str(uuids.uuid5(uuids.NAMESPACE_URL, f"stillframe:{name}:"))
