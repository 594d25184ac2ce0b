"""Looking at a booted guest: libvirt, QEMU, the process table and the files, as plain data."""

from __future__ import annotations

import os

from stillframe.block.image import ImagePlace, file_identity, file_place
from stillframe.block.tools import image_info
from stillframe.hypervisor.domain import Domain
from stillframe.hypervisor.model import DomainView, Power
from stillframe.restore.boot_decide import BootSight, DiskSight, Image, Stand
from stillframe.restore.boot_record import BootDisk, BootRecord, BootStore
from stillframe.restore.boot_server import find_server
from stillframe.restore.boot_xml import stand_of
from stillframe.restore.target import unfinished


def look_at_boot(store: BootStore, record: BootRecord, domain: Domain) -> BootSight:
    """Return what is to be seen of a booted guest now. Raises HypervisorError, NoHypervisor."""
    # Before it was to be defined, whatever libvirt has of that UUID is not this guest.
    view = domain.view() if record.define_begun else DomainView(record.name, record.uuid, Power.GONE)
    disks = tuple(_look_at(store, record, disk, view) for disk in record.disks)
    return BootSight(view.power, disks, bool(left_of(record)))


def left_of(record: BootRecord) -> list[str]:
    """Return the files and folders that were made for the guest and are there."""
    ours, others = [path for path in record.files if record.file_is_ours(path)], [*record.folders]
    for path in record.files:
        making = record.making_path(path)
        others += [making, *unfinished(making)]
    for disk in record.disks:
        others.append(disk.making_path(disk.overlay_path))
        if disk.overlay_is_ours():
            ours.append(disk.overlay_path)
        if disk.copy is not None:
            others.append(disk.making_path(disk.copy.path))
            if disk.copy.is_ours():
                ours.append(disk.copy.path)
    return [*ours, *(path for path in others if os.path.lexists(path))]


def overlay_of(disk: BootDisk) -> ImagePlace:
    """Return the place of a disk's overlay."""
    return file_place(disk.overlay_path, "qcow2")


def running_names(view: DomainView) -> dict[str, str]:
    """Return what the live XML calls the image of each disk."""
    return {} if view.live is None else {target: disk.top.place for target, disk in view.live.disks.items()}


def _look_at(store: BootStore, record: BootRecord, disk: BootDisk, view: DomainView) -> DiskSight:
    jobs = view.jobs or {}
    defined = None if view.inactive is None else view.inactive.disks.get(disk.target)
    image, off = _image(disk), view.power is Power.OFF
    return DiskSight(
        disk.target, image, _running(disk, view), stand_of(defined, disk),
        disk.target in jobs or _is_copied(disk.target, view),
        find_server(store, record, disk) is not None,
        names=not (off and image is Image.WRITTEN and not disk.is_left_behind)
        or bool(image_info(overlay_of(disk)).backing),
        left=disk.is_left_behind and disk.overlay_is_ours())


def _is_copied(target: str, view: DomainView) -> bool:
    """Return whether QEMU has a job that copies the disk, be it one that libvirt has forgotten."""
    jobs = () if view.qemu is None else view.qemu.jobs
    return any(job.name.startswith(f"copy-{target}-") for job in jobs)


def _running(disk: BootDisk, view: DomainView) -> Stand:
    """Return what QEMU itself has. libvirt's XML can be wrong for ever after a crash at the wrong instant."""
    if view.qemu is None and view.live is not None:  # a pull runs: it is not to be asked
        return stand_of(view.live.disks.get(disk.target), disk)
    seen = None if view.qemu is None else view.qemu.disks.get(disk.target)
    if seen is None or not seen.files:
        return Stand.NONE
    files = {os.path.normpath(file) for file in seen.files}
    if disk.copy is not None and files == {disk.copy.path}:
        return Stand.COPY
    if os.path.normpath(seen.files[0]) != disk.overlay_path:
        return Stand.OTHER
    # While it pulls, a filter of its own lies above the overlay and shows as the same file.
    return Stand.WHOLE if files == {disk.overlay_path} else Stand.SNAPSHOT


def _image(disk: BootDisk) -> Image:
    path, is_ours = disk.overlay_path, disk.overlay_is_ours()
    if disk.is_left_behind and disk.copy is not None:
        path, is_ours = disk.copy.path, disk.copy.is_ours()
    if not os.path.lexists(path):
        return Image.ABSENT
    if not is_ours:
        return Image.OTHER
    return Image.FRESH if file_identity(path) == disk.overlay_identity else Image.WRITTEN
