"""The connection to libvirt: it may break at any moment, and is made again.

Two kinds of call pass through here. A *look* changes nothing, so it is repeated after
a reconnect. An *act* is made once: when the connection breaks during it, it may or may
not have been carried out, and ConnectionLost tells the caller to look again.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import libvirt

from stillframe.clock import Clock, Deadline
from stillframe.errors import ConnectionLost, GuestUnknown, HypervisorError, NoHypervisor, NotPermitted

T = TypeVar("T")

_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 6
_RECONNECT_PAUSE_S = 0.2

_BROKEN = frozenset({
    libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_SYSTEM_ERROR,
    libvirt.VIR_ERR_INVALID_CONN,
})


class Connection:
    """A connection to one libvirt daemon, reconnected when it is lost.

    Events only wake up who waits in wait_change; what happened is always asked for anew,
    because an event can be missed and a reconnect loses all that came before it.
    """

    def __init__(self, uri: str, clock: Clock, reconnect_timeout_s: float = 60.0) -> None:
        self.uri = uri
        self.clock = clock
        self._reconnect_timeout_s = reconnect_timeout_s
        self._changed = threading.Event()
        self._starts: Counter[str] = Counter()
        self._opened = 0
        self._lock = threading.RLock()
        _run_event_loop()
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        self._connect = self._open()

    def look(self, question: Callable[[libvirt.virConnect], T]) -> T:
        """Return what *question* finds; after a lost connection it is asked again.

        Raises HypervisorError, or NoHypervisor when libvirt stays away for the whole
        reconnect time.
        """
        deadline = Deadline(self.clock, self._reconnect_timeout_s)
        while True:
            try:
                return self.act(question)
            except ConnectionLost:
                self._reconnect(deadline)

    def versions(self) -> tuple[str, str]:
        """Return libvirt's and QEMU's versions, as people write them. Raises HypervisorError."""
        libvirt_number = self.look(lambda connect: int(connect.getLibVersion()))
        qemu_number = self.look(lambda connect: int(connect.getVersion()))
        return _version(libvirt_number), _version(qemu_number)

    def qemu_owner(self) -> tuple[int, int] | None:
        """Return the user and the group that libvirt runs QEMU as, None if it does not say."""
        text = self.look(lambda connect: str(connect.getCapabilities()))
        for model in ET.fromstring(text).iterfind("./host/secmodel"):
            if model.findtext("model") == "dac":
                label = model.findtext("baselabel", "")
                user, _, group = label.replace("+", "").partition(":")
                return (int(user), int(group)) if user.isdigit() and group.isdigit() else None
        return None

    def act(self, step: Callable[[libvirt.virConnect], T]) -> T:
        """Return what *step* returns; it is made once.

        Raises HypervisorError when libvirt refused, and ConnectionLost when nobody can
        say whether it was carried out.
        """
        connect = self._connect
        try:
            return step(connect)
        except libvirt.libvirtError as error:
            raise self._translated(connect, error) from error

    def ensure(self) -> None:
        """Make the connection anew if it is broken; raises NoHypervisor after the reconnect time."""
        self.look(lambda connect: connect.getLibVersion())

    def release(self) -> None:
        """Do nothing: libvirt serves many."""

    def try_again(self) -> None:
        """Make the connection anew if libvirt answers now; waits for nothing and raises nothing."""
        with contextlib.suppress(NoHypervisor, NotPermitted), self._lock:
            opened = self._open()
            self.close()
            self._connect = opened

    def wait_change(self, timeout_s: float) -> bool:
        """Return when an event came, at the latest after *timeout_s*; whether one came."""
        changed = self.clock.wait(self._changed, timeout_s)
        self._changed.clear()
        return changed

    def starts(self, uuid: str) -> tuple[int, int]:
        """Return what is another value once the domain was started, or its start may have been missed."""
        return self._opened, self._starts[uuid]

    def count(self) -> int:
        """Return how many times the connection was made by now."""
        return self._opened

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(libvirt.libvirtError):
            self._connect.close()

    def _open(self) -> libvirt.virConnect:
        try:
            connect = libvirt.open(self.uri)
        except libvirt.libvirtError as error:
            denied = error.get_error_code() in (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED)
            # For a system error libvirt gives errno as its first number.
            if denied or error.get_int1() in (errno.EACCES, errno.EPERM):
                raise NotPermitted(
                    f"libvirt at {self.uri} refused the user: {error}",
                    "run stillframe as root, or add the user to the group libvirt",
                ) from error
            raise NoHypervisor(
                f"libvirt at {self.uri} does not answer: {error}", "systemctl status libvirtd",
            ) from error
        with contextlib.suppress(libvirt.libvirtError):  # a driver inside this process has no keepalive
            connect.setKeepAlive(_KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT)
        for event, told in ((libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, self._on_event),
                            (libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD, self._on_event),
                            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle)):
            with contextlib.suppress(libvirt.libvirtError):
                connect.domainEventRegisterAny(None, event, told, None)
        self._opened += 1
        return connect

    def _on_event(self, *_details: object) -> None:
        self._changed.set()

    def _on_lifecycle(
        self, _connect: libvirt.virConnect, domain: libvirt.virDomain, event: int, *_details: object
    ) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
            self._starts[domain.UUIDString()] += 1
        self._changed.set()

    def _reconnect(self, deadline: Deadline) -> None:
        with self._lock:
            self.close()
            while True:
                try:
                    self._connect = self._open()
                    return
                except NoHypervisor:
                    if deadline.passed():
                        raise
                    self.clock.pause(_RECONNECT_PAUSE_S)

    def _translated(
        self, connect: libvirt.virConnect, error: libvirt.libvirtError
    ) -> HypervisorError | GuestUnknown:
        code = error.get_error_code()
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return GuestUnknown(f"libvirt knows no such guest: {error}", "virsh list --all")
        # A daemon that died in mid-call shows as one of several codes, of which some also
        # have other causes: only the connection itself tells.
        if code in _BROKEN or code == libvirt.VIR_ERR_INTERNAL_ERROR:
            try:
                broken = connect.isAlive() != 1
            except libvirt.libvirtError:
                broken = True
            if broken:
                return ConnectionLost(f"The connection to libvirt was lost: {error}", code)
        return HypervisorError(f"libvirt said: {error}", code)


_loop_lock = threading.Lock()
_loop_started = False


def _run_event_loop() -> None:
    # libvirt wants its loop registered before the first connection is opened, once a process.
    global _loop_started  # noqa: PLW0603  # the registration is process-wide in libvirt itself
    with _loop_lock:
        if _loop_started:
            return
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_turn_event_loop, name="libvirt-events", daemon=True).start()
        _loop_started = True


def _turn_event_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
