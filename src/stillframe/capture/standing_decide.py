"""Deciding about standing overlays: whether a guest stands as it was left, and how the older one goes.

Pure functions, as in decide.py. The chain of a disk while a standing run lets the older overlay go is
base ← lower ← overlay. The guest uses *overlay* all the time, so that nothing here stops the guest or changes
which image it uses, and base ← lower ← overlay reads the same as base ← overlay once lower is in the base.
The table in docs/CAPTURE.md is this file in words.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from stillframe.capture.decide import (
    Action,
    Decision,
    DiskSight,
    FileSeen,
    JobSeen,
    Seen,
    Sight,
    Targets,
    Why,
    decide,
)
from stillframe.capture.journal import DiskRecord, RunRecord
from stillframe.capture.states import DiskPhase, State
from stillframe.hypervisor.model import Power


class Named(enum.Enum):
    """Where the older overlay is still named as part of the disk's chain."""

    QEMU = "QEMU"
    LIVE = "the live XML"
    INACTIVE = "the definition"
    HEADER = "the overlay's header"


@dataclass(frozen=True, slots=True)
class LowerSight:
    """What is seen of one disk. *top* is the disk as decide sees it, BASE being the wrong image here.

    *named*: where the older overlay is still part of the chain. *lower*: what lies at its path. *complete*:
    whether it was seen to be in the base by a comparison or an offline commit, None while neither was made.
    *leaked*: QEMU's nodes over it that are in no chain. *named_by*: another domain that names it.
    """

    top: DiskSight
    named: frozenset[Named]
    lower: FileSeen = FileSeen.OURS
    complete: bool | None = None
    leaked: tuple[str, ...] = ()
    named_by: str = ""


@dataclass(frozen=True, slots=True)
class LowerView:
    """What is seen of the domain and all disks. *same_boot*: the run began in this boot of the host."""

    power: Power
    disks: tuple[LowerSight, ...]
    managed_save: bool = False
    same_boot: bool = True
    waited_out: bool = False


class Step(enum.Enum):
    """One safe next step of letting the older overlays go. Each is repeatable."""

    WAIT = "wait and look again"
    END_STRAY = "cancel a commit that libvirt has lost; both overlays stay whole"
    START_DOWN = "start committing the older overlays down into the bases"
    COMPARE_DOWN = "compare the base with the older overlay"
    DOWN_OFFLINE = "commit the older overlay down with qemu-img, the guest being off"
    POINT_PAST = "make the domain's definition name the base right below the overlay"
    CONFIRM_DOWN = "make the bases durable, and write down that they hold the older overlays"
    CLOSE_NODES = "close block nodes of the older overlay that nothing uses"
    SHED = "delete the older overlays"
    STAND = "close the run: the guest stands on the new overlays"
    ASK_FIRST = "leave everything as it is and ask"


@dataclass(frozen=True, slots=True)
class Lowering:
    """The next step, for which disks, and why."""

    step: Step
    targets: Targets = ()
    reason: str = ""
    why: Why = Why.STEP


def stands(record: RunRecord, sight: Sight) -> Decision | None:
    """Return why the standing run *record* is not as it was left, None if it is.

    It is if bringing the guest back would begin with committing all of its overlays, and with nothing else.
    """
    decision = decide(msgspec.structs.replace(record, state=State.RELEASED), sight)
    gone = tuple(disk.target for disk in sight.disks if disk.live is Seen.ABSENT)
    if gone and decision.action is not Action.ASK:
        return Decision(
            Action.ASK, gone, "the disk was unplugged while it stood on its overlay", Why.UNPLUGGED)
    every = tuple(disk.target for disk in record.disks)
    if decision.action is Action.START_COMMIT and decision.targets == every:
        return None
    if decision.action is Action.ASK:
        return decision
    return Decision(
        Action.ASK, decision.targets, f"its standing overlays are not as they were left: {decision.reason}",
        Why.STANDS)


