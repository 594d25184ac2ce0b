"""The names in a mirror folder, and reading and writing its records."""

from __future__ import annotations

import re

from stillframe.errors import GuestUnfit
from stillframe.mirror.blockmap import looks_like_a_map
from stillframe.mirror.files import Files
from stillframe.mirror.record import MirrorRecord, RecordUnreadable, decode, encode
from stillframe.units import MIB

RECORD = "mirror.json"
NEXT = "mirror.next.json"
APPLYING = "mirror.applying.json"
DOMAIN = "domain.xml"
DOMAIN_STAGED = "domain.xml.new"
LOCK = ".stillframe.lock"
LOCK_HELD = ".stillframe.lock.held"

_TARGET = r"[A-Za-z0-9_-]+"
_STAGED = re.compile(rf"{_TARGET}\.(img\.new|map\.new|redo)|domain\.xml\.new|mirror\.(\w+\.)?json\.tmp")
_IMAGE = re.compile(rf"({_TARGET})\.img")
_OURS = re.compile(
    rf"{_TARGET}\.(map|img\.removed-[0-9a-f]+)|domain\.xml|{re.escape(LOCK)}(\.held[.0-9a-z]*)?")
# What file systems themselves put into a folder.
_SYSTEM = re.compile(r"lost\+found|\.nfs[0-9a-f]+|\.fuse_hidden[0-9a-f]+|\.smb[0-9A-Fa-f]+|\.snapshots?")
_RECORD_LIMIT_BYTES = 4 * MIB


def image_name(target: str) -> str:
    """Return the name of the image of the disk *target*."""
    return f"{target}.img"


def staged_image_name(target: str) -> str:
    """Return the name of an image whose first copy is not published."""
    return f"{target}.img.new"


def map_name(target: str) -> str:
    """Return the name of the map that belongs to the image."""
    return f"{target}.map"


def staged_map_name(target: str) -> str:
    """Return the name of the map that will belong to the image."""
    return f"{target}.map.new"


def redo_name(target: str) -> str:
    """Return the name of the redo file."""
    return f"{target}.redo"


def removed_image_name(target: str, generation: str) -> str:
    """Return the name under which the image of a disk is kept that left the guest."""
    return f"{target}.img.removed-{generation[:8]}"


def check_target(target: str) -> str:
    """Return *target* if it can be part of a file name. Raises GuestUnfit."""
    if not re.fullmatch(_TARGET, target):
        raise GuestUnfit(
            f"The disk target {target!r} can't be part of a file name.", "virsh domblklist GUEST")
    return target


def staged_names(names: list[str]) -> list[str]:
    """Return which of *names* an update stages and may leave behind."""
    return sorted(name for name in names if _STAGED.fullmatch(name))


def image_targets(names: list[str]) -> list[str]:
    """Return the targets of the images among *names*."""
    return sorted(match[1] for match in map(_IMAGE.fullmatch, names) if match)


def foreign_name(files: Files, names: list[str]) -> str:
    """Return a name that shows that the folder is not stillframe's, "" if it is or is empty.

    A folder with a record or marker is stillframe's, whatever else somebody put there. Without,
    every file must be one that stillframe writes, and an image must have its map beside it.
    """
    rest = [name for name in names if not _SYSTEM.fullmatch(name)]
    if {RECORD, NEXT, APPLYING} & set(rest):
        return ""
    made_here = LOCK in rest or LOCK_HELD in rest or any(
        looks_like_a_map(files, name) for name in rest if name.endswith(".map"))
    for name in sorted(rest):
        image = _IMAGE.fullmatch(name)
        if image:
            if not looks_like_a_map(files, map_name(image[1])):
                return name
        elif not made_here or not (_OURS.fullmatch(name) or _STAGED.fullmatch(name)):
            return name
    return ""


def read_record(files: Files, name: str) -> MirrorRecord | None:
    """Return the record in the file *name*, None if there is no such file. Raises RecordUnreadable."""
    try:
        fd = files.open(name)
    except FileNotFoundError:
        return None
    try:
        size = files.size_bytes(fd)
        if size > _RECORD_LIMIT_BYTES:
            raise RecordUnreadable("it is far too long")
        text = bytearray(size)
        files.pread_into(fd, memoryview(text), 0)
    finally:
        files.close(fd)
    return decode(bytes(text))


def write_record(files: Files, name: str, record: MirrorRecord) -> None:
    """Put *record* into the file *name*, durable and in one step: the old text or the new one."""
    staged = f"{name}.tmp"
    write_file(files, staged, encode(record))
    files.rename(staged, name)
    files.fsync_folder()


def write_file(files: Files, name: str, content: bytes) -> None:
    """Write a new file, durable (its name is not, until fsync_folder)."""
    fd = files.open(name, create=True)
    try:
        files.pwrite(fd, content, 0)
        files.fsync(fd)
    finally:
        files.close(fd)
