"""Bringing a booted guest home while it runs, and throwing one away.

What is in the snapshot only is pulled by QEMU (`block-stream`) into the overlay, which is to be the guest's
image. Nothing is switched over, so nothing can be lost: whatever is killed, the overlay holds what the guest
wrote, and pulling can be begun anew. That a disk has landed is believed only once QEMU has written down
what it pulled (`kept_on_snapshot` says why).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from stillframe.capture.growth import allocated_bytes, free_bytes
from stillframe.capture.lock import domain_lock
from stillframe.capture.neighbours import other_users
from stillframe.clock import Deadline
from stillframe.errors import (
    GuestShutOff,
    GuestState,
    GuestUnfit,
    GuestUnknown,
    HypervisorError,
    ImageShared,
    LandFailed,
    TargetSmall,
)
from stillframe.hypervisor.model import BlockJob
from stillframe.restore.boot import Stop
from stillframe.restore.boot_decide import Image, Stand
from stillframe.restore.boot_record import BEFORE_BOOT, BootRecord, BootState
from stillframe.restore.boot_server import log_of
from stillframe.restore.boot_sight import left_of
from stillframe.restore.boot_steps import BootTools, BootWay
from stillframe.units import MIB, size_text

_POLL_S = 0.2
#: libvirt takes a job out of its list somewhat before QEMU's graph shows the outcome.
_OUTCOME_S = 10.0
_RESERVE_BYTES = 64 * MIB

#: Called with a disk's target, what is done and the whole, in bytes.
Report = Callable[[str, int, int], None]


def land_guest(record: BootRecord, tools: BootTools, stop: Stop, report: Report) -> list[str]:
    """Bring a booted guest home; return what was done in words.

    Raises LandFailed, GuestShutOff, TargetSmall, and what a signal raises: the guest runs on then, and
    it can be done again.
    """
    with domain_lock(tools.store.state_folder, record.uuid, record.name, "land", tools.clock):
        way = BootWay(tools.store.current(record), tools)
        way.settle()
        if way.is_over():
            return way.did
        _check(way.known, tools)
        way.record = tools.store.enter(way.known, BootState.LANDING)
        for disk in record.disks:
            if not way.is_over() and not (way.known.disk(disk.target).landed and
                                          _stand(way, disk.target) is Stand.WHOLE):
                _pull(way, disk.target, stop, report)
                way.settle()
        if not way.is_over():
            raise _failed(way.known, way.decide().reason, tools)
        return way.did


def discard_guest(record: BootRecord, tools: BootTools, *, dry_run: bool) -> list[str]:
    """Throw a booted guest away, with all that was made for it and nothing else; return what was done.

    Raises GuestUnfit, ImageShared where something else would be touched.
    """
    with domain_lock(tools.store.state_folder, record.uuid, record.name, "discard", tools.clock):
        way = BootWay(tools.store.current(record), tools)
        if way.is_over():
            return []
        if way.known.state is BootState.LANDED:
            raise GuestUnknown(f"{record.name} has landed: it is a guest like any other.",
                               f"virsh undefine {record.name}   # with --nvram, if it has one")
        if way.known.state not in (BootState.DISCARDING, BootState.UNDOING):
            _refuse_foreign(way)
        removed = [f"the definition of {record.name}", *left_of(way.known)]
        if dry_run:
            return [f"would remove {each}" for each in removed]
        if way.known.state in BEFORE_BOOT:
            way.settle()  # a boot that never came to its end is removed, or the guest is there by now
        if not way.is_over() and way.known.state is not BootState.DISCARDING:
            way.record = tools.store.enter(way.known, BootState.DISCARDING)
        way.settle()
        return [f"removed {each}" for each in removed]


def _check(record: BootRecord, tools: BootTools) -> None:
    power = tools.domain(record).power()
    if not power.has_qemu:
        raise GuestShutOff(
            f"{record.name} is {power.value}; a guest lands while it runs.", f"virsh start {record.name}")
    needed: dict[int, int] = {}
    for disk in record.disks:
        if not disk.landed:
            device = os.stat(disk.overlay_path).st_dev
            missing = max(0, disk.data_bytes - allocated_bytes(disk.overlay_path))
            needed[device] = needed.get(device, _RESERVE_BYTES) + missing
            folder = os.path.dirname(disk.overlay_path)
            free = free_bytes(folder)
            if free < needed[device]:
                raise TargetSmall(
                    f"{folder} has {size_text(free)} free, and {record.name} needs at least "
                    f"{size_text(needed[device])} to land there.", f"df {folder}", GuestState.OVERLAID)


def _pull(way: BootWay, target: str, stop: Stop, report: Report) -> None:
    """Have QEMU pull a disk, and wait until it has written everything down."""
    tools, domain = way.tools, way.tools.domain(way.known)
    way.record = tools.store.note(way.known, detail=f"pulling {target}")
    way.keep((target,))
    if _job(way, target) is None:
        domain.start_pull(target)
    while (job := _job(way, target)) is not None:
        report(target, job.cur, job.end)
        stopped = stop()
        if stopped is not None:
            domain.abort_block_job(target)
            stopped.guest = GuestState.OVERLAID
            raise stopped
        tools.clock.pause(_POLL_S)
    # libvirt may take a job out of its list somewhat before QEMU's graph shows what came of it.
    deadline = Deadline(tools.clock, _OUTCOME_S)
    while _stand(way, target) is Stand.SNAPSHOT:
        if deadline.passed():
            raise _failed(way.known, f"QEMU ended the pull of {target} before its end", tools)
        tools.clock.pause(_POLL_S)


def _job(way: BootWay, target: str) -> BlockJob | None:
    domain = way.tools.domain(way.known)
    try:
        return domain.pull_of(target)
    except HypervisorError as error:
        power = domain.power()
        if power.has_qemu:
            raise
        raise _failed(way.known, f"it is {power.value} now", way.tools) from error


def _stand(way: BootWay, target: str) -> Stand:
    return next(each.running for each in way.look().disks if each.target == target)


def _failed(record: BootRecord, why: str, tools: BootTools) -> LandFailed:
    said = [line for disk in record.disks for line in log_of(tools.store, record, disk)[-1:]]
    about = f" Its server said: {said[-1]}." if said else ""
    return LandFailed(
        f"{record.name} has not landed: {why}.{about}",
        f"stillframe recover {record.name}; stillframe land {record.name}   # goes on where it stopped")


def _refuse_foreign(way: BootWay) -> None:
    """Refuse to throw away a guest of which something is not stillframe's own making."""
    record = way.known
    for seen in way.look().disks:
        disk = record.disk(seen.target)
        if seen.image is Image.OTHER and disk.overlay_identity is not None:
            raise GuestUnfit(f"{disk.overlay_path} is not the file that was made for {record.name}.",
                             f"ls -li {disk.overlay_path}", GuestState.UNTOUCHED)
        if Stand.OTHER in (seen.running, seen.defined):
            raise GuestUnfit(
                f"{disk.target} of {record.name} does not stand on {disk.overlay_path}, which was made "
                "for it, but on an image of somebody else.",
                f"virsh domblklist {record.name}", GuestState.UNTOUCHED)
    users = other_users(way.tools.domain(record), {disk.overlay_path for disk in record.disks})
    for path, user in users.items():
        raise ImageShared(f"{path} is also an image of {user}.", f"virsh domblklist {user}")

