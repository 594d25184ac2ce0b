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
from stillframe.errors import StillframeError
from stillframe.hypervisor.domain import Domain


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


def let_go_on(record: RunRecord, domain: Domain, journal: Journal, clock: Clock, why: str) -> bool:
    """Resume the guest if stillframe suspended it and that loses nothing; return whether it did.

    Works even if the journal can't be written any more: then only where no pivot was begun.
    Never raises.
    """
    try:
        sight = look(record, domain, clock, {})
        if not may_resume(record, sight):
            return False
        disks = unequal_again(record, sight)
        if disks != record.disks:
            record = journal.note(record, "going on, so overlay and base are equal no more", disks=disks)
        domain.resume()
    except StillframeError:
        return False
    with contextlib.suppress(StillframeError):
        journal.note(record, f"resumed: {why}", suspended=False)
    return True
