"""The guard: a small process of its own that thaws or resumes the guest if the run can't.

    python -m stillframe.capture.guard thaw|resume URI UUID NAME STATE_FOLDER RUN_ID DEADLINE_S

It is started before the freeze (or the suspend) and says `ready` once it is connected to libvirt. (A QEMU
without libvirt serves one client at a time: there it connects when the run has let go.) Its
standard input is a pipe from the run: the line `done` there means that the run has done it
itself. End of file without it means that the run died. Then, or when DEADLINE_S seconds have
passed, it thaws until the guest agent says thawed; or it resumes the guest where that loses
nothing (let_go_on.py), unless somebody else works on the guest by then. It has a session of
its own, so that a Ctrl-C or a kill of the run's process group leaves it alone.
"""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stillframe import process
from stillframe.capture.journal import Journal
from stillframe.capture.let_go_on import let_go_on
from stillframe.capture.lock import domain_lock
from stillframe.capture.thaw import thaw_until_verified
from stillframe.clock import Clock, Deadline, SystemClock
from stillframe.errors import FreezeFailed, StillframeError
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.guests import guest_at
from stillframe.hypervisor.model import Power

#: How long the guard goes on trying to thaw a guest whose agent does not answer.
PERSISTENCE_S = 3600.0
_ANSWER_S = 5.0
_READY_S = 20.0
_LOCK_S = 3.0


class Guard:
    """The run's end of a guard."""

    def __init__(self, child: process.Helper) -> None:
        self._child = child

    def dismiss(self) -> None:
        """Tell the guard that nothing is left for it to do, and wait until it is gone."""
        if self._child.stdin is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.write(b"done\n")
                self._child.stdin.flush()
        process.stop(self._child)

    def leave(self) -> None:
        """Let the guard do its work. After dismiss() there is none left."""
        if self._child.stdin is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.close()


def start_guard(
    duty: str, domain: Guest, journal: Journal, run_id: str, deadline_s: float, clock: Clock
) -> Guard | None:
    """Start a guard with *duty* ("thaw" or "resume"); None if it could not be started."""
    try:
        child = process.start_detached([
            sys.executable, "-m", "stillframe.capture.guard", duty, domain.connection.uri, domain.uuid,
            domain.name, str(journal.folder), run_id, str(deadline_s),
        ])
    except (OSError, StillframeError):
        return None
    guard = Guard(child)
    if _is_ready(child, Deadline(clock, _READY_S)):
        return guard
    guard.dismiss()
    return None


@contextlib.contextmanager
def guarded(
    domain: Guest, journal: Journal, run_id: str, deadline_s: float, clock: Clock
) -> Iterator[Guard]:
    """Have a freeze guarded within the block. When it ends without dismiss(), the guard thaws.

    Raises FreezeFailed when the guard does not start; nothing is frozen then.
    """
    guard = start_guard("thaw", domain, journal, run_id, deadline_s, clock)
    if guard is None:
        raise FreezeFailed(
            "The process that guards the freeze did not start, so the guest was not frozen.",
            "run again; or with --quiesce none for a crash-consistent copy",
        )
    try:
        yield guard
    finally:
        guard.leave()


def _is_ready(child: process.Helper, deadline: Deadline) -> bool:
    if child.stdout is None:
        return False
    ready, _, _ = select.select([child.stdout], [], [], deadline.remaining_s())
    return bool(ready) and child.stdout.readline().strip() == b"ready"


def main(arguments: Sequence[str]) -> int:
    """Run the guard; return 0 if the run did its duty itself, 3 if the guard did, 4 if nobody could."""
    duty, uri, uuid, name, folder, run_id, deadline_s = arguments
    clock = SystemClock()
    domain = guest_at(uri, uuid, name, clock)
    print("ready", flush=True)  # noqa: T201 -- the run waits for this line on the pipe
    why = _wait_for_run(float(deadline_s))
    if not why:
        return 0
    # Thawed first: the journal may be what the run died of.
    done = _thaw(domain, clock) if duty == "thaw" else _resume(domain, Path(folder), clock)
    with contextlib.suppress(StillframeError):
        words = "did" if done else "had not to, or could not,"
        Journal(Path(folder), clock).remark(run_id, f"the guard {words} {duty} the guest: {why}")
    return 3 if done else 4


def _resume(domain: Guest, folder: Path, clock: Clock) -> bool:
    """Resume the guest as soon as that is safe and nobody else works on it; give up after an hour."""
    deadline = Deadline(clock, PERSISTENCE_S)
    while not deadline.passed():
        # libvirtd may be away, a call of the dead run may still hold libvirt's lock on the domain.
        with contextlib.suppress(StillframeError):
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
                if resumed:
                    return True
        clock.pause(1.0)
    return False


def _thaw(domain: Guest, clock: Clock) -> bool:
    deadline = Deadline(clock, PERSISTENCE_S)
    while not deadline.passed():
        # libvirtd may be down as well: an hour is longer than any restart.
        with contextlib.suppress(StillframeError):
            if thaw_until_verified(domain, clock, deadline.remaining_s(), _ANSWER_S):
                return True
        clock.pause(1.0)
    return False


def _wait_for_run(deadline_s: float) -> str:
    """Return why the guard must act, "" when the run says that it need not."""
    ready, _, _ = select.select([sys.stdin], [], [], deadline_s)
    if not ready:
        return f"the run did not do it within {deadline_s:.0f} s"
    return "" if sys.stdin.readline().strip() == "done" else "the run died"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
