"""Which disks can keep a bitmap, which can be counted from an earlier capture, and why the others can't.

Where there is a doubt, a disk is not counted: it is read whole, and the reason is told.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

from stillframe.block.anchor import Anchor
from stillframe.block.image import ImageKind, ImagePlace
from stillframe.capture.journal import DiskRecord
from stillframe.hypervisor.checkpoint import read_checkpoint
from stillframe.hypervisor.model import Checkpoint, DomainView

_HASH_LETTERS = 10
_OUR_NAME = re.compile(rf"stillframe-[0-9a-f]{{{_HASH_LETTERS}}}-")
_VERSION_2 = "0.10"


@dataclass(frozen=True, slots=True)
class DiskChoice:
    """What is done with a disk: *keeps* a bitmap from now on, *counts* from the earlier, *note* why not."""

    target: str
    keeps: bool
    counts: bool
    note: str = ""

    def whole(self, note: str) -> DiskChoice:
        """Return the choice to read the disk whole, because of *note*."""
        return DiskChoice(self.target, self.keeps, counts=False, note=note)


def checkpoint_prefix(destination: str) -> str:
    """Return what the names of stillframe's checkpoints for *destination* begin with."""
    return f"stillframe-{hashlib.sha256(destination.encode()).hexdigest()[:_HASH_LETTERS]}-"


def is_our_name(name: str) -> bool:
    """Return whether a checkpoint, or its bitmap, is named as stillframe names its own."""
    return _OUR_NAME.match(name) is not None


def bitmap_reasons(view: DomainView) -> Mapping[str, str]:
    """Return for each disk of a running guest that can keep no bitmap why not, by target."""
    found = {}
    for target, disk in (view.live.disks if view.live else {}).items():
        known = view.qemu.disks.get(target) if view.qemu else None
        if disk.top.format != "qcow2":
            found[target] = f"{disk.top.format} images keep no bitmap"
        elif known is None or not known.files:
            found[target] = "QEMU does not tell which image it uses"
        elif known.compat == _VERSION_2:
            found[target] = "qcow2 of version 2 keeps no bitmap (qemu-img amend -o compat=1.1 changes that)"
    return found


def image_marks(disks: tuple[DiskRecord, ...]) -> Mapping[str, str]:
    """Return a text for each disk that differs once another image is in its place. Kept in the checkpoint."""
    return {disk.target: json.dumps(_mark(disk.base, disk.base_key)) for disk in disks}


def choose_disks(
    disks: tuple[DiskRecord, ...], view: DomainView, destination: str, earlier: Anchor | None
) -> tuple[DiskChoice, ...]:
    """Return for each disk of a plan what is done with it. Says nothing of libvirt's own memory yet."""
    reasons = bitmap_reasons(view)
    return tuple(
        DiskChoice(disk.target, keeps=False, counts=False, note=f"{reasons[disk.target]}: it is read whole")
        if disk.target in reasons else _choose(disk, view, destination, earlier)
        for disk in disks
    )


def _choose(
    disk: DiskRecord, view: DomainView, destination: str, earlier: Anchor | None
) -> DiskChoice:
    note = "" if earlier is None else _why_whole(disk, view, destination, earlier)
    return DiskChoice(disk.target, keeps=True, counts=earlier is not None and not note, note=note)


def _why_whole(disk: DiskRecord, view: DomainView, destination: str, earlier: Anchor) -> str:
    """Return why the disk can't be counted from *earlier*, "" if it can."""
    name = earlier.checkpoint
    made = read_checkpoint(earlier.checkpoint_xml)
    if not name or made is None:
        return "the last capture left no checkpoint"
    if not name.startswith(checkpoint_prefix(destination)) or made.name != name \
            or not name.startswith(checkpoint_prefix(destination) + earlier.capture):
        return f"{name} is not the checkpoint that stillframe made for this destination"
    if disk.target not in earlier.sizes or disk.target not in made.targets:
        return "it was added, or kept no bitmap, at the last capture"
    if earlier.sizes[disk.target] != disk.size_bytes:
        return f"it was resized from {earlier.sizes[disk.target]} to {disk.size_bytes} bytes"
    if is_replaced(disk, made):
        return "another image is in its place than at the last capture"
    bitmap = (view.qemu.bitmaps(disk.base_qemu_file) if view.qemu else {}).get(name)
    if bitmap is None:
        return f"its bitmap {name} is lost"
    if bitmap.inconsistent:
        return f"its bitmap {name} is inconsistent: QEMU did not end in an orderly way"
    return "" if bitmap.usable else f"its bitmap {name} does not record"


def is_replaced(disk: DiskRecord, made: Checkpoint) -> bool:
    """Return whether another image is in the disk's place than the checkpoint was made on."""
    # All disks of a guest have bitmaps of the same name: two images that changed places would pass for one
    # another by name and size.
    known = made.about.get(disk.target)
    return known != image_marks((disk,))[disk.target] or made.places.get(disk.target) != disk.base_key


def _mark(place: ImagePlace, key: str) -> list[str]:
    # The numbers of devices last only until a reboot; a file's inode lasts as long as the file.
    if place.kind is ImageKind.FILE:
        identity = place.identity()
        return [key, "" if identity is None else str(identity.inode)]
    return [key]


def without_checkpoint(
    choices: tuple[DiskChoice, ...], why: str, only: Container[str] | None = None
) -> tuple[DiskChoice, ...]:
    """Return the choices with all that count (or *only* these) read whole, because of *why*."""
    return tuple(
        choice.whole(why) if choice.counts and (only is None or choice.target in only) else choice
        for choice in choices
    )
