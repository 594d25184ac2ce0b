"""What qemu-img does for stillframe: look, make an overlay, compare, resize, and commit offline."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillframe import process
from stillframe.block.image import ImagePlace, overlay_place
from stillframe.errors import CopyFailed, OverlayTaken, ProgramFailed

_INFO_TIMEOUT_S = 30.0
_CREATE_TIMEOUT_S = 60.0
_NOT_IN_USE = "Stop what uses the image, or wait until it is done; then run the command again"


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What qemu-img says of one image of a chain.

    `backing` is the backing file as the header has it ("" for none), `backing_format` the
    format written beside it. `bitmaps` are (name, flags) of persistent bitmaps.
    `allocated_bytes` is what the file takes on its file system.
    """

    name: str
    driver: str
    virtual_size_bytes: int
    allocated_bytes: int
    backing: str = ""
    backing_format: str = ""
    corrupt: bool = False
    bitmaps: tuple[tuple[str, tuple[str, ...]], ...] = ()
    internal_snapshots: int = 0


def chain_info(place: ImagePlace, *, timeout_s: float = _INFO_TIMEOUT_S) -> tuple[ImageInfo, ...]:
    """Return the image and all its backing images, the top one first. Works while in use.

    Only metadata is read, so the image is opened without taking its lock (``-U``).
    Raises ProgramFailed (also when an image of the chain is missing), ProgramTimedOut.
    """
    if place.beneath is not None:
        return (image_info(place, timeout_s=timeout_s), *chain_info(place.beneath, timeout_s=timeout_s))
    output = process.run(
        ["qemu-img", "info", "-U", "--output=json", "--backing-chain", place.json_name()],
        timeout_s=timeout_s,
    )
    return tuple(_info(entry) for entry in json.loads(output.stdout))


def image_info(place: ImagePlace, *, timeout_s: float = _INFO_TIMEOUT_S) -> ImageInfo:
    """Return what qemu-img says of the image alone. Works while in use, and as chain_info does."""
    output = process.run(
        ["qemu-img", "info", "-U", "--output=json", place.alone().json_name()], timeout_s=timeout_s)
    return _info(json.loads(output.stdout))


def create_overlay(
    path: str, base: ImagePlace, virtual_size_bytes: int, *, timeout_s: float = _CREATE_TIMEOUT_S
) -> None:
    """Make an empty qcow2 at *path* that stands on *base*; durable when this returns.

    The base is not opened: it may be in use, and need not be reachable. No subclusters, which would make a
    guest's first small writes cheaper: QEMU 7.2 ends when somebody pulls into such an image.

    Raises OverlayTaken if *path* exists; what is there is never changed. Raises ProgramFailed, OSError.
    """
    _create(path, ["-u", "-f", "qcow2", "-b", base.backing_text(), "-F", base.driver], virtual_size_bytes,
            timeout_s)


def create_image(path: str, image_format: str, size_bytes: int, *, timeout_s: float = _CREATE_TIMEOUT_S
                 ) -> None:
    """Make an image of zeroes at *path*, as create_overlay does."""
    _create(path, ["-f", image_format], size_bytes, timeout_s)


