"""The states of a run, and which may follow which.

A state is entered (durably, see journal) *before* the step it is named after is taken.
docs/CAPTURE.md shows the same table; a test compares the two.
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Where a run is. One line a state: what is about to be done, or being done."""

    PLANNED = "planned"  # everything was checked; nothing is changed yet
    OVERLAYS = "overlays"  # creating the overlay files
    SHUTTING_DOWN = "shutting-down"  # asking the guest to shut down (quiesce shutdown)
    FREEZING = "freezing"  # freezing the file systems (quiesce agent)
    SNAPSHOT = "snapshot"  # putting the overlays on, all disks at one moment
    THAWING = "thawing"  # thawing the file systems
    STARTING = "starting"  # starting the guest again (quiesce shutdown)
    COPYING = "copying"  # the bases stand still and are being copied
    RELEASED = "released"  # the copy is durable or given up: a commit may begin
    COMMITTING = "committing"  # the overlays are being written back into the bases
    SUSPENDING = "suspending"  # stopping the CPUs for the guarded pivot
    PIVOTING = "pivoting"  # making the bases the guest's images again
    RESUMING = "resuming"  # letting the CPUs go on
    CLEANING = "cleaning"  # deleting the overlay files
    RESTARTING = "restarting"  # starting a guest that stillframe had shut down and left off
    REDEFINING = "redefining"  # telling libvirt of a checkpoint that it lost (method bitmap)
    BEGINNING = "beginning"  # beginning the backup job and its checkpoint, all disks at one moment
    READING = "reading"  # the disks are read as they were at that moment
    ENDING = "ending"  # ending the backup job
    FORGETTING = "forgetting"  # deleting checkpoints that nothing will count from
    SWEEPING = "sweeping"  # deleting scratch files and the socket
    LOWERING = "lowering"  # the copy is durable, its overlays stay; older ones are committed down
    SHEDDING = "shedding"  # deleting the older overlays, whose data is in the bases
    STANDING = "standing"  # the guest stays on the overlays, by intention, until the next run or `settle`
    DONE = "done"  # nothing of the run is left


_S = State

#: Once released, what is seen decides the next step: any of these may follow any other.
_BACK = frozenset({
    _S.COMMITTING, _S.SUSPENDING, _S.PIVOTING, _S.RESUMING, _S.CLEANING, _S.RESTARTING, _S.DONE,
})

#: The same for a backup job: what follows its release.
_PULLED = frozenset({_S.ENDING, _S.RESUMING, _S.FORGETTING, _S.SWEEPING, _S.DONE})

#: From each state, the states that may be entered next. Giving up leads to RELEASED from
#: anywhere before it. A standing run goes to RELEASED when it is settled, and to DONE when the next one
#: has taken its place.
TRANSITIONS: dict[State, frozenset[State]] = {
    _S.PLANNED: frozenset({_S.OVERLAYS, _S.FREEZING, _S.REDEFINING, _S.BEGINNING, _S.RELEASED}),
    _S.OVERLAYS: frozenset({_S.SHUTTING_DOWN, _S.FREEZING, _S.SNAPSHOT, _S.RELEASED}),
    _S.SHUTTING_DOWN: frozenset({_S.SNAPSHOT, _S.RELEASED}),
    _S.FREEZING: frozenset({_S.SNAPSHOT, _S.BEGINNING, _S.RELEASED}),
    _S.SNAPSHOT: frozenset({_S.THAWING, _S.STARTING, _S.COPYING, _S.RELEASED}),
    _S.THAWING: frozenset({_S.COPYING, _S.READING, _S.RELEASED}),
    _S.STARTING: frozenset({_S.COPYING, _S.RELEASED}),
    _S.COPYING: frozenset({_S.RELEASED, _S.LOWERING, _S.STANDING}),
    _S.REDEFINING: frozenset({_S.FREEZING, _S.BEGINNING, _S.RELEASED}),
    _S.BEGINNING: frozenset({_S.THAWING, _S.READING, _S.RELEASED}),
    _S.READING: frozenset({_S.RELEASED}),
    _S.RELEASED: _BACK | _PULLED,
    _S.COMMITTING: _BACK,
    _S.SUSPENDING: _BACK,
    _S.PIVOTING: _BACK,
    _S.RESUMING: _BACK | _PULLED,
    _S.CLEANING: _BACK,
    _S.RESTARTING: _BACK,
    _S.ENDING: _PULLED,
    _S.FORGETTING: _PULLED,
    _S.SWEEPING: _PULLED,
    _S.LOWERING: frozenset({_S.LOWERING, _S.SHEDDING, _S.STANDING}),
    _S.SHEDDING: frozenset({_S.LOWERING, _S.SHEDDING, _S.STANDING}),
    _S.STANDING: frozenset({_S.RELEASED, _S.DONE}),
    _S.DONE: frozenset(),
}

#: In these states the copy may still need the bases (or the job): nothing may be committed or ended.
BEFORE_RELEASE = frozenset({
    _S.PLANNED, _S.OVERLAYS, _S.SHUTTING_DOWN, _S.FREEZING, _S.SNAPSHOT, _S.THAWING, _S.STARTING,
    _S.COPYING, _S.REDEFINING, _S.BEGINNING, _S.READING,
})

#: The states that only runs of the bitmap method come to.
PULL_STATES = frozenset({
    _S.REDEFINING, _S.BEGINNING, _S.READING, _S.ENDING, _S.FORGETTING, _S.SWEEPING,
})

#: In these states the overlays of the run are to stay (standing.py): nothing may commit them.
KEPT = frozenset({_S.LOWERING, _S.SHEDDING, _S.STANDING})


class DiskPhase(enum.Enum):
    """What is known for certain of one disk of a run."""

    PLANNED = "planned"  # its overlay may exist but was never proven to be in use
    OVERLAID = "overlaid"  # the guest was seen to write to the overlay
    COMMITTING = "committing"  # its commit may have begun: the base alone is no point in time
    PIVOTING = "pivoting"  # the pivot was about to be sent: base and overlay were equal then
    ON_BASE = "on-base"  # live and inactive XML and QEMU were seen to name the base: it is the truth


class Quiesce(enum.Enum):
    """How the guest is brought to rest before the overlay is put on."""

    AUTO = "auto"
    AGENT = "agent"
    SHUTDOWN = "shutdown"
    NONE = "none"


class Consistency(enum.Enum):
    """What state the captured disks are in."""

    FILESYSTEM = "filesystem"
    CRASH = "crash"
    SHUTDOWN = "shutdown"
