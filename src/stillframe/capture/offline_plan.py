"""What an offline run is going to do, decided before any image is opened."""

from __future__ import annotations

from itertools import pairwise

from stillframe.block.tools import ImageInfo, chain_info
from stillframe.capture.journal import DiskRecord
from stillframe.capture.plan import (
    Plan,
    Wishes,
    choose_disks,
    how_to_look,
    is_other,
    place_of_chain,
    real_path,
    refuse_format,
    refuse_shared,
)
from stillframe.capture.states import Quiesce
from stillframe.errors import GuestBusy, GuestUnfit, OverlayTaken, ProgramFailed, ProgramTimedOut
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import OVERLAY_SUFFIX, Disk, DomainView, Power


def make_offline_plan(domain: Guest, view: DomainView, wishes: Wishes) -> Plan:
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
    chosen, excluded = choose_disks(domain, view.inactive, wishes)
    disks = tuple(_plan_disk(view, disk, wishes) for disk in chosen)
    refuse_shared(domain, view.inactive, chosen)
    return Plan(domain, view, view.inactive, disks, (), excluded, Quiesce.NONE, (), (), wishes)


def _plan_disk(view: DomainView, disk: Disk, wishes: Wishes) -> DiskRecord:
    top = disk.top
    refuse_format(disk, view.name, wishes)
    if "<slices" in top.xml:
        raise GuestUnfit(f"{disk.target} of {view.name} is a slice of its image.",
                         wishes.again(view.name, f"--exclude {disk.target}"))
    if top.place.endswith(OVERLAY_SUFFIX):
        raise OverlayTaken(
            f"{disk.target} of {view.name} stands on {top.place}, an overlay of stillframe "
            "that this journal does not know.",
            "stillframe status --state-dir with the state folder of the run that made it",
        )
    place = place_of_chain(disk.chain)
    try:
        chain = chain_info(place)
    except (ProgramFailed, ProgramTimedOut) as error:
        raise GuestUnfit(
            f"The image of {disk.target} of {view.name} can't be read: {error.message}",
            how_to_look(top)) from error
    _refuse_other_chain(view, disk, chain)
    return DiskRecord(
        target=disk.target, base=place, base_source_xml=top.xml, base_kind=top.kind,
        base_format=top.format, base_key=top.key, base_qemu_file="",
        size_bytes=chain[0].virtual_size_bytes, overlay_path="",
    )


def _refuse_other_chain(view: DomainView, disk: Disk, chain: tuple[ImageInfo, ...]) -> None:
    """Refuse a chain that would be another disk than the one that the guest gets when it starts.

    qemu-nbd goes by the images' headers; libvirt does so, too, below what the definition names, unless that
    says where the chain ends. (Somebody's snapshot leaves a definition that names two images and no end.) A
    backing file without a format would be probed, which lets a guest choose what a raw image is taken for.
    """
    for info, below in pairwise(chain):
        if not (info.backing_format or info.backing.startswith("json:")):
            raise GuestUnfit(
                f"{info.name} of {view.name} names no format for its backing file.",
                f"qemu-img rebase -u -b {info.backing} -F {below.driver} {info.name}")
    named = [real_path(source.place) for source in disk.chain]
    told = [real_path(info.name) for info in chain]
    if len(named) > len(told) or (disk.ends and len(named) != len(told)) or any(map(is_other, named, told)):
        raise GuestUnfit(
            f"{disk.target} of {view.name} is defined as {' ← '.join(named[::-1])}, but its images' headers "
            f"name {' ← '.join(told[::-1])}.",
            f"{how_to_look(disk.top)}; virsh dumpxml --inactive {view.name}")
