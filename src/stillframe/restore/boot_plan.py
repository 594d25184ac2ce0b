"""What a boot is going to make, decided before anything is made; all that is in the way is named here."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from stillframe.capture.growth import free_bytes
from stillframe.clock import utc_text
from stillframe.errors import (
    DestinationUnwritable,
    HostUnfit,
    NotPermitted,
    RepositoryRefused,
    TargetExists,
    TargetSmall,
)
from stillframe.hypervisor.domain import all_domains
from stillframe.repository.catalog import display_name
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import Content, DiskEntry, Manifest
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.restore.boot import BootPlan
from stillframe.restore.boot_machine import machine_of, nvram_path
from stillframe.restore.boot_record import PATIENCE_S, BootDisk, BootRecord, BootState
from stillframe.restore.boot_server import socket_of
from stillframe.restore.boot_steps import BootTools
from stillframe.restore.boot_xml import disk_on_snapshot, policies_of, with_policies
from stillframe.restore.definition import Identity, Place, domain_for, new_identity, same_identity
from stillframe.restore.host_check import accept, host_facts, lacking
from stillframe.units import MIB, size_text

_IMAGES = Path("/var/lib/libvirt/images")
#: What the file system of the overlays must have free: a guest that can't write is paused at once.
_LEAST_FREE_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class BootWish:
    """What a user asked for.

    *name* is the new guest's ("" for one made of the old one's), *pool* the folder for the overlays.
    *network*: see `Place`. *accept_nearest*: what the host lacks is replaced by the nearest that it has. For the
    rest, see BootRecord.
    """

    name: str = ""
    pool: Path | None = None
    network: str | None = None
    is_original: bool = False
    accept_nearest: bool = False
    pauses: bool = True
    patience_s: float = PATIENCE_S


def plan_boot(
    repository: Repository, snapshot: SnapshotName, manifest: Manifest, wish: BootWish, tools: BootTools,
) -> BootPlan:
    """Return the plan. Changes nothing.

    Raises HostUnfit, TargetExists, TargetSmall, DestinationUnwritable, NotPermitted, RepositoryRefused.
    """
    text = manifest.inactive_xml or manifest.live_xml
    if not text:
        raise RepositoryRefused(
            f"{display_name(snapshot)} is of a guest without libvirt: nothing tells how to boot it.",
            f"stillframe serve {snapshot.sid[:12]} --repo REPO   # and boot it by other means")
    if os.geteuid() != 0:
        raise NotPermitted(
            "Only root can hand sockets and images over to QEMU's user.", "run stillframe as root")
    name = wish.name or (manifest.guest if wish.is_original else f"{manifest.guest}-booted")
    identity = _identity(text, manifest, name, wish, tools)
    pool = _pool(wish, tools)
    disks = tuple(_disk(disk, identity.uuid, text, pool / f"{name}-{disk.target}.qcow2")
                  for disk in manifest.disks)
    place = Place(
        name=name, identity=identity, disks={disk.target: disk_on_snapshot(disk) for disk in disks},
        network=wish.network, nvram=nvram_path(text, name), is_original=wish.is_original)
    definition, warnings = _adapted(text, place, wish, tools)
    machine = machine_of(manifest, place, Places(repository))
    _check_paths(disks, machine.paths)
    _check_room(pool)
    record = BootRecord(
        uuid=identity.uuid, name=name, uri=tools.connection.uri, address=repository.address,
        snapshot=display_name(snapshot), sid=snapshot.sid, origin=manifest.uuid, state=BootState.PLANNED,
        began_at=utc_text(tools.clock.now()), pauses=wish.pauses, patience_s=wish.patience_s, disks=disks,
        files=machine.own_files, folders=machine.own_folders)
    definition = with_policies(definition, disks, pauses=wish.pauses)
    return BootPlan(record, definition, repository, (*warnings, *_left_out(manifest)), machine.write)


def _identity(text: str, manifest: Manifest, name: str, wish: BootWish, tools: BootTools) -> Identity:
    """Return the new guest's identity. Raises TargetExists where a guest has its name, or its UUID."""
    here = {domain.name: domain.uuid for domain in all_domains(tools.connection)}
    if name in here or tools.store.named(name) is not None:
        raise TargetExists(f"There is a guest called {name} already.", "choose another name: --as NAME")
    if not wish.is_original:
        return new_identity(text, random.SystemRandom())
    if manifest.uuid in here.values():
        other = next(each for each, uuid in here.items() if uuid == manifest.uuid)
        raise TargetExists(
            f"{other} is here and has the UUID {manifest.uuid}: two guests can't have one identity.",
            "leave --same-identity out")
    return same_identity(text)


def _pool(wish: BootWish, tools: BootTools) -> Path:
    folder = wish.pool or tools.connection.pool_folder("default") or _IMAGES
    if not folder.is_dir():
        raise DestinationUnwritable(f"There is no folder {folder}.", "choose another one: --pool DIR")
    return Path(os.path.realpath(folder))


def _disk(disk: DiskEntry, uuid: str, text: str, path: Path) -> BootDisk:
    return BootDisk(
        target=disk.target, overlay_path=str(path), socket=socket_of(uuid, disk.target),
        content=Content(size_bytes=disk.size_bytes, root=disk.root), data_bytes=disk.data_bytes,
        policies=policies_of(text, disk.target))


def _adapted(text: str, place: Place, wish: BootWish, tools: BootTools) -> tuple[str, list[str]]:
    """Return the definition, and what was found that the host lacks but does without. Raises HostUnfit."""
    facts = host_facts(tools.connection)
    findings = lacking(domain_for(text, place), facts)
    fatal = [each for each in findings if each.is_fatal]
    if fatal and not (wish.accept_nearest and all(each.nearest for each in fatal)):
        every = all(each.nearest for each in fatal)
        raise HostUnfit(
            f"The guest can't run here: {'; '.join(each.text for each in fatal)}.",
            "run again with --accept-nearest" if every else "boot it on a host that has these")
    return domain_for(text, accept(place, findings)), [each.text for each in findings]


def _left_out(manifest: Manifest) -> list[str]:
    return [f"not in the snapshot, and so not in the guest: {each}" for each in manifest.excluded]


def _check_paths(disks: tuple[BootDisk, ...], others: tuple[str, ...]) -> None:
    for path in (*(disk.overlay_path for disk in disks), *others):
        if os.path.lexists(path):
            raise TargetExists(
                f"{path} exists.", "choose another name with --as, or another folder with --pool")


def _check_room(pool: Path) -> None:
    free = free_bytes(str(pool))
    if free < _LEAST_FREE_BYTES:
        raise TargetSmall(
            f"{pool} has {size_text(free)} free; what the guest writes goes there, and it needs at least "
            f"{size_text(_LEAST_FREE_BYTES)}.", "choose another folder: --pool DIR")
