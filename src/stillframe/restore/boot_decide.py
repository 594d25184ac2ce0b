"""What is to be done next for a guest that was booted from a snapshot.

`decide_boot` is a pure function of the record and of what libvirt, QEMU, the process table and the files show
now. A boot that fails, `recover`, `land` and `discard` all go by it; docs/BOOT.md has it as a table.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from stillframe.hypervisor.model import Power
from stillframe.restore.boot_record import BEFORE_BOOT, BootRecord, BootState


class Image(enum.Enum):
    """What is at an overlay's path."""

    ABSENT = "absent"
    FRESH = "fresh"  # our overlay, as it was made
    WRITTEN = "written"  # our overlay, written to since
    OTHER = "other"  # another file


class Stand(enum.Enum):
    """What a disk stands on, in one view of the guest."""

    NONE = "none"  # there is no such view (not running, not defined), or no such disk in it
    SNAPSHOT = "snapshot"  # the overlay, with the snapshot below it
    WHOLE = "whole"  # the overlay alone
    COPY = "copy"  # the disk's copy alone
    OTHER = "other"  # another image


@dataclass(frozen=True, slots=True)
class DiskSight:
    """One disk, as it was seen. *running* is QEMU's own word, *defined* the inactive XML's.

    *image* is the overlay, or the copy that the disk has landed in. *busy*: a job is at work on it. *served*:
    its server is there. *names*: the overlay's header names what is below it; looked at only while the
    guest is off. *left*: it has landed in its copy, and the overlay is there.
    """

    target: str
    image: Image
    running: Stand
    defined: Stand
    busy: bool
    served: bool
    names: bool = True
    left: bool = False


@dataclass(frozen=True, slots=True)
class BootSight:
    """A booted guest, as it was seen. *left*: files or folders that were made for it are there."""

    power: Power
    disks: tuple[DiskSight, ...]
    left: bool


class BootStep(enum.Enum):
    """One step, taken before the next look."""

    NOTHING = "nothing"
    ADOPT = "adopt"  # write down that the guest is there
    UNDO = "undo"  # write down that what was made is to be removed
    DESTROY = "destroy"  # end the guest's QEMU
    UNDEFINE = "undefine"  # remove the definition
    END_SERVERS = "end-servers"  # end the servers
    REMOVE = "remove"  # remove the files that were made
    FORGET = "forget"  # remove the record
    STAND = "stand"  # put the snapshot back below the overlay, in the overlay's header
    KEEP = "keep"  # make the definition name overlay and snapshot
    SERVE = "serve"  # start the servers that are not there
    RESUME = "resume"  # let the guest go on
    FLUSH = "flush"  # have QEMU write down what was pulled, and write down that a disk has landed
    REDEFINE = "redefine"  # make the definition name the overlay alone
    MOVE = "move"  # have QEMU write down a disk's copy, define the guest on it, note that the disk has landed
    END_COPY = "end-copy"  # end the job that copies
    RELEASE = "release"  # let the guest go on, if it was stopped for the switch
    CLOSE = "close"  # write down that the guest has landed
    CLEAR = "clear"  # remove the overlays of disks that have landed in their copies
    ASK = "ask"  # only a person can decide


_WHOLE = "its images hold everything themselves"
_UNNAMED = ("it runs on an image whose file was removed, or whose name another file has: what that holds is "
            "gone once the guest ends, so copy it before you shut the guest down")
_SAVE = "virsh blockcopy {name} {target} FILE --format qcow2 --transient-job --wait --finish"
_ASTRAY = "a disk has landed in its copy, but the overlay is in use again, which is older"


@dataclass(frozen=True, slots=True)
class BootDecision:
    """The step, the disks that it is for, and why. *advice* is what a person had best do first, if asked."""

    step: BootStep
    reason: str
    targets: tuple[str, ...] = ()
    advice: str = ""


