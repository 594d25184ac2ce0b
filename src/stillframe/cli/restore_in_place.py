"""`stillframe restore --in-place`: a snapshot over the guest that is there; only what differs is written."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

from stillframe.backup.run import BackupJob, BackupResult, backup_guest
from stillframe.capture.limits import Limits
from stillframe.capture.lock import domain_lock
from stillframe.capture.method import Method
from stillframe.capture.restoring import Restoring, RestoringStore, attention
from stillframe.cli.restore import chosen_disks, split_name, stop_of
from stillframe.cli.restore_app import InPlaceOptions
from stillframe.cli.session import Session
from stillframe.cli.snapshots import find, name_body, short_id
from stillframe.config import GuestSettings, for_guest
from stillframe.errors import (
    EXIT_OK,
    GuestState,
    GuestUnfit,
    GuestUnknown,
    RepositoryDamaged,
    StillframeError,
    TargetInUse,
)
from stillframe.hypervisor.advice import is_bare
from stillframe.hypervisor.domain import Domain, find_domain
from stillframe.hypervisor.model import Power
from stillframe.repository.catalog import display_name
from stillframe.repository.held import held_snapshot
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import Manifest
from stillframe.repository.places import Places
from stillframe.repository.snapshots import newest_of
from stillframe.restore.in_place import (
    WRITING,
    InPlace,
    InPlaceTools,
    compare_in_place,
    finish_untorn,
    restore_in_place,
    turn_off,
)
from stillframe.restore.in_place_plan import InPlaceWish, begin, go_on, refuse_busy, refuse_unfit
from stillframe.restore.known import Known
from stillframe.storage.address import folder_of
from stillframe.units import duration_text, size_text

#: What is said of an interrupt from the first write on.
_KEPT = "What was written is kept."


@dataclass(frozen=True)
class Order:
    """What is to be restored, and how. *force* cuts the guest's power."""

    name: str
    options: InPlaceOptions
    force: bool
    skip_bad: bool
    dry_run: bool


def restore_over(session: Session, order: Order) -> int:
    """Restore in place; return the exit code: RepositoryDamaged's if something was lost and skipped."""
    text, target = split_name(order.name)
    name = find(session, text)
    with held_snapshot(session.repository, name, session.clock, session.host) as manifest:
        return _restored(session, order, name, manifest, target)


def _restored(
    session: Session, order: Order, name: SnapshotName, manifest: Manifest, target: str,
) -> int:
    disks = tuple(chosen_disks(manifest, target, display_name(name)))
    wish = InPlaceWish(manifest, display_name(name), session.address, disks, not target,
                       order.options.with_definition)
    domain = _guest(session, manifest, order)
    call = _Call(session, order, wish, domain)
    session.kept = f"The disks of {domain.name} are as they were."
    with session.signals_as_stop("what was begun can be finished by the same command"):
        done = call.run()
    _tell(session, domain.name, done, dry_run=order.dry_run)
    session.screen.json({
        "snapshot": name_body(name), "guest": domain.name, "dry_run": order.dry_run,
        "whole": done.is_whole, "state_before": call.before, "disks": [asdict(disk) for disk in done.disks],
        "files": done.files, "lost_files": done.lost, "warnings": done.warnings})
    return EXIT_OK if done.is_whole else RepositoryDamaged.exit_code


def _guest(session: Session, manifest: Manifest, order: Order) -> Domain:
    """Return the guest to restore over. Raises GuestUnknown, GuestUnfit."""
    asked = order.options.guest
    if is_bare(asked or ""):
        raise GuestUnfit("A guest without libvirt has no definition that says which images are its own.",
                         f"stillframe restore {order.name} --to PATH --delta --repo REPO   # with QEMU ended")
    try:
        return find_domain(session.connection, asked or manifest.uuid)
    except GuestUnknown as error:
        if asked:
            raise
        raise GuestUnknown(
            f"The guest of the snapshot, {manifest.guest} ({manifest.uuid}), is not on this host.",
            f"stillframe restore {order.name} --in-place --guest NAME --repo REPO   # over another guest",
        ) from error


