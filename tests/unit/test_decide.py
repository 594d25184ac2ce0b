"""What the decision may never do, whatever is recorded and whatever is seen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.capture.decide import (
    Action,
    Decision,
    DiskSight,
    FileSeen,
    JobSeen,
    Seen,
    Sight,
    decide,
    settled,
)
from stillframe.capture.journal import RunRecord
from stillframe.capture.states import BEFORE_RELEASE, KEPT, DiskPhase, State
from stillframe.hypervisor.model import Power
from tests.unit.capture_records import (
    AT,
    disk_sight,
    off,
    off_disk,
    on_base,
    on_overlay,
    paused,
    run_record,
    running,
)

_BEGINS_COMMIT = (Action.START_COMMIT, Action.COMMIT_IN_QEMU, Action.COMMIT_OFFLINE)
_PIVOTS = (Action.PIVOT, Action.FINISH_IN_QEMU)
_TOUCHES_COMMIT = (*_BEGINS_COMMIT, *_PIVOTS)
_NOTHING_DONE = (Action.ASK, Action.WAIT, Action.RELEASE, Action.THAW, Action.RESUME)
_NOT_COMMITTED = (DiskPhase.PLANNED, DiskPhase.OVERLAID)
_TARGETS = ("vda", "vdb")


_SEEN = [Seen.BASE, Seen.OVERLAY, Seen.UNDER, Seen.OTHER]
#: What may be unusual about a disk, and how; None of it in most of the disks that are drawn.
_ODD_WITH_QEMU: dict[str, list[Any]] = {
    "qemu": [*_SEEN, Seen.UNKNOWN], "live": _SEEN, "inactive": [*_SEEN, Seen.UNKNOWN], "job": list(JobSeen),
    "leaked_nodes": [("node",)],
}
_ODD_OFF: dict[str, list[Any]] = {"inactive": [*_SEEN, Seen.UNKNOWN], "equal": [True, False]}
_ODD_FILES: dict[str, list[Any]] = {
    "overlay": [FileSeen.ABSENT, FileSeen.OTHER], "base_present": [False], "base_intact": [False],
    "base_newer": [True, None], "overlay_empty": [True, False], "named_by": ["other"],
}


def _some(chance: random.Random, values: Iterable[str], most: int) -> set[str]:
    pool = sorted(values)
    return set(chance.sample(pool, chance.randint(0, min(most, len(pool)))))


def _disk(chance: random.Random, target: str, power: Power) -> DiskSight:
    """A disk that all agree on, but for some oddities."""
    top = chance.choice([Seen.BASE, Seen.OVERLAY])
    choices: dict[str, list[Any]]
    if power.has_qemu:
        job = chance.choice([JobSeen.NONE, JobSeen.READY]) if top is Seen.OVERLAY else JobSeen.NONE
        plain = disk_sight(target, top, job=job)
        choices = {**_ODD_WITH_QEMU, **_ODD_FILES}
    else:
        plain = off_disk(top, target)
        choices = {**_ODD_OFF, **_ODD_FILES}
    changes = {name: chance.choice(choices[name]) for name in sorted(_some(chance, choices, 4))}
    if power is Power.GONE:
        changes["inactive"] = Seen.UNKNOWN
    return replace(plain, **changes)


_RECORD_FLAGS = ("snapshot_begun", "freeze_begun", "thaw_verified", "suspended", "start_verified")
_SIGHT_FLAGS = ("managed_save", "shutdown_pending", "waited_out", "thaw_hopeless")
# Overlays that are to stay have a decision of their own (test_standing_decide).
_STATES = [state for state in State if state not in KEPT]
_RELEASED = [state for state in _STATES if state not in BEFORE_RELEASE]


def make_situation(chance: random.Random) -> tuple[RunRecord, Sight]:
    """Any record with any sight that can be seen: what QEMU says is known only while it runs."""
    power = chance.choice(list(Power))
    targets = _TARGETS[:chance.randint(1, 2)]
    state = chance.choice([*_RELEASED, *_RELEASED, *_STATES])
    known, seen = _some(chance, _RECORD_FLAGS, 5), _some(chance, _SIGHT_FLAGS, 2)
    record = run_record(
        state, {target: chance.choice(list(DiskPhase)) for target in targets},
        shutdown_begun_at=chance.choice(["", AT]), **{flag: flag in known for flag in _RECORD_FLAGS},
    )
    disks = tuple(_disk(chance, target, power) for target in targets)
    return record, Sight(power, disks, **{flag: flag in seen for flag in _SIGHT_FLAGS})


#: For what shrinks; the sweep below goes through far more of them.
situations = st.randoms(use_true_random=False).map(make_situation)


def uses(disk: DiskSight) -> tuple[Seen, Seen, Seen]:
    return disk.qemu, disk.live, disk.inactive


def violations(record: RunRecord, sight: Sight, decision: Decision) -> list[str]:
    """Return which invariants *decision* would break, in words."""
    wrong = dict(_wrong_for_domain(record, sight, decision))
    for disk in sight.disks:
        if disk.target in decision.targets:
            phase = record.disk(disk.target).phase
            for rule in (_wrong_unlink, _wrong_confirm, _wrong_commit, _wrong_elsewhere):
                wrong.update(rule(record, sight, disk, phase, decision.action))
    return [words for words, is_wrong in wrong.items() if is_wrong]


Wrong = dict[str, bool]


def _wrong_unlink(
    _record: RunRecord, sight: Sight, disk: DiskSight, phase: DiskPhase, action: Action
) -> Wrong:
    if action is not Action.UNLINK:
        return {}
    return {
        "unlink: in use": Seen.OVERLAY in uses(disk) or Seen.UNDER in uses(disk),
        "unlink: on an image nobody knows": Seen.OTHER in uses(disk),
        "unlink: QEMU was not asked": sight.power.has_qemu and disk.qemu is not Seen.BASE,
        "unlink: a job runs": disk.job is not JobSeen.NONE,
        "unlink: not ours": disk.overlay is not FileSeen.OURS,
        "unlink: QEMU holds it open": bool(disk.leaked_nodes),
        "unlink: another domain names it": bool(disk.named_by),
        "unlink: nobody confirmed the base": phase is not DiskPhase.ON_BASE,
        "unlink: QEMU hides": sight.power is Power.HIDDEN,
    }


def _wrong_confirm(
    record: RunRecord, sight: Sight, disk: DiskSight, phase: DiskPhase, action: Action
) -> Wrong:
    if action is not Action.CONFIRM_BASE:
        return {}
    never_on = phase is DiskPhase.PLANNED and not record.snapshot_begun
    holds_data = disk.overlay is FileSeen.OURS and not disk.overlay_empty
    return {
        # The live view alone may lag for ever: a start goes by the definition, writes go by QEMU.
        "confirm: the overlay is in use": Seen.OVERLAY in (disk.qemu, disk.inactive) or (
            disk.live is Seen.OVERLAY and disk.qemu is not Seen.BASE),
        "confirm: not compared": not sight.power.has_qemu and not disk.equal and not never_on,
        "confirm: its writes are nowhere else":
            sight.power.has_qemu and holds_data and phase is DiskPhase.OVERLAID,
    }


def _wrong_commit(
    _record: RunRecord, _sight: Sight, disk: DiskSight, phase: DiskPhase, action: Action
) -> Wrong:
    if action not in _BEGINS_COMMIT:
        return {}
    offline = action is Action.COMMIT_OFFLINE
    return {
        "commit: the base changed after the capture": phase in _NOT_COMMITTED and not disk.base_intact,
        "commit: the base is the truth": phase is DiskPhase.ON_BASE,
        "commit: not our overlay": disk.overlay is not FileSeen.OURS,
        "commit: another base": not disk.base_present,
        "commit: a job runs": disk.job is not JobSeen.NONE,
        "commit: QEMU is not on our overlay": not offline and disk.qemu is not Seen.OVERLAY,
        "commit: by the wrong one":
            not offline and (disk.live is Seen.BASE) != (action is Action.COMMIT_IN_QEMU),
        "commit: the base may be newer":
            offline and disk.inactive is Seen.BASE and disk.base_newer is not False,
        "commit: either may be newer": offline and phase is DiskPhase.PIVOTING,
    }


def _wrong_elsewhere(
    record: RunRecord, sight: Sight, disk: DiskSight, _phase: DiskPhase, action: Action
) -> Wrong:
    overlaid = [each for each in sight.disks if each.qemu is Seen.OVERLAY]
    pivots = action in (Action.PIVOT, Action.SUSPEND) or (
        action is Action.FINISH_IN_QEMU and disk.qemu is Seen.OVERLAY)
    points = action is Action.POINT_TO_BASE
    return {
        "pivot: not all are ready": pivots and any(each.job is not JobSeen.READY for each in overlaid),
        "pivot: the CPUs run": pivots and (sight.power is Power.RUNNING) != (action is Action.SUSPEND),
        "point to base: not compared": points and not sight.power.has_qemu and not disk.equal,
        "point to base: in use":
            points and sight.power.has_qemu and disk.qemu is not Seen.BASE,
    }


def _wrong_for_domain(record: RunRecord, sight: Sight, decision: Decision) -> Wrong:
    action = decision.action
    hidden = sight.power is Power.HIDDEN
    offline = action in (Action.COMMIT_OFFLINE, Action.COMPARE)
    ours = sight.power is Power.PAUSED and record.suspended
    left = not all(settled(disk) for disk in sight.disks)
    behind = any(
        disk.qemu is Seen.BASE and disk.inactive is Seen.OVERLAY for disk in sight.disks)
    lost = any(Seen.OVERLAY in uses(disk) and disk.overlay is not FileSeen.OURS for disk in sight.disks)
    frozen = record.freeze_begun and not record.thaw_verified and sight.power.has_qemu
    resume, start, finish = (action is each for each in (Action.RESUME, Action.START, Action.FINISH))
    return {
        "a target that is not in the record":
            not set(decision.targets) <= {disk.target for disk in record.disks},
        "no reason": not decision.reason,
        "a commit before release": action in _TOUCHES_COMMIT and record.state in BEFORE_RELEASE,
        "released twice": action is Action.RELEASE and record.state not in BEFORE_RELEASE,
        "offline work while QEMU runs": offline and (sight.power.has_qemu or hidden),
        "offline work with a managed save": offline and sight.managed_save,
        "resume: not our pause": resume and not ours and sight.power is not Power.PAUSED_ON_IO_ERROR,
        "resume: libvirt is behind": resume and behind,
        "start: we did not shut it down":
            start and (not record.shutdown_begun_at or sight.power is not Power.OFF),
        "start: something is left": start and left,
        "finish: something is left": finish and (left or hidden),
        "finish: paused by us": finish and ours,
        "finish: frozen": finish and frozen,
        "something was done though the overlay in use is lost": lost and action not in _NOTHING_DONE,
    }


@settings(max_examples=1000, deadline=None)
@given(situations)
def test_no_decision_breaks_an_invariant(situation: tuple[RunRecord, Sight]) -> None:
    record, sight = situation
    assert violations(record, sight, decide(record, sight)) == []


def test_no_decision_of_a_great_many_breaks_an_invariant_and_all_actions_are_among_them() -> None:
    chance = random.Random(20261123)
    decided: Counter[Action] = Counter()
    for _ in range(60_000):
        record, sight = make_situation(chance)
        decision = decide(record, sight)
        decided[decision.action] += 1
        assert violations(record, sight, decision) == [], (record, sight, decision)
    assert set(Action) - set(decided) == set()


@settings(max_examples=500, deadline=None)
@given(situations)
def test_giving_up_waiting_never_waits_for_anything_but_a_commit(situation: tuple[RunRecord, Sight]) -> None:
    record, sight = situation
    decision = decide(record, replace(sight, waited_out=True))
    assert decision.action is not Action.WAIT or decision.reason == "the commit runs"


@settings(max_examples=500, deadline=None)
@given(situations)
def test_a_guest_that_stillframe_paused_is_not_left_paused_when_a_person_is_asked(
    situation: tuple[RunRecord, Sight]
) -> None:
    record, sight = situation
    decision = decide(record, sight)
    if decision.action is Action.ASK and sight.power is Power.PAUSED and record.suspended:
        # On the base, or perhaps: what may_resume says of a disk that QEMU does not tell of.
        behind = [disk for disk in sight.disks if disk.qemu is Seen.BASE or (
            disk.qemu is Seen.UNKNOWN and record.disk(disk.target).phase is DiskPhase.PIVOTING)]
        assert any(disk.inactive is Seen.OVERLAY for disk in behind)


@pytest.mark.parametrize(("record", "sight", "wrong", "words"), [
    (run_record(State.COPYING), running(on_overlay()), Action.START_COMMIT, "before release"),
    (run_record(), running(on_overlay(base_intact=False)), Action.START_COMMIT, "base changed"),
    (run_record(), running(on_base()), Action.UNLINK, "nobody confirmed"),
    (run_record(State.CLEANING, {"vda": DiskPhase.ON_BASE}), running(on_base(named_by="other")),
     Action.UNLINK, "another domain"),
    (run_record(State.CLEANING, {"vda": DiskPhase.ON_BASE}), running(on_base(overlay=FileSeen.OTHER)),
     Action.UNLINK, "not ours"),
    (run_record(State.COMMITTING), running(on_overlay(job=JobSeen.READY)), Action.PIVOT, "CPUs run"),
    (run_record(State.COMMITTING), paused(on_overlay(job=JobSeen.COMMITTING)), Action.PIVOT, "ready"),
    (run_record(State.DONE), paused(on_base()), Action.RESUME, "not our pause"),
    (run_record(), off(off_disk(Seen.OVERLAY), managed_save=True), Action.COMMIT_OFFLINE, "managed save"),
    (run_record(), Sight(Power.HIDDEN, (off_disk(Seen.OVERLAY),)), Action.COMMIT_OFFLINE, "QEMU runs"),
    (run_record(), off(off_disk(Seen.BASE, overlay=FileSeen.ABSENT)), Action.START, "did not shut it down"),
    (run_record(), running(on_overlay()), Action.FINISH, "something is left"),
    (run_record(), running(on_overlay(overlay=FileSeen.ABSENT)), Action.START_COMMIT, "in use is lost"),
])
def test_the_invariants_catch_a_wrong_decision(
    record: RunRecord, sight: Sight, wrong: Action, words: str
) -> None:
    targets = tuple(disk.target for disk in record.disks)
    found = violations(record, sight, Decision(wrong, targets, "because"))
    assert any(words in violation for violation in found)
