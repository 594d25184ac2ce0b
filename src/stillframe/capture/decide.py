"""The one decision: the next safe step, given the journal and what is seen now.

A pure function. A run that ends normally and `recover` after any crash go through it
alike, one step at a time, looking anew after each. It never trusts the journal alone:
the journal says what may have been begun, the sight says what is. The table in
docs/CAPTURE.md is this file in words.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stillframe.capture.journal import DiskRecord, RunRecord
from stillframe.capture.states import BEFORE_RELEASE, KEPT, DiskPhase
from stillframe.hypervisor.model import Power

Targets = tuple[str, ...]

_NOT_COMMITTED = (DiskPhase.PLANNED, DiskPhase.OVERLAID)


class Seen(enum.Enum):
    """Which image something (QEMU, the live XML, the inactive XML) names as a disk's top."""

    BASE = "base"
    OVERLAY = "overlay"
    UNDER = "our overlay below another image"
    OTHER = "another image"
    ABSENT = "no such disk"
    UNKNOWN = "unknown"


class JobSeen(enum.Enum):
    """The block job on a disk. COMMITTING and READY are a commit of our overlay."""

    NONE = "none"
    COMMITTING = "committing"
    READY = "ready"
    STRAY = "a commit of our overlay that QEMU runs but libvirt has lost"
    FOREIGN = "foreign"


class FileSeen(enum.Enum):
    """What lies at the overlay's path."""

    ABSENT = "absent"
    OURS = "ours"
    OTHER = "another file"


