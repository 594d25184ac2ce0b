"""`stillframe mirror`: one guest after the other; one guest's failure does not stop the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from stillframe.cli.screen import error_body
from stillframe.cli.session import Session
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import (
    EXIT_CRASH_CONSISTENT,
    EXIT_FELL_BACK,
    EXIT_OK,
    EXIT_PARTIAL,
    GuestShutOff,
    NeedsAttention,
    StillframeError,
)
from stillframe.hypervisor.domain import Domain, all_domains, find_domain
from stillframe.hypervisor.model import Power
from stillframe.mirror.run import MirrorJob, MirrorResult, mirror_guest
from stillframe.mirror.update import CopyResult
from stillframe.units import duration_text, size_text

Outcome = MirrorResult | StillframeError


def mirror(
    session: Session, names: Sequence[str], destination: Path, options: GuestSettings, verify: bool
) -> int:
    """Mirror the named guests, or all running ones if none is named; return the exit code."""
    targets = list(names) or _running(session)
    outcomes: list[tuple[str, Outcome]] = []
    with session.signals_as_stop():
        for name in targets:
            outcome = _one(session, name, destination, options, verify)
            outcomes.append((name, outcome))
            _show(session, name, outcome)
    session.screen.json({"guests": [_body(name, outcome) for name, outcome in outcomes]})
    return _exit_code([outcome for _, outcome in outcomes])


def _running(session: Session) -> list[str]:
    running = []
    for domain in all_domains(session.connection):
        if domain.power() in (Power.OFF, Power.GONE):
            session.screen.say(f"{domain.name} is shut off and is left out")
        else:
            running.append(domain.name)
    if not running:
        raise GuestShutOff("No guest runs, so there is nothing to mirror.", "virsh list --all")
    return running


def _one(
    session: Session, name: str, destination: Path, options: GuestSettings, verify: bool
) -> Outcome:
    try:
        stopped = session.stop()
        if stopped is not None:
            raise stopped
        domain: Domain = find_domain(session.connection, name)
        session.screen.say(f"mirroring {domain.name} to {destination / domain.name}")
        return mirror_guest(
            MirrorJob(
                domain, destination, for_guest(session.settings, domain.name, options), verify,
                session.stop, session.screen.on_copy(domain.name),
            ),
            session.tools,
        )
    except StillframeError as error:
        return error


def _show(session: Session, name: str, outcome: Outcome) -> None:
    screen = session.screen
    if isinstance(outcome, StillframeError):
        screen.error(outcome, name)
        return
    for word in outcome.recovered:
        screen.warn(word)
    for warning in outcome.warnings:
        screen.warn(f"{name}: {warning}")
    for excluded in outcome.excluded:
        screen.say(f"{name}: {excluded.target} is not mirrored: {excluded.reason}")
    for disk in outcome.disks:
        screen.result(f"{name} {disk.target}: {_disk_words(disk)}")
    frozen = f", frozen for {duration_text(outcome.frozen_s)}" if outcome.frozen_s else ""
    screen.result(
        f"{name}: {outcome.folder} holds the guest as of {outcome.captured_at}, "
        f"{outcome.consistency}-consistent{frozen}; took {duration_text(outcome.seconds)}"
    )


def _disk_words(disk: CopyResult) -> str:
    how = "first copy" if disk.first_copy else f"{size_text(disk.changed_bytes)} of it changed"
    words = f"{size_text(disk.data_bytes)} read, {how}, {size_text(disk.written_bytes)} written"
    if disk.fell_back:
        words += f"; compared in full: {disk.fell_back}"
    if disk.healed_blocks:
        words += f"; {disk.healed_blocks} blocks of the mirror were wrong and are mended"
    return f"{words} ({duration_text(disk.seconds)})"


def _body(name: str, outcome: Outcome) -> dict[str, object]:
    if isinstance(outcome, StillframeError):
        return {"guest": name, "ok": False, "error": error_body(outcome)}
    return {"guest": name, "ok": True, "fell_back": outcome.fell_back, **asdict(outcome)}


def _exit_code(outcomes: Sequence[Outcome]) -> int:
    errors = [each for each in outcomes if isinstance(each, StillframeError)]
    if errors:
        if any(isinstance(error, NeedsAttention) for error in errors):
            return NeedsAttention.exit_code
        # One guest's error is the command's; several guests failing alike, too.
        codes = {error.exit_code for error in errors}
        return codes.pop() if len(errors) == len(outcomes) and len(codes) == 1 else EXIT_PARTIAL
    results = [each for each in outcomes if isinstance(each, MirrorResult)]
    if any(result.fell_back for result in results):
        return EXIT_FELL_BACK
    # Crash-consistent although nobody asked for it with --quiesce none.
    if any(result.consistency == "crash" and result.warnings for result in results):
        return EXIT_CRASH_CONSISTENT
    return EXIT_OK
