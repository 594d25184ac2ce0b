"""Samba's smbd on a machine of its own (a mount namespace), with that machine's settings and accounts."""

from __future__ import annotations

from pathlib import Path

from lab.machinedaemon import MachineDaemon


class MachineSmbd(MachineDaemon):
    """See MachineDaemon."""

    @property
    def start(self) -> str:
        """See MachineDaemon."""
        Path("/run/samba").mkdir(exist_ok=True)
        settings = {
            "smb ports": self.port, "interfaces": "127.0.0.1/8", "bind interfaces only": "yes",
            "disable netbios": "yes", "pid directory": self.folder, "log file": self.folder / "output",
            "lock directory": self.folder, "ncalrpc dir": self.folder / "ncalrpc", "load printers": "no",
            "printcap name": "/dev/null", "rpc start on demand helpers": "no"}
        options = " ".join(f"--option='{name} = {value}'" for name, value in settings.items())
        return f"/usr/sbin/smbd --daemon {options}"

    @property
    def pid_file(self) -> Path:
        """See MachineDaemon."""
        return self.folder / "smbd.pid"
