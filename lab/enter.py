"""Run a command in a private world with room for a whole libvirt.

    python -m lab.enter [--network] -- COMMAND...

COMMAND gets its own mount, network and PID namespaces. In them /run, /etc/libvirt and
libvirt's folders under /var are empty folders inside one temporary folder, so nothing that
happens there can reach the machine's own libvirt; when COMMAND ends, everything it started
(libvirtd, virtlogd, every QEMU) is killed with it and the temporary folder is removed.
With --network it has the machine's network instead of one of its own, so that it reaches other hosts.
Two stages: `_outside` makes the namespaces with unshare(1), `_inside` is process 1 in them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

#: Set to 1 inside the lab.
MARK = "STILLFRAME_LAB"
#: Inside the lab: the namespaces of the outside, so that tests can tell that theirs are others.
OUTSIDE = "STILLFRAME_LAB_OUTSIDE"
#: Where the temporary folder is made, when not in /var/tmp.
PLACE = "STILLFRAME_LAB_FOLDER"
#: Where guests' images belong inside the lab.
IMAGES_DIR = Path("/var/lib/libvirt/images")
#: Where QEMU's user may make sockets inside the lab.
SOCKETS_DIR = Path("/run/stillframe-lab")

_PRIVATE = ("/run", "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt",
            "/var/lib/stillframe", "/etc/stillframe", "/srv", "/etc/systemd/system")
# What libvirt found out about QEMU: probing takes some ten seconds, and libvirt itself sees when
# QEMU, the kernel or libvirt changed since. Kept from one lab to the next.
_PROBED_DIR = Path("/var/cache/libvirt/qemu/capabilities")
_STAGE_TWO = "--inside"
_SIGNALLED = 128

# No D-Bus, no polkit and no security module in the lab: as root, the socket's mode is enough.
_LIBVIRTD_CONF = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
_QEMU_CONF = """\
security_driver = "none"
cgroup_device_acl = ["/dev/null", "/dev/full", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/ptmx"]
"""
# The lab reads results from QEMU's log, which must not be rotated away below it.
_VIRTLOGD_CONF = """\
max_size = 0
"""


def cache_dir() -> Path:
    """Return the folder (made if absent) for what is worth keeping between labs."""
    place = os.environ.get("XDG_CACHE_HOME") or Path(__file__).resolve().parent.parent / ".cache"
    folder = Path(place) / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def inside_lab() -> bool:
    """Return whether this process runs inside the lab."""
    return os.environ.get(MARK) == "1"


def namespaces() -> list[str]:
    """Return the mount, network and PID namespaces of this process."""
    return [os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "net", "pid")]


def main(arguments: Sequence[str]) -> int:
    """Run the command after ``--`` in a new lab; return its exit code (128 + n for signal n)."""
    if arguments[:1] == [_STAGE_TWO]:
        return _inside(Path(arguments[1]), arguments[3:])
    with_network = arguments[:1] == ["--network"]
    command = arguments[1:] if with_network else arguments
    if len(command) < 2 or command[0] != "--":
        print("usage: python -m lab.enter [--network] -- COMMAND...", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("The lab needs root: it makes mount, network and PID namespaces.", file=sys.stderr)
        return 2
    return _outside(command[1:], with_network=with_network)


def _outside(command: Sequence[str], *, with_network: bool) -> int:
    folder = Path(tempfile.mkdtemp(prefix="stillframe-lab.", dir=os.environ.get(PLACE, "/var/tmp")))
    try:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--",
             "unshare", "--mount", *([] if with_network else ["--net"]), "--pid", "--fork",
             "--kill-child=KILL", "--mount-proc", "--propagation", "private", "--",
             sys.executable, "-m", "lab.enter", _STAGE_TWO, str(folder), "--", *command],
            env={**_with_bytecode(os.environ), "PYTHONPATH": _import_path(), OUTSIDE: " ".join(namespaces())},
        )
        # The terminal sends Ctrl-C to the whole foreground group, the command included: it decides
        # what to do about it. Only a signal meant for this process alone ends the lab.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.kill())
        code = process.wait()
        return code if code >= 0 else _SIGNALLED - code
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _import_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))


def _with_bytecode(environment: Mapping[str, str]) -> dict[str, str]:
    """Have Python keep what it compiled, in the cache: the lab starts thousands of short Python processes.

    Where the machine forbids bytecode files (containers do), each would compile everything anew.
    """
    kept = {name: value for name, value in environment.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {"PYTHONPYCACHEPREFIX": str(cache_dir() / "bytecode"), **kept}


def _inside(folder: Path, command: Sequence[str]) -> int:
    _furnish(folder)
    os.environ[MARK] = "1"
    os.environ.update(_appliance_environment())
    # As in a terminal, even if the lab was started in the background or by nohup, which ignore some signals:
    # what is ignored is inherited, and a shell can't even trap it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # Started before any handler is set, so that the command begins with the usual ones.
    child = subprocess.Popen(list(command))

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_on)
    while True:
        # As process 1 it reaps whatever was orphaned: a killed QEMU must not stay as a zombie.
        pid, status = os.waitpid(-1, 0)
        if pid == child.pid:
            _keep_probed()
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else _SIGNALLED - code


def _furnish(folder: Path) -> None:
    for path in _PRIVATE:
        own = folder / path.strip("/").replace("/", "-")
        own.mkdir(mode=0o755)
        Path(path).mkdir(parents=True, exist_ok=True)
        if path == "/etc/libvirt":
            _copy_settings(Path(path), own)
        subprocess.run(["mount", "--bind", str(own), path], check=True)
    for path, mode in (("/run/lock", 0o1777), ("/run/user", 0o755), ("/run/libvirt", 0o755),
                       (str(SOCKETS_DIR), 0o1777), (str(IMAGES_DIR), 0o711)):
        Path(path).mkdir(mode=mode)
        os.chmod(path, mode)
    kept = cache_dir() / "capabilities"
    if kept.is_dir():
        shutil.copytree(kept, _PROBED_DIR)
    # Without control groups to write to, libvirt leaves the machine's own ones alone.
    subprocess.run(["umount", "--recursive", "--lazy", "/sys/fs/cgroup"], check=False, capture_output=True)
    if Path("/dev/kvm").exists():
        # The guests are emulated, on every machine alike. An empty read-only file is what even root
        # can't open for writing: libvirt takes it as "no KVM" and neither probes it nor QEMU each time.
        empty = folder / "no-kvm"
        empty.touch()
        subprocess.run(["mount", "--bind", str(empty), "/dev/kvm"], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", "/dev/kvm"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def _appliance_environment() -> dict[str, str]:
    """Return what has libguestfs make its appliance with the lab's kernel: the machine may have none.

    The appliance is kept in the cache, one for each user. supermin wants /lib/modules to exist.
    """
    packages, made = cache_dir() / "packages", cache_dir() / "appliance"
    if not packages.is_dir():
        return {}
    made.mkdir(exist_ok=True)
    made.chmod(0o1777)
    Path("/lib/modules").mkdir(parents=True, exist_ok=True)
    return {
        "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg", "LIBGUESTFS_CACHEDIR": str(made),
        "SUPERMIN_KERNEL": str(next((packages / "boot").glob("vmlinuz-*"))),
        "SUPERMIN_MODULES": str(next((packages / "lib/modules").iterdir())),
    }


def _copy_settings(machine: Path, own: Path) -> None:
    # Only the settings: the machine's own domains, networks and hooks stay out of the lab.
    for setting in machine.glob("*.conf"):
        shutil.copy(setting, own / setting.name)
    (own / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
    (own / "qemu.conf").write_text(_QEMU_CONF)
    (own / "virtlogd.conf").write_text(_VIRTLOGD_CONF)


def _keep_probed() -> None:
    kept = cache_dir() / "capabilities"
    kept.mkdir(exist_ok=True)
    for probed in _PROBED_DIR.glob("*.xml"):
        # By way of a rename: labs may run side by side.
        part = kept / f".{probed.name}.{os.getppid()}"
        shutil.copyfile(probed, part)
        part.rename(kept / probed.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
