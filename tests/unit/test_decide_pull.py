"""The decisions behind the release of a backup job: each row of the table, and what must never be decided."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import pytest

from stillframe.capture.decide_pull import (
    BackupSeen,
    PullAction,
    PullSight,
    PullWhy,
    decide_pull,
    is_durable,
    unneeded,
)
from stillframe.capture.journal import PullRecord, RunRecord
from stillframe.capture.method import Method
from stillframe.capture.states import BEFORE_RELEASE, PULL_STATES, Quiesce, State
from stillframe.hypervisor.model import Power

PULL = PullRecord(
    checkpoint="new", older=("old", "older"), socket="/s", folder="", scratch=("/a", "/b"), qemu_files=(),
    begun=True)
RECORD = RunRecord(
    id="1", uuid="u", name="guest", uri="qemu:///system", destination="there", quiesce=Quiesce.NONE,
    state=State.RELEASED, began_at="", pid=1, disks=(), method=Method.BITMAP, pull=PULL)
GIVEN_UP = msgspec.structs.replace(RECORD, given_up="why")
SEEN = PullSight(Power.RUNNING, checkpoints=frozenset({"new", "old"}), files=("/a",))


def action(record: RunRecord, sight: PullSight) -> PullAction:
    return decide_pull(record, sight).action


def test_the_usual_course() -> None:
    sight = replace(SEEN, job=BackupSeen.OURS)
    assert action(RECORD, sight) is PullAction.END_JOB
    decision = decide_pull(RECORD, SEEN)
    assert (decision.action, decision.targets) == (PullAction.FORGET, ("old",))
    sight = replace(SEEN, checkpoints=frozenset({"new"}))
    assert action(RECORD, sight) is PullAction.SWEEP
    assert action(RECORD, replace(sight, files=())) is PullAction.FINISH


def test_a_run_that_was_given_up_deletes_its_own_checkpoint_and_keeps_the_older() -> None:
    decision = decide_pull(GIVEN_UP, SEEN)
    assert (decision.action, decision.targets) == (PullAction.FORGET, ("new",))
    assert action(GIVEN_UP, replace(SEEN, checkpoints=frozenset({"old"}), files=())) is PullAction.FINISH


@pytest.mark.parametrize("state", [state for state in State if state in BEFORE_RELEASE])
def test_before_the_release_it_is_given_up(state: State) -> None:
    assert action(msgspec.structs.replace(RECORD, state=state), SEEN) is PullAction.RELEASE


def test_a_guest_that_may_be_frozen_is_thawed_before_all_else() -> None:
    frozen = msgspec.structs.replace(RECORD, freeze_begun=True)
    sight = replace(SEEN, job=BackupSeen.OURS)
    assert action(frozen, sight) is PullAction.THAW
    assert action(frozen, replace(sight, thaw_hopeless=True)) is PullAction.END_JOB
    nothing = PullSight(Power.RUNNING, thaw_hopeless=True)
    assert decide_pull(frozen, nothing).why is PullWhy.FROZEN
    assert action(frozen, replace(nothing, power=Power.OFF)) is PullAction.FINISH


def test_a_guest_paused_by_an_io_error_goes_on_once_the_job_is_over() -> None:
    sight = replace(SEEN, power=Power.PAUSED_ON_IO_ERROR, job=BackupSeen.OURS)
    assert action(RECORD, sight) is PullAction.END_JOB
    sight = replace(sight, job=BackupSeen.NONE)
    assert action(RECORD, sight) is PullAction.RESUME
    assert decide_pull(RECORD, replace(sight, waited_out=True)).why is PullWhy.IO_ERROR
    never_begun = msgspec.structs.replace(RECORD, pull=msgspec.structs.replace(PULL, begun=False))
    assert action(never_begun, sight) is PullAction.FORGET
    assert action(RECORD, replace(sight, power=Power.PAUSED)) is PullAction.FORGET, "not paused by us"


def test_what_libvirt_lost() -> None:
    sight = replace(SEEN, job=BackupSeen.WEDGED)
    assert action(RECORD, sight) is PullAction.WAIT
    assert decide_pull(RECORD, replace(sight, waited_out=True)).why is PullWhy.WEDGED
    assert action(RECORD, replace(SEEN, stray=True)) is PullAction.CLOSE_IN_QEMU
    assert decide_pull(RECORD, replace(SEEN, power=Power.HIDDEN)).why is PullWhy.HIDDEN


def test_never_deletes_what_the_next_run_counts_from_nor_ends_anothers_job() -> None:
    """Over every state and every sight."""
    records = [
        msgspec.structs.replace(RECORD, state=state, given_up=given_up, freeze_begun=frozen)
        for state in (State.RELEASED, *PULL_STATES) for given_up in ("", "why") for frozen in (False, True)
    ]
    names = [frozenset(each) for each in ((), ("new",), ("old",), ("new", "old", "older"))]
    for record, power, job, stray, seen, files, waited in itertools.product(
        records, Power, BackupSeen, (False, True), names, ((), ("/a",)), (False, True)
    ):
        sight = PullSight(power, job, stray, seen, files, waited_out=waited)
        decision = decide_pull(record, sight)
        if decision.action is PullAction.FORGET:
            kept = {PULL.checkpoint} if is_durable(record) else set(PULL.older)
            assert not kept & set(decision.targets)
            assert record.state not in BEFORE_RELEASE
        if decision.action is PullAction.END_JOB:
            assert job is BackupSeen.OURS
        if decision.action is PullAction.FINISH:
            assert not files
            assert not seen & unneeded(record)
            assert job is not BackupSeen.OURS
        if decision.action is PullAction.RESUME:
            assert power is Power.PAUSED_ON_IO_ERROR
