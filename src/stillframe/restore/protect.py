"""Keeping a guest from being started while its disks are partly restored, and letting go of it again.

For that time the definition names images that are not there, in words that say why: whoever starts the guest
is told them. No lock of ours would outlive us, and a hook of libvirt's is not ours.

A definition can be made anew at any time, though, by a person or a tool that keeps it elsewhere. So an image
in a file gets another name, too, and a link that leads nowhere lies where it was: every start fails, by
whatever definition, and a QEMU by hand. `ls` shows why. A block device or an image behind a network has no
name that is ours to change.

Both can be done again from wherever they were broken off, and both are undone by looking at what is there.
"""

from __future__ import annotations

import contextlib
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from stillframe.block.image import file_identity
from stillframe.capture.let_go_on import fsync_definition
from stillframe.capture.restoring import MARK, RestorePhase, Restoring, RestoringDisk
from stillframe.errors import DestinationUnwritable, GuestState, NeedsAttention, TargetInUse
from stillframe.hypervisor.domain import qemu_by_uuid
from stillframe.hypervisor.domain_xml import with_source
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import DomainXml, Power, Source
from stillframe.restore.files import sync_folder
from stillframe.restore.target import opened, write_errors

#: What the definition names meanwhile: the image's name, then this. There is no such image.
UNFINISHED = ".unfinished-stillframe-restore"
#: Where the link leads that lies in the image's place. There is no such folder, so nothing is made there.
SIGN = "/unfinished-restore-in-place/see-stillframe-status"
#: The attribute of a source that names the image, by its kind.
_NAMES = {"file": "file", "block": "dev"}


def prove_off(domain: Guest) -> None:
    """Raise TargetInUse unless libvirt and the process table both show that no QEMU of the guest runs."""
    if domain.power() is not Power.OFF or qemu_by_uuid(domain.uuid) is not None:
        raise TargetInUse(f"{domain.name} was started just now.",
                          f"{domain.advice.shut_down}   # then run the command again")


def protect(restoring: Restoring, domain: Guest) -> None:
    """Keep the guest from starting. What is protected already stays so. Raises TargetInUse."""
    with contextlib.ExitStack() as locks:
        for disk in restoring.disks:
            locks.enter_context(_locked(disk))
        prove_off(domain)
        _define_marked(restoring, domain)
        for disk in restoring.disks:
            if disk.is_file:
                _mark(disk)
        # Started while the definition was being changed, by the one before.
        prove_off(domain)


def let_go(restoring: Restoring, domain: Guest) -> None:
    """Let the guest start again: images and definition are called what they were called.

    What the definition does not name as `protect` left it is not ours any more: the guest may have run since,
    on an image above the one that was restored. Raises NeedsAttention if something else lies in an image's
    place.
    """
    for disk in restoring.disks:
        if disk.is_file:
            _unmark(disk)
    _define_unmarked(restoring, domain)


def is_marked(path: str) -> bool:
    """Return whether the image at *path* is kept away for a restore in place, by whomever."""
    return os.path.lexists(path + MARK) or (os.path.islink(path) and os.readlink(path) == SIGN)


def defined(restoring: Restoring, domain: Guest) -> DomainXml:
    """Return the guest's definition. Raises NeedsAttention if it has none any more."""
    found = domain.view().inactive
    if found is None:
        raise NeedsAttention(f"{restoring.name} (UUID {restoring.uuid}) is not defined any more.",
                             f"virsh define XML   # the guest's definition, with that UUID; then "
                             f"{restoring.again()}", GuestState.RESTORING)
    return found


@contextlib.contextmanager
def _locked(disk: RestoringDisk) -> Iterator[None]:
    """Hold QEMU's lock on a local image, under whichever name it is there now."""
    if not disk.place.kind.is_local:
        yield
        return
    path = disk.marked_path if disk.is_file and os.path.lexists(disk.marked_path) else disk.place.path
    try:
        with opened(path, os.O_RDONLY):
            yield
    except FileNotFoundError as error:
        raise NeedsAttention(
            f"The image {disk.place.path} is gone, and so is {disk.marked_path}.",
            f"ls -l {os.path.dirname(path)}", GuestState.UNKNOWN) from error


def _mark(disk: RestoringDisk) -> None:
    path = disk.place.path
    with write_errors(path, DestinationUnwritable):
        if not os.path.lexists(disk.marked_path):
            os.rename(path, disk.marked_path)
        if not os.path.lexists(path):
            os.symlink(SIGN, path)
        sync_folder(path)
    _refuse_other(disk)


def _unmark(disk: RestoringDisk) -> None:
    path = disk.place.path
    with write_errors(path, DestinationUnwritable):
        if os.path.lexists(disk.marked_path):
            _refuse_other(disk)
            os.rename(disk.marked_path, path)
        sync_folder(path)


def _refuse_other(disk: RestoringDisk) -> None:
    """Raise NeedsAttention if the image, or what lies in its place, is not what was put there."""
    path = disk.place.path
    strange = os.path.lexists(path) and not (os.path.islink(path) and os.readlink(path) == SIGN)
    if strange or disk.identity is None or not disk.identity.same_file(file_identity(disk.marked_path)):
        raise NeedsAttention(
            f"{path} was replaced by another file while it was being restored in place; the image is "
            f"{disk.marked_path}.",
            f"ls -l {path} {disk.marked_path}   # move away what does not belong there, then run again",
            GuestState.RESTORING)


def _define_marked(restoring: Restoring, domain: Guest) -> None:
    """Define the guest with images that are not there."""
    text = defined(restoring, domain).text
    for disk in restoring.disks:
        text = with_source(text, disk.target, _marked_source(disk))
    domain.define(text)
    fsync_definition(domain)


def _define_unmarked(restoring: Restoring, domain: Guest) -> None:
    """Define the guest with its own images where it names those that are not there."""
    now = defined(restoring, domain)
    marked = {disk.target for disk in restoring.disks if _is_named_marked(now, disk.target)}
    if marked:
        # One that was given up before the first write leaves the guest the definition that it had.
        is_written = restoring.phase is RestorePhase.WRITTEN
        text = restoring.definition if is_written and restoring.definition else now.text
        for disk in restoring.disks:
            if disk.target in marked:
                text = with_source(text, disk.target, disk.source())
            elif disk.target in now.disks:
                text = with_source(text, disk.target, now.disks[disk.target].top)
        domain.define(text)
    fsync_definition(domain)


def _is_named_marked(definition: DomainXml, target: str) -> bool:
    """Return whether the disk has an image that is not there, whatever else of it was changed since."""
    now = definition.disks.get(target) or definition.bystanders.get(target)
    source = ET.Element("source") if now is None else ET.fromstring(now.top.xml)
    return any(value.endswith(UNFINISHED) for value in source.attrib.values())


def _marked_source(disk: RestoringDisk) -> Source:
    """Return a source like the disk's that is not there."""
    element = ET.fromstring(disk.source_xml)
    name = _NAMES.get(disk.source_kind, "name")
    element.set(name, element.get(name, "") + UNFINISHED)
    return Source(disk.source_kind, disk.source_format, "", xml=ET.tostring(element, encoding="unicode"))
