"""What an offline run is going to do, decided before any image is opened."""

from __future__ import annotations

import os
from itertools import pairwise

from stillframe.block.tools import ImageInfo, chain_info
from stillframe.capture.journal import DiskRecord
from stillframe.capture.plan import (
    OVERLAY_SUFFIX,
    Plan,
    Wishes,
    choose_disks,
    place_of,
    refuse_shared,
)
from stillframe.capture.states import Quiesce
from stillframe.errors import GuestBusy, GuestUnfit, OverlayTaken, ProgramFailed, ProgramTimedOut
from stillframe.hypervisor.domain import Domain
from stillframe.hypervisor.model import Disk, DomainView, Power
from stillframe.hypervisor.monitor import plain_file

_FORMATS = ("raw", "qcow2")


def make_offline_plan(domain: Domain, view: DomainView, wishes: Wishes) -> Plan:
    """Return the plan for reading *domain*, which *view* shows to be shut off.

    Changes nothing. Raises a Refused error that names what is in the way.
    """
    if view.power is not Power.OFF or view.inactive is None:
        raise GuestUnfit(
            f"{view.name} is {view.power.value}; the method offline reads guests that are shut off.",
            wishes.again(view.name, "--method auto"),
        )
    if view.domain_job:
        raise GuestBusy(f"Another job runs on {view.name}.", f"virsh domjobinfo {view.name}")
    chosen, excluded = choose_disks(view.inactive, wishes, view.name)
    disks = tuple(_plan_disk(view, disk, wishes) for disk in chosen)
    refuse_shared(domain, view.inactive, chosen)
    return Plan(domain, view, view.inactive, disks, (), excluded, Quiesce.NONE, (), (), wishes)


def _plan_disk(view: DomainView, disk: Disk, wishes: Wishes) -> DiskRecord:
    top, exclude = disk.top, wishes.again(view.name, f"--exclude {disk.target}")
    if top.format not in _FORMATS:
        raise GuestUnfit(
            f"{disk.target} of {view.name} is {top.format}; stillframe captures raw and qcow2.", exclude)
    if "<encryption" in top.xml:
        raise GuestUnfit(
            f"{disk.target} of {view.name} is encrypted by QEMU, which is not supported.", exclude)
    if "<slices" in top.xml:
        raise GuestUnfit(f"{disk.target} of {view.name} is a slice of its image.", exclude)
    if top.place.endswith(OVERLAY_SUFFIX):
        raise OverlayTaken(
            f"{disk.target} of {view.name} stands on {top.place}, an overlay of stillframe "
            "that this journal does not know.",
            "stillframe status --state-dir with the state folder of the run that made it",
        )
    place = place_of(top)
    try:
        chain = chain_info(place)
    except (ProgramFailed, ProgramTimedOut) as error:
        raise GuestUnfit(
            f"The image of {disk.target} of {view.name} can't be read: {error.message}",
            f"qemu-img info -U --backing-chain {top.place}") from error
    _refuse_other_chain(view, disk, chain)
    return DiskRecord(
        target=disk.target, base=place, base_source_xml=top.xml, base_kind=top.kind,
        base_format=top.format, base_key=top.key, base_qemu_file="",
        size_bytes=chain[0].virtual_size_bytes, overlay_path="",
    )


def _refuse_other_chain(view: DomainView, disk: Disk, chain: tuple[ImageInfo, ...]) -> None:
    """Refuse a chain that would be another disk than the one that the guest gets when it starts.

    qemu-nbd goes by the images' headers; libvirt does so, too, unless the definition names the chain. A
    backing file without a format would be probed, which lets a guest choose what a raw image is taken for.
    """
    for info, below in pairwise(chain):
        if not (info.backing_format or info.backing.startswith("json:")):
            raise GuestUnfit(
                f"{info.name} of {view.name} names no format for its backing file.",
                f"qemu-img rebase -u -b {info.backing} -F {below.driver} {info.name}")
    named = [_real(source.place) for source in disk.chain]
    told = [_real(info.name) for info in chain]
    if len(named) > 1 and (len(named) != len(told) or any(
            one != other for one, other in zip(named, told, strict=True) if _is_path(one, other))):
        raise GuestUnfit(
            f"{disk.target} of {view.name} is defined as {' ← '.join(named[::-1])}, but its images' headers "
            f"name {' ← '.join(told[::-1])}.",
            f"qemu-img info -U --backing-chain {disk.top.place}; virsh dumpxml --inactive {view.name}")


def _is_path(one: str, other: str) -> bool:
    """Return whether both are paths. Network names have many spellings."""
    return one.startswith("/") and other.startswith("/")


def _real(name: str) -> str:
    plain = plain_file(name)
    return os.path.realpath(plain) if plain.startswith("/") else plain
