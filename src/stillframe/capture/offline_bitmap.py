"""Counting a disk that is off by the bitmap of a checkpoint that a running capture left.

The bitmap is in the image, and QEMU marks in it what the guest writes. Offline nothing new can be put in
place, so the snapshot of an offline run keeps the anchor that it counted from. That is safe: a bitmap only
grows, so what it has marked since the anchor's moment includes all that changed since any later moment.
It shrinks only if an older copy of the image is put back. So what is marked now is kept with the anchor:
two states of an image that both come from the anchor's differ nowhere but in what either has marked.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from stillframe.block.anchor import Anchor
from stillframe.block.marked import stretches
from stillframe.block.reader import DiskReader
from stillframe.block.tools import ImageInfo
from stillframe.capture.bitmap_choice import is_replaced
from stillframe.capture.journal import DiskRecord
from stillframe.hypervisor.checkpoint import read_checkpoint

#: QEMU's flags: the bitmap was not closed well; it is one that counts.
_IN_USE = "in-use"
_COUNTS = "auto"


def usable_bitmap(disk: DiskRecord, image: ImageInfo, earlier: Anchor | None) -> tuple[str, str]:
    """Return the name of the bitmap to count *disk* by, "" if there is none, and why not.

    No reason is given where none was to be expected.
    """
    if earlier is None or not earlier.checkpoint or disk.target not in earlier.sizes:
        return "", ""
    flags = dict(image.bitmaps).get(earlier.checkpoint)
    if flags is None:
        return "", f"the bitmap {earlier.checkpoint} is not in {image.name}"
    if _IN_USE in flags:
        return "", f"the bitmap {earlier.checkpoint} in {image.name} was not closed well (QEMU was killed)"
    if _COUNTS not in flags:
        return "", f"the bitmap {earlier.checkpoint} in {image.name} was switched off"
    made = read_checkpoint(earlier.checkpoint_xml)
    if made is not None and is_replaced(disk, made):
        # All disks of a guest have bitmaps of the same name: images that changed places would pass.
        return "", "another image is in its place than at the last capture"
    if image.virtual_size_bytes != earlier.sizes[disk.target]:
        return "", "the disk has another size"
    return earlier.checkpoint, ""


def kept_anchor(earlier: Anchor | None, counted: Mapping[str, DiskReader]) -> Anchor | None:
    """Return the anchor that an offline capture keeps, which counted the disks *counted*.

    A disk that could not be counted now can't be counted from there any more. Raises CopyFailed.
    """
    if earlier is None or not earlier.checkpoint or not counted:
        return None
    return msgspec.structs.replace(
        earlier, sizes={target: reader.size_bytes for target, reader in counted.items()},
        marked={target: stretches(reader.changed() or ()) for target, reader in counted.items()})
