"""Mending libvirt's own status file of a running guest, where libvirt itself never will.

Three kinds of damage, both left by a libvirtd that was killed at the wrong instant:

- `<mirror job=''>`: libvirtd can't read the file when it comes back ("unknown mirror job type
  ''") and shows the guest as shut off while its QEMU runs.
- It had dismissed a pivoted commit in QEMU but not yet written that down: the live XML names the
  overlay for ever, while QEMU is on the base.
- It had begun a backup job but not yet written down which: calls for the guest time out, and the job can't
  be ended ("backup job data missing").

The file can only be changed while libvirtd is stopped.
"""

from __future__ import annotations

import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from stillframe.capture.journal import RunRecord
from stillframe.capture.states import DiskPhase
from stillframe.errors import GuestState, NeedsAttention, Refused
from stillframe.hypervisor.domain import qemu_pid

_FOLDER = Path("/run/libvirt/qemu")
_DAEMON_PIDS = (Path("/run/libvirtd.pid"), Path("/run/virtqemud.pid"))


def repair_status_file(name: str, runs: Sequence[RunRecord], folder: Path = _FOLDER) -> str:
    """Mend the status file of guest *name*; say what was done.

    A disk's source is changed only where its run in *runs* says that QEMU was seen on the base.
    A copy of the file is kept beside it. Raises Refused while libvirtd runs or when the
    guest's QEMU doesn't.
    """
    if any(_runs(path) for path in _DAEMON_PIDS):
        raise Refused(
            "libvirtd runs: it would overwrite the status file.",
            f"systemctl stop 'libvirtd*.socket' libvirtd; stillframe recover --repair-status {name}",
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
    overlays = {
        disk.overlay_path for run in runs if run.name == name
        for disk in run.disks if disk.phase is DiskPhase.ON_BASE
    }
    mended += [_put_on_base(disk) for disk in tree.iter("disk") if _is_behind(disk, tree, overlays)]
    mended += _drop_lost_backup(tree)
    if not mended:
        return f"{path} has nothing that stillframe knows how to mend; nothing was changed"
    shutil.copy2(path, path.with_suffix(".xml.stillframe-before"))
    new = path.with_suffix(".xml.stillframe-new")
    tree.write(new, encoding="unicode")
    shutil.copymode(path, new)
    os.replace(new, path)
    return f"mended {path} ({', '.join(mended)}); now: systemctl start libvirtd"


def _is_broken(disk: ET.Element) -> bool:
    mirror = disk.find("mirror")
    return mirror is not None and not mirror.get("job")


def _mend(disk: ET.Element, tree: ET.ElementTree[ET.Element]) -> str:
    """Name the mirror's job as libvirt's own list of jobs has it; without one, drop the mirror."""
    name, mirror = _target(disk), disk.find("mirror")
    if mirror is None:
        return name
    for job in tree.iter("blockjob"):
        of = job.find("disk")
        if of is not None and of.get("dst") == name and job.get("type"):
            mirror.set("job", job.get("type", ""))
            return f"{name}: its mirror is a {job.get('type')} again"
    disk.remove(mirror)
    return f"{name}: a mirror without a job was removed"


def _is_behind(disk: ET.Element, tree: ET.ElementTree[ET.Element], overlays: set[str]) -> bool:
    source = disk.find("source")
    jobs = {each.get("dst") for job in tree.iter("blockjob") for each in job.iterfind("disk")}
    return source is not None and source.get("file") in overlays and _target(disk) not in jobs


def _put_on_base(disk: ET.Element) -> str:
    """Make the image below the overlay the disk's own, with libvirt's node names for it."""
    below, driver, overlay = disk.find("backingStore"), disk.find("driver"), disk.find("source")
    base = None if below is None else below.find("source")
    if below is None or driver is None or overlay is None or base is None:
        raise NeedsAttention(
            f"The status file does not say what is below the overlay of {_target(disk)}.",
            "shut the guest down from inside and start it again", GuestState.SAFE,
        )
    found = below.find("format")
    driver.set("type", "raw" if found is None else found.get("type", "raw"))
    disk.set("type", below.get("type", "file"))
    base.set("index", below.get("index", "1"))
    place = list(disk).index(overlay)
    deeper = below.find("backingStore")
    for child in (overlay, below, *disk.findall("mirror")):
        disk.remove(child)
    disk.insert(place, base)
    disk.insert(place + 1, ET.Element("backingStore") if deeper is None else deeper)
    return f"{_target(disk)}: it is on its base"


def _drop_lost_backup(tree: ET.ElementTree[ET.Element]) -> list[str]:
    """Remove a backup job that libvirt has no data of; what QEMU runs of it, `recover` closes there."""
    if tree.find(".//domainbackup") is not None:
        return []
    lost = [
        (parent, job) for parent in tree.iter() for job in parent.findall("job")
        if job.get("async") == "backup"
    ]
    for parent, job in lost:
        parent.remove(job)
    return ["a backup job without data was removed"] if lost else []


def _target(disk: ET.Element) -> str:
    target = disk.find("target")
    return "?" if target is None else target.get("dev", "?")


def _runs(pid_file: Path) -> bool:
    try:
        return Path(f"/proc/{int(pid_file.read_text())}").exists()
    except (OSError, ValueError):
        return False
