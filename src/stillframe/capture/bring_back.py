"""Bringing the guest back onto its own images: look, decide, do one step, look again.

The same loop ends a normal run, a failed one, and whatever a crash left. Each step's
intent is in the journal before it is taken. A call that fails is not believed: the next
look tells what came of it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from msgspec.structs import replace as replace_record

from stillframe.block.image import overlay_place
from stillframe.block.tools import commit_offline, compare, stand_on
from stillframe.capture.decide import Action, Decision, Sight, Why, decide
from stillframe.capture.explain import attention
from stillframe.capture.guard import Guard
from stillframe.capture.guard_capture import guard_capture
from stillframe.capture.journal import DiskRecord, Journal, RunRecord
from stillframe.capture.let_go_on import fsync_definition, let_go_on, unequal_again
from stillframe.capture.limits import Limits
from stillframe.capture.sight import drained, look, qemu_mark, ready_to_pivot, stray_job
from stillframe.capture.states import DiskPhase, State
from stillframe.capture.stepping import REPEATS_LIMIT, CommitProgress, Stepping, Watcher, again
from stillframe.clock import Clock, Deadline, utc_text
from stillframe.durable import fsync
from stillframe.errors import (
    CopyFailed,
    GuestState,
    GuestUnknown,
    HypervisorError,
    NeedsAttention,
    ProgramFailed,
    ProgramTimedOut,
    StillframeError,
)
from stillframe.hypervisor import qemu_commit
from stillframe.hypervisor.domain_xml import with_source
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import DomainView, Power

_SETTLE_S = 8.0
_CONVERGE_S = 10.0
_OFFLINE_S = 6 * 3600.0
_GUARD_S = 24 * 3600.0
_STEPS_LIMIT = 200_000
Drained = Callable[[DomainView, RunRecord, tuple[str, ...]], bool]


class BringBack(Stepping):
    """Takes one run of one domain to DONE, or raises NeedsAttention with everything left as it is."""

    poll_s = 0.25

    def __init__(
        self, journal: Journal, domain: Guest, clock: Clock, limits: Limits, watcher: Watcher
    ) -> None:
        super().__init__(journal, domain, clock, limits, watcher)
        self._compared: dict[str, bool] = {}
        self._waiting: Deadline | None = None
        self._waiting_for: Decision | None = None
        self._repeats: Counter[Action] = Counter()
        self._guard: Guard | None = None
        self._suspended = False

    def look(self, record: RunRecord) -> Sight:
        """Return what is seen now, without doing anything."""
        sight = look(
            record, self._domain, self._clock, self._compared, thaw_hopeless=self._thaw_hopeless
        )
        if sight.power.has_qemu:
            # Whatever was compared while the guest was off: it may write again.
            self._compared.clear()
        return sight

    def finish(self, record: RunRecord) -> RunRecord:
        """Do step after step until the run is DONE; return its record.

        Raises NeedsAttention where no safe step is left; nothing of the guest is changed then.
        """
        self._record, self._suspended = record, record.suspended
        if record.suspended:
            self._start_guard(record)
        try:
            return self._go(record)
        except BaseException as error:
            record = self._newest(self._record)
            why = f"bringing it back ended in {type(error).__name__}"
            resumed = let_go_on(record, self._domain, self._journal, self._clock, why)
            if not isinstance(error, StillframeError):
                raise
            told = _needs_attention(error, record)
            if record.suspended and not resumed:
                told.guest = GuestState.STOPPED
            if told is error:
                raise
            raise told from error
        finally:
            if self._guard is not None:
                self._guard.leave()

    def _go(self, record: RunRecord) -> RunRecord:
        for _ in range(_STEPS_LIMIT):
            record, decision = self._decide(record)
            if decision is not None and decision.action is Action.FINISH:
                return self._journal.enter(
                    record, State.DONE, decision.reason, ended_at=utc_text(self._clock.now())
                )
            if decision is not None:
                record = self._attempt(record, decision)
            self._record = record
        raise NeedsAttention(f"Bringing {record.name} back takes too many steps.", again(record))

    def _newest(self, record: RunRecord) -> RunRecord:
        """Return the record as the journal has it, or as far as we know if that can't be read."""
        try:
            record = self._journal.current(record)
        except StillframeError:
            return replace_record(record, suspended=self._suspended)
        return record

    def _decide(self, record: RunRecord) -> tuple[RunRecord, Decision | None]:
        """Return the next step; None if the look failed and is to be taken again."""
        try:
            sight = self.look(record)
        except (HypervisorError, ProgramFailed, ProgramTimedOut) as error:
            self._failed(record, "look at the guest", error)
            return record, None
        runs_on = sight.power is Power.RUNNING and sight.same_qemu
        if runs_on and (disks := unequal_again(record, sight)) != record.disks:
            record = self._journal.note(record, "the guest runs on its overlay", disks=disks)
        decision = decide(record, sight)
        if decision == self._waiting_for and self._waiting is not None and self._waiting.passed():
            decision = decide(record, replace(sight, waited_out=True))
        return record, decision

    def _attempt(self, record: RunRecord, decision: Decision) -> RunRecord:
        if decision.action is Action.ASK:
            raise attention(record, decision)
        if decision.action is not Action.WAIT:
            self._waiting = None
        before = record
        try:
            record = self._step(decision.action)(record, decision)
            self._failures = 0
            if decision.action is not Action.WAIT:
                self.did.append(_sentence(decision))
            return record
        except NeedsAttention:
            raise
        except (HypervisorError, GuestUnknown, CopyFailed, ProgramFailed, ProgramTimedOut) as error:
            self._failed(before, decision.action.value, error)
            return self._journal.current(before)
        except OSError as error:
            self._failed(before, decision.action.value, StillframeError(str(error)))
            return self._journal.current(before)

    def _step(self, action: Action) -> Callable[[RunRecord, Decision], RunRecord]:
        return {
            Action.RELEASE: self._release,
            Action.THAW: self._thaw,
            Action.WAIT: self._wait,
            Action.DROP_NODES: self._drop_nodes,
            Action.COMMIT_IN_QEMU: self._commit_in_qemu,
            Action.FINISH_IN_QEMU: self._finish_in_qemu,
            Action.END_STRAY_JOB: self._end_stray_job,
            Action.START_COMMIT: self._start_commit,
            Action.SUSPEND: self._suspend,
            Action.PIVOT: self._pivot,
            Action.POINT_TO_BASE: self._point_to_base,
            Action.CONFIRM_BASE: self._confirm_base,
            Action.RESUME: self._resume,
            Action.COMPARE: self._compare,
            Action.COMMIT_OFFLINE: self._commit_offline,
            Action.UNLINK: self._unlink,
            Action.START: self._start,
        }[action]

    # --- the steps ----------------------------------------------------------------------------

    def _release(self, record: RunRecord, decision: Decision) -> RunRecord:
        return self._given_up(record, decision.reason)

    def _thaw(self, record: RunRecord, _decision: Decision) -> RunRecord:
        return self._thawed(record)

    def _wait(self, record: RunRecord, decision: Decision) -> RunRecord:
        committing = decision.why is Why.COMMIT_RUNS
        if self._waiting is None or self._waiting_for != decision:
            limit_s = self._limits.commit_s if committing else _SETTLE_S
            if record.state is State.SHUTTING_DOWN:
                limit_s = record.shutdown_timeout_s
            self._waiting, self._waiting_for = Deadline(self._clock, limit_s), decision
        if committing:
            self._report_commit()
            if self._waiting.passed():
                self._give_up_commit(record, decision)
        self._domain.connection.wait_change(self.poll_s)
        return record

    def _report_commit(self) -> None:
        view = self._domain.view()
        jobs = [job for job in (view.qemu.jobs if view.qemu else ()) if "commit" in job.name]
        self._watcher.commit(
            CommitProgress(sum(job.done for job in jobs), sum(job.total for job in jobs))
        )

    def _give_up_commit(self, record: RunRecord, decision: Decision) -> None:
        for target in decision.targets:
            with contextlib.suppress(HypervisorError):
                self._domain.abort_block_job(target)
        self._end_stray_job(record, decision)  # a commit that libvirt does not know
        self._journal.note(record, "the commit did not converge and was aborted; the overlay is whole")
        raise NeedsAttention(
            f"Writing the overlay of {record.name} back did not end within "
            f"{self._limits.commit_s:.0f} s: the guest writes faster than its base takes it.",
            f"stillframe recover {record.name}   # when the guest is less busy",
        )

    def _count(self, action: Action, message: str, next_command: str) -> None:
        """Raise NeedsAttention with the message once *action* was taken too often without avail."""
        self._repeats[action] += 1
        if self._repeats[action] > REPEATS_LIMIT:
            raise NeedsAttention(message, next_command)
        # What stood in the way may be going: the readers of a run that was killed hold the bases' locks until
        # the kernel has ended them.
        self._clock.pause(4 * self.poll_s * (self._repeats[action] - 1))

    def _count_commit(self, record: RunRecord) -> None:
        self._count(
            Action.START_COMMIT, f"Writing the overlay of {record.name} back failed {REPEATS_LIMIT} times; "
            "the guest runs on the overlay, which is whole.",
            f"df -h {_folders(record)}; free some space there, then: {again(record)}",
        )

    def _start_commit(self, record: RunRecord, decision: Decision) -> RunRecord:
        self._count_commit(record)
        disks = _with_phase(record, decision.targets, DiskPhase.COMMITTING)
        record = self._journal.enter(record, State.COMMITTING, " ".join(decision.targets), disks=disks)
        view = self._domain.view()
        for target in decision.targets:
            chain = view.live.disks[target].chain if view.live else ()
            known = record.disk(target)
            # The guard against merging the user's own top: exactly our overlay over exactly our base.
            if len(chain) < 2 or chain[0].place != known.overlay_path or chain[1].key != known.base_key:
                raise NeedsAttention(
                    f"The chain of {target} is not stillframe's overlay on the recorded base any more.",
                    self._domain.advice.definition,
                )
            self._domain.start_commit(target, chain[1].index, chain[0].index)
        return self._journal.done(record)

    def _suspend(self, record: RunRecord, decision: Decision) -> RunRecord:
        self._count(
            decision.action, f"The commits of {record.name} do not converge while it stands still: "
            "its storage is too slow or does not answer.",
            f"dmesg | tail; then: {again(record)}",
        )
        self._start_guard(record)
        record = self._journal.enter(record, State.SUSPENDING, suspended=True)
        self._suspended = True
        self._domain.suspend()
        return self._journal.done(record)

    def _start_guard(self, record: RunRecord) -> None:
        if self._guard is None:
            self._guard = guard_capture(
                "resume", self._domain, self._journal, record.id, _GUARD_S, self._clock)
        if self._guard is None:
            self._watcher.say("the process that guards the pivot did not start; going on without it")

    def _resume_now(self, record: RunRecord) -> RunRecord:
        """Let the guest go on; from then on no overlay is equal to its base."""
        disks = unequal_again(record, self.look(record))
        record = self._journal.enter(record, State.RESUMING, disks=disks)
        self._domain.resume()
        self._suspended = False
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None
        return self._journal.done(record, suspended=False)

    def _wait_drained(self, record: RunRecord, targets: tuple[str, ...], test: Drained) -> None:
        """Wait until base and overlay of each target are equal, the guest standing still."""
        deadline = Deadline(self._clock, _CONVERGE_S)
        while not test(self._domain.view(), record, targets):
            if deadline.passed():
                if record.suspended:
                    self._resume_now(record)
                raise HypervisorError("The commit is not ready although the guest stands still.", 0)
            self._domain.connection.wait_change(self.poll_s / 10)

    def _pivot(self, record: RunRecord, decision: Decision) -> RunRecord:
        self._wait_drained(record, decision.targets, ready_to_pivot)
        disks = _with_phase(record, decision.targets, DiskPhase.PIVOTING)
        record = self._journal.enter(
            record, State.PIVOTING, " ".join(decision.targets), disks=disks,
            qemu_mark=qemu_mark(self._domain))
        for target in decision.targets:
            self._domain.pivot(target)
        return self._journal.done(record)

    def _confirm_base(self, record: RunRecord, decision: Decision) -> RunRecord:
        fsync_definition(self._domain)
        disks = _with_phase(record, decision.targets, DiskPhase.ON_BASE)
        return self._journal.note(record, f"on base: {' '.join(decision.targets)}", disks=disks)

    def _resume(self, record: RunRecord, decision: Decision) -> RunRecord:
        self._count(
            decision.action, f"{record.name} is paused again and again by I/O errors on its own images.",
            f"df -h {_folders(record)}; free some space, then: {self._domain.advice.resume}; "
            f"{again(record)}",
        )
        return self._resume_now(record)

    def _commit_in_qemu(self, record: RunRecord, decision: Decision) -> RunRecord:
        self._count_commit(record)
        self._watcher.say(f"libvirt has forgotten the overlay of {' '.join(decision.targets)}: asking QEMU")
        disks = _with_phase(record, decision.targets, DiskPhase.COMMITTING)
        record = self._journal.enter(record, State.COMMITTING, "in QEMU", disks=disks)
        for target in decision.targets:
            known = record.disk(target)
            self._domain.qmp(partial(
                qemu_commit.start, target=target, overlay_file=known.overlay_path,
                base_file=known.base_qemu_file))
        return self._journal.done(record)

    def _finish_in_qemu(self, record: RunRecord, decision: Decision) -> RunRecord:
        self._wait_drained(record, decision.targets, drained)
        disks = _with_phase(record, decision.targets, DiskPhase.PIVOTING)
        record = self._journal.enter(
            record, State.PIVOTING, "in QEMU", disks=disks, qemu_mark=qemu_mark(self._domain))
        for target in decision.targets:
            step = partial(
                qemu_commit.finish, target=target, overlay_file=record.disk(target).overlay_path)
            deadline = Deadline(self._clock, _CONVERGE_S)
            while not self._domain.qmp(step):
                if deadline.passed():
                    raise HypervisorError(f"QEMU's commit of {target} does not end.", 0)
                self._clock.pause(self.poll_s / 10)
        return self._journal.note(record, f"committed in QEMU: {' '.join(decision.targets)}")

    def _end_stray_job(self, record: RunRecord, decision: Decision) -> RunRecord:
        for target in decision.targets:
            name = stray_job(self._domain.view(), record.disk(target))
            if name:
                self._domain.qmp(partial(qemu_commit.cancel, job=name))
        return self._journal.note(record, f"lost commits cancelled: {' '.join(decision.targets)}")

    def _drop_nodes(self, record: RunRecord, decision: Decision) -> RunRecord:
        for target in decision.targets:
            self._domain.qmp(partial(
                qemu_commit.close_unused, target=target, overlay_file=record.disk(target).overlay_path))
        return record

    def _compare(self, record: RunRecord, decision: Decision) -> RunRecord:
        for target in decision.targets:
            self._watcher.say(f"comparing base and overlay of {target}")
            known = record.disk(target)
            overlay = overlay_place(known.overlay_path, known.base)
            self._compared[target] = compare(known.base, overlay, timeout_s=_OFFLINE_S)
        return record

    def _commit_offline(self, record: RunRecord, decision: Decision) -> RunRecord:
        self._watcher.say(f"the guest is off: writing the overlay of {' '.join(decision.targets)} back")
        disks = _with_phase(record, decision.targets, DiskPhase.COMMITTING)
        record = self._journal.enter(record, State.COMMITTING, "offline", disks=disks)
        for target in decision.targets:
            known = record.disk(target)
            if not known.base.kind.is_local:  # libvirt may have spelt it its own way
                stand_on(known.overlay_path, known.base)
            commit_offline(known.overlay_path, known.base, timeout_s=_OFFLINE_S)
            self._compared[target] = True
        return self._journal.done(record)

    def _point_to_base(self, record: RunRecord, decision: Decision) -> RunRecord:
        view = self._domain.view()
        if view.inactive is None:
            raise HypervisorError("The domain has no definition to correct.", 0)
        # Both images read the same now; what is started from here on may write to either.
        disks = _with_phase(record, decision.targets, DiskPhase.PIVOTING)
        record = self._journal.enter(
            record, State.PIVOTING, "in the definition", disks=disks, qemu_mark=qemu_mark(self._domain))
        text = view.inactive.text
        for target in decision.targets:
            text = with_source(text, target, record.disk(target).source())
        self._domain.define(text)
        return self._journal.note(record, f"defined with base again: {' '.join(decision.targets)}")

    def _unlink(self, record: RunRecord, decision: Decision) -> RunRecord:
        record = self._journal.enter(record, State.CLEANING, " ".join(decision.targets))
        fsync_definition(self._domain)
        for target in decision.targets:
            path = Path(record.disk(target).overlay_path)
            path.unlink()
            fsync(path.parent)
        return self._journal.done(record)

    def _start(self, record: RunRecord, decision: Decision) -> RunRecord:
        record = self._journal.enter(record, State.RESTARTING, decision.reason)
        self._domain.start()
        return self._journal.done(record, start_verified=True)


def _with_phase(record: RunRecord, targets: tuple[str, ...], phase: DiskPhase) -> tuple[DiskRecord, ...]:
    return tuple(
        disk.with_phase(phase) if disk.target in targets else disk for disk in record.disks
    )


def _sentence(decision: Decision) -> str:
    where = f" ({', '.join(decision.targets)})" if decision.targets else ""
    return f"{decision.action.value}{where}: {decision.reason}"


def _needs_attention(error: StillframeError, record: RunRecord) -> NeedsAttention:
    if isinstance(error, NeedsAttention):
        return error
    return NeedsAttention(
        f"{error.message} {record.name} may still be on its overlays.",
        f"{error.next_command}; then: {again(record)}".removeprefix("; then: "),
    )


def _folders(record: RunRecord) -> str:
    return " ".join(sorted({str(Path(disk.base.path).parent) for disk in record.disks if disk.base.path}))
