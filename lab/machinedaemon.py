"""A daemon on a machine of its own (a mount namespace), with that machine's settings and accounts."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Self

from lab.ports import free_ports, listens
from lab.waiting import PATIENCE_S, wait_for


class MachineDaemon:
    """A daemon at `port` that the shell starts there with the line `start`; gone after the block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        return self

    @property
    def start(self) -> str:
        """The line. The daemon listens soon after it, or when it returns."""
        raise NotImplementedError

    @property
    def pid_file(self) -> Path:
        """Where the daemon writes its PID."""
        return self.folder / "pid"

    def __exit__(self, *_: object) -> None:
        if self.pid_file.exists():
            os.kill(int(self.pid_file.read_text()), signal.SIGTERM)
            wait_for("the daemon is gone", lambda: not listens(self.port), PATIENCE_S)
