"""Hosts on one bridge: each with a network, a name, processes and mounts of its own.

    with Network() as network, network.host("alpha") as alpha:
        subprocess.run(alpha.command(["stillframe", "list"]))

No host sees another's processes, so that a repository takes them for different machines. Files and the lab's
libvirtd are shared; whoever listens at `Network.address` is reached by all. In the lab alone, whose network
namespace has no way out.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from lab.daemons import OutsideLab
from lab.enter import inside_lab
from lab.waiting import PATIENCE_S

_BRIDGE = "hosts0"
_PREFIX = "10.77.0"
_SHELL = 'hostname "$1" && ip link set lo up && echo ready && exec sleep infinity'


class Network:
    """A bridge within the block."""

    #: Where this side listens.
    address = f"{_PREFIX}.1"

    def __init__(self) -> None:
        self._hosts = 0

    def __enter__(self) -> Self:
        if not inside_lab():
            raise OutsideLab
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        return self

    def __exit__(self, *_: object) -> None:
        _ip("link", "del", _BRIDGE)

    def host(self, name: str) -> Host:
        """Return one more host, which is there within its block."""
        self._hosts += 1
        return Host(name, self._hosts)


class Host:
    """Namespaces that a sleeping process holds."""

    def __init__(self, name: str, number: int) -> None:
        self._name = name
        self._number = number
        self._pid = 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--",
             "unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
             "--propagation", "private", "--", "sh", "-c", _SHELL, "sh", self._name],
            stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        parent = self._process.pid
        self._pid = int(Path(f"/proc/{parent}/task/{parent}/children").read_text())
        outer = f"host{self._number}"
        _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", str(self._pid))
        _ip("link", "set", outer, "master", _BRIDGE, "up")
        for words in (("addr", "add", f"{_PREFIX}.{self._number + 1}/24", "dev", "eth0"),
                      ("link", "set", "eth0", "up")):
            subprocess.run(self.command(["ip", *words]), check=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=PATIENCE_S)

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command line that runs *words* on this host."""
        return ["nsenter", f"--target={self._pid}", "--mount", "--net", "--uts", "--pid", "--", *words]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
