"""The one decision for a run of the bitmap method: the next safe step behind the release.

A pure function of the journal and of what is seen, as decide.py is for overlays. A run that ends normally
and `recover` after any crash go through it alike. No image of the guest is at stake here: QEMU writes to the
guest's own images all the while. What is to be kept right is which checkpoint the next run counts from.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from stillframe.capture.journal import RunRecord
from stillframe.capture.states import BEFORE_RELEASE
from stillframe.hypervisor.model import Power


class BackupSeen(enum.Enum):
    """The backup job on the domain, by libvirt."""

    NONE = "none"
    OURS = "ours"
    OTHER = "another job"
    WEDGED = "a job that libvirt itself lost the data of"


@dataclass(frozen=True, slots=True)
class PullSight:
    """What is seen of the domain and of what the run made.

    *checkpoints* are the names of the run's own and the older checkpoints that are there still, by libvirt or
    as bitmaps of QEMU. *stray*: QEMU holds our scratch files open although libvirt has no job of ours.
    *files* are scratch files and the socket, if there still. *thaw_hopeless*: the thaw was tried for its
    whole time. *waited_out*: waiting for this sight to change, or trying to change it, has been given up.
    """

    power: Power
    job: BackupSeen = BackupSeen.NONE
    stray: bool = False
    checkpoints: frozenset[str] = frozenset()
    files: tuple[str, ...] = ()
    thaw_hopeless: bool = False
    waited_out: bool = False


class PullAction(enum.Enum):
    """One safe next step. Each is repeatable: it may have been begun before a crash."""

    RELEASE = "give up what is left of the copy, so that the job may be ended"
    THAW = "thaw the guest's file systems"
    WAIT = "wait and look again"
    END_JOB = "end the backup job"
    CLOSE_IN_QEMU = "close in QEMU what is left of a backup job that libvirt has lost"
    RESUME = "let the guest go on"
    FORGET = "delete checkpoints that nothing counts from"
    SWEEP = "delete scratch files and the socket"
    FINISH = "close the run"
    ASK = "leave everything as it is and ask"


class PullWhy(enum.Enum):
    """What lies behind a question."""

    STEP = "the usual course"
    HIDDEN = "libvirt does not see the running QEMU"
    WEDGED = "libvirt has lost the data of its own job"
    IO_ERROR = "paused by an I/O error"
    FROZEN = "perhaps frozen"


@dataclass(frozen=True, slots=True)
class PullDecision:
    """The next step, for which checkpoints or files, and why (for people)."""

    action: PullAction
    targets: tuple[str, ...] = ()
    reason: str = ""
    why: PullWhy = PullWhy.STEP


def is_durable(record: RunRecord) -> bool:
    """Return whether the run's copy is durable, so that the next run counts from its checkpoint."""
    return record.state not in BEFORE_RELEASE and not record.given_up


def unneeded(record: RunRecord) -> frozenset[str]:
    """Return the checkpoints of ours that no run will count from any more."""
    if record.pull is None:
        return frozenset()
    # The anchor moves only with a durable copy: until then the older one stays, and the new one goes.
    return frozenset(record.pull.older if is_durable(record) else (record.pull.checkpoint,))


def decide_pull(record: RunRecord, sight: PullSight) -> PullDecision:
    """Return the one safe next step for the run *record*, given *sight*."""
    if sight.power is Power.HIDDEN:
        return PullDecision(
            PullAction.ASK, (), "libvirt takes the guest for shut off, but its QEMU still runs",
            PullWhy.HIDDEN)
    if record.state in BEFORE_RELEASE:
        return PullDecision(PullAction.RELEASE, (), f"the run ended while {record.state.value}")
    frozen = record.freeze_begun and not record.thaw_verified
    if frozen and sight.power is Power.RUNNING and not sight.thaw_hopeless:
        return PullDecision(PullAction.THAW, (), "the guest may be frozen")
    return _decide_job(sight) or _decide_guest(record, sight) or _decide_rest(record, sight)


def _decide_job(sight: PullSight) -> PullDecision | None:
    if sight.job is BackupSeen.WEDGED:
        action = PullAction.ASK if sight.waited_out else PullAction.WAIT
        return PullDecision(action, (), "libvirt was killed while it began the backup job, and has lost the "
                            "job's data", PullWhy.WEDGED)
    if sight.job is BackupSeen.OURS:
        return PullDecision(PullAction.END_JOB, (), "the backup job still runs")
    if sight.stray:
        return PullDecision(PullAction.CLOSE_IN_QEMU, (), "QEMU holds scratch files that libvirt has lost")
    return None


def _decide_guest(record: RunRecord, sight: PullSight) -> PullDecision | None:
    begun = record.pull is not None and record.pull.begun
    if sight.power is not Power.PAUSED_ON_IO_ERROR or not begun:
        return None
    if sight.waited_out:
        return PullDecision(
            PullAction.ASK, (), "the guest stays paused after an I/O error", PullWhy.IO_ERROR)
    return PullDecision(PullAction.RESUME, (), "the guest was paused by an I/O error during the backup job")


def _decide_rest(record: RunRecord, sight: PullSight) -> PullDecision:
    forget = tuple(sorted(sight.checkpoints & unneeded(record)))
    if forget:
        kept = "the copy is durable" if is_durable(record) else "the copy was given up"
        return PullDecision(PullAction.FORGET, forget, kept)
    if sight.files:
        return PullDecision(PullAction.SWEEP, sight.files, "nothing uses them any more")
    if record.freeze_begun and not record.thaw_verified and sight.power.has_qemu:
        return PullDecision(PullAction.ASK, (), "the guest agent does not confirm that the guest is thawed",
                            PullWhy.FROZEN)
    return PullDecision(PullAction.FINISH, (), "nothing of the run is left")
