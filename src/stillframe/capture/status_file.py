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
    """Remove broken <mirror> elements from the status file of guest *name*; say what was done.

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
    removed = 0
    for disk in tree.iter("disk"):
        for mirror in disk.findall("mirror"):
            if not mirror.get("job"):
                disk.remove(mirror)
                removed += 1
    if not removed:
        return f"{path} has no broken mirror element; nothing was changed"
    shutil.copy2(path, path.with_suffix(".xml.stillframe-before"))
    mended = path.with_suffix(".xml.stillframe-new")
    tree.write(mended, encoding="unicode")
    os.replace(mended, path)
    return f"removed {removed} broken mirror elements from {path}; now: systemctl start libvirtd"


def _runs(pid_file: Path) -> bool:
    try:
        return Path(f"/proc/{int(pid_file.read_text())}").exists()
    except (OSError, ValueError):
        return False
