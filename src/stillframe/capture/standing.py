"""The standing-overlay method: each run's overlay stays, and the next one reads only what it holds.

    before       base ← old          the guest writes to old since the last durable capture
    the moment   base ← old ← new    one atomic snapshot over all disks; base ← old stands still
    the copy     what old holds itself is what changed
    durable      base ← new          old is committed down into the base (standing_lower.py)
    given up     base ← old          new is written back into old (bring_back.py): old still holds all that
                                     changed since the last durable capture

Until the copy is durable a run is one of the overlay method, whose base happens to be old.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import msgspec

from stillframe.block.anchor import Anchor
from stillframe.block.image import file_place
from stillframe.block.reader import open_reader
from stillframe.block.tools import image_info
from stillframe.capture.bring_back import BringBack
from stillframe.capture.decide import Action, Decision, decide
from stillframe.capture.explain import attention
from stillframe.capture.forward import brought_back
from stillframe.capture.growth import allocated_bytes, free_bytes
from stillframe.capture.journal import DiskRecord, RunRecord
from stillframe.capture.limits import Limits
from stillframe.capture.method import Method
from stillframe.capture.plan import Plan
from stillframe.capture.recover import Recovered
from stillframe.capture.run import Capture, OverlayRun, StillDisk, Stop, Tools
from stillframe.capture.sight import intact, look
from stillframe.capture.standing_decide import stands
from stillframe.capture.standing_lower import LowerRun, standing_disks
from stillframe.capture.states import State
from stillframe.errors import (
    CopyFailed,
    GuestState,
    GuestUnfit,
    NeedsAttention,
    ProgramFailed,
    ProgramTimedOut,
)
from stillframe.hypervisor.domain import Domain
from stillframe.hypervisor.guest import Guest
from stillframe.units import size_text


@contextlib.contextmanager
def captured_by_standing_overlay(
    plan: Plan, tools: Tools, destination: str, stop: Stop, earlier: Anchor | None
) -> Iterator[Capture]:
    """Put overlays on all disks of the plan and give what is below them, standing still.

    *earlier* is the anchor of the last durable capture for this destination. A disk whose standing overlay
    was put on by that capture is read by its changes; else it is read whole, and its note says why. When
    the block ends well, the guest stands on the new overlays, and no older ones are left; when it ends by an
    exception, the guest is on what it was on before. Raises RunFailed, NeedsAttention (also where a standing
    overlay is not as it was left: nothing was changed then), GuestUnfit and what the block raises.
    """
    refuse_undefined(plan)
    refuse_moved(plan, tools)
    refuse_bitmaps_on_network(plan)
    run = _StandingRun(plan, tools, destination, stop, earlier)
    back = BringBack(tools.journal, plan.domain, tools.clock, plan.limits, tools.watcher)
    lower = LowerRun(tools.journal, plan.domain, tools.clock, plan.limits, tools.watcher)

    def finish(record: RunRecord) -> RunRecord:
        if record.state is State.STANDING:
            return record
        return lower.finish(record) if record.state is State.LOWERING else back.finish(record)

    with brought_back(run, finish, GuestState.OVERLAID):
        yield run.take()


def refuse_undefined(plan: Plan) -> None:
    """Raise GuestUnfit if a disk has no definition that libvirt keeps: nobody would start it on its overlay.

    Whoever starts a transient guest, or plugs a disk in for one boot, names the image that they know, which
    is the base, without what is in the overlay.
    """
    defined = plan.view.inactive.disks if plan.view.inactive is not None else {}
    missing = [disk.target for disk in plan.disks if disk.target not in defined]
    if missing:
        raise GuestUnfit(
            f"{', '.join(missing)} of {plan.domain.name} is in no definition that libvirt keeps, so its next "
            "start would not know of a standing overlay.",
            plan.wishes.again(plan.domain.name, "--method overlay"),
        )


def refuse_bitmaps_on_network(plan: Plan) -> None:
    """Raise GuestUnfit for a qcow2 on network storage that has bitmaps: no overlay can be committed into it.

    libvirt does not look for the backing file of such an image, so it can't reopen it to merge the bitmaps
    ("unknown presence of backing store", 9.0). QEMU has committed by then, and libvirt's chain stays wrong.
    """
    qemu = plan.view.qemu
    for disk in plan.disks:
        bottom = plan.live.disks[disk.target].chain[-1]
        bitmaps = qemu.bitmaps(qemu.disks[disk.target].files[-1]) if qemu is not None else {}
        if bitmaps and (bottom.kind, bottom.format) == ("network", "qcow2"):
            raise GuestUnfit(
                f"{disk.target} of {plan.domain.name} is a qcow2 on network storage and has bitmaps of "
                "checkpoints: libvirt could not commit a standing overlay into it.",
                plan.wishes.again(plan.domain.name, "--method bitmap")
                + f"   # or delete them: virsh checkpoint-list {plan.domain.name}",
            )


def refuse_moved(plan: Plan, tools: Tools) -> None:
    """Raise NeedsAttention if the plan's standing overlays are not as they were left, naming what changed.

    Raises GuestUnfit if one of their disks is to be left out now: it would have to go with the others.
    """
    record = plan.standing
    if record is None:
        return
    problem = how_it_stands(record, plan.domain, tools)
    if problem is not None:
        raise attention(record, problem)
    left_out = {disk.target for disk in record.disks} - {disk.target for disk in plan.disks}
    if left_out:
        raise GuestUnfit(
            f"{', '.join(sorted(left_out))} of {record.name} stands on an overlay and is to be left out now.",
            f"stillframe settle {record.name}   # then run again",
        )


def how_it_stands(record: RunRecord, domain: Guest, tools: Tools) -> Decision | None:
    """Return why the guest does not stand as the standing run *record* left it, None if it does."""
    return stands(record, look(record, domain, tools.clock, {}))


class _StandingRun(OverlayRun):
    """The forward half of a run whose overlays stay if its copy becomes durable."""

    method = Method.STANDING_OVERLAY

    def __init__(
        self, plan: Plan, tools: Tools, destination: str, stop: Stop, earlier: Anchor | None
    ) -> None:
        self._old = plan.standing
        self._earlier = earlier
        super().__init__(plan, tools, destination, stop, "" if self._old is None else self._old.id)

    def take(self) -> Capture:
        """See OverlayRun."""
        capture = super().take()
        sizes = {disk.target: disk.size_bytes for disk in self.record.disks}
        return replace(capture, anchor=Anchor(capture=self.record.id, sizes=sizes))

    def still(self, disk: DiskRecord) -> StillDisk:
        """See OverlayRun: what stands still is the older overlay, if there is one, over the guest's image."""
        old = self._below(disk)
        place = disk.base if old is None else old.base
        note = self._why_whole(disk, old)
        # Without an anchor nobody asks why, and what the overlay holds counts from another destination's run.
        counts = self._earlier is not None and not note
        read = partial(open_reader, disk.base, clock=self._clock, top_changed=counts)
        return StillDisk(disk.target, place, disk.size_bytes, Method.STANDING_OVERLAY, read, note)

    def check_still(self) -> None:
        """See OverlayRun; the images below the older overlays are to stand still, too."""
        super().check_still()
        for disk in self._old.disks if self._old is not None else ():
            if not intact(disk, disk.base.identity()):
                raise CopyFailed(
                    f"The base of {disk.target} ({disk.base.text()}) was changed during the copy.",
                    "find out which program writes to it (fuser -v), then run again",
                )

    def release(self) -> None:
        """Write down that the copy is durable, and that the overlays stay."""
        record = self.record
        if record.freeze_begun and not record.thaw_verified:
            super().release()  # the guest may hang in a freeze: bring it back as far as can be, and ask
        elif self._old is None:
            self._enter(State.STANDING, "the copy is durable", disks=standing_disks(record))
        else:
            self._enter(State.LOWERING, "the copy is durable",
                        disks=tuple(self._rebased(disk) for disk in record.disks))

    def _below(self, disk: DiskRecord) -> DiskRecord | None:
        """Return the record of the standing overlay that is *disk*'s base, None if its base is none."""
        if self._old is None:
            return None
        return next((each for each in self._old.disks if each.overlay_path == disk.base.path), None)

    def _rebased(self, disk: DiskRecord) -> DiskRecord:
        """Return the disk with the guest's own image as its base again, the older overlay between them."""
        old = self._below(disk)
        if old is None:
            return disk
        return msgspec.structs.replace(
            old, size_bytes=disk.size_bytes, overlay_path=disk.overlay_path,
            overlay_identity=disk.overlay_identity, phase=disk.phase,
            lower_path=old.overlay_path, lower_identity=old.overlay_identity,
        )

    def _why_whole(self, disk: DiskRecord, old: DiskRecord | None) -> str:
        """Return why the disk is read whole although it was to be read by its changes; "" if it is not."""
        earlier = self._earlier
        if earlier is None:
            return ""
        if old is None or self._old is None:
            return "no overlay stands on it"
        if earlier.capture != self._old.id:
            return f"its overlay counts from run {self._old.id}, not from the last for this destination"
        if earlier.sizes.get(disk.target) != disk.size_bytes:
            return "its size has changed"
        return ""


