"""Which other domains of this host have an image in one of their chains."""

from __future__ import annotations

import os

from stillframe.block.image import local_place
from stillframe.block.tools import chain_info
from stillframe.errors import ProgramFailed, ProgramTimedOut
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import Disk


def other_users(guest: Guest, places: set[str]) -> dict[str, str]:
    """Return for each of *places* that a neighbour of *guest* uses, that neighbour's name.

    A running domain's XML names its whole chain; a shut-off domain's XML often names only
    the top, so that the chains of its qcow2 images are read.
    """
    found: dict[str, str] = {}
    for domain in guest.neighbours():
        described = domain.descriptions()
        disks = [disk for xml in described for disk in (*xml.disks.values(), *xml.bystanders.values())]
        named = {source.place for disk in disks for source in disk.chain}
        if len(described) == 1:
            named |= {place for disk in disks for place in _hidden_chain(disk)}
        real = {os.path.realpath(place) for place in named if place.startswith("/")} | named
        for place in places:
            if place in real or (place.startswith("/") and os.path.realpath(place) in real):
                found[place] = domain.name
    return found


def _hidden_chain(disk: Disk) -> set[str]:
    if disk.top.format != "qcow2" or disk.top.kind not in ("file", "block"):
        return set()
    try:
        return {info.name for info in chain_info(local_place(disk.top.place, "qcow2"))}
    except (OSError, ProgramFailed, ProgramTimedOut):
        # An image that can't be opened uses nothing; its own guest's run will say so.
        return set()
