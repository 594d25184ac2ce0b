"""A real SFTP server on loopback: OpenSSH's sshd with its own keys, which only the lab's key opens.

with SftpDaemon(folder) as server:
storage = FileStorage(sftp.SftpServer(server.place("a/folder")), make=True)
"""

from __future__ import annotations

import getpass
import subprocess
from pathlib import Path
from typing import Self
from urllib.parse import urlencode

from lab.ports import free_ports
from lab.server import Server
from stillframe.storage.sftp import SftpPlace

_SETTINGS = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile {folder}/pid
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
MaxStartups 64:30:128
MaxSessions 64
Subsystem sftp internal-sftp{options}
"""


class SftpDaemon(Server):
    """Runs within the block. Files lie below `root`. *refused* is a request that nobody may make there."""

    def __init__(self, folder: Path, refused: str = "") -> None:
        super().__init__(folder)
        self.root = folder / "root"
        self._options = f" -P {refused}" if refused else ""

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        for name in ("host", "user"):
            self._make_key(name)
        (self.port,) = free_ports(1)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        settings = self._folder / "sshd_config"
        settings.write_text(_SETTINGS.format(port=self.port, folder=self._folder, options=self._options))
        self.trust(self._folder / "host.pub")
        self._start(["/usr/sbin/sshd", "-D", "-e", "-f", str(settings)])
        return self

    def trust(self, public_key: Path) -> None:
        """Write down that this is the host's key."""
        kind, key, *_ = public_key.read_text().split()
        (self._folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def known_hosts_for(self, port: int) -> Path:
        """Return a file that says that this host's key is known at another *port* of it, too."""
        kind, key, *_ = (self._folder / "host.pub").read_text().split()
        path = self._folder / f"known_hosts-{port}"
        path.write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
        return path

    def other_key(self) -> Path:
        """Return a public key that is not the host's."""
        self._make_key("other")
        return self._folder / "other.pub"

    def place(self, path: str) -> SftpPlace:
        """Return the place of a folder below the root."""
        return SftpPlace(
            host="127.0.0.1", port=self.port, user=getpass.getuser(), path=f"{self.root}/{path}",
            identity=str(self._folder / "user"), known_hosts=str(self._folder / "known_hosts"))

    def url(self, folder: str) -> str:
        """See Server."""
        place = self.place(folder)
        query = urlencode({"identity": place.identity, "known_hosts": place.known_hosts})
        return f"sftp://{place.user}@{place.host}:{place.port}{place.path}?{query}"

    def _make_key(self, name: str) -> None:
        path = self._folder / name
        if not path.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
