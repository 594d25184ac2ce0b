"""`stillframe boot`, `land` and `discard`: a guest that runs at once from a snapshot, and its two ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stillframe.capture.lock import lock_holder
from stillframe.cli.options import seconds_of
from stillframe.cli.session import Session
from stillframe.cli.snapshots import find
from stillframe.errors import EXIT_OK
from stillframe.repository.held import held_snapshot
from stillframe.repository.snapshots import read_snapshot
from stillframe.restore.boot import boot_guest
from stillframe.restore.boot_decide import BootStep
from stillframe.restore.boot_plan import BootWish, plan_boot
from stillframe.restore.boot_record import BootRecord, BootState
from stillframe.restore.boot_server import log_of
from stillframe.restore.boot_steps import BootTools, BootWay
from stillframe.restore.land import discard_guest, land_guest
from stillframe.restore.land_plan import LandWish, plan_landing
from stillframe.units import size_text

#: Of a server's log, in `status`.
_SHOWN_LINES = 3


def boot(session: Session, snapshot: str, wish: BootWish, patience: str, *, dry_run: bool) -> int:
    """Boot a snapshot as a new guest; return the exit code."""
    session.kept = "Nothing of it is left."
    patience_s = seconds_of("patience", patience)
    name = find(session, snapshot)
    manifest = read_snapshot(session.repository, name)
    other = manifest.guest if wish.guest.keeps_identity else f"{manifest.guest}-booted"
    wish = replace(wish, patience_s=patience_s, guest=replace(wish.guest, name=wish.guest.name or other))
    tools = tools_of(session)
    plan = plan_boot(session.repository, name, manifest, wish, tools)
    for warning in plan.warnings:
        session.screen.warn(warning)
    if dry_run:
        session.screen.result(plan.definition)
        for disk in plan.record.disks:
            session.screen.result(
                f"{disk.target}: what it writes would go to {disk.overlay_path}; once landed it takes "
                f"{size_text(disk.data_bytes)} or more, {size_text(plan.free_bytes)} are free")
        session.screen.json({"dry_run": True, **record_body(plan.record), "definition": plan.definition,
                             "free_bytes": plan.free_bytes})
        return EXIT_OK
    # Its servers have sessions of their own, once they run.
    with (
        held_snapshot(session.repository, name, session.clock, session.host),
        session.signals_as_stop("what was made is being removed"),
    ):
        record = boot_guest(plan, tools, session.stop)
    session.screen.result(
        f"{record.name} runs from {record.snapshot} in {record.address}; it reads from there until: "
        f"stillframe land {record.name}")
    for disk in record.disks:
        session.screen.result(f"{disk.target}: what it writes goes to {disk.overlay_path}")
    session.screen.json({"dry_run": False, **record_body(record)})
    return EXIT_OK


def land(session: Session, name: str, wish: LandWish, *, dry_run: bool) -> int:
    """Bring a booted guest home while it runs; return the exit code."""
    session.kept = "The guest runs on from its snapshot; what was pulled stays."
    record = session.boot_store.get(name)
    if dry_run:
        return _show_landing(session, record, wish)

    def report(target: str, done_bytes: int, total_bytes: int) -> None:
        session.screen.bar(f"{record.name} {target}: land", done_bytes, total_bytes)

    with session.signals_as_stop("the guest runs on from its snapshot"):
        landed = land_guest(record, wish, tools_of(session), session.stop, report)
    session.screen.result(f"{record.name} has landed: it needs neither the snapshot nor a server any more")
    session.screen.json({"dry_run": False, "guest": record.name, "did": landed.did, "disks": [
        {"target": disk.target, "image": disk.image_path, "format": disk.image_format}
        for disk in landed.disks]})
    return EXIT_OK


def _show_landing(session: Session, record: BootRecord, wish: LandWish) -> int:
    tools = tools_of(session)
    landings = plan_landing(record, BootWay(record, tools).look(), wish, tools)
    for landing in landings:
        session.screen.result(f"{record.name} {landing.words()}")
    session.screen.json({"dry_run": True, "guest": record.name, "disks": [
        {"target": each.target, "image": each.path, "copied": each.copy is not None,
         "missing_bytes": each.missing_bytes} for each in landings]})
    return EXIT_OK


def discard(session: Session, name: str, *, dry_run: bool) -> int:
    """Throw a booted guest away; return the exit code."""
    record = session.boot_store.get(name)
    did = discard_guest(record, tools_of(session), dry_run=dry_run)
    for words in did:
        session.screen.result(f"{record.name}: {words}")
    session.screen.json({"dry_run": dry_run, "guest": record.name, "did": did})
    return EXIT_OK


def tools_of(session: Session) -> BootTools:
    """Return what booted guests are handled with."""
    return BootTools(
        session.boot_store, session.connection, session.clock,
        session.repository_at, session.screen.say)


def record_body(record: BootRecord) -> dict[str, object]:
    """Return a booted guest for JSON."""
    return {
        "guest": record.name, "uuid": record.uuid, "state": record.state.value, "snapshot": record.snapshot,
        "snapshot_id": record.sid, "repository": record.address, "booted_at": record.began_at,
        "on_error": "pause" if record.pauses else "report",
        "disks": [{"target": disk.target, "overlay": disk.overlay_path, "image": disk.image_path,
                   "landed": disk.landed}
                  for disk in record.disks],
    }


@dataclass(frozen=True)
class BootedGuest:
    """A booted guest as `status` shows it. *trouble* says what is not as it should be, "" if all is."""

    record: BootRecord
    trouble: str
    lines: tuple[str, ...]

    def words(self) -> list[str]:
        """Return it for people."""
        record = self.record
        state = "runs" if record.state is BootState.BOOTED else f"is {record.state.value}"
        about = f"{self.trouble}: stillframe recover {record.name}" if self.trouble else (
            f"to bring it home: stillframe land {record.name}")
        source = f"{record.snapshot} in {record.address}, since {record.began_at}"
        return [f"{record.name} {state} from {source}; {about}", *(f"  {line}" for line in self.lines)]

    def body(self) -> dict[str, object]:
        """Return it for JSON."""
        return {**record_body(self.record), "trouble": self.trouble, "log": list(self.lines)}


def booted_guests(session: Session) -> list[BootedGuest]:
    """Return the booted guests, as they are now. Raises NoHypervisor."""
    tools = tools_of(session) if session.boot_store.all() else None
    return [] if tools is None else [_seen(record, tools) for record in session.boot_store.all()]


def _seen(record: BootRecord, tools: BootTools) -> BootedGuest:
    lines = tuple(line for disk in record.disks for line in log_of(tools.store, record, disk)[-_SHOWN_LINES:])
    holder = lock_holder(tools.store.state_folder, record.uuid)
    if holder:  # what it makes is half made now, and will be whole
        return BootedGuest(record, "", (f"at work: {holder}", *lines))
    decision = BootWay(record, tools).decide()
    return BootedGuest(record, "" if decision.step is BootStep.NOTHING else decision.reason, lines)