def _create(path: str, options: Sequence[str], virtual_size_bytes: int, timeout_s: float) -> None:
    try:
        # Taking the name first makes a race with another program end in an error, not in a loss.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError as error:
        raise OverlayTaken(
            f"{path} already exists, and no known run of stillframe made it.",
            f"look at it (qemu-img info -U {path}), move it away if it is not needed, run again",
        ) from error
    try:
        process.run(["qemu-img", "create", "-q", *options, path, str(virtual_size_bytes)],
                    timeout_s=timeout_s)
        _fsync(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # qemu-img removes what it could not finish
            os.unlink(path)
        raise
    _fsync(os.path.dirname(path))


def holds_data(overlay_path: str, *, timeout_s: float = _INFO_TIMEOUT_S) -> bool:
    """Return whether the overlay itself has any cluster, its backing chain left aside.

    Only metadata is read, so it works while in use. Raises ProgramFailed, ProgramTimedOut.
    """
    alone = "json:" + json.dumps({
        "driver": "qcow2", "file": {"driver": "file", "filename": overlay_path}, "backing": None})
    output = process.run(["qemu-img", "map", "-U", "--output=json", alone], timeout_s=timeout_s)
    try:
        return any(extent["present"] for extent in json.loads(output.stdout))
    except ValueError:
        return True  # so many extents that the output was cut


def compare(first: ImagePlace, second: ImagePlace, *, timeout_s: float) -> bool:
    """Return whether both images read the same to the last byte (a longer one ends in zeroes).

    QEMU's locks are taken: raises CopyFailed when an image is in use for writing, or unreadable.
    """
    try:
        output = process.run(
            ["qemu-img", "compare", first.json_name(), second.json_name()],
            timeout_s=timeout_s, accept=(0, 1),
        )
    except ProgramFailed as error:
        raise CopyFailed(
            f"{first.text()} and {second.text()} could not be compared: {error.stderr}", _NOT_IN_USE
        ) from error
    return output.code == 0


def stand_on(overlay_path: str, base: ImagePlace, *, timeout_s: float = _CREATE_TIMEOUT_S) -> None:
    """Make *overlay_path* name *base* as its backing file, which must read as what it stood on; durable.

    Its data is left as it is. QEMU's lock is taken: raises CopyFailed, with nothing changed, while a running
    program has it open.
    """
    command = ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", base.backing_text(), "-F", base.driver,
               overlay_path]
    try:
        process.run(command, timeout_s=timeout_s)
    except ProgramFailed as error:
        raise CopyFailed(
            f"{overlay_path} could not be put on {base.text()}: {error.stderr}", _NOT_IN_USE) from error
    _fsync(overlay_path)


def commit_offline(overlay_path: str, base: ImagePlace, *, timeout_s: float) -> None:
    """Write what *overlay_path* holds into *base*, its backing file, while nobody uses them.

    The overlay is left as it is. QEMU's locks are taken on both: raises CopyFailed, with nothing
    written, when a running program has one open; also when the overlay's header names another
    base, and when writing failed (the overlay is then still whole: the call can be repeated).
    """
    overlay = overlay_place(overlay_path, base)
    named = image_info(overlay).backing
    if named != base.backing_text():
        raise CopyFailed(
            f"{overlay_path} stands on {named!r}, not on {base.text()!r}: it was not written back.",
            f"qemu-img info -U --backing-chain {overlay_path}",
        )
    into = [] if overlay.beneath is not None else ["-b", named]  # the overlay's place names the base itself
    command = ["qemu-img", "commit", "-q", "-d", *into, overlay.json_name()]
    try:
        process.run(command, timeout_s=timeout_s)
    except ProgramFailed as error:
        raise CopyFailed(
            f"{overlay_path} could not be written back into {base.text()}: {error.stderr}", _NOT_IN_USE
        ) from error
    if base.kind.is_local:
        _fsync(base.path)


def resize(image: ImagePlace, size_bytes: int, *, timeout_s: float = _CREATE_TIMEOUT_S) -> None:
    """Give an image that nobody uses another size; what lies behind it is dropped. Takes QEMU's locks.

    Raises ProgramFailed, ProgramTimedOut.
    """
    if image_info(image).virtual_size_bytes != size_bytes:
        process.run(["qemu-img", "resize", "-q", "--shrink", image.json_name(), str(size_bytes)],
                    timeout_s=timeout_s)


def remove_bitmap(image: ImagePlace, name: str, *, timeout_s: float = _INFO_TIMEOUT_S) -> None:
    """Delete the persistent bitmap called *name*, if there is one, from a qcow2 that nobody uses.

    QEMU's locks are taken. Raises ProgramFailed, ProgramTimedOut.
    """
    if any(found == name for found, _flags in image_info(image).bitmaps):
        process.run(
            ["qemu-img", "bitmap", "--remove", image.json_name(), name], timeout_s=timeout_s)


def _info(entry: dict[str, Any]) -> ImageInfo:
    data = entry.get("format-specific", {}).get("data", {})
    bitmaps = tuple(
        (bitmap["name"], tuple(bitmap.get("flags", ()))) for bitmap in data.get("bitmaps", ()))
    return ImageInfo(
        name=entry["filename"], driver=entry["format"], virtual_size_bytes=entry["virtual-size"],
        allocated_bytes=entry.get("actual-size", 0), backing=entry.get("backing-filename", ""),
        backing_format=entry.get("backing-filename-format", ""),
        corrupt=bool(data.get("corrupt", False)), bitmaps=bitmaps,
        internal_snapshots=len(entry.get("snapshots", ())),
    )


def _fsync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
