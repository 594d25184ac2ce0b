"""`stillframe backup`: one guest after the other; one guest's failure does not stop the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stillframe.backup.run import BackupJob, BackupResult, backup_guest
from stillframe.backup.snapshot import DiskResult
from stillframe.cli.find import find_guest
from stillframe.cli.guests import all_guests, body_of, exit_code, for_each
from stillframe.cli.session import Session
from stillframe.cli.snapshots import short_id
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import EXIT_CRASH_CONSISTENT, EXIT_FELL_BACK, EXIT_OK
from stillframe.storage.address import folder_of
from stillframe.units import duration_text, size_text

#: What a message tells people to type again, with another option.
_COMMAND = "stillframe backup {guest} --repo REPO"


def backup(session: Session, names: Sequence[str], options: GuestSettings) -> int:
    """Back the named guests up, or all if none is named; return the exit code."""
    session.kept = "No snapshot was made; those that are there are as they were."
    folder = folder_of(session.address)
    session.ask_for_secret()
    targets = list(names) or all_guests(session, options)
    outcomes = for_each(
        session, targets, lambda name: _one(session, name, folder, options),
        lambda name, result: _show(session, name, result))
    session.screen.json({"guests": [
        body_of(name, outcome, fell_back=isinstance(outcome, BackupResult) and outcome.fell_back)
        for name, outcome in outcomes]})
    return exit_code([outcome for _, outcome in outcomes], _code)


def _one(session: Session, name: str, folder: Path | None, options: GuestSettings) -> BackupResult:
    domain = find_guest(session, name)
    session.screen.say(f"backing {domain.name} up to {session.address}")
    wishes = for_guest(session.settings, domain.name, options)
    return backup_guest(
        BackupJob(
            domain, lambda: session.near_repository, folder, session.host, session.hints_folder,
            replace(wishes, command=_COMMAND.replace("{guest}", domain.advice.guest)), session.stop,
            lambda target, done, total: session.screen.bar(f"{domain.name} {target}: copy", done, total),
            session.settings.of_guest(domain.name, options).tags or (),
        ),
        session.tools,
    )


def _code(result: BackupResult) -> int:
    if result.fell_back:
        return EXIT_FELL_BACK
    return EXIT_CRASH_CONSISTENT if result.fell_short else EXIT_OK


def _show(session: Session, name: str, result: BackupResult) -> None:
    screen = session.screen
    for disk in result.disks:
        screen.result(f"{name} {disk.target}: {_disk_words(disk)}")
    frozen = f", frozen for {duration_text(result.frozen_s)}" if result.frozen_s else ""
    parent = f"upon {short_id(result.parent)}" if result.parent else f"no parent: {result.parent_note}"
    screen.result(
        f"{name}: snapshot {short_id(result.snapshot)} holds the guest as of {result.captured_at}, "
        f"{result.consistency}-consistent{frozen}; {parent}; {size_text(result.stored_bytes)} stored; "
        f"took {duration_text(result.seconds)}"
    )


def _disk_words(disk: DiskResult) -> str:
    changed = f", {size_text(disk.changed_bytes)} changed" if disk.compared else ""
    whole = f"; read whole: {disk.note}" if disk.note else ""
    return (f"by {disk.method}, {size_text(disk.read_bytes)} read{changed}, "
            f"{size_text(disk.stored_bytes)} stored{whole} ({duration_text(disk.seconds)})")


