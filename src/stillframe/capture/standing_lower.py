"""Letting the older overlays go: look, decide, do one step, look again (see standing_decide.py).

The run's copy is durable, and its overlays stay. base ← lower ← overlay becomes base ← overlay: libvirt's
commit of an image below the one in use, by which the guest neither stops nor changes its image. The same
loop ends a run and `recover`s it. It takes a run from LOWERING to STANDING, or raises NeedsAttention with
everything left as it is: the guest's data is complete in the chain at each step.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from stillframe.block.image import overlay_place
from stillframe.block.tools import commit_offline, compare, stand_on
from stillframe.capture.decide import Action as BackAction
from stillframe.capture.decide import Decision, Why
from stillframe.capture.explain import attention
from stillframe.capture.journal import DiskRecord, Journal, RunRecord
from stillframe.capture.let_go_on import fsync_definition
from stillframe.capture.limits import Limits
from stillframe.capture.standing_decide import Lowering, LowerView, Step, decide_lowering
from stillframe.capture.standing_sight import header_backing, look_lower, lower_job
from stillframe.capture.states import DiskPhase, State
from stillframe.capture.stepping import REPEATS_LIMIT, CommitProgress, Stepping, Watcher, again
from stillframe.clock import Clock, Deadline
from stillframe.durable import fsync
from stillframe.errors import (
    CopyFailed,
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

_SETTLE_S = 8.0
_OFFLINE_S = 6 * 3600.0
_STEPS_LIMIT = 200_000


class LowerRun(Stepping):
    """Takes one run from LOWERING or SHEDDING to STANDING."""

    def __init__(
        self, journal: Journal, domain: Guest, clock: Clock, limits: Limits, watcher: Watcher
    ) -> None:
        super().__init__(journal, domain, clock, limits, watcher)
        self._complete: dict[str, bool] = {}
        self._waiting: Deadline | None = None
        self._waiting_for: Lowering | None = None
        self._repeats: Counter[Step] = Counter()

    def look(self, record: RunRecord) -> LowerView:
        """Return what is seen now, without doing anything."""
        return look_lower(record, self._domain, self._complete)

    def finish(self, record: RunRecord) -> RunRecord:
        """Do step after step until the run stands; return its record. Raises NeedsAttention."""
        for _ in range(_STEPS_LIMIT):
            decision = self._decide(record)
            if decision is not None and decision.step is Step.STAND:
                return self._stand(record)
            if decision is not None:
                record = self._attempt(record, decision)
        raise NeedsAttention(f"Committing the older overlays of {record.name} takes too many steps.",
                             again(record))

    def _decide(self, record: RunRecord) -> Lowering | None:
        try:
            view = self.look(record)
        except (HypervisorError, ProgramFailed, ProgramTimedOut) as error:
            self._failed(record, "look at the guest", error)
            return None
        decision = decide_lowering(record, view)
        if decision == self._waiting_for and self._waiting is not None and self._waiting.passed():
            decision = decide_lowering(record, replace(view, waited_out=True))
        return decision

    def _attempt(self, record: RunRecord, decision: Lowering) -> RunRecord:
        if decision.step is Step.ASK_FIRST:
            raise attention(record, Decision(BackAction.ASK, decision.targets, decision.reason, decision.why))
        if decision.step is not Step.WAIT:
            self._waiting = None
        try:
            after = self._steps()[decision.step](record, decision)
        except NeedsAttention:
            raise
        except (HypervisorError, GuestUnknown, CopyFailed, ProgramFailed, ProgramTimedOut) as error:
            self._failed(record, decision.step.value, error)
            return self._journal.current(record)
        except OSError as error:
            self._failed(record, decision.step.value, StillframeError(str(error)))
            return self._journal.current(record)
        self._failures = 0
        if decision.step is not Step.WAIT:
            where = f" ({', '.join(decision.targets)})" if decision.targets else ""
            self.did.append(f"{decision.step.value}{where}: {decision.reason}")
        return after

    def _steps(self) -> dict[Step, Callable[[RunRecord, Lowering], RunRecord]]:
        return {
            Step.WAIT: self._wait,
            Step.END_STRAY: self._end_stray,
            Step.START_DOWN: self._start_down,
            Step.COMPARE_DOWN: self._compare_down,
            Step.DOWN_OFFLINE: self._down_offline,
            Step.POINT_PAST: self._point_past,
            Step.CONFIRM_DOWN: self._confirm_down,
            Step.CLOSE_NODES: self._close_nodes,
            Step.SHED: self._shed,
        }

    # --- the steps ----------------------------------------------------------------------------

    def _wait(self, record: RunRecord, decision: Lowering) -> RunRecord:
        committing = decision.why is Why.COMMIT_RUNS
        if self._waiting is None or self._waiting_for != decision:
            self._waiting = Deadline(self._clock, self._limits.commit_s if committing else _SETTLE_S)
            self._waiting_for = decision
        if committing:
            self._report(record)
            if self._waiting.passed():
                raise NeedsAttention(
                    f"Committing the older overlay of {record.name} down did not end within "
                    f"{self._limits.commit_s:.0f} s; it goes on, and nothing is lost.", again(record))
        self._domain.connection.wait_change(self.poll_s)
        return record

    def _report(self, record: RunRecord) -> None:
        view = self._domain.view()
        jobs = [job for disk in record.disks if (job := lower_job(view, disk)) is not None]
        self._watcher.commit(CommitProgress(sum(job.done for job in jobs), sum(job.total for job in jobs)))

    def _start_down(self, record: RunRecord, decision: Lowering) -> RunRecord:
        self._repeats[decision.step] += 1
        if self._repeats[decision.step] > REPEATS_LIMIT:
            raise NeedsAttention(
                f"Committing the older overlay of {record.name} down failed {REPEATS_LIMIT} times; the "
                "guest's data is complete in its chain.",
                f"df -h; free some space below the base, then: {again(record)}")
        self._clock.pause(self.poll_s * 10 * (self._repeats[decision.step] - 1))
        record = self._enter_committing(record, decision, "")
        view = self._domain.view()
        for target in decision.targets:
            known = record.disk(target)
            chain = view.live.disks[target].chain if view.live else ()
            # Exactly our older overlay, right below ours and right above the base that was recorded.
            if len(chain) < 3 or (chain[0].place, chain[1].place, chain[2].key) != (
                    known.overlay_path, known.lower_path, known.base_key):
                raise NeedsAttention(
                    f"The chain of {target} is not stillframe's two overlays on the recorded base any more.",
                    f"virsh dumpxml {record.name}")
            self._domain.start_lowering(target, chain[2].index, chain[1].index)
        return self._journal.done(record)

    def _enter_committing(self, record: RunRecord, decision: Lowering, detail: str) -> RunRecord:
        disks = _changed(record, decision.targets, phase=DiskPhase.COMMITTING)
        return self._journal.enter(
            record, State.LOWERING, f"{detail} {' '.join(decision.targets)}".strip(), disks=disks)

    def _end_stray(self, record: RunRecord, decision: Lowering) -> RunRecord:
        view = self._domain.view()
        for target in decision.targets:
            job = lower_job(view, record.disk(target))
            if job is not None:
                self._domain.qmp(partial(qemu_commit.cancel, job=job.name))
        return self._journal.note(record, f"lost commits cancelled: {' '.join(decision.targets)}")

    def _compare_down(self, record: RunRecord, decision: Lowering) -> RunRecord:
        for target in decision.targets:
            known = record.disk(target)
            self._watcher.say(f"comparing the base and the older overlay of {target}")
            self._complete[target] = compare(
                known.base, overlay_place(known.lower_path, known.base), timeout_s=_OFFLINE_S)
        return record

    def _down_offline(self, record: RunRecord, decision: Lowering) -> RunRecord:
        names = " ".join(decision.targets)
        self._watcher.say(f"the guest is off: committing the older overlay of {names} down")
        record = self._enter_committing(record, decision, "offline")
        for target in decision.targets:
            known = record.disk(target)
            # Even if the overlay's header is past it already: writing the same once more does no harm.
            stand_on(known.lower_path, known.base)
            commit_offline(known.lower_path, known.base, timeout_s=_OFFLINE_S)
            stand_on(known.overlay_path, known.base)
            self._complete[target] = True
        return self._journal.done(record)

    def _point_past(self, record: RunRecord, decision: Lowering) -> RunRecord:
        view = self._domain.view()
        if view.inactive is None:
            raise HypervisorError("The domain has no definition to correct.", 0)
        record = self._journal.enter(record, State.LOWERING, "in the definition")
        text = view.inactive.text
        for target in decision.targets:
            text = with_source(
                text, target, view.inactive.disks[target].top, record.disk(target).source())
        self._domain.define(text)
        return self._journal.done(record)

    def _confirm_down(self, record: RunRecord, decision: Lowering) -> RunRecord:
        for target in decision.targets:
            known = record.disk(target)
            backing = header_backing(known)
            if not known.base.is_named(backing):
                raise NeedsAttention(
                    f"The overlay {known.overlay_path} of {record.name} stands on {backing!r}, not on "
                    f"{known.base.text()}.", f"qemu-img info -U --backing-chain {known.overlay_path}")
            # The base first: QEMU has not flushed it, and the overlay's header counts on it.
            if known.base.kind.is_local:
                fsync(Path(known.base.path))
            fsync(Path(known.overlay_path))
        fsync_definition(self._domain)
        disks = _changed(record, decision.targets, lowered=True)
        return self._journal.note(record, f"in the base: {' '.join(decision.targets)}", disks=disks)

    def _close_nodes(self, record: RunRecord, decision: Lowering) -> RunRecord:
        for target in decision.targets:
            self._domain.qmp(partial(
                qemu_commit.close_unused, target=target, overlay_file=record.disk(target).lower_path))
        return record

    def _shed(self, record: RunRecord, decision: Lowering) -> RunRecord:
        record = self._journal.enter(record, State.SHEDDING, " ".join(decision.targets))
        for target in decision.targets:
            path = Path(record.disk(target).lower_path)
            path.unlink()
            fsync(path.parent)
        return self._journal.done(record)

    def _stand(self, record: RunRecord) -> RunRecord:
        return self._journal.take_over(
            record, "the guest stands on the overlays of this run", disks=standing_disks(record))


def standing_disks(record: RunRecord) -> tuple[DiskRecord, ...]:
    """Return the disks of a run that stands from now on: what is below its overlays changes no more."""
    disks = []
    for disk in record.disks:
        with contextlib.suppress(OSError):
            disk = msgspec.structs.replace(disk, base_identity=disk.base.identity())  # noqa: PLW2901
        disks.append(msgspec.structs.replace(
            disk, phase=DiskPhase.OVERLAID, lower_path="", lower_identity=None, lowered=False))
    return tuple(disks)


def _changed(record: RunRecord, targets: tuple[str, ...], **changes: object) -> tuple[DiskRecord, ...]:
    return tuple(
        msgspec.structs.replace(disk, **changes) if disk.target in targets else disk for disk in record.disks)
