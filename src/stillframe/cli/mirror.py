"""`stillframe mirror`: one guest after the other; one guest's failure does not stop the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stillframe.cli.find import find_guest
from stillframe.cli.guests import all_guests, body_of, exit_code, for_each
from stillframe.cli.places import destination_of
from stillframe.cli.session import Session
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import EXIT_CRASH_CONSISTENT, EXIT_FELL_BACK, EXIT_OK
from stillframe.mirror.place import Destination
from stillframe.mirror.run import MirrorJob, MirrorResult, mirror_guest
from stillframe.mirror.update import CopyResult
from stillframe.units import duration_text, size_text


def mirror(
    session: Session, names: Sequence[str], destination: str, options: GuestSettings, verify: bool
) -> int:
    """Mirror the named guests, or all if none is named; return the exit code."""
    where = destination_of(session, destination)
    targets = list(names) or all_guests(session, options)
    outcomes = for_each(
        session, targets, lambda name: _one(session, name, where, options, verify),
        lambda name, result: _show(session, name, result))
    session.screen.json({"guests": [
        body_of(name, outcome, fell_back=isinstance(outcome, MirrorResult) and outcome.fell_back)
        for name, outcome in outcomes]})
    return exit_code([outcome for _, outcome in outcomes], _code)


def _one(
    session: Session, name: str, destination: Destination, options: GuestSettings, verify: bool
) -> MirrorResult:
    domain = find_guest(session, name)
    session.screen.say(f"mirroring {domain.name} to {destination.text_for(domain.name)}")
    wishes = for_guest(session.settings, domain.name, options)
    return mirror_guest(
        MirrorJob(
            domain, destination,
            replace(wishes, command=wishes.command.replace("{guest}", domain.advice.guest)), verify,
            session.stop, session.screen.on_copy(domain.name),
        ),
        session.tools,
    )


def _code(result: MirrorResult) -> int:
    if result.fell_back:
        return EXIT_FELL_BACK
    # Crash-consistent although nobody asked for it with --quiesce none.
    return EXIT_CRASH_CONSISTENT if result.consistency == "crash" and result.warnings else EXIT_OK


def _show(session: Session, name: str, result: MirrorResult) -> None:
    screen = session.screen
    for disk in result.disks:
        screen.result(f"{name} {disk.target}: {_disk_words(disk)}")
    frozen = f", frozen for {duration_text(result.frozen_s)}" if result.frozen_s else ""
    screen.result(
        f"{name}: {result.folder} holds the guest as of {result.captured_at}, "
        f"{result.consistency}-consistent{frozen}; took {duration_text(result.seconds)}"
    )


def _disk_words(disk: CopyResult) -> str:
    how = "first copy" if disk.first_copy else f"{size_text(disk.changed_bytes)} of it changed"
    words = (f"by {disk.method}, {size_text(disk.data_bytes)} read, {how}, "
             f"{size_text(disk.written_bytes)} written")
    if disk.fell_back and disk.fell_back != disk.note:
        words += f"; compared in full: {disk.fell_back}"
    if disk.note:
        words += f"; read whole: {disk.note}"
    if disk.healed_blocks:
        words += f"; {disk.healed_blocks} blocks of the mirror were wrong and are mended"
    return f"{words} ({duration_text(disk.seconds)})"
