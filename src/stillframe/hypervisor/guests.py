"""From an address to a guest: the one place that knows which adapter serves which address."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillframe.clock import Clock
from stillframe.hypervisor.advice import BARE, is_bare
from stillframe.hypervisor.bare import BareGuest
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import Domain
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.qmp import QmpLink

#: Gives the other guests of the host; it may fail to find any.
Neighbours = Callable[[], Sequence[Guest]]


def guest_at(
    uri: str, uuid: str, name: str, clock: Clock, *, connect: Callable[[str], Connection] | None = None,
    neighbours: Neighbours = tuple,
) -> Guest:
    """Return the guest *uuid* that was reached at *uri*, whether it still runs or not.

    libvirt is connected to at once, by *connect* if that is given; a QEMU when it is first asked, since its
    monitor serves one client at a time. *neighbours* are those of a guest that libvirt does not know.
    """
    if is_bare(uri):
        return BareGuest(QmpLink(uri.removeprefix(BARE), clock), uuid, name, neighbours)
    return Domain(Connection(uri, clock) if connect is None else connect(uri), uuid, name)
