"""`stillframe drill`: snapshots are booted to see that they boot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillframe.capture.growth import free_bytes
from stillframe.cli.drilled import check_lines, drill_body, drill_words, save_picture
from stillframe.cli.options import seconds_of
from stillframe.cli.screen import error_body
from stillframe.cli.session import Session
from stillframe.cli.snapshots import find, name_body, short_id
from stillframe.config import GuestSettings, drill_settings
from stillframe.errors import (
    EXIT_OK,
    EXIT_PARTIAL,
    DrillFailed,
    SnapshotUnknown,
    StillframeError,
)
from stillframe.repository.catalog import display_name, list_snapshots
from stillframe.repository.drills import Drill, record_drill
from stillframe.repository.held import held_snapshot
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import Manifest
from stillframe.repository.snapshots import read_snapshot
from stillframe.restore.drill import WRITTEN_FOLDER, DrillPlan, DrillTools, DrillWish, plan_drill, run_drill
from stillframe.restore.drill_place import clear_left_drills
from stillframe.restore.drill_watch import Proof
from stillframe.units import duration_text, size_text


@dataclass(frozen=True)
class Order:
    """What is to be drilled, and how. *snapshot* is None for the latest of every guest."""

    snapshot: str | None
    options: GuestSettings
    script: str
    check_timeout: str
    network: str
    nearest: bool
    screenshot: Path | None
    dry_run: bool = False


def drill(session: Session, order: Order) -> int:
    """Drill what is asked for, one after the other; return the exit code."""
    session.kept = "What was booted is gone; nothing was written down of it."
    seconds_of("check_timeout", order.check_timeout)
    names = _latest(session) if order.snapshot is None else [find(session, order.snapshot)]
    session.ask_for_secret()
    if order.dry_run:
        session.screen.json({"dry_run": True, "drills": [_would(session, name, order) for name in names]})
        return EXIT_OK
    for words in clear_left_drills(session.state_folder, session.connection):
        session.screen.warn(words)
    bodies: list[dict[str, object]] = []
    errors: list[StillframeError] = []
    failed = False
    with session.signals_as_stop("what was booted is being thrown away"):
        for name in names:
            try:
                found = _one(session, name, order)
            except StillframeError as error:
                if len(names) == 1 or session.stop() is not None:
                    raise
                session.complete(error)
                session.screen.error(error, display_name(name))
                errors.append(error)
                bodies.append({"snapshot": name_body(name), "error": error_body(error)})
                continue
            _show(session, name, found)
            failed |= not found.passed
            bodies.append({"snapshot": name_body(name), "error": None, **drill_body(found)})
            if order.screenshot is not None:
                save_picture(session, found, order.screenshot)
    session.screen.json({"dry_run": False, "drills": bodies})
    if failed:
        return DrillFailed.exit_code
    return (errors[0].exit_code if len(errors) == len(names) else EXIT_PARTIAL) if errors else EXIT_OK


def _one(session: Session, name: SnapshotName, order: Order) -> Drill:
    """Drill one snapshot and write down what was found."""
    with held_snapshot(session.repository, name, session.clock, session.host) as manifest:
        plan, wish, tools = _planned(session, name, manifest, order)
        moment = session.clock.now()
        found = run_drill(plan, wish, tools)
    record_drill(session.repository, moment, found)
    return found


def _planned(
    session: Session, name: SnapshotName, manifest: Manifest, order: Order,
) -> tuple[DrillPlan, DrillWish, DrillTools]:
    chosen = drill_settings(session.settings, name.guest, order.options)
    proof = Proof(chosen.expect, order.script, chosen.checks, chosen.timeout_s,
                  seconds_of("check_timeout", order.check_timeout))
    wish = DrillWish(proof, order.network, order.nearest)
    tools = DrillTools(session.repository, session.connection, session.state_folder, session.clock,
                       session.host, session.stop, session.screen.say)
    plan = plan_drill(name, manifest, wish, tools)
    for warning in plan.warnings:
        session.screen.warn(f"{name.guest}: {warning}")
    return plan, wish, tools


def _would(session: Session, name: SnapshotName, order: Order) -> dict[str, object]:
    """Say what would be drilled and how, and return it for JSON; raises what would stop it."""
    plan, wish, _ = _planned(session, name, read_snapshot(session.repository, name), order)
    proof = wish.proof
    free = free_bytes(WRITTEN_FOLDER)
    session.screen.result(
        f"{display_name(name)}: {plan.made.name} would be booted, and is up by "
        f"{' and '.join(proof.waits_for)} within {duration_text(proof.boot_s)}; what it writes goes to "
        f"{WRITTEN_FOLDER}, {size_text(free)} are free")
    for check in proof.checks:
        session.screen.result(f"  would check {check}")
    return {"snapshot": name_body(name), "guest": plan.made.name, "waits_for": list(proof.waits_for),
            "checks": list(proof.checks), "boot_s": proof.boot_s, "warnings": list(plan.warnings),
            "definition": plan.definition, "written_to": WRITTEN_FOLDER, "free_bytes": free}


def _latest(session: Session) -> list[SnapshotName]:
    """Return the newest snapshot of each guest of each host."""
    newest: dict[tuple[str, str], SnapshotName] = {}
    for name in sorted(list_snapshots(session.storage), key=lambda each: (each.utc, each.sid)):
        newest[name.host, name.guest] = name
    if not newest:
        raise SnapshotUnknown("There is no snapshot in the repository yet.",
                              "stillframe backup GUEST --repo REPO")
    return [newest[guest] for guest in sorted(newest)]


def _show(session: Session, name: SnapshotName, found: Drill) -> None:
    for line in (f"{display_name(name)}: {drill_words(found)}", *check_lines(found)):
        session.screen.result(line)
    if not found.passed:
        error = DrillFailed(
            f"The drill of {display_name(name)} failed: {found.reason}.",
            f"stillframe show {short_id(name.sid)} --repo REPO   # with what the guest printed last")
        session.complete(error)
        session.screen.error(error)
