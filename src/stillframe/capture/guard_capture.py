"""The guard of a capture: it thaws or resumes the guest if the run can't.

    python -m stillframe.capture.guard_capture thaw|resume URI UUID NAME STATE_FOLDER RUN_ID DEADLINE_S

It thaws until the guest agent says thawed; or it resumes the guest where that loses nothing
(let_go_on.py), unless somebody else works on the guest by then. (A QEMU without libvirt serves one client
at a time: there it connects when the run has let go.)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stillframe.capture.guard import Guard, persist, stand_by, start_guard
from stillframe.capture.journal import Journal
from stillframe.capture.let_go_on import let_go_on
from stillframe.capture.lock import domain_lock
from stillframe.capture.thaw import thaw_until_verified
from stillframe.clock import Clock, Deadline, SystemClock
from stillframe.errors import FreezeFailed, StillframeError
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.guests import guest_at
from stillframe.hypervisor.model import Power

_ANSWER_S = 5.0
_LOCK_S = 3.0


def guard_capture(
    duty: str, domain: Guest, journal: Journal, run_id: str, deadline_s: float, clock: Clock
) -> Guard | None:
    """Start a guard with *duty* ("thaw" or "resume"); None if it could not be started."""
    return start_guard(__name__, [
        duty, domain.connection.uri, domain.uuid, domain.name, str(journal.folder), run_id, str(deadline_s),
    ], clock)


@contextlib.contextmanager
def guarded(
    domain: Guest, journal: Journal, run_id: str, deadline_s: float, clock: Clock
) -> Iterator[Guard]:
    """Have a freeze guarded within the block. When it ends without dismiss(), the guard thaws.

    Raises FreezeFailed when the guard does not start; nothing is frozen then.
    """
    guard = guard_capture("thaw", domain, journal, run_id, deadline_s, clock)
    if guard is None:
        raise FreezeFailed(
            "The process that guards the freeze did not start, so the guest was not frozen.",
            "run again; or with --quiesce none for a crash-consistent copy",
        )
    try:
        yield guard
    finally:
        guard.leave()


def main(arguments: Sequence[str]) -> int:
    """Run the guard; return 0 if the run did its duty itself, 3 if the guard did, 4 if nobody could."""
    duty, uri, uuid, name, folder, run_id, deadline_s = arguments
    clock = SystemClock()
    domain = guest_at(uri, uuid, name, clock)
    why = stand_by(float(deadline_s))
    if not why:
        return 0

    def thaw(deadline: Deadline) -> bool | None:
        return thaw_until_verified(domain, clock, deadline.remaining_s(), _ANSWER_S) or None

    # Thawed first: the journal may be what the run died of.
    done = persist(clock, thaw if duty == "thaw" else lambda _: _resume(domain, Path(folder), clock))
    with contextlib.suppress(StillframeError):
        words = "did" if done else "had not to, or could not,"
        Journal(Path(folder), clock).remark(run_id, f"the guard {words} {duty} the guest: {why}")
    return 3 if done else 4


def _resume(domain: Guest, folder: Path, clock: Clock) -> bool | None:
    """Resume the guest if that is safe; None while it is not, False if there is nothing to resume."""
    if domain.power() is not Power.PAUSED:
        return False
    # Who holds the domain needs the connection, where there can be only one.
    domain.connection.release()
    journal = Journal(folder, clock)
    # A dying process closes the pipe a moment before its lock. Whoever else holds the
    # domain brings it back, the resume included.
    with domain_lock(journal.folder, domain.uuid, domain.name, "guard", clock, _LOCK_S):
        suspended = [run for run in journal.open_runs(domain.uuid) if run.suspended]
        if not suspended:
            return False
        why = "the run died while the guest stood still"
        resumed = any(let_go_on(run, domain, journal, clock, why) for run in suspended)
        domain.connection.release()
        return resumed or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