@dataclass(frozen=True, slots=True)
class DiskSight:
    """What is seen of one disk.

    *base_present*: the recorded base is there. *base_intact*: nothing wrote to it since the
    capture (True where that can't be told, as for devices). *base_newer*: whether it was
    written to later than the overlay, None where that can't be told. *overlay_empty*: whether
    the overlay holds no data at all, None while not looked at. *equal*: whether base and
    base+overlay read the same, None while not compared. *named_by*: another domain whose
    chain names the overlay.
    """

    target: str
    qemu: Seen
    live: Seen
    inactive: Seen
    job: JobSeen = JobSeen.NONE
    overlay: FileSeen = FileSeen.OURS
    base_present: bool = True
    base_intact: bool = True
    base_newer: bool | None = False
    overlay_empty: bool | None = None
    leaked_nodes: tuple[str, ...] = ()
    named_by: str = ""
    equal: bool | None = None


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of the domain and all disks of the run.

    *same_qemu*: the guest's QEMU is the one that the last pivot was sent to (True if none was).
    *shutdown_pending*: the guest was asked to shut down and its time is not over. *waited_out*:
    waiting for this same sight to change has been given up. *thaw_hopeless*: the thaw was
    tried for its whole time.
    """

    power: Power
    disks: tuple[DiskSight, ...]
    managed_save: bool = False
    same_qemu: bool = True
    shutdown_pending: bool = False
    waited_out: bool = False
    thaw_hopeless: bool = False


class Why(enum.Enum):
    """What lies behind a decision, where more than its words depends on it."""

    STEP = "the usual course"
    COMMIT_RUNS = "a commit runs"
    HIDDEN = "libvirt does not see the running QEMU"
    FOREIGN_JOB = "another program's block job"
    FOREIGN_OVERLAY = "another overlay on top"
    UNCERTAIN = "which image is in use is not certain"
    FILE_GONE = "a needed file is not there"
    DIVERGED = "base and overlay each hold writes that the other lacks"
    LIVE_VIEW = "libvirt's live view is wrong for good"
    STALE_CHAIN = "libvirt's live view names an image below the one in use that QEMU has no more"
    IO_ERROR = "paused by an I/O error"
    MANAGED_SAVE = "a managed save image belongs to the overlay"
    UNPLUGGED = "the disk was unplugged"
    NAMED_ELSEWHERE = "another guest's chain names the overlay"
    FROZEN = "perhaps frozen"
    STANDS = "the overlays are to stay"


class Action(enum.Enum):
    """One safe next step. Each is repeatable: it may have been begun before a crash."""

    RELEASE = "give up what is left of the copy, so that commits may begin"
    THAW = "thaw the guest's file systems"
    WAIT = "wait and look again"
    DROP_NODES = "close block nodes that nothing uses"
    COMMIT_IN_QEMU = "commit the overlay by QEMU's own command, since libvirt has forgotten it"
    FINISH_IN_QEMU = "end QEMU's own commit"
    END_STRAY_JOB = "cancel a commit that libvirt has lost; the overlay stays whole"
    START_COMMIT = "start writing the overlays back"
    SUSPEND = "stop the guest's CPUs for the pivot"
    PIVOT = "make the bases the guest's images again"
    POINT_TO_BASE = "make the domain's definition name the base again"
    CONFIRM_BASE = "write down that the base is the truth again"
    RESUME = "let the guest go on"
    COMPARE = "compare base and overlay"
    COMMIT_OFFLINE = "write the overlay back with qemu-img, the guest being off"
    UNLINK = "delete the overlays"
    START = "start the guest, which stillframe had shut down"
    FINISH = "close the run"
    ASK = "leave everything as it is and ask"


@dataclass(frozen=True, slots=True)
class Decision:
    """The next step, for which disks, and why (for people)."""

    action: Action
    targets: tuple[str, ...] = ()
    reason: str = ""
    why: Why = Why.STEP


def decide(record: RunRecord, sight: Sight) -> Decision:
    """Return the one safe next step for the run *record*, given *sight*."""
    if sight.power is Power.HIDDEN:
        return _ask((), "libvirt takes the guest for shut off, but its QEMU still runs", Why.HIDDEN)
    if sight.shutdown_pending and sight.power is Power.RUNNING and not sight.waited_out:
        return Decision(Action.WAIT, (), "the guest was asked to shut down and may still do so")
    if record.state in BEFORE_RELEASE:
        return Decision(Action.RELEASE, (), f"the run ended while {record.state.value}")
    if _maybe_frozen(record, sight):
        return Decision(Action.THAW, (), "the guest may be frozen")
    decision = _decide_kept(record) or _decide_disks(record, sight) or _decide_end(record, sight)
    if decision.action is Action.ASK and may_resume(record, sight):
        return Decision(Action.RESUME, (), f"a person is needed, and stillframe had stopped the CPUs: "
                        f"{decision.reason}")
    return decision


def _ask(targets: Targets, reason: str, why: Why) -> Decision:
    return Decision(Action.ASK, targets, reason, why)


def _decide_kept(record: RunRecord) -> Decision | None:
    """Leave overlays alone that are to stay: standing_decide is there for them."""
    if record.state not in KEPT:
        return None
    return _ask((), "the guest stands on its overlays by intention", Why.STANDS)


def settled(disk: DiskSight) -> bool:
    """Return whether nothing of the run is left on *disk*, or nothing that is ours."""
    return disk.overlay is not FileSeen.OURS and not disk.leaked_nodes and all(
        seen not in (Seen.OVERLAY, Seen.UNDER) for seen in (disk.qemu, disk.live, disk.inactive)
    )


def _maybe_frozen(record: RunRecord, sight: Sight) -> bool:
    begun = record.freeze_begun and not record.thaw_verified
    return begun and sight.power is Power.RUNNING and not sight.thaw_hopeless


def may_resume(record: RunRecord, sight: Sight) -> bool:
    """Return whether a guest that stillframe suspended may go on although a person has to choose.

    While QEMU is on a base and the definition still names its overlay, only standing still keeps
    the two equal: a guest that went on and then died would start from the older one.
    """
    behind = any(
        disk.inactive is Seen.OVERLAY and (
            disk.qemu is Seen.BASE or (
                disk.qemu is Seen.UNKNOWN and record.disk(disk.target).phase is DiskPhase.PIVOTING))
        for disk in sight.disks
    )
    return sight.power is Power.PAUSED and record.suspended and not behind


def _decide_disks(record: RunRecord, sight: Sight) -> Decision | None:
    for disk in sight.disks:
        problem = None if disk.live is Seen.ABSENT else _foreign_problem(disk, record)
        if problem is not None:
            return problem
    return _decide_running(record, sight) if sight.power.has_qemu else _decide_off(record, sight)


def _foreign_problem(disk: DiskSight, record: RunRecord) -> Decision | None:
    def ask(reason: str, why: Why) -> Decision:
        return Decision(Action.ASK, (disk.target,), reason, why)

    if settled(disk):
        return None
    if disk.job is JobSeen.FOREIGN:
        return ask(f"another program runs a block job on {disk.target}", Why.FOREIGN_JOB)
    for place, seen in (("QEMU", disk.qemu), ("the live XML", disk.live),
                        ("the domain's definition", disk.inactive)):
        if seen is Seen.UNDER:
            return ask(
                f"somebody put another overlay on top of stillframe's on {disk.target}", Why.FOREIGN_OVERLAY)
        if seen is Seen.OTHER:
            return ask(
                f"{place} names an image for {disk.target} that is neither the base nor the overlay",
                Why.UNCERTAIN)
    in_use = Seen.OVERLAY in (disk.qemu, disk.live, disk.inactive)
    if in_use and disk.overlay is not FileSeen.OURS:
        path = record.disk(disk.target).overlay_path
        return ask(
            f"{disk.target} is on the overlay {path}, but the file there is {disk.overlay.value}",
            Why.FILE_GONE)
    if not disk.base_present and (in_use or _may_be_needed(record, disk)):
        return ask(f"the base of {disk.target} is not where it was", Why.FILE_GONE)
    return None


# --- The guest runs ---------------------------------------------------------------------------


def _decide_running(record: RunRecord, sight: Sight) -> Decision | None:
    # A disk that was unplugged in mid-run must not keep the others from being brought back.
    disks = [
        disk for disk in sight.disks
        if disk.live is not Seen.ABSENT and (not settled(disk) or disk.qemu is Seen.BASE)
    ]
    unknown = _pick(disks, lambda disk: Seen.UNKNOWN in (disk.qemu, disk.live))
    if unknown:
        action = Action.ASK if sight.waited_out else Action.WAIT
        return Decision(action, unknown, "QEMU does not tell which image the disk uses", Why.UNCERTAIN)
    return (
        _ask_if_astray(record, sight, disks)
        or _confirm_pivoted(record, disks)
        or _decide_commit(record, sight, disks)
        or _decide_pivoted(record, sight, disks)
    )


def _ask_if_astray(record: RunRecord, sight: Sight, disks: list[DiskSight]) -> Decision | None:
    """Ask if the guest was started from the image that is not the complete one."""
    restarted = _pick(disks, lambda disk: (
        disk.qemu is Seen.BASE and not sight.same_qemu and disk.overlay is FileSeen.OURS
        and record.disk(disk.target).phase is DiskPhase.PIVOTING))
    if restarted:
        return _ask(
            restarted,
            "the guest was started on the base while it was not certain that the pivot had been made",
            Why.DIVERGED)
    stale = _pick(disks, lambda disk: disk.qemu is Seen.BASE and _holds_lost_writes(record, disk))
    if stale:
        return _ask(
            stale,
            "the guest runs on the base, but the overlay holds writes that the base lacks",
            Why.DIVERGED)
    doubtful = _pick(disks, lambda disk: (
        disk.qemu is Seen.OVERLAY and not sight.same_qemu and disk.base_newer is not False
        and record.disk(disk.target).phase is DiskPhase.PIVOTING))
    if doubtful:
        return _ask(
            doubtful, "the guest was started on the overlay, but may have run on the base before",
            Why.DIVERGED)
    again = _pick(disks, lambda disk: (
        disk.qemu is Seen.OVERLAY and record.disk(disk.target).phase is DiskPhase.ON_BASE))
    if again:
        return _ask(again, "the guest runs on the overlay again, but the base is newer", Why.DIVERGED)
    return None


def _confirm_pivoted(record: RunRecord, disks: list[DiskSight]) -> Decision | None:
    """Confirm a pivoted disk even while another still has to be: the guest may write to its base."""
    pivoted = _pick(disks, lambda disk: (
        (disk.qemu, disk.live, disk.inactive, disk.job) == (Seen.BASE, Seen.BASE, Seen.BASE, JobSeen.NONE)
        and record.disk(disk.target).phase is DiskPhase.PIVOTING
    ))
    return Decision(Action.CONFIRM_BASE, pivoted, "QEMU and both XMLs name the base") if pivoted else None


def _holds_lost_writes(record: RunRecord, disk: DiskSight) -> bool:
    if disk.overlay is not FileSeen.OURS or disk.overlay_empty:
        return False
    phase = record.disk(disk.target).phase
    if phase is DiskPhase.PLANNED:
        return record.snapshot_begun and disk.overlay_empty is False
    # The guest wrote to the overlay, and no commit has ended that could have brought it to the base.
    return phase in (DiskPhase.OVERLAID, DiskPhase.COMMITTING)


def _decide_commit(record: RunRecord, sight: Sight, disks: list[DiskSight]) -> Decision | None:
    """Write back the overlays that QEMU uses; pivot when all are ready and the CPUs stand still."""
    overlaid = [disk for disk in disks if disk.qemu is Seen.OVERLAY]
    if not overlaid:
        return None
    # A disk that has pivoted, but is not confirmed, is known to be equal only while all stands still.
    pivoted = any(
        disk.qemu is Seen.BASE and record.disk(disk.target).phase is DiskPhase.PIVOTING for disk in disks)
    waiting = any(disk.job is not JobSeen.READY for disk in overlaid)
    if waiting and not pivoted and may_resume(record, sight):
        return Decision(Action.RESUME, (), "the commits are not ready, and the guest need not wait for them")
    stray = _pick(overlaid, lambda disk: disk.job is JobSeen.STRAY)
    if stray:
        action = Action.END_STRAY_JOB if sight.waited_out else Action.WAIT
        return Decision(action, stray, "libvirt does not know of the commit that QEMU runs")
    idle = [disk for disk in overlaid if disk.job is JobSeen.NONE]
    if idle:
        return _base_changed(record, idle) or _begin_commit(idle)
    if any(disk.job is JobSeen.COMMITTING for disk in overlaid):
        return Decision(Action.WAIT, _pick(overlaid), "the commit runs", Why.COMMIT_RUNS)
    if sight.power is Power.RUNNING:
        return Decision(Action.SUSPEND, _pick(overlaid), "all commits are ready")
    forgotten = _pick(overlaid, _is_forgotten)
    if forgotten:
        return Decision(Action.FINISH_IN_QEMU, forgotten, "QEMU's own commit is ready")
    return Decision(Action.PIVOT, _pick(overlaid), "all commits are ready and the CPUs stand still")


def _begin_commit(idle: list[DiskSight]) -> Decision:
    forgotten = _pick(idle, _is_forgotten)
    if forgotten:
        return Decision(
            Action.COMMIT_IN_QEMU, forgotten, "QEMU writes to the overlay, but libvirt says base"
        )
    return Decision(Action.START_COMMIT, _pick(idle), "the guest writes to the overlay, no commit runs")


def _is_forgotten(disk: DiskSight) -> bool:
    """QEMU writes to the overlay while libvirt's XML says base: the next cold start would lose data."""
    return disk.qemu is Seen.OVERLAY and disk.live is Seen.BASE


