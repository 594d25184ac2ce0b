"""A small world for the decision to act in: a guest, libvirt, QEMU and files, all of which may fail.

A disk's content is a set of writes. The overlay holds the writes made while the guest was on
it, a commit carries them into the base bit by bit. Every write that the guest was told is done
must be in the guest's image when the run ends, and in the base or the overlay at all times.

Actions do to the world and the journal what bring_back does, and the tool may die in between.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from stillframe.capture.decide import Action, Decision, DiskSight, FileSeen, JobSeen, Seen, Sight
from stillframe.capture.journal import RunRecord
from stillframe.capture.let_go_on import unequal_again
from stillframe.capture.states import TRANSITIONS, DiskPhase, State
from stillframe.hypervisor.model import Power
from tests.unit.capture_records import AT, run_record

Decide = Callable[[RunRecord, Sight], Decision]

_STEPS_LIMIT = 500
_PATIENCE = 3


class ToolDied(Exception):
    """stillframe was killed; the world goes on."""


class Lost(AssertionError):
    """A write that the guest was told is done would be gone."""


@dataclass
class WorldDisk:
    """One disk as it really is. *forked*: the guest wrote to the base when the overlay was already used."""

    target: str
    base: set[int] = field(default_factory=set)
    overlay: set[int] | None = None
    acknowledged: set[int] = field(default_factory=set)
    put_on: bool = False
    forked: bool = False
    qemu: Seen = Seen.BASE
    live: Seen = Seen.BASE
    inactive: Seen = Seen.BASE
    job: JobSeen = JobSeen.NONE
    leaked: bool = False
    base_at: int = 0
    overlay_at: int = 0
    captured_at: int | None = None

    def name(self, seen: Seen) -> None:
        """Have QEMU and both XMLs name *seen*."""
        self.qemu = self.live = self.inactive = seen

    def equal(self) -> bool:
        """What a comparison of base and overlay says."""
        return (self.overlay or set()) <= self.base and not (self.forked and self.overlay)


class World:
    """One scenario: `run` lets *decide* act in it until the run ends."""

    def __init__(self, chance: random.Random, decide: Decide, faults: int) -> None:
        self.chance = chance
        self.decide = decide
        self.faults_left = faults
        self.now = 1
        self.power = Power.RUNNING
        self.frozen = False
        self.person_needed = False
        self.happened: Counter[str] = Counter()
        self.disks = [WorldDisk(f"vd{letter}") for letter in "ab"[:chance.randint(1, 2)]]
        self.compared: dict[str, bool] = {}
        self.waited = 0
        self.waiting_for: Decision | None = None
        self.record = self._first_half()

    # --- how far the run came before it ended ---------------------------------------------------

    def _first_half(self) -> RunRecord:
        self._guest_writes()
        for disk in self.disks:
            disk.overlay = set()
        return self.chance.choice([
            self._files_only, self._no_transaction, self._forgotten, self._seen, self._copied,
            self._shut_down, self._frozen,
        ])()

    def _record(self, state: State, phase: DiskPhase, **changes: object) -> RunRecord:
        return run_record(state, {disk.target: phase for disk in self.disks}, **changes)

    def _files_only(self) -> RunRecord:
        return self._record(State.OVERLAYS, DiskPhase.PLANNED)

    def _no_transaction(self) -> RunRecord:
        for disk in self.disks:
            disk.leaked = self.chance.random() < 0.5
        return self._record(State.SNAPSHOT, DiskPhase.PLANNED)

    def _transaction(self, *, xml: bool = True) -> None:
        for disk in self.disks:
            disk.put_on = True
            disk.qemu = Seen.OVERLAY
            if xml:
                disk.name(Seen.OVERLAY)
        self._guest_writes()

    def _forgotten(self) -> RunRecord:
        self._transaction(xml=False)
        return self._record(State.SNAPSHOT, DiskPhase.PLANNED)

    def _seen(self) -> RunRecord:
        self._transaction()
        return self._record(State.SNAPSHOT, DiskPhase.PLANNED)

    def _copied(self) -> RunRecord:
        self._transaction()
        for disk in self.disks:
            disk.captured_at = self.now
        return self._record(self.chance.choice([State.COPYING, State.RELEASED]), DiskPhase.OVERLAID)

    def _shut_down(self) -> RunRecord:
        self._transaction()
        started = self.chance.random() < 0.5
        if not started:
            self._off()
        return self._record(State.STARTING, DiskPhase.OVERLAID, shutdown_begun_at=AT, start_verified=started)

    def _frozen(self) -> RunRecord:
        self.frozen = True
        if self.chance.random() < 0.5:
            self._transaction()
            return self._record(State.THAWING, DiskPhase.OVERLAID, freeze_begun=True)
        return self._record(State.FREEZING, DiskPhase.PLANNED, freeze_begun=True)

    # --- what the tool sees ---------------------------------------------------------------------

    def sight(self) -> Sight:
        if self.power.has_qemu:
            self.compared.clear()
        waited_out = self.waited >= _PATIENCE
        return Sight(self.power, tuple(self._disk_sight(disk) for disk in self.disks), waited_out=waited_out)

    def _disk_sight(self, disk: WorldDisk) -> DiskSight:
        alive = self.power.has_qemu
        captured_at = disk.captured_at
        return DiskSight(
            disk.target,
            qemu=disk.qemu if alive else Seen.UNKNOWN,
            live=disk.live if alive else Seen.UNKNOWN,
            inactive=disk.inactive,
            job=disk.job,
            overlay=FileSeen.ABSENT if disk.overlay is None else FileSeen.OURS,
            base_intact=captured_at is None or disk.base_at <= captured_at,
            base_newer=disk.base_at > disk.overlay_at,
            overlay_empty=None if disk.overlay is None else not disk.overlay,
            leaked_nodes=("node",) if disk.leaked and disk.qemu is Seen.BASE and alive else (),
            equal=self.compared.get(disk.target),
        )

    # --- the loop of bring_back -----------------------------------------------------------------

    def run(self) -> Decision:
        """Let things happen and steps be taken until the decision is to finish or to ask; return it."""
        for _ in range(_STEPS_LIMIT):
            sight = self.sight()
            if sight.power is Power.RUNNING:
                self._note(disks=unequal_again(self.record, sight))
            decision = self.decide(self.record, sight)
            if decision.action is Action.FINISH:
                self._check_finished()
                return decision
            if decision.action is Action.ASK:
                return decision
            try:
                self._attempt(decision)
            except ToolDied:
                self._restart_tool()
            self._things_happen()
            self._check_kept()
        raise AssertionError(f"does not end: {self.record.state} {self.happened}")

    def _attempt(self, decision: Decision) -> None:
        self.happened[decision.action.name] += 1
        if decision.action is Action.WAIT:
            self.waited = self.waited + 1 if decision == self.waiting_for else 1
            self.waiting_for = decision
            return
        self.waited = 0
        targets = [disk for disk in self.disks if disk.target in decision.targets]
        _EFFECTS[decision.action](self, targets)

    def _restart_tool(self) -> None:
        self.compared.clear()
        self.waited = 0
        self.waiting_for = None

    def _may_die(self) -> None:
        if self._fault("tool dies", 0.15):
            raise ToolDied

    def _enter(self, state: State, **changes: object) -> None:
        assert state in TRANSITIONS[self.record.state]
        self._note(state=state, **changes)
        self._may_die()

    def _note(self, **changes: object) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)

    def _phase(self, disks: list[WorldDisk], phase: DiskPhase) -> dict[str, object]:
        chosen = {disk.target for disk in disks}
        return {"disks": tuple(
            each.with_phase(phase) if each.target in chosen else each for each in self.record.disks)}

    # --- the steps ------------------------------------------------------------------------------

    def _release(self, _disks: list[WorldDisk]) -> None:
        self._enter(State.RELEASED)

    def _thaw(self, _disks: list[WorldDisk]) -> None:
        self.frozen = False
        self._may_die()
        self._note(thaw_verified=True)

    def _begin_commit(self, disks: list[WorldDisk]) -> None:
        self._enter(State.COMMITTING, **self._phase(disks, DiskPhase.COMMITTING))
        for disk in disks:
            self._check_commit(disk)
            assert disk.qemu is Seen.OVERLAY
            disk.job = JobSeen.COMMITTING
            self._commit_some(disk)
            self._may_die()

    def _suspend(self, _disks: list[WorldDisk]) -> None:
        self._enter(State.SUSPENDING, suspended=True)
        if self.power is Power.RUNNING:
            self.power = Power.PAUSED
        self._may_die()

    def _pivot(self, disks: list[WorldDisk]) -> None:
        assert all(disk.job is JobSeen.READY and disk.live is Seen.OVERLAY for disk in disks)
        if self.power is Power.RUNNING:
            self._guest_writes()  # it does not stand still: what it writes now may miss the base
        else:
            for disk in disks:
                self._commit_all(disk)
        self._enter(State.PIVOTING, **self._phase(disks, DiskPhase.PIVOTING))
        for disk in disks:
            self._leave_overlay(disk)
            # libvirt catches up at once, or in a while.
            if self.chance.random() < 0.7:
                disk.name(Seen.BASE)
            self._may_die()

    def _finish_in_qemu(self, disks: list[WorldDisk]) -> None:
        for disk in disks:
            if disk.qemu is Seen.OVERLAY:
                self._commit_all(disk)  # waited for, the CPUs standing still, before the step is entered
        self._enter(State.PIVOTING, **self._phase(disks, DiskPhase.PIVOTING))
        for disk in disks:
            if disk.qemu is Seen.OVERLAY:
                assert disk.job is JobSeen.READY
                assert self.power is not Power.RUNNING
                self._commit_all(disk)
                disk.qemu = Seen.BASE
                self._may_die()  # the job is concluded, and nobody has dismissed it
            disk.job = JobSeen.NONE
            disk.leaked = False
            self._may_die()

    def _end_stray_job(self, disks: list[WorldDisk]) -> None:
        for disk in disks:
            disk.job = JobSeen.NONE
            self._may_die()

    def _drop_nodes(self, disks: list[WorldDisk]) -> None:
        for disk in disks:
            disk.leaked = False

    def _point_to_base(self, disks: list[WorldDisk]) -> None:
        self._enter(State.PIVOTING, **self._phase(disks, DiskPhase.PIVOTING))
        for disk in disks:
            disk.inactive = Seen.BASE
        self._may_die()

    def _confirm_base(self, disks: list[WorldDisk]) -> None:
        self._note(**self._phase(disks, DiskPhase.ON_BASE))
        self._may_die()

    def _resume(self, _disks: list[WorldDisk]) -> None:
        self._enter(State.RESUMING, disks=unequal_again(self.record, self.sight()))
        self.power = Power.RUNNING
        self._may_die()
        self._note(suspended=False)

    def _compare(self, disks: list[WorldDisk]) -> None:
        assert not self.power.has_qemu
        for disk in disks:
            self.compared[disk.target] = disk.equal()

    def _commit_offline(self, disks: list[WorldDisk]) -> None:
        assert not self.power.has_qemu
        self._enter(State.COMMITTING, **self._phase(disks, DiskPhase.COMMITTING))
        for disk in disks:
            self._check_commit(disk)
            self._commit_some(disk)
            self._may_die()
            self._commit_all(disk)
            self.compared[disk.target] = True

    def _unlink(self, disks: list[WorldDisk]) -> None:
        self._enter(State.CLEANING)
        for disk in disks:
            used = (disk.qemu, disk.live, disk.inactive) if self.power.has_qemu else (disk.inactive,)
            if Seen.OVERLAY in used or not (disk.overlay or set()) <= disk.base:
                raise Lost(f"{disk} is unlinked")
            disk.overlay = None
            self._may_die()

    def _start(self, _disks: list[WorldDisk]) -> None:
        self._enter(State.RESTARTING)
        self._boot()
        self._may_die()
        self._note(start_verified=True)

    # --- what happens by itself -----------------------------------------------------------------

    def _things_happen(self) -> None:
        if self.power is Power.RUNNING and not self.frozen and self.chance.random() < 0.6:
            self._guest_writes()
        for disk in self.disks:
            if disk.job is JobSeen.COMMITTING:
                self._commit_some(disk)
                if self.chance.random() < 0.5:
                    disk.job = JobSeen.READY
            behind = self.power.has_qemu and disk.qemu is Seen.BASE and disk.live is Seen.OVERLAY
            if behind and (self.waited == _PATIENCE - 1 or self.chance.random() < 0.5):
                disk.live = Seen.BASE
            if disk.live is Seen.BASE and disk.qemu is Seen.BASE and self.chance.random() < 0.3:
                disk.inactive = Seen.BASE
        self._faults()

    def _faults(self) -> None:
        jobs = [disk for disk in self.disks if disk.job in (JobSeen.COMMITTING, JobSeen.READY)]
        if self.power.has_qemu and self._fault("QEMU dies", 0.08):
            self._off()
            return
        if self.power is Power.OFF and self._may_boot() and self._fault("somebody starts the guest", 0.2):
            self._boot()
        if jobs and self._fault("a commit fails", 0.1):
            self.chance.choice(jobs).job = JobSeen.NONE
        known = [disk for disk in jobs if disk.live is Seen.OVERLAY and disk.qemu is Seen.OVERLAY]
        if known and self._fault("libvirt loses a job", 0.1):
            self.chance.choice(known).job = JobSeen.STRAY
        if self.power is Power.RUNNING and self._fault("I/O error", 0.05):
            self.power = Power.PAUSED_ON_IO_ERROR
        if self.power is Power.PAUSED and self._fault("somebody resumes the guest", 0.05):
            self.power = Power.RUNNING
            self.person_needed = True

    def _fault(self, name: str, likely: float) -> bool:
        if self.faults_left == 0 or self.chance.random() >= likely:
            return False
        self.faults_left -= 1
        self.happened[name] += 1
        return True

    def _may_boot(self) -> bool:
        # Between a pivot and its being written down, base and overlay are equal only until a boot.
        return not any(
            disk.inactive is Seen.BASE and not disk.equal()
            and self.record.disk(disk.target).phase is DiskPhase.PIVOTING
            for disk in self.disks
        )

    def _off(self) -> None:
        self.power = Power.OFF
        self.frozen = False
        for disk in self.disks:
            disk.job = JobSeen.NONE
            disk.leaked = False

    def _boot(self) -> None:
        self.power = Power.RUNNING
        for disk in self.disks:
            disk.name(disk.inactive)
            if disk.inactive is Seen.BASE and disk.overlay and not disk.equal():
                self.person_needed = True

    def _guest_writes(self) -> None:
        for disk in self.disks:
            self.now += 1
            disk.acknowledged.add(self.now)
            if disk.qemu is Seen.OVERLAY:
                assert disk.overlay is not None
                disk.overlay.add(self.now)
                disk.overlay_at = self.now
            else:
                disk.base.add(self.now)
                disk.base_at = self.now
                disk.forked = disk.put_on

    def _commit_some(self, disk: WorldDisk) -> None:
        assert disk.overlay is not None
        missing = sorted(disk.overlay - disk.base)
        self.now += 1
        disk.base |= set(missing[:self.chance.randint(0, len(missing))])
        disk.base_at = self.now

    def _commit_all(self, disk: WorldDisk) -> None:
        assert disk.overlay is not None
        self.now += 1
        disk.base |= disk.overlay
        disk.base_at = self.now

    def _leave_overlay(self, disk: WorldDisk) -> None:
        disk.qemu, disk.job = Seen.BASE, JobSeen.NONE

    # --- what must hold -------------------------------------------------------------------------

    def _check_commit(self, disk: WorldDisk) -> None:
        if disk.forked and disk.overlay:
            raise Lost(f"{disk}: newer writes in the base are overwritten")

    def _check_kept(self) -> None:
        for disk in self.disks:
            if not disk.acknowledged <= disk.base | (disk.overlay or set()):
                raise Lost(f"{disk}")

    def _check_finished(self) -> None:
        for disk in self.disks:
            assert disk.overlay is None
            assert disk.inactive is Seen.BASE
            if self.power.has_qemu:
                assert (disk.qemu, disk.live, disk.job) == (Seen.BASE, Seen.BASE, JobSeen.NONE)
            if disk.base != disk.acknowledged:
                raise Lost(f"{disk} ends without some writes")
        assert not self.frozen
        assert not (self.power is Power.PAUSED and self.record.suspended)


_EFFECTS: dict[Action, Callable[[World, list[WorldDisk]], None]] = {
    Action.RELEASE: World._release,
    Action.THAW: World._thaw,
    Action.DROP_NODES: World._drop_nodes,
    Action.COMMIT_IN_QEMU: World._begin_commit,
    Action.FINISH_IN_QEMU: World._finish_in_qemu,
    Action.END_STRAY_JOB: World._end_stray_job,
    Action.START_COMMIT: World._begin_commit,
    Action.SUSPEND: World._suspend,
    Action.PIVOT: World._pivot,
    Action.POINT_TO_BASE: World._point_to_base,
    Action.CONFIRM_BASE: World._confirm_base,
    Action.RESUME: World._resume,
    Action.COMPARE: World._compare,
    Action.COMMIT_OFFLINE: World._commit_offline,
    Action.UNLINK: World._unlink,
    Action.START: World._start,
}
