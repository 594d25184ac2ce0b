"""What one capture leaves for the next to count from."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Anchor(msgspec.Struct, frozen=True, kw_only=True):
    """What a capture left in the guest, so that a later one reads only what changed since.

    It is kept with the snapshot or mirror that the capture became: a later run counts from what is
    durable, never from an attempt. *capture* is the ID of the run. *checkpoint* is the name of libvirt's
    checkpoint (which its bitmaps share), "" if it left none; *checkpoint_xml* defines it again where
    libvirt lost it. *marked* has, by target, (offset, length) of stretches that were already marked when
    this was stored, if that is later than the checkpoint: they count as changed for whoever counts from here.
    Else an older copy of an image, put back, would come with a bitmap that knows less than the snapshot does.
    *sizes* are the sizes in bytes, by target, of all disks that can be counted from it.
    """

    capture: str
    sizes: Mapping[str, int]
    checkpoint: str = ""
    checkpoint_xml: str = ""
    marked: Mapping[str, tuple[tuple[int, int], ...]] = {}
