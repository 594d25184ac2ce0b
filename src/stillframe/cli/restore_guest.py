"""`stillframe restore --as`: a whole guest, beside the original or on another host."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from stillframe.cli.restore import say_restored, stop_of
from stillframe.cli.restore_app import GuestOptions
from stillframe.cli.session import Session
from stillframe.cli.snapshots import find, name_body
from stillframe.errors import EXIT_OK, RepositoryDamaged
from stillframe.repository.held import held_snapshot
from stillframe.repository.manifest import Manifest
from stillframe.repository.places import Places
from stillframe.repository.snapshots import read_snapshot
from stillframe.restore.claim import Claims
from stillframe.restore.guest_plan import GuestPlan, GuestWish, plan_guest
from stillframe.restore.run import RestoreProgress
from stillframe.restore.whole_guest import (
    GuestTools,
    RestoredGuest,
    forget_defined,
    start_guest,
)
from stillframe.restore.whole_guest import restore_guest as make_guest
from stillframe.units import size_text


@dataclass(frozen=True)
class Order:
    """What is to be restored, and how. *force* overwrites block devices."""

    snapshot: str
    options: GuestOptions
    image_format: str
    force: bool
    skip_bad: bool
    dry_run: bool

    @property
    def wish(self) -> GuestWish:
        """What the guest is to be."""
        chosen = self.options
        return GuestWish(chosen.name or "", chosen.pool, chosen.devices, self.image_format, self.force,
                         chosen.keeps_identity, chosen.network, chosen.nearest)

    @property
    def starts(self) -> bool:
        """Whether the guest is to be started."""
        return self.options.starts


def restore_guest(session: Session, order: Order) -> int:
    """Restore a whole guest; return the exit code: RepositoryDamaged's if anything was lost and skipped."""
    name = find(session, order.snapshot)
    session.kept = "Nothing of the new guest is left."
    claims = Claims(session.state_folder, session.clock)
    head: dict[str, object] = {
        "snapshot": name_body(name), "guest": order.wish.name, "dry_run": order.dry_run}
    if order.dry_run:
        manifest = read_snapshot(session.near_repository, name)
        return _show(session, _plan(session, manifest, order, claims), head)
    with held_snapshot(session.near_repository, name, session.clock, session.host) as manifest:
        return _restored(session, manifest, order, claims, head)


def _restored(
    session: Session, manifest: Manifest, order: Order, claims: Claims, head: Mapping[str, object],
) -> int:
    with claims.held(order.wish.name), session.signals_as_stop("what was made is being removed"):
        plan = _plan(session, manifest, order, claims)
        for words in _notes(plan):
            session.screen.warn(words)
        plan.check()

        def report(target: str, progress: RestoreProgress) -> None:
            session.screen.bar(f"{target}: restore", progress.done_bytes, progress.size_bytes)

        tools = GuestTools(Places(session.near_repository), session.connection, claims, session.clock,
                           lambda: stop_of(session), report)
        done = make_guest(plan, tools, skip_bad=order.skip_bad)
        _tell(session, plan, done)
        if order.starts:
            start_guest(plan, session.connection)
    session.screen.result(f"{order.wish.name}: {'started' if order.starts else 'defined, off'}")
    session.screen.json({
        **head, **_body(plan), "started": order.starts, "whole": done.is_whole,
        "disks": _disk_bodies(plan, done), "files": done.files, "lost_files": done.lost_files})
    return EXIT_OK if done.is_whole else RepositoryDamaged.exit_code


def _plan(session: Session, manifest: Manifest, order: Order, claims: Claims) -> GuestPlan:
    earlier = claims.read(order.wish.name)
    if not order.dry_run:
        earlier = forget_defined(claims, earlier, session.connection)
    plan = plan_guest(manifest, order.wish, session.connection, earlier, random.SystemRandom())
    # A boot that was broken off is not known to libvirt, and has the same names.
    session.boot_store.refuse_known(plan.claim.name, plan.claim.uuid)
    return plan


def _show(session: Session, plan: GuestPlan, head: dict[str, object]) -> int:
    """Say what would be done; raises what would stop it."""
    session.screen.result(plan.difference().rstrip("\n"))
    for disk in plan.disks:
        session.screen.result(f"{disk.entry.target}: {disk.wishes.path} ({disk.wishes.format}, "
                              f"{size_text(disk.entry.size_bytes)}): takes {size_text(disk.needed_bytes)}")
    for target in plan.files:
        session.screen.result(f"{target.entry.role}: {target.path}")
    for words in _notes(plan):
        session.screen.result(words)
    plan.check()
    session.screen.json({**head, **_body(plan), "difference": plan.difference(), "disks": [
        {"target": disk.entry.target, "path": disk.wishes.path, "format": disk.wishes.format,
         "size_bytes": disk.entry.size_bytes, "needed_bytes": disk.needed_bytes}
        for disk in plan.disks], "files": [target.path for target in plan.files]})
    return EXIT_OK


def _notes(plan: GuestPlan) -> list[str]:
    return [*(finding.text for finding in plan.findings), *plan.warnings]


def _body(plan: GuestPlan) -> dict[str, object]:
    return {"uuid": plan.claim.uuid, "macs": plan.claim.macs, "definition": plan.definition,
            "needed_bytes": plan.needed_bytes, "findings": [asdict(finding) for finding in plan.findings],
            "warnings": plan.warnings}


def _tell(session: Session, plan: GuestPlan, done: RestoredGuest) -> None:
    for disk in plan.disks:
        target = disk.entry.target
        if target in done.kept:
            session.screen.result(f"{target}: {disk.wishes.path}: finished by the run before")
        else:
            say_restored(session, target, done.disks[target])
    for path in done.files:
        session.screen.result(f"{path}: written")
    for damage in done.lost_files:
        session.screen.result(f"lost: {damage}")


def _disk_bodies(plan: GuestPlan, done: RestoredGuest) -> list[dict[str, object]]:
    return [{"target": disk.entry.target, "format": disk.wishes.format, "path": disk.wishes.path,
             "kept": disk.entry.target in done.kept, **(
                 asdict(done.disks[disk.entry.target]) if disk.entry.target in done.disks else {})}
            for disk in plan.disks]
