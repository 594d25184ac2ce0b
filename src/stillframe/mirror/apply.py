"""From the commit marker to the finished mirror, in steps that can each be repeated.

The order is all there is to it; folder.py tells the whole protocol.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from stillframe.clock import Clock
from stillframe.mirror.files import Files
from stillframe.mirror.layout import (
    APPLYING,
    DOMAIN,
    DOMAIN_STAGED,
    NEXT,
    RECORD,
    image_name,
    map_name,
    read_record,
    redo_name,
    removed_image_name,
    staged_image_name,
    staged_map_name,
    staged_names,
    write_record,
)
from stillframe.mirror.record import (
    DAMAGED,
    WHOLE,
    DiskRecord,
    ImageIdentity,
    MirrorRecord,
    RecordUnreadable,
)
from stillframe.mirror.redo import RedoDamaged, apply_redo, check_redo

Tick = Callable[[], None]


class Unfinishable(ValueError):
    """The marked update can't be brought to its end: something it needs is damaged or gone.

    *applying*: the images may already be a mixture. *marker* is None if it can't be read.
    """

    def __init__(self, why: str, marker: MirrorRecord | None, *, applying: bool) -> None:
        super().__init__(why)
        self.marker = marker
        self.applying = applying


def finish(files: Files, clock: Clock, tick: Tick) -> MirrorRecord:
    """Bring the marked update to its end, from wherever it is; return the record of the mirror.

    Raises Unfinishable. Can be repeated after a crash or an error at any place.
    """
    applying = APPLYING in files.names()
    marker = None
    try:
        marker = read_record(files, APPLYING if applying else NEXT)
        if marker is None:
            raise RedoDamaged(f"{NEXT} is missing")
        if not is_applied(files, marker):
            check_staged(files, marker, tick)
            if not applying:
                marker = begin_applying(files, marker)
                applying = True
        return apply(files, marker, clock, tick)
    except (RedoDamaged, RecordUnreadable) as error:
        raise Unfinishable(str(error), marker, applying=applying) from error


def check_staged(files: Files, record: MirrorRecord, tick: Tick) -> None:
    """Look whether all that the marker *record* speaks of is there and undamaged.

    Raises RedoDamaged. Nothing is changed.
    """
    for disk in record.disks:
        if disk.whole:
            staged = files.facts(staged_image_name(disk.target)) or files.facts(image_name(disk.target))
            if staged is None or staged.size_bytes != disk.size_bytes:
                raise RedoDamaged(f"{staged_image_name(disk.target)} is missing or has the wrong size")
            continue
        if files.facts(image_name(disk.target)) is None:
            raise RedoDamaged(f"{image_name(disk.target)} is missing")
        try:
            check_redo(files, redo_name(disk.target), _generation(record), disk.size_bytes, tick)
        except RedoDamaged as error:
            raise RedoDamaged(f"{redo_name(disk.target)}: {error}") from error


def begin_applying(files: Files, record: MirrorRecord) -> MirrorRecord:
    """Turn the marker "published" into "being applied", durably; return it.

    An image that somebody else wrote to since it was published loses its identity here, so
    that its map will not be believed.
    """
    disks = tuple(
        disk if disk.whole or disk.identity == image_identity(files, disk.target)
        else msgspec.structs.replace(disk, identity=None)
        for disk in record.disks
    )
    if disks != record.disks:
        record = msgspec.structs.replace(record, disks=disks)
        write_record(files, NEXT, record)
    files.rename(NEXT, APPLYING)
    files.fsync_folder()
    return record


def apply(files: Files, record: MirrorRecord, clock: Clock, tick: Tick) -> MirrorRecord:
    """Write what the marker *record* (being applied) stands for into the images, and end it.

    Returns the record of the new mirror. Can be repeated after a crash at any place.
    """
    if not is_applied(files, record):
        for disk in record.disks:
            tick()
            _apply_disk(files, record, disk, tick)
        for target in record.removed:
            _rename_if_there(files, image_name(target), removed_image_name(target, record.generation))
            files.unlink(map_name(target))
        _rename_if_there(files, DOMAIN_STAGED, DOMAIN)
        files.fsync_folder()
        # In whole seconds, which every file system can keep.
        mtime_ns = int(clock.now().timestamp()) * 10**9
        disks = tuple(_settled(files, disk, mtime_ns) for disk in record.disks)
        done = msgspec.structs.replace(record, disks=disks, removed=(), state=WHOLE)
        write_record(files, RECORD, done)
    files.unlink(APPLYING)
    files.fsync_folder()
    with contextlib.suppress(OSError):  # the mirror is whole; what stays is swept by the next run
        sweep(files)
    finished = read_record(files, RECORD)
    assert finished is not None
    return finished


def drop(files: Files) -> None:
    """Forget an update whose applying has not begun; the mirror before it stays."""
    files.unlink(NEXT)
    files.fsync_folder()
    sweep(files)


def mark_damaged(files: Files, marker: MirrorRecord | None) -> MirrorRecord | None:
    """Record that the images may be a mixture, and forget the update that made them so.

    Returns the record, None if there was nothing readable to base it on.
    """
    try:
        old = read_record(files, RECORD)
    except RecordUnreadable:
        old = None
    base = old or marker
    record = None
    if base is not None:
        disks = tuple(
            msgspec.structs.replace(disk, identity=None, whole=False) for disk in base.disks)
        # A mixture is of no moment that anything could be counted from.
        record = msgspec.structs.replace(
            base, state=DAMAGED, disks=disks, removed=(), anchor=msgspec.UNSET)
        write_record(files, RECORD, record)
    files.unlink(APPLYING)
    files.unlink(NEXT)
    files.fsync_folder()
    sweep(files)
    return record


def sweep(files: Files) -> None:
    """Remove staging files. Only when no marker stands."""
    for name in staged_names(files.names()):
        files.unlink(name)
    files.fsync_folder()


def image_identity(files: Files, target: str) -> ImageIdentity | None:
    """Return what the image of *target* looks like now; None if there is none."""
    found = files.facts(image_name(target))
    return ImageIdentity(found.inode, found.size_bytes, found.mtime_ns) if found else None


def is_applied(files: Files, record: MirrorRecord) -> bool:
    """Return whether the update of the marker *record* is in the images, and only its end is missing."""
    try:
        there = read_record(files, RECORD)
    except RecordUnreadable:
        return False
    return there is not None and there.generation == record.generation and there.state == WHOLE


def _apply_disk(files: Files, record: MirrorRecord, disk: DiskRecord, tick: Tick) -> None:
    if disk.whole:
        _rename_if_there(files, staged_image_name(disk.target), image_name(disk.target))
    else:
        fd = files.open(image_name(disk.target), write=True)
        try:
            apply_redo(
                files, redo_name(disk.target), fd, generation=_generation(record),
                size_bytes=disk.size_bytes, tick=tick,
            )
        finally:
            files.close(fd)
    _rename_if_there(files, staged_map_name(disk.target), map_name(disk.target))


def settle_image(files: Files, target: str, mtime_ns: int) -> ImageIdentity | None:
    """Set the image's time of change, make the image durable, and return what it looks like then.

    The time is set by hand, after closing: an SMB server may otherwise set its own later.
    """
    name = image_name(target)
    files.set_mtime(name, mtime_ns)
    fd = files.open(name)
    try:
        files.fsync(fd)
    finally:
        files.close(fd)
    return image_identity(files, target)


def _settled(files: Files, disk: DiskRecord, mtime_ns: int) -> DiskRecord:
    """Return the record of an applied disk, with the identity by which its map is believed."""
    settled = settle_image(files, disk.target, mtime_ns)
    identity = settled if disk.whole or disk.identity is not None else None
    return msgspec.structs.replace(disk, identity=identity, whole=False)


def _rename_if_there(files: Files, old: str, new: str) -> None:
    if files.facts(old) is not None:
        files.rename(old, new)


def _generation(record: MirrorRecord) -> bytes:
    return bytes.fromhex(record.generation)
