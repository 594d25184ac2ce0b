"""Watching the overlays grow, so that the copy is given up before a file system is full.

Looked at whenever the copy asks whether it should stop (a few times a second), not by
libvirt's block threshold event: that event is one-shot, can be missed, and doesn't see
other programs fill the file system.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillframe.capture.limits import Limits
from stillframe.errors import OverlayFull, OverlaySpace
from stillframe.units import size_text

_SECTOR_BYTES = 512
_NETWORK = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "9p", "afs", "glusterfs", "gfs2", "ocfs2", "lustre",
})


@dataclass(frozen=True, slots=True)
class Watermark:
    """For one file system: the overlays (or scratch files) on it, and when the copy is given up, in bytes."""

    paths: tuple[str, ...]
    limit_bytes: int
    reserve_bytes: int
    what: str = "overlays"

    def reached(self) -> OverlayFull | None:
        """Return the error to stop with if the overlays are too large or the space too small."""
        used = sum(allocated_bytes(path) for path in self.paths)
        free = free_bytes(str(Path(self.paths[0]).parent))
        if used < self.limit_bytes and free > self.reserve_bytes:
            return None
        return OverlayFull(
            f"The copy was given up: the {self.what} hold {size_text(used)} "
            f"(limit {size_text(self.limit_bytes)}), {size_text(free)} are free "
            f"(at least {size_text(self.reserve_bytes)} are kept).",
            "run again with --overlay-dir on a larger file system, or a higher --overlay-limit",
        )


def plan_watermarks(
    paths: Sequence[str], limits: Limits, what: str = "overlays"
) -> tuple[Watermark, ...]:
    """Return one watermark for each file system that *paths* (not yet existing) will be on.

    Raises OverlaySpace when less than the required space is free.
    """
    by_device: dict[int, list[str]] = {}
    for path in paths:
        by_device.setdefault(os.stat(Path(path).parent).st_dev, []).append(path)
    marks = []
    for group in by_device.values():
        folder = str(Path(group[0]).parent)
        free = free_bytes(folder)
        needed = max(limits.min_free_bytes, (limits.overlay_bytes or 0) + limits.reserve_bytes)
        if free < needed:
            raise OverlaySpace(
                f"Only {size_text(free)} are free in {folder} for the {what}; "
                f"{size_text(needed)} are required.",
                "free some space, or choose --overlay-dir, --min-free or --overlay-limit",
            )
        limit = free // 2 if limits.overlay_bytes is None else limits.overlay_bytes
        marks.append(Watermark(tuple(group), limit, limits.reserve_bytes, what))
    return tuple(marks)


def free_bytes(folder: str) -> int:
    """Return what an unprivileged process could still write in *folder*."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def on_network(folder: Path) -> bool:
    """Return whether *folder* (resolved) lies on a network file system."""
    kind = file_system_of(folder, Path("/proc/self/mounts").read_text())
    return kind in _NETWORK or kind.startswith("fuse.")


def file_system_of(folder: Path, mounts: str) -> str:
    """Return the type of the file system that *folder* lies on, by a text like /proc/self/mounts."""
    best, kind = "", ""
    for line in mounts.splitlines():
        point, name = line.split()[1:3]
        place = point.replace("\\040", " ")
        # Of mounts on one point the last one lies on top.
        if folder.is_relative_to(place) and len(place) >= len(best):
            best, kind = place, name
    return kind


def allocated_bytes(path: str) -> int:
    """Return what the file takes on its file system; 0 if it is not there."""
    try:
        return os.stat(path).st_blocks * _SECTOR_BYTES
    except FileNotFoundError:
        return 0
