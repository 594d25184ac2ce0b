"""A second QMP monitor of a lab guest, which works without libvirtd and beside its jobs.

libvirt takes one command at a time per domain and none while it makes a snapshot; a guest
that writes all the time must not wait for that, and must go on when libvirtd is dead.
"""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any, TextIO

from lab.enter import SOCKETS_DIR
from lab.waiting import PATIENCE_S, wait_for


class MonitorFailed(AssertionError):
    """QEMU refused a command or did not answer."""


class SideMonitor:
    """Commands for one domain's QEMU, each over a connection of its own."""

    def __init__(self, name: str) -> None:
        self.path: Path = SOCKETS_DIR / f"{name}.qmp"

    def commandline_xml(self) -> str:
        """Return the element that gives a domain this monitor (namespace prefix ``qemu``)."""
        return (f"<qemu:commandline><qemu:arg value='-qmp'/>"
                f"<qemu:arg value='unix:{self.path},server=on,wait=off'/></qemu:commandline>")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command and return what it returns. Raises MonitorFailed."""
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        try:
            with wait_for(f"monitor {self.path}", self._connect, PATIENCE_S) as stream:
                return _exchange(stream, request)
        except OSError as error:
            raise MonitorFailed(f"{command}: {error!r}") from error

    def _connect(self) -> TextIO | None:
        # QEMU serves one client at a time; a connection made while it lets the last one go may be
        # reset before the greeting. No command was sent yet, so that is simply tried again.
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(PATIENCE_S)
            link.connect(str(self.path))
            stream = link.makefile("rw", encoding="utf-8")
        try:
            if stream.readline():
                _exchange(stream, {"execute": "qmp_capabilities"})
                return stream
        except (ConnectionResetError, BrokenPipeError):
            pass
        with contextlib.suppress(OSError):
            stream.close()
        return None

    def human(self, line: str) -> str:
        """Run a line of the human monitor and return what it printed. Raises MonitorFailed."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))


def _exchange(stream: TextIO, request: dict[str, object]) -> Any:
    stream.write(json.dumps(request) + "\n")
    stream.flush()
    while line := stream.readline():
        answer = json.loads(line)
        if "error" in answer:
            raise MonitorFailed(f"{request}: {answer['error']}")
        if "return" in answer:
            return answer["return"]
    raise MonitorFailed(f"{request}: the monitor was closed")
