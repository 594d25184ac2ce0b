"""OpenSSH's sshd on a machine of its own (a mount namespace), with that machine's settings and accounts."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Self

from lab.ports import free_ports, listens
from lab.waiting import PATIENCE_S, wait_for


class MachineSshd:
    """A daemon at `port` that the shell starts there with the line `start`; gone after the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (self.port,) = free_ports(1)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._folder / "host"], check=True)
        return self

    @property
    def start(self) -> str:
        """The line. It returns when the daemon listens."""
        return (f"/usr/sbin/sshd -E {self._folder}/output -h {self._folder}/host -p {self.port} "
                f"-o ListenAddress=127.0.0.1 -o UsePAM=no -o PidFile={self._folder}/pid")

    def __exit__(self, *_: object) -> None:
        pid = self._folder / "pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGTERM)
            wait_for("sshd is gone", lambda: not listens(self.port), PATIENCE_S)