def decide_lowering(record: RunRecord, view: LowerView) -> Lowering:
    """Return the one safe next step for a run whose copy is durable and whose overlays stay."""
    if view.power is Power.HIDDEN:
        return _ask((), "libvirt takes the guest for shut off, but its QEMU still runs", Why.HIDDEN)
    pending = [disk for disk in view.disks if _is_pending(record.disk(disk.top.target), disk)]
    for disk in pending:
        problem = _problem(record.disk(disk.top.target), disk, view)
        if problem is not None:
            return problem
    if pending and view.power.has_qemu:
        return _decide_running(record, view, pending)
    if pending and view.power is Power.GONE:
        return _ask(_pick(pending), "the guest is not defined any more", Why.UNCERTAIN)
    if pending:
        return _decide_off(view, pending)
    return _decide_end(record, view)


def _ask(targets: Targets, reason: str, why: Why) -> Lowering:
    return Lowering(Step.ASK_FIRST, targets, reason, why)


def _is_pending(known: DiskRecord, disk: LowerSight) -> bool:
    return bool(known.lower_path) and (not known.lowered or bool(disk.named))


def _problem(  # noqa: PLR0911 -- a table, one return a row
    known: DiskRecord, disk: LowerSight, view: LowerView
) -> Lowering | None:
    top = disk.top
    target = (top.target,)
    if top.job is JobSeen.FOREIGN:
        return _ask(target, f"another program runs a block job on {top.target}", Why.FOREIGN_JOB)
    seen = (top.qemu, top.live, top.inactive)
    if Seen.UNDER in seen:
        return _ask(target, f"somebody put another overlay on top of stillframe's on {top.target}",
                    Why.FOREIGN_OVERLAY)
    if Seen.OTHER in seen or Seen.BASE in seen:
        return _ask(target, f"{top.target} is not on its overlay any more", Why.UNCERTAIN)
    if view.power.has_qemu and top.live is Seen.ABSENT:
        return _ask(target, "the disk was unplugged while it stood on its overlay", Why.UNPLUGGED)
    if not view.power.has_qemu and top.inactive is not Seen.OVERLAY:
        return _ask(target, f"no definition names {top.target} any more", Why.UNCERTAIN)
    if top.overlay is not FileSeen.OURS:
        return _ask(target, f"{top.target} is on the overlay {known.overlay_path}, but the file there is "
                    f"{top.overlay.value}", Why.FILE_GONE)
    if disk.lower is not FileSeen.OURS:
        return _ask(target, f"the older overlay {known.lower_path} is {disk.lower.value}", Why.FILE_GONE)
    if not top.base_present:
        return _ask(target, f"the base of {top.target} is not where it was", Why.FILE_GONE)
    if not top.base_intact and known.phase is DiskPhase.OVERLAID:
        return _ask(target, "the base was written to while the overlays stood on it", Why.DIVERGED)
    return None


def _decide_running(record: RunRecord, view: LowerView, disks: list[LowerSight]) -> Lowering:
    unknown = _pick(disks, lambda disk: Seen.UNKNOWN in (disk.top.qemu, disk.top.live))
    if unknown:
        return _wait(view, unknown, "QEMU does not tell which image the disk uses", Why.UNCERTAIN)
    stray = _pick(disks, lambda disk: disk.top.job is JobSeen.STRAY)
    if stray and view.waited_out:
        return Lowering(Step.END_STRAY, stray, "libvirt does not know of the commit that QEMU runs")
    if stray:
        return Lowering(Step.WAIT, stray, "libvirt does not know of the commit that QEMU runs")
    idle = [disk for disk in disks if disk.top.job is JobSeen.NONE]
    above = _pick(idle, lambda disk: Named.QEMU in disk.named and Named.LIVE in disk.named)
    if above:
        return Lowering(Step.START_DOWN, above, "the older overlay is in the chain, no commit runs")
    busy = _pick(disks, lambda disk: disk.top.job is not JobSeen.NONE)
    if busy:
        return Lowering(Step.WAIT, busy, "the commit runs", Why.COMMIT_RUNS)
    lost = _pick(idle, lambda disk: Named.QEMU in disk.named)
    if lost:
        return _wait(view, lost, "QEMU has the older overlay in the chain, libvirt has not", Why.UNCERTAIN)
    for where, why in ((Named.LIVE, Why.STALE_CHAIN), (Named.HEADER, Why.UNCERTAIN)):
        behind = _pick(idle, lambda disk, where=where: where in disk.named)  # type: ignore[misc]
        if behind:
            return _wait(view, behind, f"QEMU has the older overlay no more, but {where.value} names it", why)
    return _decide_definition(view, idle) or _decide_durable(record, view, idle)


