"""A Ceph of one monitor and one OSD on the lab's loopback, for disks on RBD.

    with Ceph(folder, daemons) as ceph:
        ...   # a guest's disk may be of Kind.RBD or Kind.RBD_QCOW2 now

Its settings and the user's key lie in /etc/ceph, as on any client of Ceph: in the lab, a folder of its own is
mounted there, so that a cluster which the machine itself uses is out of reach. Everybody proves who they are
(cephx): QEMU by a secret that libvirt keeps, qemu-img and qemu-nbd by the user's keyring. That of the
administrator is elsewhere, so that nobody comes by it unasked.
"""

from __future__ import annotations

import base64
import json
import subprocess
import uuid
from pathlib import Path
from typing import Self

from lab.daemons import LibvirtDaemons, OutsideLab
from lab.enter import inside_lab
from lab.images import run
from lab.waiting import PATIENCE_S, wait_for

#: The pool that guests' images are in, and who may use it.
POOL = "rbd"
USER = "libvirt"
MON_HOST, MON_PORT = "127.0.0.1", 6789
#: The secret under which libvirt keeps the user's key.
SECRET_UUID = "6a5ec12c-16b1-4a39-8c1c-3bd4e9f8d1b2"

_SETTINGS_DIR = Path("/etc/ceph")
#: Where the cluster is, for its clients.
SETTINGS = _SETTINGS_DIR / "ceph.conf"
#: What qemu-img and qemu-nbd open images with.
USER_KEYRING = _SETTINGS_DIR / f"ceph.client.{USER}.keyring"
_CAPABILITIES = {
    "mon.": ["mon", "allow *"],
    "client.admin": ["mon", "allow *", "osd", "allow *"],
    "osd.0": ["mon", "allow profile osd", "mgr", "allow profile osd", "osd", "allow *"],
    f"client.{USER}": ["mon", "profile rbd", "osd", f"profile rbd pool={POOL}"],
}
# One copy of everything, and no warnings about that; nothing waits for a manager, which RBD does not need.
_SETTINGS = """\
[global]
fsid = {fsid}
mon host = v1:{host}:{port}
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
run dir = {folder}/run
admin socket = {folder}/run/$name.$pid.asok
log file = {folder}/$name.log
crash dir = {folder}/run
public addr = {host}
cluster addr = {host}
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
mon data avail warn = 2
[client]
admin socket =
log file = /dev/null
[mon.a]
mon data = {folder}/mon
mon addr = {host}:{port}
[osd.0]
osd data = {folder}/osd
bluestore block create = true
bluestore block size = 4294967296
osd memory target = 939524096
"""


class Ceph:
    """The cluster, with its data in *folder*. Raises OutsideLab outside the lab."""

    def __init__(self, folder: Path, daemons: LibvirtDaemons) -> None:
        if not inside_lab():
            raise OutsideLab
        self.folder = folder
        self._keyring = folder / "keyring"
        self._daemons = daemons
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        """Make and start the cluster; return once an image can be made in its pool."""
        settings = self.folder / "etc"
        for part in (settings, self.folder / "run", self.folder / "mon", self.folder / "osd"):
            part.mkdir(parents=True)
        run("mount", "--bind", settings, _SETTINGS_DIR)
        fsid = str(uuid.uuid4())
        SETTINGS.write_text(
            _SETTINGS.format(fsid=fsid, folder=self.folder, host=MON_HOST, port=MON_PORT))
        self._make_keys()
        try:
            self._start_monitor(fsid)
            self._start_osd()
            self._ceph("osd", "pool", "create", POOL, "8", "8")
            run("rbd", "--keyring", self._keyring, "pool", "init", POOL)
            self._tell_libvirt()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the daemons and take the settings away."""
        self._end()

    def _make_keys(self) -> None:
        for name, capabilities in _CAPABILITIES.items():
            keyring = USER_KEYRING if name == f"client.{USER}" else self._keyring
            create = [] if keyring.exists() else ["--create-keyring"]
            pairs = zip(capabilities[::2], capabilities[1::2], strict=True)
            words = [word for pair in pairs for word in ("--cap", *pair)]
            run("ceph-authtool", keyring, *create, "--gen-key", "--name", name, *words)

    def _start_monitor(self, fsid: str) -> None:
        monitors = self.folder / "monmap"
        run("monmaptool", "--create", "--addv", "a", f"v1:{MON_HOST}:{MON_PORT}", "--fsid", fsid, monitors)
        run("ceph-mon", "--id", "a", "--mkfs", "--monmap", monitors, "--keyring", self._keyring)
        self._start("ceph-mon", "a")
        for keyring in (self._keyring, USER_KEYRING):
            self._ceph("auth", "import", "-i", keyring)

    def _start_osd(self) -> None:
        key = {"cephx_secret": run("ceph-authtool", self._keyring, "--name", "osd.0", "--print-key").strip()}
        identity = str(uuid.uuid4())
        secrets = self.folder / "osd.json"
        secrets.write_text(json.dumps(key))
        self._ceph("osd", "new", identity, "0", "-i", secrets)
        run("ceph-osd", "--id", "0", "--mkfs", "--osd-uuid", identity, "--keyring", self._keyring)
        self._start("ceph-osd", "0")
        wait_for("the OSD is up", lambda: json.loads(
            self._ceph("osd", "stat", "--format", "json"))["num_up_osds"] == 1, PATIENCE_S)

    def _ceph(self, *words: str | Path) -> str:
        return run("ceph", "--keyring", self._keyring, *words)

    def _start(self, program: str, name: str) -> None:
        command = [program, "--foreground", "--id", name, "--keyring", str(self._keyring)]
        with (self.folder / f"{program}.log").open("ab") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def _tell_libvirt(self) -> None:
        key = run("ceph-authtool", USER_KEYRING, "--name", f"client.{USER}", "--print-key").strip()
        connection = self._daemons.connect()
        secret = connection.secretDefineXML(
            f"<secret ephemeral='no' private='no'><uuid>{SECRET_UUID}</uuid>"
            f"<usage type='ceph'><name>client.{USER}</name></usage></secret>")
        secret.setValue(base64.b64decode(key))
        connection.close()

    def _end(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(PATIENCE_S)
        self._processes.clear()
        run("umount", _SETTINGS_DIR)
