"""Mending libvirt's own status file of a running guest that libvirt takes for shut off.

A libvirtd that is killed while its status file says `<mirror job=''>` can't read that file
when it comes back ("unknown mirror job type ''"): it shows the guest as shut off while its
QEMU runs. The file can only be changed while libvirtd is stopped.
"""

from __future__ import annotations

import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

from stillframe.errors import GuestState, NeedsAttention, Refused
from stillframe.hypervisor.domain import qemu_pid

_FOLDER = Path("/run/libvirt/qemu")
_DAEMON_PIDS = (Path("/run/libvirtd.pid"), Path("/run/virtqemud.pid"))


def repair_status_file(name: str, folder: Path = _FOLDER) -> str:
    """Mend broken <mirror> elements in the status file of guest *name*; say what was done.

    A copy of the file is kept beside it. Raises Refused while libvirtd runs or when the
    guest's QEMU doesn't.
    """
    if any(_runs(path) for path in _DAEMON_PIDS):
        raise Refused(
            "libvirtd runs: it would overwrite the status file.",
            f"systemctl stop libvirtd.socket libvirtd; stillframe recover --repair-status {name}",
        )
    if qemu_pid(name) is None:
        raise Refused(f"No QEMU of {name} runs, so there is nothing to mend.", "systemctl start libvirtd")
    path = folder / f"{name}.xml"
    try:
        tree = ET.parse(path)
    except (OSError, ET.ParseError) as error:
        raise NeedsAttention(
            f"The status file {path} can't be read: {error}", f"ls -l {path}", GuestState.UNKNOWN
        ) from error
    mended = [_mend(disk, tree) for disk in tree.iter("disk") if _is_broken(disk)]
    if not mended:
        return f"{path} has no broken mirror element; nothing was changed"
    shutil.copy2(path, path.with_suffix(".xml.stillframe-before"))
    new = path.with_suffix(".xml.stillframe-new")
    tree.write(new, encoding="unicode")
    os.replace(new, path)
    return f"mended {path} ({', '.join(mended)}); now: systemctl start libvirtd"


def _is_broken(disk: ET.Element) -> bool:
    mirror = disk.find("mirror")
    return mirror is not None and not mirror.get("job")


def _mend(disk: ET.Element, tree: ET.ElementTree[ET.Element]) -> str:
    """Name the mirror's job as libvirt's own list of jobs has it; without one, drop the mirror."""
    target, mirror = disk.find("target"), disk.find("mirror")
    name = "?" if target is None else target.get("dev", "?")
    if mirror is None:
        return name
    for job in tree.iter("blockjob"):
        of = job.find("disk")
        if of is not None and of.get("dst") == name and job.get("type"):
            mirror.set("job", job.get("type", ""))
            return f"{name}: its mirror is a {job.get('type')} again"
    disk.remove(mirror)
    return f"{name}: a mirror without a job was removed"


def _runs(pid_file: Path) -> bool:
    try:
        return Path(f"/proc/{int(pid_file.read_text())}").exists()
    except (OSError, ValueError):
        return False