def decide_boot(record: BootRecord, sight: BootSight) -> BootDecision:
    """Return the one safe next step."""
    state = record.state
    if sight.power is Power.HIDDEN:
        return BootDecision(BootStep.ASK, "libvirt takes the guest for shut off, but its QEMU runs")
    if state is BootState.DISCARDING:
        return _remove(sight, "it is being thrown away")
    if state is BootState.LANDED:
        return _close(record, sight)
    if state in BEFORE_BOOT:
        return _half_made(record, sight)
    if not sight.power.has_qemu:
        return _off(record, sight)
    return _copied(record, sight) or _running(record, sight)


def _half_made(record: BootRecord, sight: BootSight) -> BootDecision:
    if sight.power.has_qemu:
        return BootDecision(BootStep.ADOPT, "the guest runs")
    if any(disk.image is Image.WRITTEN for disk in sight.disks):
        return BootDecision(BootStep.ADOPT, "the guest ran, and its overlays hold what it wrote")
    if record.state is BootState.UNDOING:
        return _remove(sight, "it never ran")
    return BootDecision(BootStep.UNDO, f"the boot ended while {record.state.value}, and the guest never ran")


def _remove(sight: BootSight, why: str) -> BootDecision:
    """Return the next step of removing a guest: what refers to something goes before it."""
    if sight.power.has_qemu:
        return BootDecision(BootStep.DESTROY, why)
    if sight.power is not Power.GONE:
        return BootDecision(BootStep.UNDEFINE, why)
    if any(disk.served for disk in sight.disks):
        return BootDecision(BootStep.END_SERVERS, why)
    if sight.left:
        return BootDecision(BootStep.REMOVE, why)
    return BootDecision(BootStep.FORGET, "nothing is left of it")


def _close(record: BootRecord, sight: BootSight) -> BootDecision:
    if any(disk.served for disk in sight.disks):
        return BootDecision(BootStep.END_SERVERS, "the guest has landed, nothing is read from them any more")
    if targets := _astray(record, sight):
        return BootDecision(BootStep.ASK, _ASTRAY, targets)
    if targets := tuple(disk.target for disk in sight.disks if disk.left):
        return BootDecision(BootStep.CLEAR, "the guest has landed in the copies", targets)
    return BootDecision(BootStep.FORGET, "the guest has landed, it is an ordinary one now")


def _off(record: BootRecord, sight: BootSight) -> BootDecision:
    lost = _lost(sight)
    if sight.power is Power.GONE:
        if len(lost) == len(sight.disks):
            return _remove(sight, "its definition and its overlays were removed by somebody else")
        return BootDecision(
            BootStep.ASK, "its definition was removed by somebody else, and overlays are left", lost)
    if lost:
        return BootDecision(BootStep.ASK, "an overlay is missing, or another file has its name", lost)
    return _copied(record, sight) or _startable(record, sight)


def _copied(record: BootRecord, sight: BootSight) -> BootDecision | None:
    """Return what a disk that is copied elsewhere needs, None if nothing is to be done for any."""
    runs = sight.power.has_qemu
    if targets := _astray(record, sight):
        return BootDecision(BootStep.ASK, _ASTRAY, targets)
    # Nobody but MOVE makes the definition name a copy, and not before all of it is written down.
    if targets := _those(sight, _waiting(record, sight),
                         lambda disk: (disk.running if runs else disk.defined) is Stand.COPY):
        return BootDecision(BootStep.MOVE, "its copy is what is used", targets[:1])
    if record.state is not BootState.SWITCHING:
        return None
    # A switch that was asked for may still come; so the guest goes on only when none can.
    if targets := tuple(disk.target for disk in sight.disks if runs and disk.busy):
        return BootDecision(BootStep.END_COPY, "whether the disk was switched over is not certain", targets)
    return BootDecision(BootStep.RELEASE, "nothing is being switched any more")