# --- Ending the standing state ------------------------------------------------------------------


def settle(domain: Guest, tools: Tools, limits: Limits, why: str = "settled") -> Recovered | None:
    """Bring the guest back onto its own images from its standing overlays; None if it has none.

    Needs the domain's lock, and that recover_domain has ended what was left open. The next run of
    the standing-overlay method reads whole disks. Raises NeedsAttention, with nothing changed, where
    the overlays are not as they were left, and GuestUnfit where a disk was made smaller meanwhile.
    """
    record = tools.journal.standing(domain.uuid)
    if record is None:
        return None
    problem = settle_problem(record, domain, tools)
    if problem is not None:
        raise attention(record, problem)
    tools.watcher.say(f"{record.name} stands on overlays: bringing it back onto its images")
    record = tools.journal.enter(record, State.RELEASED, why)
    back = BringBack(tools.journal, domain, tools.clock, limits, tools.watcher)
    try:
        return Recovered(back.finish(record), tuple(back.did))
    except NeedsAttention as error:
        error.next_command = error.next_command or f"stillframe recover {record.name}"
        raise


def settle_problem(record: RunRecord, domain: Guest, tools: Tools) -> Decision | None:
    """Return what stands in the way of settling the standing run *record*, None if nothing does."""
    decision = first_settle_step(record, domain, tools)
    return decision if decision.action is Action.ASK else None


