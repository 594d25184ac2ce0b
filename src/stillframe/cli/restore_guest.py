"""`stillframe restore --as`: a whole guest, beside the original or on another host."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from stillframe.cli.restore import say_restored, stop_of
from stillframe.cli.session import Session
from stillframe.cli.snapshots import find, name_body
from stillframe.errors import EXIT_OK, RepositoryDamaged
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
    """What is to be restored, and how."""

    snapshot: str
    wish: GuestWish
    skip_bad: bool
    starts: bool
    dry_run: bool


@dataclass(frozen=True)
class GuestOptions:
    """The options of `restore` that are for a whole guest."""

    name: str | None
    pool: str
    devices: dict[str, str]
    keeps_identity: bool
    network: str | None
    nearest: bool
    starts: bool
    dry_run: bool

    @property
    def is_asked_for(self) -> bool:
        """Whether a whole guest is wanted. Raises BadParameter for options that are of no use without."""
        if self.name is None and self != GuestOptions(None, "", {}, False, None, False, False, False):
            raise typer.BadParameter("--pool, --disk, --same-identity, --network, --no-network, --nearest, "
                                     "--start and --dry-run go with --as NAME")
        return self.name is not None

    def order(self, snapshot: str, image_format: str, *, force: bool, skip_bad: bool) -> Order:
        """Return what is asked for."""
        wish = GuestWish(self.name or "", self.pool, self.devices, image_format, force, self.keeps_identity,
                         self.network, self.nearest)
        return Order(snapshot, wish, skip_bad, self.starts, self.dry_run)


def guest_restore_options(  # noqa: PLR0913, PLR0917  # typer makes an option of each parameter
    as_: Annotated[
        str | None, typer.Option("--as", help="restore the whole guest as a new one of this name")] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", help="--as: folder, or libvirt's pool, for disks (default: default)")
    ] = None,
    disk: Annotated[
        list[str] | None, typer.Option("--disk", help="--as: write a disk to a block device: vda=/dev/x")] = None,
    same_identity: Annotated[
        bool, typer.Option("--same-identity", help="--as: keep the guest's UUID and MAC addresses")] = False,
    network: Annotated[
        str | None, typer.Option("--network", help="--as: put all interfaces on this network of libvirt")] = None,
    no_network: Annotated[
        bool, typer.Option("--no-network", help="--as: leave all interfaces out")] = False,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="--as: take what the host has instead of what it lacks")] = False,
    start: Annotated[bool, typer.Option("--start", help="--as: start the guest")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="--as: show the definition's changes and the space, do nothing")
    ] = False,
) -> GuestOptions:
    """Return how a whole guest is to be restored."""
    if as_ is not None:
        check_name(as_)
    if network is not None and no_network:
        raise typer.BadParameter("choose one: --network or --no-network")
    devices = {}
    for each in disk or ():
        target, _, path = each.partition("=")
        if not (target and path.startswith("/dev/")) or target in devices:
            raise typer.BadParameter(f"--disk names a target and a block device, once each: vda=/dev/x, not {each}")
        devices[target] = path
    return GuestOptions(as_, pool or "", devices, same_identity, "" if no_network else network, nearest, start,
                        dry_run)


def check_name(name: str) -> None:
    """Raise BadParameter if no guest can be called *name*."""
    if not name or "/" in name or name.startswith(".") or not name.isprintable():
        raise typer.BadParameter(f"{name!r} can't be a guest's name")


def restore_guest(session: Session, order: Order) -> int:
    """Restore a whole guest; return the exit code: RepositoryDamaged's if something was lost and skipped."""
    name = find(session, order.snapshot)
    manifest = read_snapshot(session.repository, name)
    session.kept = "Nothing of the new guest is left."
    claims = Claims(session.state_folder, session.clock)
    head: dict[str, object] = {"snapshot": name_body(name), "guest": order.wish.name, "dry_run": order.dry_run}
    if order.dry_run:
        return _show(session, _plan(session, manifest, order, claims), head)
    with claims.held(order.wish.name), session.signals_as_stop("what was made is being removed"):
        plan = _plan(session, manifest, order, claims)
        for words in _notes(plan):
            session.screen.warn(words)
        plan.check()

        def report(target: str, progress: RestoreProgress) -> None:
            session.screen.bar(f"{target}: restore", progress.done_bytes, progress.size_bytes)

        tools = GuestTools(Places(session.repository), session.connection, claims, session.clock,
                           lambda: stop_of(session), report)
        done = make_guest(plan, tools, skip_bad=order.skip_bad)
        _tell(session, plan, done)
        if order.starts:
            start_guest(plan, session.connection)
    session.screen.result(f"{order.wish.name}: {'started' if order.starts else 'defined, off'}")
    session.screen.json({**head, **_body(plan), "started": order.starts, "whole": done.is_whole,
                         "disks": _disk_bodies(plan, done), "files": done.files, "lost_files": done.lost_files})
    return EXIT_OK if done.is_whole else RepositoryDamaged.exit_code


def _plan(session: Session, manifest: Manifest, order: Order, claims: Claims) -> GuestPlan:
    earlier = claims.read(order.wish.name)
    if not order.dry_run:
        earlier = forget_defined(claims, earlier, session.connection)
    return plan_guest(manifest, order.wish, session.connection, earlier, random.SystemRandom())


def _show(session: Session, plan: GuestPlan, head: dict[str, object]) -> int:
    """Say what would be done; raises what would stop it."""
    session.screen.result(plan.difference().rstrip("\n"))
    for disk in plan.disks:
        room = "nothing (a device)" if disk.is_device else "nothing (it is there already)" if disk.is_done else (
            f"up to {size_text(disk.entry.data_bytes)}")
        session.screen.result(f"{disk.entry.target}: {disk.wishes.path} ({disk.wishes.format}, "
                              f"{size_text(disk.entry.size_bytes)}): takes {room}")
    for target in plan.files:
        session.screen.result(f"{target.entry.role}: {target.path}")
    for words in _notes(plan):
        session.screen.result(words)
    plan.check()
    session.screen.json({**head, **_body(plan), "difference": plan.difference(), "disks": [
        {"target": disk.entry.target, "path": disk.wishes.path, "format": disk.wishes.format,
         "size_bytes": disk.entry.size_bytes, "needed_bytes": 0 if disk.is_device else disk.entry.data_bytes}
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
