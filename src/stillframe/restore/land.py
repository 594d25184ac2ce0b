"""Bringing a booted guest home while it runs, and throwing one away.

What is in the snapshot only is pulled by QEMU (`block-stream`) into the overlay, which is to be the guest's
image. Nothing is switched over, so nothing can be lost: whatever is killed, the overlay holds what the guest
wrote, and pulling can be begun anew. That a disk has landed is believed only once QEMU has written down
what it pulled (`kept_on_snapshot` says why).

Where another image is wanted, QEMU copies the disk to it, and the guest is switched over while it stands
still: it goes on when the copy is written down and the definition names it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from stillframe.block.image import file_identity
from stillframe.block.tools import create_image
from stillframe.capture.growth import free_bytes
from stillframe.capture.lock import domain_lock
from stillframe.clock import Deadline
from stillframe.errors import (
    GuestState,
    GuestUnfit,
    GuestUnknown,
    HypervisorError,
    LandFailed,
    ProgramFailed,
    TargetExists,
)
from stillframe.hypervisor.model import BlockJob, Mirror, Power
from stillframe.restore.boot import Stop
from stillframe.restore.boot_decide import Image, Stand
from stillframe.restore.boot_record import BEFORE_BOOT, BootDisk, BootRecord, BootState, give_name
from stillframe.restore.boot_server import log_of
from stillframe.restore.boot_sight import left_of
from stillframe.restore.boot_steps import BootTools, BootWay, drop_copy, refuse_shared
from stillframe.restore.land_guard import switch_guarded
from stillframe.restore.land_plan import Landing, LandWish, plan_landing
from stillframe.units import size_text

_POLL_S = 0.2
_DRAIN_S = 10.0
_DRAIN_POLL_S = 0.01
#: libvirt takes a job out of its list somewhat before QEMU's graph shows the outcome.
_OUTCOME_S = 10.0

#: Called with a disk's target, what is done and the whole, in bytes.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Landed:
    """What was done for a guest, in words, and its disks."""

    did: list[str]
    disks: tuple[BootDisk, ...]


def land_guest(record: BootRecord, wish: LandWish, tools: BootTools, stop: Stop, report: Report) -> Landed:
    """Bring a booted guest home; return what was done.

    Raises LandFailed, what plan_landing does, and what a signal raises: the guest runs on then, and
    it can be done again.
    """
    with domain_lock(tools.store.state_folder, record.uuid, record.name, "land", tools.clock):
        way = BootWay(tools.store.current(record), tools)
        way.settle()
        if way.is_over():
            return Landed(way.did, record.disks)
        landings = plan_landing(way.known, way.look(), wish, tools)
        with _needing_qemu(way):
            disks = _land(way, landings, stop, report)
        if not way.is_over():
            raise _failed(way.known, way.decide().reason, tools)
        return Landed(way.did, disks)


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


def _land(
    way: BootWay, landings: Sequence[Landing], stop: Stop, report: Report,
) -> tuple[BootDisk, ...]:
    """Land one disk after the other; return all as they are named once they have landed."""
    way.record = way.tools.store.enter(way.known, BootState.LANDING)
    for landing in landings:
        _settle_on(way, landing)
    disks = way.known.disks
    for landing in landings:
        if not way.is_over():
            (_pull if landing.copy is None else _copy)(way, landing.target, stop, report)
    return disks


def _settle_on(way: BootWay, landing: Landing) -> None:
    """Write down where a disk is to land. What was begun for another place is ended and removed."""
    disk = way.known.disk(landing.target)
    job, mirror = _job(way, disk.target), way.tools.domain(way.known).mirror_of(disk.target)
    wanted = "" if landing.copy is None else landing.copy.path
    if job is not None and wanted != ("" if mirror is None else mirror.place):
        way.end_job(disk.target)
    if disk.copy != landing.copy:
        drop_copy(disk)
        way.note(msgspec.structs.replace(disk, copy=landing.copy))


def _pull(way: BootWay, target: str, stop: Stop, report: Report) -> None:
    """Have QEMU pull a disk, and wait until it has written everything down."""
    tools, domain = way.tools, way.tools.domain(way.known)
    way.record = tools.store.note(way.known, detail=f"pulling {target}")
    way.keep((target,))
    if _job(way, target) is None:
        domain.start_pull(target)
    while (job := _job(way, target)) is not None:
        _wait(way, target, job, stop, report)
    # libvirt may take a job out of its list somewhat before QEMU's graph shows what came of it.
    deadline = Deadline(tools.clock, _OUTCOME_S)
    while _stand(way, target) is Stand.SNAPSHOT:
        if deadline.passed():
            raise _failed(way.known, f"QEMU ended the pull of {target} before its end", tools)
        tools.clock.pause(_POLL_S)
    way.settle()


def _copy(way: BootWay, target: str, stop: Stop, report: Report) -> None:
    """Have QEMU copy a disk, and switch the guest over to the copy once the two are the same."""
    tools, domain = way.tools, way.tools.domain(way.known)
    way.record = tools.store.note(way.known, detail=f"copying {target}")
    # Kept, libvirt does not make it name the copy at the switch: by then not all may be written down.
    way.keep((target,))
    if _job(way, target) is None:
        path, image_format = _make_copy(way, target)
        domain.start_copy(target, path, image_format)
    while not _is_ready(domain.mirror_of(target)):
        job = _job(way, target)
        if job is None:
            failed = _ended(way, target)
            _drop_unused_copy(way, target)
            raise failed
        _wait(way, target, job, stop, report)
    with switch_guarded(way.known, tools):
        try:
            _switch(way, target)
        finally:
            way.end_switch()  # the guest stands still until then
    way.settle()


def _make_copy(way: BootWay, target: str) -> tuple[str, str]:
    """Make the empty image that a disk is copied to; return its path and format."""
    disk = way.known.disk(target)
    assert disk.copy is not None
    drop_copy(disk)  # a copy that was given up is of no use for another one
    copy, making = disk.copy, disk.making_path(disk.copy.path)
    try:
        create_image(making, copy.format, way.tools.domain(way.known).capacity_bytes(target))
        way.note(msgspec.structs.replace(
            disk, copy=msgspec.structs.replace(copy, identity=file_identity(making))))
        give_name(making, copy.path)
    except FileExistsError as error:
        raise TargetExists(f"{copy.path} exists.", "choose another folder with --pool",
                           GuestState.OVERLAID) from error
    except (OSError, ProgramFailed) as error:
        raise _failed(way.known, f"{copy.path} can't be made: {error}", way.tools) from error
    return copy.path, copy.format


def _drop_unused_copy(way: BootWay, target: str) -> None:
    """Give the room of a copy that came to no end back: it might be what was lacking."""
    if _stand(way, target) is Stand.SNAPSHOT:
        drop_copy(way.known.disk(target))


def _switch(way: BootWay, target: str) -> None:
    """Switch the guest over to the copy while it stands still: whichever of the two it starts on is right."""
    tools, domain = way.tools, way.tools.domain(way.known)
    runs = domain.power() is Power.RUNNING
    way.record = tools.store.enter(way.known, BootState.SWITCHING, f"{target} is copied", held=runs)
    if runs:
        domain.suspend()
    deadline = Deadline(tools.clock, _DRAIN_S)
    while True:
        job = _job(way, target)
        if job is None:
            raise _ended(way, target)
        if _is_ready(domain.mirror_of(target)) and job.cur == job.end:
            break
        if deadline.passed():
            if runs:  # no switch was asked for: the guest need not wait for a job that may be slow to end
                domain.resume()
            raise _failed(way.known, f"the copy of {target} does not catch up with the guest", tools)
        tools.clock.pause(_DRAIN_POLL_S)
    domain.pivot(target)


def _is_ready(mirror: Mirror | None) -> bool:
    return mirror is not None and mirror.ready


def _wait(way: BootWay, target: str, job: BlockJob, stop: Stop, report: Report) -> None:
    """Tell how far the job on a disk is, and wait a little. Ends it, and raises, where that is asked for."""
    report(target, job.cur, job.end)
    stopped = stop()
    if stopped is not None:
        way.tools.domain(way.known).abort_block_job(target)
        stopped.guest = GuestState.OVERLAID
        raise stopped
    way.tools.clock.pause(_POLL_S)


def _job(way: BootWay, target: str) -> BlockJob | None:
    return way.tools.domain(way.known).pull_of(target)


@contextlib.contextmanager
def _needing_qemu(way: BootWay) -> Iterator[None]:
    """Raise LandFailed for what libvirt refuses within the block because the guest's QEMU has ended."""
    try:
        yield
    except HypervisorError as error:
        power = way.tools.domain(way.known).power()
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


def _ended(way: BootWay, target: str) -> LandFailed:
    folder = os.path.dirname(way.known.disk(target).image_path)
    free = size_text(free_bytes(folder))
    return _failed(
        way.known, f"QEMU ended the copy of {target} before its end; {free} are free in {folder}", way.tools)


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
    refuse_shared(way.tools.domain(record), {
        path for disk in record.disks for path in (disk.overlay_path, disk.image_path)})

