"""mirror.json: what a mirror folder holds, and of which moment.

JSON, UTF-8, one object, written for people to read. `format` is 1. `checksum` is the
BLAKE3 (hex) of the same object's canonical JSON (keys sorted, no spaces, `checksum` ""),
so a torn or edited file is noticed and never believed.

The same object under the name mirror.next.json is the commit marker of an update that is
durable but not yet in the images; under the name mirror.applying.json it is one whose
writing into the images has begun. See folder.py for the protocol.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from stillframe.block.anchor import Anchor

FORMAT = 1
WHOLE = "whole"
DAMAGED = "damaged"


class ImageIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The image file as stillframe left it. Any difference means that somebody else wrote."""

    inode: int
    size_bytes: int
    mtime_ns: int


class DiskRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One mirrored disk.

    `map_digest` is the BLAKE3 (hex) of the whole map file. `identity` is the image after the
    last write (in a marker: before the update is applied, None if it is a new image); None in
    mirror.json means that the map is not to be believed. `source` is for people: where the disk's image was.
    """

    target: str
    image: str
    size_bytes: int
    block_size_bytes: int
    map_digest: str
    source: str
    identity: ImageIdentity | None = None
    #: In a marker: whether the image is staged whole (TARGET.img.new), not as a redo file.
    whole: bool = False
    #: When the disk was last read whole, RFC 3339 UTC text; not there in records of earlier versions.
    read_whole_at: str | msgspec.UnsetType = msgspec.UNSET


class MirrorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One moment of a guest in a mirror folder.

    `captured_at` is RFC 3339 UTC text. `state` is "whole", or "damaged" when an apply could
    not be ended and the images may be a mixture: they are then of no single moment. `anchor` is what
    was left in the guest for the next update to count from; it is not there if nothing was.
    """

    generation: str
    guest: str
    uuid: str
    captured_at: str
    consistency: str
    disks: tuple[DiskRecord, ...]
    state: str = WHOLE
    removed: tuple[str, ...] = ()
    #: Not None: what earlier versions wrote without it must keep its checksum.
    anchor: Anchor | msgspec.UnsetType = msgspec.UNSET
    format: int = FORMAT
    checksum: str = ""

    def disk(self, target: str) -> DiskRecord | None:
        """Return the record of the disk *target*, None if it is not in this mirror."""
        return next((disk for disk in self.disks if disk.target == target), None)


class RecordUnreadable(ValueError):
    """The file is torn, damaged, edited, or of a format this version doesn't know."""


def encode(record: MirrorRecord) -> bytes:
    """Return *record* as the text of mirror.json, with its checksum filled in."""
    sealed = msgspec.structs.replace(record, checksum=_checksum(record))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n"


def decode(text: bytes) -> MirrorRecord:
    """Return the record that *text* holds. Raises RecordUnreadable."""
    try:
        record = msgspec.json.decode(text, type=MirrorRecord)
    except (msgspec.MsgspecError, ValueError) as error:
        raise RecordUnreadable(f"it is not a mirror record ({error})") from error
    if record.format != FORMAT:
        raise RecordUnreadable(f"its format is {record.format}, this stillframe knows {FORMAT}")
    if record.checksum != _checksum(record):
        raise RecordUnreadable("its checksum does not fit its text")
    return record


def _checksum(record: MirrorRecord) -> str:
    bare = msgspec.structs.replace(record, checksum="")
    return str(blake3(msgspec.json.encode(bare, order="sorted")).hexdigest())


class FolderState(enum.Enum):
    """What a mirror folder holds."""

    ABSENT = "the folder does not exist yet"
    EMPTY = "no mirror yet"
    WHOLE = "a whole mirror"
    STAGED = "what an unfinished update left; the mirror before it (if any) is whole"
    PENDING = "an update that is durable but not yet in the images"
    DAMAGED = "images that are of no single moment"
    UNREADABLE = "images whose record can't be read"
    FOREIGN = "files that stillframe did not write"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What MirrorFolder.inspect found. Nothing was changed by looking.

    `record` is the last whole mirror (or the damaged one), None if there is none that can be
    read. `pending` is the update that recover() would finish. `detail` is for people: which
    file makes the folder foreign, why the record is not readable.
    """

    state: FolderState
    record: MirrorRecord | None = None
    pending: MirrorRecord | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class CaptureFacts:
    """What publish() writes beside the images. `captured_at` is RFC 3339 UTC text."""

    captured_at: str
    consistency: str
    domain_xml: str
    anchor: Anchor | None = None
