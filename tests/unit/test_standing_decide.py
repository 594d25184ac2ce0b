"""What letting older overlays go may never do, and how a standing guest is told from one that is not."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from stillframe.block.image import file_place, nbd_place
from stillframe.capture.decide import Action, FileSeen, JobSeen, Seen, Why, decide
from stillframe.capture.journal import RunRecord
from stillframe.capture.standing_decide import (
    Lowering,
    LowerSight,
    LowerView,
    Named,
    Step,
    decide_lowering,
    stands,
)
from stillframe.capture.states import DiskPhase, State
from stillframe.hypervisor.model import Power
from tests.unit.capture_records import disk_sight, off, off_disk, on_base, on_overlay, run_record, running

_TARGETS = ("vda", "vdb")
_EVERYWHERE = frozenset(Named)
_WITH_QEMU = (Power.RUNNING, Power.PAUSED, Power.PAUSED_ON_IO_ERROR)


def lowering(*, phase: DiskPhase = DiskPhase.OVERLAID, lowered: bool = False, disks: int = 1) -> RunRecord:
    record = run_record(State.LOWERING, dict.fromkeys(_TARGETS[:disks], phase), follows="before")
    return msgspec.structs.replace(record, disks=tuple(
        msgspec.structs.replace(
            disk, lower_path=f"/images/old-{disk.target}", lower_identity=disk.overlay_identity,
            lowered=lowered)
        for disk in record.disks))


def sight(target: str = "vda", named: frozenset[Named] = _EVERYWHERE, **changes: Any) -> LowerSight:
    names = ("lower", "complete", "leaked", "named_by")
    own = {name: changes.pop(name) for name in names if name in changes}
    return LowerSight(on_overlay(target, **changes), named, **own)


def view(*disks: LowerSight, power: Power = Power.RUNNING, **changes: Any) -> LowerView:
    return LowerView(power, disks, **changes)


# --- Whatever is recorded and whatever is seen --------------------------------------------------


def situation(chance: random.Random) -> tuple[RunRecord, LowerView]:
    power = chance.choice([*_WITH_QEMU, Power.RUNNING, Power.OFF, Power.OFF, Power.HIDDEN, Power.GONE])
    record = lowering(disks=chance.randint(1, 2))
    record = msgspec.structs.replace(record, disks=tuple(
        msgspec.structs.replace(disk, phase=chance.choice([DiskPhase.OVERLAID, DiskPhase.COMMITTING]),
                                lowered=chance.random() < 0.4)
        for disk in record.disks))
    return record, LowerView(
        power, tuple(_any_disk(chance, disk.target, power) for disk in record.disks),
        managed_save=chance.random() < 0.1, same_boot=chance.random() < 0.7,
        waited_out=chance.random() < 0.4)


def _any_disk(chance: random.Random, target: str, power: Power) -> LowerSight:
    top = on_overlay(target) if power.has_qemu else off_disk(Seen.OVERLAY, target)
    odd: dict[str, list[Any]] = {
        "live": [Seen.BASE, Seen.OTHER, Seen.UNDER, Seen.ABSENT], "inactive": [Seen.BASE, Seen.UNKNOWN],
        "job": [JobSeen.COMMITTING, JobSeen.STRAY, JobSeen.FOREIGN], "base_intact": [False],
        "overlay": [FileSeen.ABSENT, FileSeen.OTHER], "base_present": [False],
    }
    if power.has_qemu:
        odd["qemu"] = [Seen.BASE, Seen.UNKNOWN, Seen.UNDER]
    for name in chance.sample(sorted(odd), chance.choice([0, 0, 0, 1, 2])):
        top = replace(top, **{name: chance.choice(odd[name])})
    named = frozenset(where for where in Named if chance.random() < 0.4)
    if not power.has_qemu:
        named -= {Named.QEMU, Named.LIVE}
    return LowerSight(
        top, named if chance.random() < 0.7 else frozenset(),
        lower=chance.choice([FileSeen.OURS, FileSeen.OURS, FileSeen.OURS, FileSeen.ABSENT, FileSeen.OTHER]),
        complete=chance.choice([None, None, True, False]),
        leaked=("node",) if power.has_qemu and chance.random() < 0.1 else (),
        named_by="other" if chance.random() < 0.1 else "")


def wrong(record: RunRecord, seen: LowerView, decision: Lowering) -> list[str]:
    """Return which invariants *decision* would break, in words."""
    found = []
    chosen = [disk for disk in seen.disks if disk.top.target in decision.targets]
    for disk in chosen:
        known = record.disk(disk.top.target)
        rules: dict[str, bool] = {}
        if decision.step in (Step.START_DOWN, Step.DOWN_OFFLINE):
            rules["commits without all files"] = disk.lower is not FileSeen.OURS or (
                disk.top.overlay is not FileSeen.OURS or not disk.top.base_present)
            rules["commits onto a touched base"] = (
                not disk.top.base_intact and known.phase is DiskPhase.OVERLAID)
            rules["commits where another image is used"] = disk.top.inactive in (Seen.BASE, Seen.OTHER)
        if decision.step is Step.START_DOWN:
            rules["starts a second job"] = disk.top.job is not JobSeen.NONE
            rules["asks libvirt for what it has not"] = not {Named.QEMU, Named.LIVE} <= disk.named
        if decision.step is Step.DOWN_OFFLINE:
            rules["writes while QEMU may run"] = seen.power is not Power.OFF or seen.managed_save
        if decision.step is Step.CONFIRM_DOWN:
            rules["believes what still names it"] = bool(disk.named)
            rules["believes a commit that a power cut ended"] = (
                not seen.same_boot and known.phase is DiskPhase.COMMITTING and disk.complete is not True)
            rules["believes an offline commit not made"] = not seen.power.has_qemu and not disk.complete
        if decision.step is Step.SHED:
            rules["deletes what may be needed"] = (
                bool(disk.named) or not known.lowered or bool(disk.named_by)
                or disk.lower is not FileSeen.OURS)
        found += [words for words, is_wrong in rules.items() if is_wrong]
    if decision.step in (Step.SHED, Step.STAND) and not all(
            record.disk(disk.top.target).lowered and not disk.named for disk in seen.disks):
        found.append("ends before all disks are confirmed")
    if decision.step is Step.STAND and any(disk.lower is FileSeen.OURS for disk in seen.disks):
        found.append("leaves an overlay behind")
    return found


def test_no_step_breaks_an_invariant_whatever_is_seen() -> None:
    seen: Counter[Step] = Counter()
    for seed in range(60_000):
        record, looked = situation(random.Random(seed))
        decision = decide_lowering(record, looked)
        seen[decision.step] += 1
        assert not wrong(record, looked, decision), (record.disks, looked, decision)
        assert set(decision.targets) <= {disk.target for disk in record.disks}
    assert set(seen) == set(Step), "the sweep has seen every step"


@pytest.mark.parametrize("broken", [
    Lowering(Step.START_DOWN, ("vda",)), Lowering(Step.DOWN_OFFLINE, ("vda",)),
    Lowering(Step.CONFIRM_DOWN, ("vda",)), Lowering(Step.SHED, ("vda",)), Lowering(Step.STAND)])
def test_the_invariants_would_be_noticed(broken: Lowering) -> None:
    assert any(wrong(*situation(random.Random(seed)), broken) for seed in range(200))


# --- Row by row ---------------------------------------------------------------------------------

_PAST = frozenset[Named]()


@pytest.mark.parametrize(("record", "seen", "step"), [
    (lowering(), view(sight()), Step.START_DOWN),
    (lowering(), view(sight(job=JobSeen.COMMITTING)), Step.WAIT),
    (lowering(), view(sight(job=JobSeen.STRAY)), Step.WAIT),
    (lowering(), view(sight(job=JobSeen.STRAY), waited_out=True), Step.END_STRAY),
    (lowering(), view(sight(named=_PAST)), Step.CONFIRM_DOWN),
    (lowering(), view(sight(named=frozenset({Named.LIVE}))), Step.WAIT),
    (lowering(), view(sight(named=frozenset({Named.LIVE})), waited_out=True), Step.ASK_FIRST),
    (lowering(), view(sight(named=frozenset({Named.INACTIVE})), waited_out=True), Step.POINT_PAST),
    (lowering(phase=DiskPhase.COMMITTING), view(sight(named=_PAST), same_boot=False), Step.COMPARE_DOWN),
    (lowering(phase=DiskPhase.COMMITTING), view(sight(named=_PAST, complete=False), same_boot=False),
     Step.ASK_FIRST),
    (lowering(phase=DiskPhase.COMMITTING), view(sight(named=_PAST, complete=True), same_boot=False),
     Step.CONFIRM_DOWN),
    (lowering(), view(sight(base_intact=False)), Step.ASK_FIRST),
    (lowering(phase=DiskPhase.COMMITTING), view(sight(base_intact=False)), Step.START_DOWN),
    (lowering(lowered=True), view(sight(named=_PAST)), Step.SHED),
    (lowering(lowered=True), view(sight(named=_PAST, leaked=("n",))), Step.CLOSE_NODES),
    (lowering(lowered=True), view(sight(named=_PAST, named_by="web")), Step.ASK_FIRST),
    (lowering(lowered=True), view(sight(named=_PAST, lower=FileSeen.ABSENT)), Step.STAND),
])
def test_a_row(record: RunRecord, seen: LowerView, step: Step) -> None:
    assert decide_lowering(record, seen).step is step


def test_offline_it_is_committed_once_more_even_if_the_header_is_past_it() -> None:
    disk = LowerSight(off_disk(Seen.OVERLAY), frozenset({Named.INACTIVE}))
    assert decide_lowering(lowering(), view(disk, power=Power.OFF)).step is Step.DOWN_OFFLINE
    done = replace(disk, complete=True)
    assert decide_lowering(lowering(), view(done, power=Power.OFF)).step is Step.POINT_PAST
    past = replace(done, named=_PAST)
    assert decide_lowering(lowering(), view(past, power=Power.OFF)).step is Step.CONFIRM_DOWN


def test_the_decision_to_bring_back_leaves_kept_overlays_alone() -> None:
    for state in (State.LOWERING, State.SHEDDING, State.STANDING):
        decision = decide(run_record(state), running(on_overlay()))
        assert (decision.action, decision.why) == (Action.ASK, Why.STANDS)


def test_a_guest_stands_only_as_it_was_left() -> None:
    record = run_record(State.STANDING, dict.fromkeys(_TARGETS, DiskPhase.OVERLAID))
    good = (on_overlay("vda"), on_overlay("vdb"))
    assert stands(record, running(*good)) is None
    for changed in (
        on_overlay("vdb", base_intact=False), on_base("vdb"), disk_sight("vdb", Seen.UNDER),
        disk_sight("vdb", Seen.OTHER), on_overlay("vdb", overlay=FileSeen.OTHER),
        on_overlay("vdb", overlay=FileSeen.ABSENT), on_overlay("vdb", base_present=False),
        on_overlay("vdb", job=JobSeen.COMMITTING), on_overlay("vdb", job=JobSeen.FOREIGN),
        on_overlay("vdb", live=Seen.BASE), on_overlay("vdb", live=Seen.ABSENT),
    ):
        problem = stands(record, running(good[0], changed))
        assert problem is not None, changed
        assert problem.action is Action.ASK
    assert stands(record, off(off_disk(Seen.BASE), off_disk(Seen.OVERLAY, "vdb"))) is not None


def test_a_network_base_is_known_by_either_spelling() -> None:
    base = nbd_place("raw", socket="/run/x.nbd", export="vda")
    spelt = ('json:{"file":{"driver":"nbd","server":{"type":"unix","path":"/run/x.nbd"},"export":"vda"}}')
    assert base.is_named(base.backing_text())
    assert base.is_named(spelt)
    assert not base.is_named(spelt.replace("/run/x.nbd", "/run/y.nbd"))
    assert not base.is_named("json:{")
    assert not file_place("/a", "raw").is_named(spelt)
