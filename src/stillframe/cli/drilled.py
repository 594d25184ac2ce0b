"""What people and programs are told of drills that were written down."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from stillframe.cli.session import Session
from stillframe.clock import utc_text
from stillframe.errors import DestinationUnwritable, ObjectMissing
from stillframe.repository.drills import Drill, DrillName, last_drills, list_drills, read_drill
from stillframe.repository.layout import SnapshotName
from stillframe.restore.target import write_errors
from stillframe.units import duration_text

_ID_SHOWN = 12


def drill_words(found: Drill) -> str:
    """Return what came of a drill, for people."""
    up = f", up in {duration_text(found.boot_s)}" if found.boot_s is not None else ""
    by = f" (by {' and '.join(found.waited_for)})"
    return f"{'passed' if found.passed else 'failed'}{up}{by}{f': {found.reason}' if found.reason else ''}"


def check_lines(found: Drill) -> list[str]:
    """Return a line for each check of a drill."""
    lines = []
    for check in found.checks:
        ended = "came to no end" if check.exit_code is None else f"exit code {check.exit_code}"
        said = " / ".join(check.output.strip().splitlines()[-3:])
        took = duration_text(check.seconds)
        lines.append(f"  check {check.command}: {ended}, {took}{f': {said}' if said else ''}")
    return lines


def drill_body(found: Drill) -> dict[str, Any]:
    """Return a drill for JSON; of the picture, only how large it is."""
    body: dict[str, Any] = msgspec.to_builtins(found)
    body["screenshot_bytes"] = len(found.screenshot)
    del body["screenshot"], body["version"]
    return body


def last_drill_of(session: Session, name: SnapshotName) -> Drill | None:
    """Return the last drill of a snapshot, None if there was none."""
    mine = [each for each in list_drills(session.storage) if each.sid == name.sid]
    with contextlib.suppress(ObjectMissing):  # a prune dropped it meanwhile
        return read_drill(session.storage, mine[-1], session.repository.key) if mine else None
    return None


def last_of_guests(session: Session, guest: str | None) -> list[DrillName]:
    """Return the last drill of each guest, or of those called *guest*; no key is needed."""
    last = last_drills(list_drills(session.storage))
    return [last[each] for each in sorted(last) if guest in (None, each[1])]


def name_line(name: DrillName) -> str:
    """Return a line for people about a drill of which the name alone is known."""
    verdict = "passed" if name.passed else "failed"
    return (f"{name.guest} on {name.host}: last drill at {utc_text(name.utc)} {verdict}, "
            f"of snapshot {name.sid[:_ID_SHOWN]}")


def drill_name_body(name: DrillName) -> dict[str, object]:
    """Return a drill's name for JSON."""
    return {"host": name.host, "guest": name.guest, "drilled_at": utc_text(name.utc), "snapshot": name.sid,
            "passed": name.passed}


def show_lines(found: Drill | None) -> Sequence[str]:
    """Return what `show` says of a snapshot's last drill."""
    if found is None:
        return ["not drilled yet"]
    lines = [f"drilled at {found.began_at} on {found.drilled_on}: {drill_words(found)}", *check_lines(found)]
    if not found.passed:
        lines += [f"  printed: {line}" for line in found.console.strip().splitlines()[-10:]]
    return lines


def save_picture(session: Session, found: Drill | None, path: Path) -> None:
    """Write a drill's picture of the screen to a file; one that is there is replaced."""
    if found is None or not found.screenshot:
        why = found.screenshot_note if found is not None else "it was not drilled yet"
        session.screen.warn(f"there is no picture of the screen: {why}")
        return
    with write_errors(str(path), DestinationUnwritable):
        path.write_bytes(found.screenshot)
    session.screen.say(f"the screen is in {path}")