def _wait(view: LowerView, targets: Targets, reason: str, why: Why) -> Lowering:
    return _ask(targets, reason, why) if view.waited_out else Lowering(Step.WAIT, targets, reason, why)


def _decide_definition(view: LowerView, disks: list[LowerSight]) -> Lowering | None:
    behind = _pick(disks, lambda disk: Named.INACTIVE in disk.named)
    if not behind:
        return None
    if view.power.has_qemu and not view.waited_out:
        return Lowering(Step.WAIT, behind, "the definition still names the older overlay")
    return Lowering(Step.POINT_PAST, behind, "the definition still names the older overlay")


def _decide_durable(record: RunRecord, view: LowerView, disks: list[LowerSight]) -> Lowering:
    # QEMU writes the overlay's new header without having flushed the base: after a power cut between the
    # two, base ← overlay may lack what is still in the older overlay.
    doubtful = [
        disk for disk in disks
        if not view.same_boot and record.disk(disk.top.target).phase is DiskPhase.COMMITTING
    ]
    lacking = _pick(doubtful, lambda disk: disk.complete is False)
    if lacking:
        return _ask(lacking, "the host went down in the commit, and the guest was started on a base that "
                    "lacks writes which are in the older overlay", Why.DIVERGED)
    unsure = _pick(doubtful, lambda disk: disk.complete is None)
    if unsure:
        return Lowering(Step.COMPARE_DOWN, unsure, "the host went down in the commit")
    return Lowering(Step.CONFIRM_DOWN, _pick(disks), "nothing names the older overlay any more")


def _decide_off(view: LowerView, disks: list[LowerSight]) -> Lowering:
    if view.managed_save:
        return _ask(_pick(disks), "the guest has a managed save image, whose memory belongs to the overlays",
                    Why.MANAGED_SAVE)
    left = _pick(disks, lambda disk: not disk.complete or Named.HEADER in disk.named)
    if left:
        return Lowering(Step.DOWN_OFFLINE, left, "the guest is off, the older overlay is complete")
    return _decide_definition(view, disks) or Lowering(
        Step.CONFIRM_DOWN, _pick(disks), "nothing names the older overlay any more")


def _decide_end(record: RunRecord, view: LowerView) -> Lowering:
    lower = [disk for disk in view.disks if record.disk(disk.top.target).lower_path]
    leaked = _pick(lower, lambda disk: bool(disk.leaked))
    if leaked:
        return Lowering(Step.CLOSE_NODES, leaked, "QEMU holds the older overlay open without using it")
    for disk in lower:
        if disk.lower is FileSeen.OURS and disk.named_by:
            return _ask((disk.top.target,), f"the guest {disk.named_by} names the older overlay in its chain",
                        Why.NAMED_ELSEWHERE)
    ours = _pick(lower, lambda disk: disk.lower is FileSeen.OURS)
    if ours:
        return Lowering(Step.SHED, ours, "nothing uses the older overlays any more")
    return Lowering(Step.STAND, (), "the older overlays are gone")


def _pick(
    disks: Sequence[LowerSight], test: Callable[[LowerSight], bool] = lambda _disk: True
) -> Targets:
    return tuple(disk.top.target for disk in disks if test(disk))