def _decide_pivoted(record: RunRecord, sight: Sight, disks: list[DiskSight]) -> Decision | None:
    stale_live = _pick(disks, lambda disk: disk.live is Seen.OVERLAY)
    stale = _pick(disks, lambda disk: disk.inactive is Seen.OVERLAY)
    # What runs on a disk of which nothing of ours is left is none of our business.
    busy = _pick(disks, lambda disk: disk.job is not JobSeen.NONE and not settled(disk))
    if stale_live or stale or busy:
        return _decide_behind(record, sight, disks, stale_live, stale, busy)
    unconfirmed = _pick(disks, lambda disk: record.disk(disk.target).phase is not DiskPhase.ON_BASE)
    if unconfirmed:
        return Decision(Action.CONFIRM_BASE, unconfirmed, "QEMU and both XMLs name the base")
    if sight.power is Power.PAUSED_ON_IO_ERROR:
        if sight.waited_out:
            return _ask((), "the guest stays paused after an I/O error", Why.IO_ERROR)
        return Decision(Action.RESUME, (), "the guest was paused by an I/O error, now it is on its base")
    if sight.power is Power.PAUSED and record.suspended:
        return Decision(Action.RESUME, (), "stillframe had stopped the CPUs")
    leaked = _pick(disks, lambda disk: bool(disk.leaked_nodes))
    if leaked:
        return Decision(Action.DROP_NODES, leaked, "QEMU holds the overlay open without using it")
    return None