class _Call:
    """One call of the command. *before* is the snapshot of the state before, "" if none was made."""

    def __init__(self, session: Session, order: Order, wish: InPlaceWish, domain: Domain) -> None:
        self._session = session
        self._order = order
        self._wish = wish
        self._domain = domain
        self._store = RestoringStore(session.journal.folder)
        self._ended = False
        self.before = ""

    def run(self) -> InPlace:
        """Compare or restore, as ordered; an error says what the guest is."""
        try:
            return self._compared() if self._order.dry_run else self._restored()
        except StillframeError as error:
            self._say_how_it_is(error)
            raise

    def _compared(self) -> InPlace:
        """Say what would be written. Raises TargetInUse for a guest that runs."""
        with self._locked():
            record, known = self._record(self._store.read(self._domain.uuid))
            return compare_in_place(record, self._wish.manifest, self._tools(known))

    def _restored(self) -> InPlace:
        """Shut the guest down if that is asked for, back it up, restore it."""
        with self._locked():
            found = self._unfinished()
            if found is None:
                refuse_busy(self._domain, self._session.journal, self._wish)
                self._turn_off()
                begin(self._domain, self._wish, self._session.clock)  # refuse before a long backup
        if found is not None:
            self.before = found.before
            self._session.kept = _KEPT
            self._session.screen.say(f"{found.words()}: going on")
        elif self._order.options.backup_first:
            self.before = self._back_up().snapshot
        with self._locked():
            self._session.screen.say(f"restoring {self._domain.name} in place from {self._wish.name}")
            record, known = self._record(self._unfinished())
            return restore_in_place(
                record, self._wish.manifest, self._tools(known), skip_bad=self._order.skip_bad)

    def _say_how_it_is(self, error: StillframeError) -> None:
        """Say of a guest whose disks are as they were whether we ended it, and how to start it then."""
        if error.guest not in (GuestState.UNTOUCHED, GuestState.SAFE):
            return
        if not self._ended:
            error.guest = GuestState.UNTOUCHED
            return
        error.guest = GuestState.UNKNOWN
        with contextlib.suppress(StillframeError):  # what came first is what is told
            if self._domain.power() is Power.OFF:  # else somebody started it again
                error.guest = GuestState.OFF
                other = f"; or {error.next_command}" if error.next_command else ""
                error.next_command = f"{self._domain.advice.start}   # as it was{other}"

    def _locked(self) -> AbstractContextManager[None]:
        return domain_lock(self._session.journal.folder, self._domain.uuid, self._domain.name,
                           "restore in place", self._session.clock)

    def _unfinished(self) -> Restoring | None:
        """Return what an earlier call left half written; what is not so is ended here."""
        found = self._store.read(self._domain.uuid)
        if found is not None and not found.phase.is_torn:
            finish_untorn(found, self._store, self._domain)
            return None
        return found

    def _record(self, found: Restoring | None) -> tuple[Restoring, Mapping[str, Known]]:
        if found is not None:
            if not found.phase.is_torn:
                raise attention(found)  # a dry run ends nothing
            return go_on(found, self._domain, self._wish), {}
        refuse_busy(self._domain, self._session.journal, self._wish)
        newest = None
        if not self._order.options.read_all:
            newest, _ = newest_of(
                self._session.repository, self._session.host, self._domain.name, self._domain.uuid)
        return begin(self._domain, self._wish, self._session.clock, self.before,
                     newest[1] if newest is not None else None)

    def _turn_off(self) -> None:
        if self._domain.power() is Power.OFF or not (self._order.options.shutdown or self._order.force):
            return
        if self._domain.power() is not Power.RUNNING and not self._order.force:
            raise TargetInUse(f"{self._domain.name} is paused, and can't shut down by itself.",
                              f"{self._domain.advice.resume}   # or --force, which cuts its power")
        refuse_unfit(self._domain, self._wish)
        self._session.screen.say(f"shutting {self._domain.name} down")
        turn_off(self._domain, self._limits(), self._session.clock, lambda: stop_of(self._session),
                 force=self._order.force)
        self._ended = True

    def _limits(self) -> Limits:
        options = GuestSettings(shutdown_timeout=self._order.options.shutdown_timeout)
        return for_guest(self._session.settings, self._domain.name, options).limits

    def _back_up(self) -> BackupResult:
        session = self._session
        session.screen.say(f"backing {self._domain.name} up first, to {session.address}")
        wishes = for_guest(session.settings, self._domain.name, GuestSettings(method=Method.OFFLINE))
        command = f"stillframe backup {shlex.quote(self._domain.name)} --repo REPO"
        try:
            result = backup_guest(
                BackupJob(
                    self._domain, lambda: session.repository, folder_of(session.address), session.host,
                    session.hints_folder, replace(wishes, command=command), session.stop,
                    lambda target, done, total: session.screen.bar(f"{target}: backup first", done, total)),
                session.tools)
        except StillframeError as error:
            error.message = f"The state before was not backed up, and nothing was restored. {error.message}"
            error.args = (error.message,)
            error.next_command += "   # or --no-backup-first, which gives that state up"
            raise
        session.screen.result(
            f"{self._domain.name}: the state before is in snapshot {short_id(result.snapshot)}, "
            f"{size_text(result.stored_bytes)} stored, took {duration_text(result.seconds)}")
        return result

    def _tools(self, known: Mapping[str, Known]) -> InPlaceTools:
        session = self._session

        def report(target: str, doing: str, done: int, total: int) -> None:
            if doing == WRITING:
                session.kept = _KEPT
            session.screen.bar(f"{target}: {doing}", done, total)

        return InPlaceTools(Places(session.repository), self._domain, self._store, session.clock,
                            lambda: stop_of(session), report, known)


def _tell(session: Session, name: str, done: InPlace, *, dry_run: bool) -> None:
    screen = session.screen
    for disk in done.disks:
        what = (f"{size_text(disk.differing_bytes)} would be written" if dry_run else
                f"{size_text(disk.written_bytes)} written, {size_text(disk.zeroed_bytes)} made zero")
        skipped = f", {size_text(disk.skipped_bytes)} done before" if disk.skipped_bytes else ""
        screen.result(f"{name} {disk.target}: {disk.path}: {size_text(disk.size_bytes)}, "
                      f"{size_text(disk.read_bytes)} compared{skipped}, {what}")
        for lost in disk.lost:
            screen.result(f"{name} {disk.target}: lost: {lost.length_bytes} bytes at {lost.offset_bytes} "
                          f"({lost.why})")
    for path in done.files:
        screen.result(f"{path}: written")
    for words in done.lost:
        screen.result(f"lost: {words}")
    for words in done.warnings:
        screen.warn(words)
