"""Keeping backup storage and a guest's own storage apart: one must not take the other with it."""

from __future__ import annotations

import os
from pathlib import Path

from stillframe.block.tools import chain_info
from stillframe.capture.growth import on_network
from stillframe.capture.journal import DiskRecord
from stillframe.capture.plan import Plan
from stillframe.errors import DestinationInsideGuest, OverlayFolderNeeded, ProgramFailed


def refuse_inside_images(path: Path, plan: Plan) -> None:
    """Raise DestinationInsideGuest if *path* (resolved) lies in the folder of an image of the guest."""
    for disk in plan.live.disks.values():
        for source in disk.chain:
            images = Path(source.place).parent.resolve() if source.kind == "file" else None
            if images is not None and path.is_relative_to(images):
                raise DestinationInsideGuest(
                    f"The destination {path} lies inside {images}, which holds {disk.target} of "
                    f"{plan.domain.name} itself.",
                    "choose a folder on other storage",
                )


def refuse_overlays_at(destination: Path, own: Path, plan: Plan) -> None:
    """Keep QEMU's writes off the backup storage: when that hangs, the guest would hang with it.

    *own* is the folder under *destination* that stillframe alone writes to. Raises OverlayFolderNeeded.
    """
    for disk in plan.disks:
        if not disk.overlay_path:
            continue
        folder = Path(disk.overlay_path).parent.resolve()
        shared = os.stat(folder).st_dev == os.stat(destination).st_dev and on_network(folder)
        if folder == destination or folder.is_relative_to(own) or shared:
            raise OverlayFolderNeeded(
                f"The overlay of {disk.target} would lie in {folder}, on the backup storage itself: if "
                "that hangs or goes away, the guest would hang with it.",
                plan.wishes.again(plan.domain.name, "--overlay-dir /var/lib/libvirt/images"),
            )


def about_bytes(disk: DiskRecord) -> int:
    """Return about how much a first copy of the disk takes, by what its images take now; 0 if not known."""
    try:
        allocated = sum(info.allocated_bytes for info in chain_info(disk.base))
    except ProgramFailed:
        return 0  # only an estimate; the copy itself will find out
    return min(allocated, disk.size_bytes)
