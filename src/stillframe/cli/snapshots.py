"""`stillframe list` and `stillframe show`: which snapshots there are, and one in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from stillframe.cli.drilled import (
    drill_body,
    drill_name_body,
    last_drill_of,
    last_of_guests,
    name_line,
    save_picture,
    show_lines,
)
from stillframe.cli.session import Session
from stillframe.clock import utc_text
from stillframe.errors import EXIT_OK, StillframeError
from stillframe.repository.catalog import display_name, list_snapshots, resolve
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import Manifest
from stillframe.repository.opened import read_parameters
from stillframe.repository.pins import pin, pinned, read_pin, unpin
from stillframe.repository.snapshots import read_snapshot, read_tags
from stillframe.units import duration_text, size_text

_ID_SHOWN = 12


def short_id(sid: str) -> str:
    """Return as much of a snapshot's ID as people are shown."""
    return sid[:_ID_SHOWN]


def name_body(name: SnapshotName) -> dict[str, object]:
    """Return a snapshot's name for JSON."""
    return {"id": name.sid, "name": display_name(name), "host": name.host, "guest": name.guest,
            "captured_at": utc_text(name.utc)}


def name_words(name: SnapshotName) -> str:
    """Return a line for people that names a snapshot."""
    return f"{short_id(name.sid)}  {display_name(name)}  on {name.host}"


def find(session: Session, text: str) -> SnapshotName:
    """Return the snapshot that *text* names. Raises SnapshotUnknown, SnapshotAmbiguous, RepositoryUnknown."""
    read_parameters(session.storage)
    return resolve(list_snapshots(session.storage), text)


def list_all(session: Session, guest: str | None, tag: str | None, *, with_tags: bool) -> int:
    """List the snapshots, or those of one guest or with one tag; return the exit code."""
    read_parameters(session.storage)
    names = sorted(
        (name for name in list_snapshots(session.storage) if guest in (None, name.guest)),
        key=lambda each: (each.utc, each.sid))
    pins = pinned(session.storage)
    tags = read_tags(session.near_repository, names) if with_tags or tag is not None else {}
    if tag is not None:
        names = [name for name in names if tag in tags.get(name.sid, ())]
    for name in names:
        words = [name_words(name), *(["pinned"] if name.sid in pins else []), *_tag_words(tags, name)]
        session.screen.result("  ".join(words))
    if not names and tag is None:
        of_guest = f" of {guest}" if guest else ""
        session.screen.say(
            f"no snapshot{of_guest} yet: "
            f"stillframe backup {guest or 'GUEST'} --repo {session.storage.address}")
    standing = _standing(session, {name.guest for name in names})
    for name_, run in standing.items():
        session.screen.result(f"{name_} stands on the overlays of run {run} by intention")
    drills = last_of_guests(session, guest)
    for drill in drills:
        session.screen.result(name_line(drill))
    session.screen.json({
        "repository": session.storage.address, "standing": standing,
        "snapshots": [
            {**name_body(name), "pinned": name.sid in pins,
             **({"tags": tags.get(name.sid)} if with_tags or tag is not None else {})} for name in names],
        "drills": [drill_name_body(drill) for drill in drills]})
    return EXIT_OK


def _tag_words(tags: Mapping[str, Sequence[str]], name: SnapshotName) -> list[str]:
    """Return words for a snapshot's tags, none if it has none or they were not read."""
    return [f"tags: {', '.join(tags[name.sid])}"] if tags.get(name.sid) else []


def pin_snapshot(session: Session, text: str, why: str) -> int:
    """Keep a snapshot whatever the rules of `forget` say; return the exit code."""
    name = find(session, text)
    new = pin(session.storage, name, why, session.clock)
    session.screen.result(f"{name_words(name)}: {'pinned' if new else 'was pinned already'}")
    session.screen.json({"snapshot": name_body(name), "pinned": True, "changed": new})
    return EXIT_OK


def unpin_snapshot(session: Session, text: str) -> int:
    """Let the rules of `forget` decide on a snapshot again; return the exit code."""
    name = find(session, text)
    was = unpin(session.storage, name)
    session.screen.result(f"{name_words(name)}: {'no longer pinned' if was else 'was not pinned'}")
    session.screen.json({"snapshot": name_body(name), "pinned": False, "changed": was})
    return EXIT_OK


def _standing(session: Session, guests: set[str]) -> dict[str, str]:
    """Return the run whose overlays each of the guests stands on, as far as this host's journal tells."""
    if not (session.state_folder / "journal.db").exists():
        return {}  # listing needs no journal, and makes none
    try:
        runs = session.journal.standing_runs()
    except StillframeError:
        return {}
    return {run.name: run.id for run in runs if run.name in guests}


def show(session: Session, text: str, screenshot: Path | None) -> int:
    """Show one snapshot in full, and its last drill; return the exit code.

    *screenshot* is the file that the screen in that drill is written to.
    """
    name = find(session, text)
    manifest = read_snapshot(session.near_repository, name)
    held = read_pin(session.storage, name.sid)
    drill = last_drill_of(session, name)
    for line in (*_lines(name, manifest), *show_lines(drill)):
        session.screen.result(line)
    if held is not None:
        session.screen.result(f"pinned at {held.at}" + (f": {held.why}" if held.why else ""))
    if screenshot is not None:
        save_picture(session, drill, screenshot)
    session.screen.json({
        "snapshot": {**name_body(name), "pinned": held is not None, **msgspec.to_builtins(manifest)},
        "last_drill": None if drill is None else drill_body(drill)})
    return EXIT_OK


def _lines(name: SnapshotName, manifest: Manifest) -> Sequence[str]:
    versions = manifest.versions
    frozen = f", frozen for {duration_text(manifest.frozen_s)}" if manifest.frozen_s else ""
    lines = [
        f"snapshot {manifest.sid}  ({display_name(name)})",
        f"guest {manifest.guest} ({manifest.uuid}) on {manifest.host}",
        (f"captured at {manifest.captured_at}, {manifest.consistency}-consistent, "
        f"quiesced by {manifest.quiesce}{frozen}"),
        f"stored from {manifest.began_at} to {manifest.ended_at}, added {size_text(manifest.stored_bytes)}",
        f"parent {short_id(manifest.parent)}" if manifest.parent else "no parent: read as if all were new",
        (f"stillframe {versions.stillframe}, {_libvirt_words(versions.libvirt)}, QEMU {versions.qemu}, "
        f"machine {versions.machine}"),
    ]
    lines += [
        f"disk {disk.target}: {size_text(disk.size_bytes)}, {disk.format} {disk.source}; "
        f"{size_text(disk.data_bytes)} data, {size_text(disk.changed_bytes)} changed, "
        f"{size_text(disk.stored_bytes)} stored; by {disk.method}"
        + (f", read whole: {disk.note}" if disk.note else "")
        for disk in manifest.disks
    ]
    lines += [f"left out: {each}" for each in manifest.excluded]
    lines += [
        f"{entry.role} {entry.path}: {size_text(entry.size_bytes)}, taken at {entry.taken_at}"
        for entry in manifest.files
    ]
    lines += [f"warning: {warning}" for warning in manifest.warnings]
    return [*lines, *_tag_words({name.sid: manifest.tags}, name)]


def _libvirt_words(version: str) -> str:
    return f"libvirt {version}" if version else "no libvirt"