def _decide_behind(
    record: RunRecord, sight: Sight, disks: list[DiskSight], stale_live: Targets, stale: Targets,
    busy: Targets,
) -> Decision:
    """QEMU is on the bases, but libvirt still shows an overlay or a job."""
    if not sight.waited_out:
        return Decision(Action.WAIT, stale_live or stale or busy, "libvirt has not caught up with the pivot")
    concluded = _pick(disks, lambda disk: disk.target in busy and disk.job is JobSeen.READY)
    if concluded and not stale_live:
        return Decision(Action.FINISH_IN_QEMU, concluded, "QEMU's own commit is over")
    if busy:
        return _ask(busy, "libvirt does not catch up with the pivot", Why.LIVE_VIEW)
    if stale:
        return Decision(Action.POINT_TO_BASE, stale, "the definition still names the overlay")
    # A libvirtd that died between QEMU's answer and its own record never puts its live view right.
    unconfirmed = tuple(
        target for target in stale_live if record.disk(target).phase is not DiskPhase.ON_BASE)
    if unconfirmed:
        return Decision(Action.CONFIRM_BASE, unconfirmed, "QEMU and the definition name the base")
    return _ask(stale_live, "libvirt's live view names the overlay, but QEMU is on the base", Why.LIVE_VIEW)


# --- The guest is off -------------------------------------------------------------------------