def _startable(record: BootRecord, sight: BootSight) -> BootDecision:
    """Return what a guest that is off needs, so that it can be started and reads what it must."""
    waiting = _waiting(record, sight)
    if targets := _those(sight, waiting, lambda disk: disk.defined in (Stand.NONE, Stand.OTHER)):
        return BootDecision(BootStep.ASK, "its definition names another image than its overlay", targets)
    # The header of an overlay is not gone by: of a pull that a killed QEMU had not written down, it
    # says that it was whole. The definition names what is below, so that is what the guest starts on.
    if targets := _those(sight, waiting, lambda disk: not disk.names):
        return BootDecision(BootStep.STAND, "what was pulled may not have been written down", targets)
    if targets := _those(sight, waiting, lambda disk: disk.defined is Stand.WHOLE):
        return BootDecision(BootStep.KEEP, "what was pulled may not have been written down", targets)
    if targets := _to_redefine(record, sight):
        return BootDecision(BootStep.REDEFINE, _WHOLE, targets)
    if not waiting:
        return BootDecision(BootStep.CLOSE, _WHOLE)
    if targets := _those(sight, waiting, lambda disk: not disk.served):
        return BootDecision(BootStep.SERVE, "its server is gone, and the guest can't be started", targets)
    return BootDecision(BootStep.NOTHING, "the guest is shut off, and can be started")


def _running(record: BootRecord, sight: BootSight) -> BootDecision:
    if targets := _lost(sight):
        advice = "; ".join(_SAVE.format(name=record.name, target=target) for target in targets)
        return BootDecision(BootStep.ASK, _UNNAMED, targets, advice)
    waiting = _waiting(record, sight)
    if targets := _those(sight, waiting, lambda disk: disk.running is Stand.WHOLE and not disk.busy):
        return BootDecision(BootStep.FLUSH, "QEMU reads nothing from the snapshot any more", targets[:1])
    if targets := _to_redefine(record, sight):
        return BootDecision(BootStep.REDEFINE, _WHOLE, targets)
    if targets := _those(sight, waiting, lambda disk: not disk.served):
        return BootDecision(BootStep.SERVE, "its server is gone, and the guest reads from it", targets)
    if sight.power is Power.PAUSED_ON_IO_ERROR:
        return BootDecision(BootStep.RESUME, "the guest was paused when a disk could not be read or written")
    if not waiting:
        return BootDecision(BootStep.CLOSE, _WHOLE)
    if targets := _those(sight, waiting, lambda disk: disk.running not in (Stand.SNAPSHOT, Stand.WHOLE)):
        return BootDecision(BootStep.ASK, "the guest does not run on its overlay", targets)
    return BootDecision(BootStep.NOTHING, "the guest runs, and reads from the snapshot what it did not write")


def _lost(sight: BootSight) -> tuple[str, ...]:
    return tuple(disk.target for disk in sight.disks if disk.image in (Image.ABSENT, Image.OTHER))


def _waiting(record: BootRecord, sight: BootSight) -> frozenset[str]:
    """Return the disks that need what is below their overlays, or are in a QEMU that has it open."""
    opened = {disk.target for disk in sight.disks if disk.running is Stand.SNAPSHOT}
    return frozenset(disk.target for disk in record.disks if not disk.landed or disk.target in opened)


def _astray(record: BootRecord, sight: BootSight) -> tuple[str, ...]:
    """Return the disks that landed in their copies, and which somebody has put back on the overlays."""
    old = (Stand.SNAPSHOT, Stand.WHOLE)
    return tuple(disk.target for disk in sight.disks if record.disk(disk.target).is_left_behind
                 and (disk.running in old or disk.defined in old))


def _to_redefine(record: BootRecord, sight: BootSight) -> tuple[str, ...]:
    return tuple(disk.target for disk in sight.disks
                 if record.disk(disk.target).landed and disk.defined is Stand.SNAPSHOT)


def _those(
    sight: BootSight, waiting: frozenset[str], is_one: Callable[[DiskSight], bool],
) -> tuple[str, ...]:
    return tuple(disk.target for disk in sight.disks if disk.target in waiting and is_one(disk))
