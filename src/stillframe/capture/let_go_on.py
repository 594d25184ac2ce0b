"""Letting a guest go on that stillframe had suspended, when the run itself can't.

Used by the run where it ends in an error, and by the guard where the run was killed.
"""

from __future__ import annotations

import contextlib

from stillframe.capture.decide import Seen, Sight, may_resume
from stillframe.capture.journal import DiskRecord, Journal, RunRecord
from stillframe.capture.sight import look
from stillframe.capture.states import DiskPhase
from stillframe.clock import Clock
from stillframe.durable import fsync
from stillframe.errors import StillframeError
from stillframe.hypervisor.guest import Guest


def unequal_again(record: RunRecord, sight: Sight) -> tuple[DiskRecord, ...]:
    """Return the run's disks with the phase they have once the guest writes again.

    A disk whose pivot was about to be sent, but which QEMU still has on its overlay, stops being
    equal to its base with the guest's first write.
    """
    on_overlay = {disk.target for disk in sight.disks if disk.qemu is Seen.OVERLAY}
    return tuple(
        disk.with_phase(DiskPhase.COMMITTING)
        if disk.phase is DiskPhase.PIVOTING and disk.target in on_overlay else disk
        for disk in record.disks
    )


def _confirmed(disks: tuple[DiskRecord, ...], sight: Sight) -> tuple[DiskRecord, ...]:
    """Return the disks, those on their base for certain marked so: the guest will write there."""
    on_base = {
        disk.target for disk in sight.disks
        if disk.qemu is disk.live is Seen.BASE and disk.inactive in (Seen.BASE, Seen.UNKNOWN)
    }
    return tuple(
        disk.with_phase(DiskPhase.ON_BASE)
        if disk.phase is DiskPhase.PIVOTING and disk.target in on_base else disk
        for disk in disks
    )


def fsync_definition(domain: Guest) -> None:
    """Make the domain's definition durable."""
    for path in domain.definition_files():
        fsync(path)


def let_go_on(record: RunRecord, domain: Guest, journal: Journal, clock: Clock, why: str) -> bool:
    """Resume the guest if stillframe suspended it and that loses nothing; return whether it did.

    Works even if the journal can't be written any more: then only where no pivot was begun.
    Never raises.
    """
    try:
        sight = look(record, domain, clock, {})
        if not may_resume(record, sight):
            return False
        disks = _confirmed(unequal_again(record, sight), sight)
        if disks != record.disks:
            fsync_definition(domain)
            record = journal.note(record, "going on: overlay and base are equal no more", disks=disks)
        domain.resume()
    except (StillframeError, OSError):
        return False
    with contextlib.suppress(StillframeError):
        journal.note(record, f"resumed: {why}", suspended=False)
    return True