def _decide_off(record: RunRecord, sight: Sight) -> Decision | None:
    unsettled = [disk for disk in sight.disks if not settled(disk)]
    if unsettled and sight.managed_save:
        return _ask(
            _pick(unsettled),
            "the guest has a managed save image, whose memory belongs to the overlay",
            Why.MANAGED_SAVE)
    decisions = [
        decision for disk in unsettled
        if (decision := _decide_off_disk(record, record.disk(disk.target), disk)) is not None
    ]
    # No disk is touched before it is certain that all can be: the guest's disks belong together.
    for action in (Action.ASK, Action.COMPARE):
        for decision in decisions:
            if decision.action is action:
                return decision
    return decisions[0] if decisions else None


def _decide_off_disk(  # noqa: PLR0911 -- a table, one return a row
    record: RunRecord, known: DiskRecord, disk: DiskSight
) -> Decision | None:
    target = (disk.target,)
    if known.phase is DiskPhase.ON_BASE:
        if disk.inactive is Seen.OVERLAY:
            return _ask(target, "the definition names the overlay again, but the base is newer", Why.DIVERGED)
        return None
    if disk.equal:
        if disk.inactive is Seen.OVERLAY:
            return Decision(Action.POINT_TO_BASE, target, "base and overlay read the same")
        return Decision(Action.CONFIRM_BASE, target, "base and overlay read the same")
    if not record_may_differ(record, known) and disk.inactive is not Seen.OVERLAY:
        return Decision(Action.CONFIRM_BASE, target, "the overlay was never put on")
    base_changed = _base_changed(record, [disk]) is not None
    must_compare = known.phase is DiskPhase.PIVOTING or disk.inactive is Seen.BASE or base_changed
    if must_compare and disk.equal is None:
        return Decision(Action.COMPARE, target, "only the images tell which of the two is complete")
    if known.phase is DiskPhase.PIVOTING:
        return _ask(target, "base and overlay differ, and either may be the newer one", Why.DIVERGED)
    if base_changed:
        return _ask(target, "the base was written to while the overlay stood on it", Why.DIVERGED)
    if disk.inactive is Seen.BASE and (
        known.phase is DiskPhase.COMMITTING or disk.base_newer is not False
    ):
        return _ask(target, "the definition names the base, but the overlay holds other data", Why.DIVERGED)
    return Decision(Action.COMMIT_OFFLINE, target, "the guest is off and its overlay is complete")


def record_may_differ(record: RunRecord, known: DiskRecord) -> bool:
    """Return whether the overlay of disk *known* may hold data: whether it may ever have been used."""
    return known.phase is not DiskPhase.PLANNED or record.snapshot_begun


def _may_be_needed(record: RunRecord, disk: DiskSight) -> bool:
    known = record.disk(disk.target)
    return record_may_differ(record, known) and known.phase is not DiskPhase.ON_BASE


# --- Both -------------------------------------------------------------------------------------


def _decide_end(record: RunRecord, sight: Sight) -> Decision:
    unplugged = _pick(
        sight.disks, lambda disk: disk.live is Seen.ABSENT and disk.overlay is FileSeen.OURS)
    if unplugged:
        return _ask(unplugged, "the disk was unplugged while it stood on its overlay", Why.UNPLUGGED)
    for disk in sight.disks:
        if disk.overlay is FileSeen.OURS and disk.named_by:
            return _ask(
                (disk.target,),
                f"the guest {disk.named_by} names the overlay in its chain",
                Why.NAMED_ELSEWHERE)
    ours = _pick(sight.disks, lambda disk: disk.overlay is FileSeen.OURS)
    if ours:
        return Decision(Action.UNLINK, ours, "nothing uses the overlays any more")
    if sight.power is Power.OFF and record.shutdown_begun_at and not record.start_verified:
        return Decision(Action.START, (), "stillframe had shut the guest down")
    if record.freeze_begun and not record.thaw_verified and sight.power.has_qemu:
        return _ask((), "the guest agent does not confirm that the guest is thawed", Why.FROZEN)
    return Decision(Action.FINISH, (), "nothing of the run is left")


def _base_changed(record: RunRecord, disks: list[DiskSight]) -> Decision | None:
    # Once a commit has begun the base changes by our own doing, and its times say nothing.
    changed = _pick(disks, lambda disk: (
        not disk.base_intact and record.disk(disk.target).phase in _NOT_COMMITTED))
    if not changed:
        return None
    return _ask(changed, "the base was written to while the overlay stood on it", Why.DIVERGED)


def _pick(
    disks: Sequence[DiskSight], test: Callable[[DiskSight], bool] = lambda _disk: True
) -> tuple[str, ...]:
    return tuple(disk.target for disk in disks if test(disk))
