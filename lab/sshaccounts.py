"""OpenSSH's sshd on a machine of its own (a mount namespace), with that machine's settings and accounts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Self

from lab.machinedaemon import MachineDaemon


class MachineSshd(MachineDaemon):
    """See MachineDaemon."""

    def __enter__(self) -> Self:
        super().__enter__()
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "host"], check=True)
        return self

    @property
    def start(self) -> str:
        """See MachineDaemon. It returns when the daemon listens."""
        return (f"/usr/sbin/sshd -E {self.folder}/output -h {self.folder}/host -p {self.port} "
                f"-o ListenAddress=127.0.0.1 -o UsePAM=no -o PidFile={self.pid_file}")
