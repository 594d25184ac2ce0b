"""`stillframe status`: runs, leftovers, guests on overlays, the last mirror and snapshot of each guest."""

from __future__ import annotations

import os

from stillframe.capture.journal import RunRecord
from stillframe.capture.lock import lock_holder
from stillframe.capture.restoring import RestoringStore, attention
from stillframe.capture.standing import past_limit
from stillframe.capture.watched import Watched
from stillframe.cli.boot import BootedGuest, booted_guests
from stillframe.cli.places import place_of
from stillframe.cli.session import Session
from stillframe.cli.snapshots import name_body, name_words
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import EXIT_OK, NeedsAttention, StillframeError
from stillframe.hypervisor.advice import is_bare
from stillframe.hypervisor.domain import all_domains
from stillframe.hypervisor.model import OVERLAY_SUFFIX
from stillframe.mirror.record import FolderState
from stillframe.mirror.recover import inspect_folder
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.layout import SnapshotName
from stillframe.repository.opened import read_parameters
from stillframe.repository.snapshots import newest_of_each
from stillframe.restore.claim import Claims
from stillframe.storage.model import Storage

_STORAGE_TIMEOUT_S = 15.0
_SHOWN_RUNS = 100
_BAD_MIRRORS = {
    state.value for state in (FolderState.DAMAGED, FolderState.UNREADABLE, FolderState.PENDING)
}


def status(session: Session) -> int:
    """Print the state of everything; return NeedsAttention's exit code if something was left."""
    runs = [_run_body(session, run) for run in session.journal.open_runs()]
    unreachable, unreachable_code = "", EXIT_OK
    overlaid: list[dict[str, str]] = []
    try:
        overlaid = _overlaid(session)
    except StillframeError as error:
        if not _without_libvirt(session):
            unreachable, unreachable_code = error.message, error.exit_code
            session.screen.warn(f"which guests stand on overlays is not known: {error.message}")
    standing = _standing(session)
    restoring = _restoring(session)
    restores = _restores(session)
    mirrors = _mirrors(session)
    booted = _booted(session)
    snapshots, repository_error = _snapshots(session)
    session.screen.json({"open_runs": runs, "guests_on_overlays": overlaid, "standing": standing,
                         "restoring": restoring, "restores": restores, "mirrors": mirrors,
                         "booted": [each.body() for each in booted],
                         "snapshots": [name_body(name) for name in snapshots],
                         "libvirt_error": unreachable, "repository_error": repository_error})
    _print(session, runs, overlaid, mirrors)
    for each in standing:
        session.screen.result(
            f"{each['guest']} stands on the overlays of run {each['run']} by intention, for its next run to "
            f"{each['destination']}" + (f"; {each['past_limit']}: stillframe settle --past-limit"
                                        if each["past_limit"] else ""))
    for each in restoring:
        state = each["holder"] or f"it can't be started: {each['next_command']}"
        session.screen.result(f"{each['words']}; {state}")
    for each in restores:
        session.screen.result(f"{each['words']}; {each['holder'] or each['next_command']}")
    for guest in booted:
        for line in guest.words():
            session.screen.result(line)
    for name in snapshots:
        session.screen.result(f"last snapshot of {name.guest}: {name_words(name)}")
    if not (runs or overlaid or standing or restoring or restores or booted or mirrors or snapshots):
        session.screen.result("no run yet: stillframe mirror GUEST DEST, or stillframe backup GUEST")
    left = [run for run in runs if not run["running"]]
    unknown = [each for each in overlaid if each["run"] == ""]
    busy = {run["guest"] for run in runs if run["running"]}
    bad = [each for each in mirrors if each["state"] in _BAD_MIRRORS and each["guest"] not in busy]
    torn = any(not each["holder"] for each in restoring) or any(each.trouble for each in booted)
    if left or unknown or bad or torn:
        return NeedsAttention.exit_code
    return unreachable_code


def _print(
    session: Session, runs: list[dict[str, object]], overlaid: list[dict[str, str]],
    mirrors: list[dict[str, str]],
) -> None:
    say = session.screen.result
    for run in runs:
        state = f"is {run['state']} ({run['holder']})" if run["running"] else (
            f"ended while {run['state']} and was not recovered: stillframe recover {run['guest']}")
        say(f"run {run['id']} of {run['guest']} {state}")
        for path in run["overlays"] if isinstance(run["overlays"], list) else []:
            say(f"  overlay {path}")
    for each in overlaid:
        owner = f"run {each['run']}" if each["run"] else "no known run: a person must look"
        say(f"{each['guest']} {each['target']} is on the overlay {each['overlay']} ({owner})")
    for mirror in mirrors:
        say(
            f"mirror of {mirror['guest']} in {mirror['folder']}: {mirror['state']}"
            + (f", as of {mirror['captured_at']}, {mirror['consistency']}-consistent"
               if mirror["captured_at"] else "")
        )


