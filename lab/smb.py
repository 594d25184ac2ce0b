"""A real SMB server on loopback: Samba's smbd with its own settings, users and share.

with SmbDaemon(folder) as server:
storage = FileStorage(SmbServer(server.place("a/folder"), server.access), make=True)
"""

from __future__ import annotations

import getpass
import subprocess
from pathlib import Path
from typing import Self

from lab.ports import free_ports
from lab.server import Server
from stillframe.storage.access import Access
from stillframe.storage.smb import SmbPlace

SHARE = "backups"
_PASSWORD = "labpass123"
_FOLDERS = ("share", "private", "state", "cache", "lock", "run", "log", "ncalrpc")
_SETTINGS = """\
[global]
 server role = standalone server
 netbios name = LAB
 interfaces = 127.0.0.1/8
 bind interfaces only = yes
 smb ports = {port}
 disable netbios = yes
 server min protocol = SMB2_10
 private dir = {folder}/private
 state directory = {folder}/state
 cache directory = {folder}/cache
 lock directory = {folder}/lock
 pid directory = {folder}/run
 ncalrpc dir = {folder}/ncalrpc
 log file = {folder}/log/log
 passdb backend = tdbsam:{folder}/private/passdb.tdb
 map to guest = never
 load printers = no
 printcap name = /dev/null
 rpc start on demand helpers = no
[{share}]
 path = {folder}/share
 writeable = yes
 strict sync = yes
"""


class SmbDaemon(Server):
    """Runs within the block."""

    def __enter__(self) -> Self:
        for name in _FOLDERS:
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self.port,) = free_ports(1)
        settings = self._folder / "smb.conf"
        settings.write_text(_SETTINGS.format(port=self.port, folder=self._folder, share=SHARE))
        subprocess.run(
            ["smbpasswd", "-c", settings, "-s", "-a", getpass.getuser()], check=True, capture_output=True,
            input=f"{_PASSWORD}\n{_PASSWORD}\n".encode())
        self._start(["/usr/sbin/smbd", "--foreground", "--no-process-group", f"--configfile={settings}"])
        return self

    @property
    def share(self) -> Path:
        """The folder that is the share."""
        return self._folder / "share"

    @property
    def access(self) -> Access:
        """Who may read and write."""
        return Access(user=getpass.getuser(), secret=_PASSWORD)

    def url(self, folder: str) -> str:
        """See Server."""
        return f"smb://127.0.0.1:{self.port}/{SHARE}/{folder}"

    @property
    def credentials(self) -> str:
        """See Server."""
        return f"username = {getpass.getuser()}\npassword = {_PASSWORD}\n"

    def place(self, folder: str) -> SmbPlace:
        """Return the place of a folder of the share."""
        return SmbPlace(host="127.0.0.1", port=self.port, share=SHARE, folder=folder)
