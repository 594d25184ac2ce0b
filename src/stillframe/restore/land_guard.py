"""The guard of a landing's switch: if the run can't, it ends the switch and lets the guest go on.

    python -m stillframe.restore.land_guard STATE_FOLDER UUID

Which image the guest is on then does not matter: overlay and copy hold the same while it stands still.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stillframe.capture.guard import persist, stand_by, start_guard
from stillframe.capture.lock import domain_lock
from stillframe.clock import SystemClock
from stillframe.errors import GuestState, LandFailed, NeedsAttention
from stillframe.hypervisor.connection import Connection
from stillframe.repository.opened import Repository
from stillframe.restore.boot_record import BootRecord, BootState, BootStore
from stillframe.restore.boot_steps import BootTools, BootWay

#: A run that hangs holds the guest's lock, against which a guard can do nothing.
_DEADLINE_S = 86400.0
_LOCK_S = 3.0


@contextlib.contextmanager
def switch_guarded(record: BootRecord, tools: BootTools) -> Iterator[None]:
    """Have a switch guarded within the block. When that ends in an error, the guard looks after the guest.

    Raises LandFailed when the guard does not start; nothing is switched then.
    """
    guard = start_guard(__name__, [str(tools.store.state_folder), record.uuid], tools.clock)
    if guard is None:
        raise LandFailed(
            f"The process that guards the switch of {record.name} did not start; it was not switched over.",
            f"stillframe land {record.name}   # goes on where it stopped", GuestState.OVERLAID)
    try:
        yield
        guard.dismiss()
    finally:
        guard.leave()


def main(arguments: Sequence[str]) -> int:
    """Run the guard; return 0 if the run did it itself, 3 if the guard did, 4 if nobody could."""
    store, uuid = BootStore(Path(arguments[0])), arguments[1]
    clock = SystemClock()
    record = store.get(uuid)
    tools = BootTools(store, Connection(record.uri, clock), clock, _never_opened)
    why = stand_by(_DEADLINE_S)
    if not why:
        return 0
    return 3 if persist(clock, lambda _: _end_switch(record, tools, why)) else 4


def _end_switch(record: BootRecord, tools: BootTools, why: str) -> bool:
    """Take the steps that are left of a switch; return whether there was one."""
    with domain_lock(tools.store.state_folder, record.uuid, record.name, "guard", tools.clock, _LOCK_S):
        way = BootWay(tools.store.current(record), tools)
        if way.is_over() or way.known.state is not BootState.SWITCHING:
            return False
        way.end_switch()
        if not way.is_over():
            way.record = tools.store.note(way.known, detail=f"the guard ended the switch: {why}")
        return True


def _never_opened(address: str) -> Repository:
    raise NeedsAttention(f"{address} is not opened by a guard.", "stillframe recover", GuestState.STOPPED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
