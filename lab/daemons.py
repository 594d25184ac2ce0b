"""libvirtd and virtlogd inside the lab, and the QEMU processes they start."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import libvirt

from lab.enter import inside_lab
from lab.waiting import PATIENCE_S, wait_for

URI = "qemu:///system"
#: Flags for undefineFlags that leave nothing of a domain behind.
UNDEFINE_WHOLLY = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)

# libvirt prints every error to standard error besides raising it; polling would flood the test's output.
libvirt.registerErrorHandler(lambda _context, _error: None, None)

_LIBVIRTD_PID = Path("/run/libvirtd.pid")
_VIRTLOGD_PID = Path("/run/virtlogd.pid")
_QEMU_NAME = re.compile(r"^guest=([^,\n]+)", re.MULTILINE)
# Where libvirt keeps what it knows about domains, from the root folder.
_DOMAIN_STATE = ("etc/libvirt/qemu/*.xml", "run/libvirt/qemu/*.xml", "run/libvirt/qemu/*.pid",
                 "var/lib/libvirt/qemu/snapshot/*/*.xml", "var/lib/libvirt/qemu/checkpoint/*/*.xml",
                 "var/lib/libvirt/qemu/save/*")
_QEMU_RUN_DIR = Path("/run/libvirt/qemu")
# The first start probes what QEMU can do; that alone takes seconds.
_START_TIMEOUT_S = 180.0


class OutsideLab(RuntimeError):
    """Daemons are only started, and processes only killed, inside the lab."""

    def __init__(self) -> None:
        super().__init__("not inside the lab: run it with `python -m lab.enter -- COMMAND` (or `make test`)")


class LibvirtDaemons:
    """The lab's own libvirtd and virtlogd. Every method raises OutsideLab outside the lab."""

    def __init__(self) -> None:
        if not inside_lab():
            raise OutsideLab

    def start(self) -> None:
        """Start what does not run yet, continue what was paused; return once libvirtd answers."""
        for program, pid_file in (("virtlogd", _VIRTLOGD_PID), ("libvirtd", _LIBVIRTD_PID)):
            if _alive(pid := _read_pid(pid_file)):
                self.continue_process(pid)
            else:
                subprocess.run([program, "--daemon"], check=True, timeout=_START_TIMEOUT_S)
        wait_for("libvirtd answers", _answers, _START_TIMEOUT_S)

    def stop(self) -> None:
        """End libvirtd in an orderly way (SIGTERM); guests stay as they are."""
        _end(_read_pid(_LIBVIRTD_PID), signal.SIGTERM)

    def kill_libvirtd(self) -> None:
        """Kill libvirtd with SIGKILL, as a crash would; guests stay as they are."""
        _end(_read_pid(_LIBVIRTD_PID), signal.SIGKILL)

    def restart_libvirtd(self) -> None:
        """End libvirtd in an orderly way and start it again."""
        self.stop()
        self.start()

    def terminate(self) -> None:
        """Kill all guests, then end both daemons."""
        for pid in _qemu_processes():
            _end(pid, signal.SIGKILL)
        self.stop()
        _end(_read_pid(_VIRTLOGD_PID), signal.SIGTERM)

    def remove_all_domains(self) -> None:
        """Kill every QEMU and undefine every domain, with all metadata."""
        for pid in _qemu_processes():
            _end(pid, signal.SIGKILL)
        connection = self.connect()
        for domain in connection.listAllDomains():
            with contextlib.suppress(libvirt.libvirtError):
                domain.destroy()
            with contextlib.suppress(libvirt.libvirtError):
                domain.undefineFlags(UNDEFINE_WHOLLY)
        left = connection.numOfDomains() + connection.numOfDefinedDomains()
        connection.close()
        if left:
            # A libvirtd that a test wedged on purpose takes no call for these domains any more.
            self.kill_libvirtd()
            for pattern in _DOMAIN_STATE:
                for path in Path("/").glob(pattern):
                    path.unlink()
            self.start()

    def alive(self) -> bool:
        """Return whether libvirtd's process exists."""
        return _alive(self.libvirtd_pid())

    def libvirtd_pid(self) -> int:
        """Return libvirtd's process number, 0 when there is none."""
        return _read_pid(_LIBVIRTD_PID)

    def connect(self) -> libvirt.virConnect:
        """Return a new connection to the lab's libvirtd."""
        return libvirt.open(URI)

    def qemu_pid(self, name: str) -> int:
        """Return the process number of domain *name*'s QEMU, 0 when there is none."""
        pid = _read_pid(_QEMU_RUN_DIR / f"{name}.pid")
        if _alive(pid):
            return pid
        # libvirt drops the pid file of a domain that it wrongly believes to be off.
        return next((pid for pid, guest in _qemu_processes().items() if guest == name), 0)

    def kill_qemu(self, name: str) -> None:
        """Kill domain *name*'s QEMU with SIGKILL; return once the process is gone."""
        _end(self.qemu_pid(name), signal.SIGKILL)

    def pause_process(self, pid: int) -> None:
        """Stop process *pid* where it is (SIGSTOP): a QEMU or libvirtd that hangs."""
        os.kill(pid, signal.SIGSTOP)

    def continue_process(self, pid: int) -> None:
        """Let process *pid* go on (SIGCONT)."""
        os.kill(pid, signal.SIGCONT)


def _answers() -> bool:
    try:
        connection = libvirt.open(URI)
    except libvirt.libvirtError:
        return False
    connection.close()
    return True


def _qemu_processes() -> dict[int, str]:
    """Return the pid of every QEMU that libvirt started in this PID namespace, and its domain's name."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "qemu-system" in arguments[0] and (named := _QEMU_NAME.search("\n".join(arguments))):
                found[int(folder.name)] = named[1]
    return {pid: name for pid, name in found.items() if _alive(pid)}


def _read_pid(pid_file: Path) -> int:
    try:
        return int(pid_file.read_text())
    except (OSError, ValueError):
        return 0


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    if state not in "ZX":
        return True
    # Killed, but as long as another of its threads is not gone the process holds its files and locks.
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    return False


def _end(pid: int, number: signal.Signals) -> None:
    if not _alive(pid):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    wait_for(f"process {pid} is gone", lambda: not _alive(pid), PATIENCE_S)
