"""Ending a backup job and all that a run of the bitmap method made: look, decide, do one step, look again.

The same loop ends a normal run, a failed one, and whatever a crash left, as bring_back.py does for overlays.
A call that fails is not believed: the next look tells what came of it.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from stillframe.block.tools import remove_bitmap
from stillframe.capture.decide_pull import PullAction, PullDecision, PullSight, PullWhy, decide_pull
from stillframe.capture.journal import Journal, RunRecord
from stillframe.capture.limits import Limits
from stillframe.capture.pull_sight import look_at_pull, pull_of, scratch_nodes
from stillframe.capture.states import State
from stillframe.capture.stepping import REPEATS_LIMIT, Stepping, Watcher, again
from stillframe.clock import Clock, Deadline, utc_text
from stillframe.errors import (
    ConnectionLost,
    GuestState,
    GuestUnknown,
    HypervisorError,
    NeedsAttention,
    ProgramFailed,
    ProgramTimedOut,
    StillframeError,
)
from stillframe.hypervisor.advice import advice_for
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.monitor import delete_bitmap

_END_S = 30.0
_SETTLE_S = 8.0
_STEPS_LIMIT = 1000

_NEXT = {
    PullWhy.HIDDEN: "systemctl stop 'libvirtd*.socket' libvirtd; stillframe recover --repair-status {name}; "
                    "systemctl start libvirtd; stillframe recover {name}",
    PullWhy.WEDGED: "systemctl stop 'libvirtd*.socket' libvirtd; stillframe recover --repair-status {name}; "
                    "systemctl start libvirtd; stillframe recover {name}   # the guest runs on meanwhile",
    PullWhy.IO_ERROR: "df -h; free some space, then: {advice.resume}; stillframe recover {name}",
    PullWhy.FROZEN: "{advice.thaw}; stillframe recover {name}",
}


class EndPull(Stepping):
    """Takes one run of the bitmap method to DONE, or raises NeedsAttention."""

    stuck = GuestState.UNKNOWN

    def __init__(
        self, journal: Journal, domain: Guest, clock: Clock, limits: Limits, watcher: Watcher
    ) -> None:
        super().__init__(journal, domain, clock, limits, watcher)
        self._waiting: Deadline | None = None
        self._repeats: Counter[PullAction] = Counter()
        #: Checkpoints whose bitmaps could not be deleted: the next durable run deletes them.
        self._left: frozenset[str] = frozenset()

    def look(self, record: RunRecord) -> PullSight:
        """Return what is seen now, without doing anything."""
        sight = look_at_pull(record, self._domain, thaw_hopeless=self._thaw_hopeless)
        return replace(sight, checkpoints=sight.checkpoints - self._left)

    def finish(self, record: RunRecord) -> RunRecord:
        """Do step after step until the run is DONE; return its record. Raises NeedsAttention."""
        for _ in range(_STEPS_LIMIT):
            decision = self._decide(record)
            if decision is None:
                continue
            if decision.action is PullAction.FINISH:
                return self._journal.enter(
                    record, State.DONE, decision.reason, ended_at=utc_text(self._clock.now()))
            if decision.action is PullAction.ASK:
                raise _attention(record, decision)
            record = self._attempt(record, decision)
        raise NeedsAttention(f"Ending the run of {record.name} takes too many steps.", again(record),
                             GuestState.UNKNOWN)

    def _decide(self, record: RunRecord) -> PullDecision | None:
        try:
            sight = self.look(record)
        except HypervisorError as error:
            self._failed(record, "look at the guest", error)
            return None
        decision = decide_pull(record, sight)
        given_up = (self._waiting is not None and self._waiting.passed()) if (
            decision.action is PullAction.WAIT) else self._repeats[decision.action] > REPEATS_LIMIT
        return decide_pull(record, replace(sight, waited_out=True)) if given_up else decision

    def _attempt(self, record: RunRecord, decision: PullDecision) -> RunRecord:
        if decision.action is not PullAction.WAIT:
            self._waiting = None
            self._repeats[decision.action] += 1
        try:
            done = self._step(decision.action)(record, decision)
        except (HypervisorError, GuestUnknown, ProgramFailed, ProgramTimedOut) as error:
            self._failed(record, decision.action.value, error)
        except OSError as error:
            self._failed(record, decision.action.value, StillframeError(str(error)))
        else:
            self._failures = 0
            if decision.action is not PullAction.WAIT:
                self.did.append(f"{decision.action.value}: {decision.reason}")
            return done
        return self._journal.current(record)

    def _step(self, action: PullAction) -> Callable[[RunRecord, PullDecision], RunRecord]:
        return {
            PullAction.RELEASE: self._release,
            PullAction.THAW: self._thaw,
            PullAction.WAIT: self._wait,
            PullAction.END_JOB: self._end_job,
            PullAction.CLOSE_IN_QEMU: self._close_in_qemu,
            PullAction.RESUME: self._resume,
            PullAction.FORGET: self._forget,
            PullAction.SWEEP: self._sweep,
        }[action]

    # --- the steps ----------------------------------------------------------------------------

    def _release(self, record: RunRecord, decision: PullDecision) -> RunRecord:
        return self._given_up(record, decision.reason)

    def _thaw(self, record: RunRecord, _decision: PullDecision) -> RunRecord:
        return self._thawed(record)

    def _wait(self, record: RunRecord, _decision: PullDecision) -> RunRecord:
        self._waiting = self._waiting or Deadline(self._clock, _SETTLE_S)
        self._domain.connection.wait_change(4 * self.poll_s)
        return record

    def _end_job(self, record: RunRecord, _decision: PullDecision) -> RunRecord:
        socket = pull_of(record).socket
        record = self._journal.enter(record, State.ENDING)
        # abortJob ends whatever job runs: asked once more whether it is ours, right before.
        if self._domain.backup_runs(socket):
            self._domain.abort_job()
        deadline = Deadline(self._clock, _END_S)
        while self._domain.backup_runs(socket):
            if deadline.passed():
                raise HypervisorError(f"The backup job of {record.name} does not end.", 0)
            self._domain.connection.wait_change(self.poll_s)
        return self._journal.done(record)

    def _close_in_qemu(self, record: RunRecord, _decision: PullDecision) -> RunRecord:
        pull = pull_of(record)
        record = self._journal.enter(record, State.ENDING, "in QEMU")
        nodes = scratch_nodes(pull, self._domain.view().qemu)
        self._domain.close_backup(pull.socket, nodes)
        return self._journal.done(record)

    def _resume(self, record: RunRecord, _decision: PullDecision) -> RunRecord:
        record = self._journal.enter(record, State.RESUMING)
        self._domain.resume()
        # What stopped it may stop it again at once: the next look is to see that.
        self._domain.connection.wait_change(4 * self.poll_s)
        return self._journal.done(record)

    def _forget(self, record: RunRecord, decision: PullDecision) -> RunRecord:
        record = self._journal.enter(record, State.FORGETTING, " ".join(decision.targets))
        for name in decision.targets:
            try:
                self._forget_one(record, name)
            except ConnectionLost:
                raise
            except (HypervisorError, ProgramFailed, ProgramTimedOut) as error:
                if self._repeats[PullAction.FORGET] <= REPEATS_LIMIT:
                    raise
                # It costs the guest a bitmap, no more; the next durable run tries again.
                self._left |= {name}
                record = self._journal.note(record, f"{name} is left to the next run: {error.message}")
        return self._journal.done(record)

    def _forget_one(self, record: RunRecord, name: str) -> None:
        has_qemu = self._domain.power().has_qemu
        if name in self._domain.checkpoints():
            with contextlib.suppress(HypervisorError):
                # libvirt can't where one of the bitmaps is absent, nor while the guest is off.
                self._domain.delete_checkpoint(name, bitmaps=has_qemu)
        if has_qemu:
            files = pull_of(record).qemu_files
            self._domain.qmp(lambda qmp: delete_bitmap(qmp, files, name))
        else:
            for disk in record.disks:
                if disk.base_format == "qcow2":
                    remove_bitmap(disk.base, name)
        if name in self._domain.checkpoints():
            self._domain.delete_checkpoint(name, bitmaps=False)

    def _sweep(self, record: RunRecord, decision: PullDecision) -> RunRecord:
        pull = pull_of(record)
        record = self._journal.enter(record, State.SWEEPING, " ".join(decision.targets))
        for path in decision.targets:
            with contextlib.suppress(FileNotFoundError):  # libvirt deletes them, too, when a job ends
                os.rmdir(path) if path == pull.folder else os.unlink(path)
        return self._journal.done(record)


def _attention(record: RunRecord, decision: PullDecision) -> NeedsAttention:
    unknown = decision.why in (PullWhy.FROZEN, PullWhy.HIDDEN)
    guest = GuestState.STOPPED if decision.why is PullWhy.IO_ERROR else (
        GuestState.UNKNOWN if unknown else GuestState.SAFE)
    return NeedsAttention(
        f"{record.name} needs a person: {decision.reason}.",
        _NEXT.get(decision.why, "stillframe recover {name}").format(
            name=record.name, advice=advice_for(record.uri, record.name)), guest)
