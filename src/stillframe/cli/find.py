"""From what a person types to a guest: a name or UUID that libvirt knows, or qmp:SOCKET."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stillframe.capture.journal import RunRecord
from stillframe.cli.session import Session
from stillframe.errors import GuestUnknown, NoHypervisor, NotPermitted
from stillframe.hypervisor.advice import BARE, is_bare
from stillframe.hypervisor.bare import find_bare
from stillframe.hypervisor.domain import all_domains, find_domain
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.guests import guest_at
from stillframe.hypervisor.qmp import QmpLink

_RECENT_RUNS = 100


def find_guest(session: Session, name: str) -> Guest:
    """Return the guest that *name* names.

    One whose run is open is not asked who it is: its QEMU may be gone, or its monitor be held by that very
    run. A guest without libvirt goes by its name, too, once a run of it is in the journal.
    Raises GuestUnknown, NoHypervisor, MonitorBusy, NotPermitted.
    """
    if is_bare(name):
        path = os.path.abspath(name.removeprefix(BARE))
        known = [run for run in session.journal.open_runs() if run.uri == BARE + path]
        if known:
            return guest_of(session, known[0])
        return find_bare(QmpLink(path, session.clock), lambda: _neighbours(session))
    try:
        return find_domain(session.connection, name)
    except (GuestUnknown, NoHypervisor):
        runs = [*session.journal.open_runs(), *session.journal.last_runs(_RECENT_RUNS)]
        for run in runs:
            if is_bare(run.uri) and name in (run.name, run.uuid):
                return guest_of(session, run)
        raise


def guest_of(session: Session, run: RunRecord) -> Guest:
    """Return the guest of a run, even if nobody knows it any more."""
    return guest_at(run.uri, run.uuid, run.name, session.clock, connect=lambda _uri: session.connection,
                    neighbours=lambda: _neighbours(session))


def _neighbours(session: Session) -> Sequence[Guest]:
    """Return libvirt's domains, none on a host without it."""
    try:
        return all_domains(session.connection)
    except (NoHypervisor, NotPermitted):
        return ()
