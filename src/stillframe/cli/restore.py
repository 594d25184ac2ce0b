"""`stillframe restore`: a snapshot's disks back into files, or a disk onto a block device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stillframe.cli.session import Session
from stillframe.cli.snapshots import find, name_body
from stillframe.errors import (
    EXIT_OK,
    DestinationUnwritable,
    GuestState,
    RepositoryDamaged,
    SlotDamaged,
    SnapshotUnknown,
    StillframeError,
    TargetExists,
)
from stillframe.repository.catalog import display_name
from stillframe.repository.held import held_snapshot
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import DiskEntry, Manifest
from stillframe.repository.places import Places
from stillframe.repository.reader import read_whole
from stillframe.restore.run import Restored, RestoreProgress, restore_disk
from stillframe.restore.target import Wishes, check_room
from stillframe.units import size_text

_DEFINITION = "domain.xml"


@dataclass(frozen=True)
class Wish:
    """What is to be restored, where to, and how. *name* is SNAPSHOT or SNAPSHOT:DISK.

    *into_folder*: *to* was written as a folder.
    """

    name: str
    to: Path
    into_folder: bool
    format: str
    delta: bool
    force: bool
    skip_bad: bool


def restore(session: Session, wish: Wish) -> int:
    """Restore; return the exit code: RepositoryDamaged's if stretches were lost and skipped."""
    text, target = split_name(wish.name)
    name = find(session, text)
    with held_snapshot(session.near_repository, name, session.clock, session.host) as manifest:
        return _restored(session, wish, name, manifest, target)


def _restored(
    session: Session, wish: Wish, name: SnapshotName, manifest: Manifest, target: str,
) -> int:
    disks = chosen_disks(manifest, target, display_name(name))
    into_folder = len(disks) > 1 or wish.into_folder or wish.to.is_dir()
    places = Places(session.near_repository)
    session.kept = "The repository is as it was."
    results = []
    with session.signals_as_stop("a new file that is not whole is removed"):
        if into_folder:
            _make_folder(wish.to)
            _check_room(disks, wish)
        for disk in disks:
            to = wish.to / _file_name(disk, wish.format) if into_folder else wish.to
            results.append((disk.target, _one(session, places, disk, to, wish)))
        files, hurt = _machine(places, manifest, wish) if into_folder and not target else ([], [])
    lost = bool(hurt) or any(result.lost for _, result in results)
    for path in files:
        session.screen.result(f"{path}: written")
    for damage in hurt:
        session.screen.result(f"lost: {damage}")
    session.screen.json({
        "snapshot": name_body(name), "whole": not lost, "files": [str(path) for path in files],
        "lost_files": hurt,
        "disks": [{"target": each, **asdict(result)} for each, result in results],
    })
    return RepositoryDamaged.exit_code if lost else EXIT_OK


def split_name(text: str) -> tuple[str, str]:
    """Return the snapshot's name and the disk's ("" if none is named) of SNAPSHOT[:DISK]."""
    snapshot, colon, disk = text.rpartition(":")
    # A time has colons too; no disk is called by digits alone.
    return (snapshot, disk) if colon and disk and not disk.rstrip("Z").isdigit() else (text, "")


def chosen_disks(manifest: Manifest, target: str, name: str) -> Sequence[DiskEntry]:
    """Return the disk called *target*, all disks if it is "". Raises SnapshotUnknown."""
    chosen = [disk for disk in manifest.disks if target in ("", disk.target)]
    if not chosen:
        there = ", ".join(disk.target for disk in manifest.disks)
        raise SnapshotUnknown(f"{name} has no disk {target}; it has {there}.",
                              f"stillframe show {manifest.sid[:12]} --repo REPO")
    return chosen


def _one(session: Session, places: Places, disk: DiskEntry, to: Path, wish: Wish) -> Restored:
    session.screen.say(f"restoring {disk.target} ({size_text(disk.size_bytes)}) to {to}")

    def report(progress: RestoreProgress) -> None:
        session.screen.bar(f"{disk.target}: restore", progress.done_bytes, progress.size_bytes)

    result = restore_disk(
        places, disk, Wishes(str(to.absolute()), wish.format, wish.force, wish.delta), clock=session.clock,
        skip_bad=wish.skip_bad, stop=lambda: stop_of(session), report=report)
    say_restored(session, disk.target, result)
    return result


def say_restored(session: Session, target: str, result: Restored) -> None:
    """Say what was restored of a disk, and what was lost."""
    session.screen.result(
        f"{target}: {result.path}: {size_text(result.data_bytes)} data, "
        f"{size_text(result.written_bytes)} written")
    for lost in result.lost:
        session.screen.result(
            f"{target}: lost: {lost.length_bytes} bytes at {lost.offset_bytes} ({lost.why})")


def stop_of(session: Session) -> StillframeError | None:
    """Return the error to end a restore with once a signal came: it touches no guest."""
    error = session.stop()
    if error is not None:
        error.guest = GuestState.UNTOUCHED
    return error


def _file_name(disk: DiskEntry, image_format: str) -> str:
    return f"{disk.target}.{'qcow2' if image_format == 'qcow2' else 'img'}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError as error:
        raise TargetExists(f"{folder} is a file, and a folder is needed.",
                           "choose a folder, or one disk: SNAPSHOT:DISK") from error
    except OSError as error:
        raise DestinationUnwritable(f"The folder {folder} can't be made: {error.strerror}.",
                                    f"ls -ld {folder.parent}") from error


def _check_room(disks: Sequence[DiskEntry], wish: Wish) -> None:
    """Raise TargetSmall if the folder has no room for all disks: each is asked for on its own later."""
    paths = {disk.target: wish.to / _file_name(disk, wish.format) for disk in disks}
    new = sum(disk.data_bytes for disk in disks if not (wish.delta and paths[disk.target].exists()))
    check_room(str(wish.to.absolute() / "disks"), new)


def _machine(places: Places, manifest: Manifest, wish: Wish) -> tuple[list[Path], list[str]]:
    """Write what belongs to the machine besides its disks; return the paths, and what was lost."""
    replace, hurt = wish.force or wish.delta, []
    written: list[Path] = []
    definition = manifest.inactive_xml or manifest.live_xml
    if definition:  # a guest without libvirt has none
        written.append(wish.to / _DEFINITION)
        _write_file(written[0], definition.encode(), replace=replace)
    for entry in manifest.files:
        try:
            content = read_whole(places, entry)
        except SlotDamaged as damage:
            if not wish.skip_bad:
                raise
            # Half of a firmware's variables is worse than none: a guest starts without them.
            hurt.append(f"{entry.path} ({damage.why})")
            continue
        written.append(wish.to / f"{entry.role}-{Path(entry.path).name}")
        _write_file(written[-1], content, replace=replace)
    return written, hurt


def _write_file(path: Path, content: bytes, *, replace: bool) -> None:
    how = os.O_TRUNC if replace else os.O_EXCL
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
    except FileExistsError as error:
        raise TargetExists(f"{path} exists.", "choose another folder, or --force") from error
    except OSError as error:
        raise DestinationUnwritable(f"{path} can't be written: {error.strerror}.",
                                    f"ls -ld {path.parent}") from error