def first_settle_step(record: RunRecord, domain: Guest, tools: Tools) -> Decision:
    """Return what settle would do first, without doing it. Raises GuestUnfit if a disk was made smaller."""
    decision = decide(
        msgspec.structs.replace(record, state=State.RELEASED), look(record, domain, tools.clock, {}))
    if decision.action is not Action.ASK:
        for disk in record.disks:
            _refuse_cut(record, disk)
    return decision


def _refuse_cut(record: RunRecord, disk: DiskRecord) -> None:
    """Raise GuestUnfit if the disk is smaller than its image below the overlay.

    A commit makes a base larger, never smaller: the guest would find the old size again, and at the end what
    it had cut off. Whoever makes the disk as large first says that they know, and has zeroes there.
    """
    try:
        now, then = (image_info(place).virtual_size_bytes
                     for place in (file_place(disk.overlay_path, "qcow2"), disk.base))
    except (ProgramFailed, ProgramTimedOut):
        return  # what can't be read is found out by the commit
    if now < then:
        raise GuestUnfit(
            f"{disk.target} of {record.name} was made smaller while it stood on its overlay: it has {now}"
            f" bytes, its image {disk.base.text()} has {then}. Back on that, it has its old size again.",
            f"virsh blockresize {record.name} {disk.target} {then}B   # while it runs; then settle, and if "
            f"you like virsh blockresize {record.name} {disk.target} {now}B",
        )


def past_limit(record: RunRecord, limits: Limits) -> str:
    """Return which standing overlay has grown past its limit, in words; "" if none has.

    A run at that moment reads and ends it anyway. Whoever looks in between (`status`, a timer, a watch)
    settles the guest early, and its next run reads whole disks.
    """
    for disk in record.disks:
        limit, used = _limit_bytes(disk, limits), allocated_bytes(disk.overlay_path)
        if used > limit:
            return f"the overlay of {disk.target} holds {size_text(used)}, its limit is {size_text(limit)}"
        with contextlib.suppress(OSError):
            free = free_bytes(str(disk.overlay_path).rpartition("/")[0])
            if free < limits.reserve_bytes:
                return f"beside the overlay of {disk.target} only {size_text(free)} are free"
    return ""


def watch_growth(domain: Domain, record: RunRecord, limits: Limits) -> None:
    """Have the connection's wait_change wake up when a standing overlay of the guest reaches its limit.

    Asks libvirt for an event at the limit; a qcow2 file is written to there no earlier than it is as large.
    Has to be done anew after each event. Raises HypervisorError, ConnectionLost.
    """
    for disk in record.disks:
        domain.tell_when_written_to(disk.target, _limit_bytes(disk, limits))


def _limit_bytes(disk: DiskRecord, limits: Limits) -> int:
    limit = limits.standing_bytes
    return round(disk.size_bytes * limits.standing_share) if limit is None else limit


def settle_past_limit(domain: Guest, tools: Tools, limits: Limits) -> Recovered | None:
    """Settle the guest if a standing overlay of it has grown past its limit; None if none has.

    Needs the domain's lock. Raises NeedsAttention.
    """
    record = tools.journal.standing(domain.uuid)
    words = "" if record is None else past_limit(record, limits)
    return settle(domain, tools, limits, words) if words else None
