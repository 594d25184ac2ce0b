"""A guest that is never defined: it runs for as long as the connection that started it, at the longest.

libvirt ends it when the connection breaks (autodestroy), so it can't outlive a tool that is killed. After a
restart, libvirt may have ended it, or may not know any more that it should (`TransientGuest.is_cut_off`).
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import libvirt

from stillframe.errors import ConnectionLost, GuestUnknown, HypervisorError
from stillframe.hypervisor import monitor
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import Domain
from stillframe.hypervisor.model import Power
from stillframe.units import MIB

T = TypeVar("T")

_OUTPUT_LIMIT_BYTES = 64 * 1024
_PICTURE_LIMIT_BYTES = 64 * MIB
_AGENT_TIMEOUT_S = 5
_WINDOWS = "mswindows"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command in the guest ended, and the end of what it printed."""

    exit_code: int
    output: str


class TransientGuest:
    """The guest *uuid*, started or not."""

    def __init__(self, connection: Connection, uuid: str, name: str) -> None:
        self.name = name
        self._connection = connection
        self._domain = Domain(connection, uuid, name)
        self._uuid = uuid
        self._connections = 0

    def start(self, text: str) -> None:
        """Start it, for as long as the connection lasts. Raises HypervisorError."""
        self._connections = self._connection.count()
        self._connection.act(lambda connect: connect.createXML(text, libvirt.VIR_DOMAIN_START_AUTODESTROY))

    def is_cut_off(self) -> bool:
        """Return whether the connection that it belongs to is not the one that there is now."""
        return self._connection.count() != self._connections

    def power(self) -> Power:
        """Return whether it runs."""
        return self._domain.power()

    def end(self) -> bool:
        """End it if it is there; return whether it was. Raises HypervisorError."""
        try:
            self._act(lambda domain: domain.destroy())
        except ConnectionLost:
            self._connection.ensure()
            return self.end()
        except GuestUnknown:
            return False
        except HypervisorError as error:
            if error.libvirt_code == libvirt.VIR_ERR_OPERATION_INVALID:  # it ended just now
                return False
            raise
        return True

    def agent_answers(self) -> bool:
        """Return whether its agent answers."""
        return self._domain.agent_answers(_AGENT_TIMEOUT_S)

    def begin(self, command: str) -> int:
        """Have the guest's shell begin a command; return its number. Raises HypervisorError."""
        words = ["cmd.exe", "/c"] if self._is_windows() else ["/bin/sh", "-c"]
        arguments = {"path": words[0], "arg": [words[1], command], "capture-output": True}
        return int(self._ask("guest-exec", arguments)["pid"])

    def ended(self, number: int) -> Ended | None:
        """Return how a command ended that was begun, None while it runs. Raises HypervisorError."""
        found = self._ask("guest-exec-status", {"pid": number})
        if not found["exited"]:
            return None
        printed = b"".join(base64.b64decode(found.get(each, "")) for each in ("out-data", "err-data"))
        # Killed by a signal: as a shell says it.
        code = int(found["exitcode"]) if "exitcode" in found else 128 + int(found.get("signal", 0))
        return Ended(code, printed[-_OUTPUT_LIMIT_BYTES:].decode(errors="replace"))

    def screenshot(self) -> tuple[str, bytes]:
        """Return its screen's (MIME type, picture). Raises HypervisorError."""
        picture = bytearray()

        def take(connect: libvirt.virConnect) -> str:
            stream = connect.newStream()
            kind = str(connect.lookupByUUIDString(self._uuid).screenshot(stream, 0))
            stream.recvAll(partial(_take, picture), None)
            stream.finish()
            return kind

        return self._connection.act(take), bytes(picture)

    def _is_windows(self) -> bool:
        with contextlib.suppress(HypervisorError):  # an agent older than the question is none of Windows
            return str(self._ask("guest-get-osinfo", {}).get("id", "")) == _WINDOWS
        return False

    def _ask(self, command: str, arguments: dict[str, object]) -> Any:
        return self._act(lambda domain: monitor.agent_command(domain, command, _AGENT_TIMEOUT_S, arguments))

    def _act(self, step: Callable[[Any], T]) -> T:
        return self._connection.act(lambda connect: step(connect.lookupByUUIDString(self._uuid)))


def _take(picture: bytearray, _stream: object, data: bytes, _opaque: object) -> int:
    if len(picture) + len(data) > _PICTURE_LIMIT_BYTES:
        return -1  # libvirt ends the transfer, and says so
    picture += data
    return len(data)
