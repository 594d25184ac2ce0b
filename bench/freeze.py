"""How long the guest is frozen, and how much of that is the one call that puts the overlays on.

    python -m lab.enter -- python -m bench.freeze [RUNS]

A database guest under load is mirrored RUNS times (10 unless given) with --quiesce agent.
Times are the run's own: frozen from the freeze's begin to the thaw's answer; the call from
the journal's history. Printed: medians, and the longest.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from lab.daemons import LibvirtDaemons
from lab.dbguest import DbGuest
from lab.enter import IMAGES_DIR
from stillframe.capture.journal import Journal
from stillframe.capture.limits import Limits
from stillframe.capture.method import Method
from stillframe.capture.plan import Wishes
from stillframe.capture.run import Tools
from stillframe.capture.states import Quiesce, State
from stillframe.capture.stepping import Watcher
from stillframe.clock import SystemClock
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import find_domain
from stillframe.mirror.place import LocalDestination
from stillframe.mirror.run import MirrorJob, mirror_guest
from stillframe.units import MIB, duration_text


def call_s(journal: Journal) -> float:
    """Return how long the last run's snapshot call took, from its journal."""
    history = journal.history(journal.last_runs(1)[0].id)
    times = [datetime.fromisoformat(step.at) for step in history if step.state == State.SNAPSHOT.value]
    return (times[-1] - times[0]).total_seconds()


def measure(guest: DbGuest, folder: Path, runs: int) -> list[tuple[float, float]]:
    """Mirror *guest* several times; return (seconds frozen, seconds in the call) of each run."""
    clock = SystemClock()
    journal = Journal(folder / "state", clock)
    tools = Tools(journal, clock, Watcher(say=lambda _: None, commit=lambda _: None))
    wishes = Wishes(Quiesce.AGENT, method=Method.OVERLAY, limits=Limits(min_free_bytes=64 * MIB))
    domain = find_domain(Connection("qemu:///system", clock), guest.name)
    destination = folder / "mirrors"
    destination.mkdir()
    measured = []
    for _ in range(runs):
        guest.wait_more_rows(20)
        job = MirrorJob(domain, LocalDestination(destination), wishes, False, lambda: None, lambda _: None)
        measured.append((mirror_guest(job, tools).frozen_s, call_s(journal)))
    return measured


def main() -> int:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    daemons = LibvirtDaemons()
    daemons.start()
    guest = DbGuest(daemons, IMAGES_DIR, "freeze-bench", pause_s=0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            guest.define()
            guest.start()
            guest.wait_ready()
            measured = measure(guest, Path(folder), runs)
        finally:
            guest.remove()
    frozen = [each[0] for each in measured]
    calls = [each[1] for each in measured]
    shares = [call / whole for whole, call in measured]
    print(f"{runs} runs under TCG, database guest under load")
    print(f"frozen: median {duration_text(statistics.median(frozen))}, longest {duration_text(max(frozen))}")
    print(f"of which putting the overlay on: median {duration_text(statistics.median(calls))}, "
          f"{statistics.median(shares):.0%} of the time frozen")
    return 0


if __name__ == "__main__":
    sys.exit(main())
