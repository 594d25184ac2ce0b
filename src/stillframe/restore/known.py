"""What is known of an image that is not read: the snapshot that it was counted from, and what changed since.

A backup by bitmap believes that what its checkpoint's bitmap does not mark is as it was; so does a restore in
place, by the same rules and no longer (`plan.FULL_READ_EVERY_S`). An image can then differ from the snapshot
that is wanted only where it was written to, or where the two snapshots differ, which their trees tell. Those
stretches are read and compared, the others are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stillframe.block.marked import stretches
from stillframe.block.reader import DiskReader
from stillframe.block.tools import image_info
from stillframe.capture.journal import DiskRecord
from stillframe.capture.offline_bitmap import usable_bitmap
from stillframe.capture.plan import FULL_READ_EVERY_S, why_due
from stillframe.clock import Clock
from stillframe.errors import SlotDamaged
from stillframe.extent import Extent
from stillframe.hypervisor.checkpoint import read_checkpoint
from stillframe.repository.difference import changed_extents
from stillframe.repository.manifest import DiskEntry, Manifest
from stillframe.repository.places import Places
from stillframe.repository.tree import Tree

#: Of so many stretches between two snapshots it is asked what the image has there; of more, some are joined.
_ASKED = 4096


@dataclass(frozen=True, slots=True)
class Known:
    """The disk *then*, at a snapshot, the *bitmap* of what changed since, and what is *marked* besides."""

    then: DiskEntry
    bitmap: str
    marked: tuple[tuple[int, int], ...]


def known_disks(records: Iterable[DiskRecord], newest: Manifest | None, clock: Clock) -> Mapping[str, Known]:
    """Return what is known of the disks of a guest that is off, by target; *newest* is its last snapshot."""
    if newest is None or newest.anchor is None or read_checkpoint(newest.anchor.checkpoint_xml) is None:
        return {}
    anchor, entries = newest.anchor, {disk.target: disk for disk in newest.disks}
    found = {}
    for record in records:
        then = entries.get(record.target)
        if then is None or record.base_format != "qcow2":
            continue
        bitmap, _ = usable_bitmap(record, image_info(record.base), anchor)
        if bitmap and not why_due(clock, then.read_whole_at, FULL_READ_EVERY_S):
            found[record.target] = Known(then, bitmap, anchor.marked.get(record.target, ()))
    return found


def may_differ(
    places: Places, disk: DiskEntry, known: Known, source: DiskReader
) -> list[Extent] | None:
    """Return what of the image may differ from *disk*, in no order; None if that is not known."""
    changed = source.changed()
    if changed is None or known.then.size_bytes != disk.size_bytes:
        return None
    try:
        trees = [Tree(places, each.size_bytes, each.place) for each in (known.then, disk)]
        between = stretches(changed_extents(*trees), _ASKED)
    except SlotDamaged:
        return None
    # One after the other: a reader has one stream of extents.
    found = list(changed)
    for offset, length in (*known.marked, *between):
        found += source.extents(offset, length)
    return found
