"""Which method captures a guest: the plan and the capture that fit the wish and what is seen.

A method is a context manager with the signature of `captured`. Each one is given the anchor that the
destination's last durable state left, and sees for itself which disks it can count from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from stillframe.block.anchor import Anchor
from stillframe.block.marked import MarkedReader
from stillframe.block.reader import DiskReader
from stillframe.capture import run
from stillframe.capture.bitmap import captured_by_bitmap
from stillframe.capture.bitmap_choice import bitmap_reasons
from stillframe.capture.method import Method
from stillframe.capture.offline import captured_offline
from stillframe.capture.offline_plan import make_offline_plan
from stillframe.capture.plan import Plan, Wishes, make_plan
from stillframe.capture.restoring import refuse_restoring
from stillframe.capture.run import Capture, StillDisk, Stop, Tools
from stillframe.capture.standing import captured_by_standing_overlay
from stillframe.capture.states import Quiesce
from stillframe.errors import GuestUnfit
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import Power

#: A method: (plan, tools, destination, stop, earlier) to a capture that is valid within the block.
Capturing = Callable[
    [Plan, Tools, str, Stop, Anchor | None], contextlib.AbstractContextManager[Capture]]


def planned(domain: Guest, wishes: Wishes, tools: Tools) -> Plan:
    """Return the plan for capturing *domain*, by a look at whether it runs and the method that is wished.

    Changes nothing. Raises a Refused error that names what is in the way, NeedsAttention.
    """
    refuse_restoring(tools.journal.folder, domain.uuid)
    standing = tools.journal.standing(domain.uuid)
    offline = domain.power() is Power.OFF if wishes.method is Method.AUTO else wishes.method is Method.OFFLINE
    if standing is not None and (offline or wishes.method is Method.BITMAP):
        # A bitmap would be kept in the overlay, which goes; a guest that is off is read by its definition.
        raise GuestUnfit(
            f"{domain.name} stands on overlays; it can't be captured by another method, or while it is off.",
            f"stillframe settle {domain.name}   # then run again",
        )
    if offline:
        return make_offline_plan(domain, domain.view(), wishes)
    return make_plan(domain, wishes, standing)


@contextlib.contextmanager
def captured(
    plan: Plan, tools: Tools, destination: str, stop: Stop, earlier: Anchor | None
) -> Iterator[Capture]:
    """Capture the disks of *plan* by the method that it is to be captured by, and give them, standing still.

    *earlier* is the anchor of the last durable snapshot or mirror at *destination*, None if there is none
    or if it is not to be used. Leaving the block without an exception says that the copy is durable: the
    guest's own anchor (a checkpoint, an overlay) advances. By an exception: nothing advances, and nothing
    of the run stays behind. Raises RunFailed and what the block raises.
    """
    with _METHODS[method_of(plan)](plan, tools, destination, stop, earlier) as capture:
        marked = earlier.marked if earlier is not None else {}
        yield replace(capture, disks=tuple(
            replace(disk, read=partial(_marked, disk, marked[disk.target])) if disk.target in marked else disk
            for disk in capture.disks))


@contextlib.contextmanager
def _marked(disk: StillDisk, marked: Sequence[tuple[int, int]]) -> Iterator[DiskReader]:
    with disk.read() as reader:
        yield MarkedReader(reader, marked)


def method_of(plan: Plan) -> Method:
    """Return the method that was wished, or what `auto` comes to: the cheapest that works for any disk.

    A backup job reads the disks that keep no bitmap whole, as the overlay does, at the same moment. Nothing
    stays on a guest that nobody asked for: only one that stands on overlays already goes on so.
    """
    if plan.wishes.method is not Method.AUTO:
        return plan.wishes.method
    if plan.view.power is Power.OFF:
        return Method.OFFLINE
    if plan.standing is not None:
        return Method.STANDING_OVERLAY
    reasons = bitmap_reasons(plan.view)
    counted = any(not reasons.get(disk.target) for disk in plan.disks)
    if not counted or plan.quiesce is Quiesce.SHUTDOWN or plan.domain.backup_problem():
        return Method.OVERLAY
    return Method.BITMAP


@contextlib.contextmanager
def _by_overlay(
    plan: Plan, tools: Tools, destination: str, stop: Stop, earlier: Anchor | None  # noqa: ARG001
) -> Iterator[Capture]:
    # It reads every disk whole and leaves no anchor, so nobody expects anything of the earlier one.
    with run.captured(plan, tools, destination, stop) as capture:
        yield capture


_METHODS: Mapping[Method, Capturing] = {
    Method.OVERLAY: _by_overlay,
    Method.STANDING_OVERLAY: captured_by_standing_overlay,
    Method.BITMAP: captured_by_bitmap,
    Method.OFFLINE: captured_offline,
}