def _restoring(session: Session) -> list[dict[str, str]]:
    """Return the restores in place that are under way or were broken off."""
    folder = session.journal.folder
    return [
        {"guest": each.name, "snapshot": each.sid, "phase": each.phase.value, "words": each.words(),
         "state_before": each.before, "holder": lock_holder(folder, each.uuid),
         "next_command": attention(each).next_command}
        for each in RestoringStore(folder).all()
    ]


def _restores(session: Session) -> list[dict[str, str]]:
    """Return the restores to new guests that are under way or were broken off. No guest depends on them."""
    claims = Claims(session.state_folder, session.clock)
    return [{"guest": each.name, "snapshot": each.sid, "words": each.words(),
             "holder": claims.holder(each.name), "next_command": each.again()} for each in claims.all()]


def _snapshots(session: Session) -> tuple[list[SnapshotName], str]:
    """Return the newest snapshot of each guest, if a repository is configured, or why that is not known."""
    if session.repository_settings.repository is None:
        return [], ""
    try:
        storage = session.storage
        found = Watched(lambda _: _newest(storage), session.clock, "list").result(
            session.stop, stall_timeout_s=_STORAGE_TIMEOUT_S)
    except StillframeError as error:
        session.screen.warn(f"the snapshots in {session.address} are not known: {error.message}")
        return [], error.message
    return found, ""


def _newest(storage: Storage) -> list[SnapshotName]:
    read_parameters(storage)
    return sorted(newest_of_each(list_snapshots(storage)).values())


def _run_body(session: Session, run: RunRecord) -> dict[str, object]:
    holder = lock_holder(session.journal.folder, run.uuid)
    return {
        "id": run.id, "guest": run.name, "state": run.state.value, "began_at": run.began_at,
        "destination": run.destination, "running": bool(holder), "holder": holder,
        "overlays": [disk.overlay_path for disk in run.disks if os.path.exists(disk.overlay_path)],
    }


def _standing(session: Session) -> list[dict[str, str]]:
    """Return the guests that stand on overlays by intention, and which have grown past their limit."""
    return [
        {"guest": run.name, "run": run.id, "destination": run.destination, "captured_at": run.captured_at,
         "past_limit": past_limit(run, for_guest(session.settings, run.name, GuestSettings()).limits)}
        for run in session.journal.standing_runs()
    ]


def _booted(session: Session) -> list[BootedGuest]:
    try:
        return booted_guests(session)
    except StillframeError as error:
        session.screen.warn(f"how guests that were booted from snapshots are is not known: {error.message}")
        return []


def _without_libvirt(session: Session) -> bool:
    """Return whether this is a host for which libvirt was never needed: all its runs were of bare QEMUs."""
    runs = session.journal.last_runs(_SHOWN_RUNS)
    return bool(runs) and all(is_bare(run.uri) for run in runs)


def _overlaid(session: Session) -> list[dict[str, str]]:
    runs = [*session.journal.open_runs(), *session.journal.standing_runs()]
    known = {disk.overlay_path: run.id for run in runs for disk in run.disks}
    found = []
    for domain in all_domains(session.connection):
        for xml in domain.descriptions()[:1]:
            found += [
                {"guest": domain.name, "target": disk.target, "overlay": disk.top.place,
                 "run": known.get(disk.top.place, "")}
                for disk in xml.disks.values() if disk.top.place.endswith(OVERLAY_SUFFIX)
            ]
    return found


def _mirrors(session: Session) -> list[dict[str, str]]:
    folders: dict[str, str] = {}
    for run in session.journal.last_runs(_SHOWN_RUNS):
        if run.mirror_folder:
            folders.setdefault(run.mirror_folder, run.name)
    found = []
    for folder, guest in sorted(folders.items()):
        try:
            seen = inspect_folder(place_of(session, folder), clock=session.clock)
        except StillframeError as error:
            found.append({"guest": guest, "folder": folder, "state": error.message,
                          "captured_at": "", "consistency": ""})
            continue
        record = seen.pending or seen.record
        found.append({
            "guest": guest, "folder": folder, "state": seen.state.value,
            "captured_at": record.captured_at if record else "",
            "consistency": record.consistency if record else "",
        })
    return found
