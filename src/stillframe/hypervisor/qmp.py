"""QMP over a QEMU's own unix socket, for guests that no libvirt runs.

Commands are lines of JSON, one at a time, each with an `id` that its answer repeats; what else QEMU says
(events, the answer to a command that was given up) is passed over. QEMU serves one client of a monitor at a
time: the next one's connection is taken, but it hears nothing until the first has gone. So the connection
is made when it is first needed, and a greeting that does not come says that somebody else holds the monitor.

Written here, and not by the library qemu.qmp: that is asyncio, and its synchronous face serves one thread and
waits for a greeting without a limit. The thread and the limits around it would be longer than this.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillframe.clock import Clock, Deadline
from stillframe.errors import ConnectionLost, GuestUnknown, HypervisorError, MonitorBusy, NotPermitted
from stillframe.hypervisor.advice import BARE, advice_for

_GREETING_S = 3.0
_ANSWER_S = 60.0
#: A block graph of hundreds of nodes takes a few MiB.
_ANSWER_LIMIT_BYTES = 64 * 1024 * 1024
_READ_BYTES = 1 << 16
_SOCKETS = Path("/proc/net/unix")
_CREDENTIALS = struct.Struct("3i")


class QmpLink:
    """A connection to one monitor, made anew when it is lost. May be used from several threads."""

    def __init__(self, path: str, clock: Clock, answer_s: float = _ANSWER_S) -> None:
        self.path = path
        self.clock = clock
        self._answer_s = answer_s
        self._lock = threading.RLock()
        self._socket: socket.socket | None = None
        self._heard = bytearray()
        self._number = 0
        #: How often it was connected: after each time another QEMU may be behind the socket.
        self.opened = 0
        #: The process that listens, 0 if it can't be seen from here.
        self.pid = 0

    @property
    def uri(self) -> str:
        """The address that the guest is named by."""
        return BARE + self.path

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run one command and return what is under "return".

        Raises HypervisorError for what QEMU refuses, ConnectionLost if nobody can say whether it was carried
        out; MonitorBusy, NotPermitted, GuestUnknown if QEMU can't be reached: nothing was asked then.
        """
        with self._lock:
            self._open()
            return self._ask(command, arguments or {})

    def ensure_open(self) -> None:
        """Connect if there is no connection; `opened` counts how often. Raises as execute() does."""
        with self._lock:
            self._open()

    def ensure(self) -> None:
        """Make the connection anew if it is broken. Where that fails, the next look tells why."""
        with self._lock, contextlib.suppress(GuestUnknown, HypervisorError, MonitorBusy):
            self._open()

    def wait_change(self, timeout_s: float) -> bool:
        """Return after *timeout_s*: QEMU's events are not listened to, what happened is always asked for."""
        self.clock.pause(timeout_s)
        return False

    def versions(self) -> tuple[str, str]:
        """Return no version of libvirt's, and QEMU's."""
        found = self.execute("query-version")["qemu"]
        return "", f"{found['major']}.{found['minor']}.{found['micro']}"

    def release(self) -> None:
        """End the connection, so that others have the monitor; it is made again when something is asked."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None
            self._heard.clear()

    # --- one command --------------------------------------------------------------------------

    def _ask(self, command: str, arguments: Mapping[str, Any]) -> Any:
        self._number += 1
        request = {"execute": command, "arguments": arguments, "id": self._number}
        try:
            self._send(json.dumps(request).encode() + b"\n")
            answer = self._answer(self._number, Deadline(self.clock, self._answer_s))
        except (OSError, ValueError) as error:
            self.release()
            raise ConnectionLost(f"The connection to QEMU was lost in {command}: {error}", 0) from error
        if "error" in answer:
            raise HypervisorError(f"QEMU said: {answer['error'].get('desc', answer['error'])}", 0)
        return answer["return"]

    def _send(self, line: bytes) -> None:
        assert self._socket is not None
        self._socket.settimeout(self._answer_s)
        self._socket.sendall(line)

    def _answer(self, number: int, deadline: Deadline) -> dict[str, Any]:
        while True:
            message = self._message(deadline)
            if message.get("id") == number and ("return" in message or "error" in message):
                return message

    def _message(self, deadline: Deadline) -> dict[str, Any]:
        """Return the next message. Raises OSError if none came in time or the monitor ended, ValueError."""
        assert self._socket is not None
        looked = 0
        while (end := self._heard.find(b"\n", looked)) < 0:
            looked = len(self._heard)
            if looked > _ANSWER_LIMIT_BYTES:
                raise OSError(f"QEMU's answer is longer than {_ANSWER_LIMIT_BYTES} bytes")
            ready, _, _ = select.select([self._socket], [], [], deadline.remaining_s())
            if not ready:
                raise TimeoutError(f"QEMU did not answer within {deadline.timeout_s:.0f} s")
            heard = self._socket.recv(_READ_BYTES)
            if not heard:
                raise OSError("QEMU closed its monitor")
            self._heard += heard
        line = bytes(self._heard[:end])
        del self._heard[: end + 1]
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"QEMU said {line[:80]!r}")  # noqa: TRY004 -- what came is wrong, not our code
        return found

    # --- connecting ---------------------------------------------------------------------------

    def _open(self) -> None:
        if self._socket is not None:
            return
        self._socket = self._connected()
        try:
            if "QMP" not in self._message(Deadline(self.clock, _GREETING_S)):
                raise ValueError("it does not greet as QMP does")
            self._ask("qmp_capabilities", {})
        except TimeoutError as error:
            self.release()
            raise MonitorBusy(
                f"QEMU took the connection at {self.path} but does not greet: another client holds the "
                "monitor (perhaps another stillframe), or QEMU hangs.",
                f"ss -xp | grep {self.path}   # or give stillframe a monitor of its own: start QEMU with "
                "-qmp unix:/run/GUEST-stillframe.sock,server=on,wait=off",
            ) from error
        except (OSError, ValueError) as error:
            self.release()
            raise GuestUnknown(
                f"What listens at {self.path} is no QMP monitor, or just ended: {error}",
                self._advice()) from error
        except ConnectionLost as error:
            raise GuestUnknown(f"QEMU at {self.path} just ended: {error.message}", self._advice()) from error
        self.opened += 1

    def _connected(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(_GREETING_S)
        try:
            link.connect(self.path)
            credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except (PermissionError, TimeoutError, BlockingIOError) as error:
            link.close()
            if not isinstance(error, PermissionError):  # the queue is full of others who want to connect
                raise MonitorBusy(
                    f"QEMU does not take a connection at {self.path}.", self._advice()) from error
            raise NotPermitted(f"The QMP socket {self.path} can't be used: {error.strerror}",
                               "run stillframe as root, or as the user that QEMU runs as") from error
        except OSError as error:
            link.close()
            if still_listens(self.path):
                raise HypervisorError(
                    f"QEMU listens at {self.path}, but can't be reached there: {error.strerror}", 0,
                ) from error
            raise GuestUnknown(
                f"No QEMU listens at {self.path}: {error.strerror}", self._advice()) from error
        self.pid = _CREDENTIALS.unpack(credentials)[0]
        return link

    def _advice(self) -> str:
        return advice_for(self.uri, "").guests


def still_listens(path: str) -> bool:
    """Return whether a process of this host listens on a unix socket that was bound at *path*.

    The kernel remembers that even when the file is gone: without it nobody gets in, but QEMU runs.
    """
    try:
        lines = _SOCKETS.read_text(errors="replace").splitlines()[1:]
    except OSError:
        return False
    names = {path, os.path.realpath(path)}
    return any(len(words) == 8 and words[7] in names for words in (line.split(maxsplit=7) for line in lines))
