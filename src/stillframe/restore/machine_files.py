"""The files of a machine on the host that it is restored to: where they go, whose they are, writing them."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stillframe.errors import DestinationUnwritable, TargetExists
from stillframe.hypervisor.domain_xml import nvram_file
from stillframe.repository.manifest import NVRAM, TPM, TPM_FOLDER, FileEntry, Manifest
from stillframe.restore.target import Naming, write_errors

_NVRAM_FOLDER = Path("/var/lib/libvirt/qemu/nvram")
_QEMU_SETTINGS = Path("/etc/libvirt/qemu.conf")
_TPM_USER = re.compile(r'^\s*swtpm_user\s*=\s*"([^"]+)"', re.MULTILINE)
_DEFAULT_TPM_USER = "tss"


@dataclass(frozen=True, slots=True)
class MachineTarget:
    """A file of the machine, and where it goes."""

    entry: FileEntry
    path: str


def nvram_path(definition: str, name: str, folder: str) -> str:
    """Return where the NVRAM of the guest *name* goes, "" if that *definition* has none.

    It is libvirt's own folder for that, if the host has it, else *folder*.
    """
    old = nvram_file(ET.fromstring(definition))
    if old is None:
        return ""
    place = _NVRAM_FOLDER if _NVRAM_FOLDER.is_dir() else Path(folder)
    return str(place / f"{name}_VARS{Path(old).suffix or '.fd'}")


def machine_targets(manifest: Manifest, uuid: str, nvram: str) -> tuple[MachineTarget, ...]:
    """Return where the machine's files go for a guest of that *uuid* whose NVRAM is at *nvram*."""
    found = []
    for entry in manifest.files:
        if entry.role == NVRAM and nvram:
            found.append(MachineTarget(entry, nvram))
        elif entry.role == TPM:
            path = tpm_path(entry, manifest.uuid, uuid)
            if path:
                found.append(MachineTarget(entry, path))
    return tuple(found)


def tpm_path(entry: FileEntry, old_uuid: str, uuid: str) -> str:
    """Return where a part of a TPM's state goes for the guest *uuid*, "" if its old path leads elsewhere."""
    inside = Path(entry.path.rpartition(f"/{old_uuid}/")[2])
    if inside.is_absolute() or ".." in inside.parts:
        return ""  # a manifest is sealed, but a path out of the folder is nothing to follow
    return str(TPM_FOLDER / uuid / inside)


def write_machine_file(target: MachineTarget, content: bytes, *, replace: bool = False) -> None:
    """Write a file, durably and as a whole or not at all, as whom it must belong to.

    NVRAM that is *replaced* belongs to whom it did; else libvirt labels it when the guest starts. The state
    of a TPM must be its emulator's. Raises TargetExists, DestinationFull, DestinationUnwritable.
    """
    with Naming(target.path, replace=replace) as naming, write_errors(target.path, DestinationUnwritable):
        fd = os.open(naming.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(fd, target.entry.mode & 0o777)
            if target.entry.role == TPM:
                own_for_tpm(target.path, fd)
            elif replace:
                os.fchown(fd, target.entry.uid, target.entry.gid)
            os.fsync(fd)
        naming.publish()


def missing_folders(targets: Iterable[MachineTarget]) -> tuple[str, ...]:
    """Return the folders that a TPM's state needs and that are not there, outermost first."""
    found: dict[str, None] = {}
    for target in targets:
        parent = Path(target.path).parent
        for folder in (*reversed(parent.parents), parent) if target.entry.role == TPM else ():
            if folder.is_relative_to(TPM_FOLDER) and not folder.exists():
                found[str(folder)] = None
    return tuple(found)


def make_folder(path: str) -> None:
    """Make a folder for disks or for a TPM's state, as libvirt makes it. Raises DestinationUnwritable."""
    folder = Path(path)
    is_state = folder.is_relative_to(TPM_FOLDER) and folder.parent != TPM_FOLDER
    with write_errors(path, DestinationUnwritable):
        folder.mkdir(mode=0o700 if is_state else 0o711, exist_ok=True)
        if is_state:
            own_for_tpm(path)


def refuse_existing(path: str) -> None:
    """Raise TargetExists if there is anything at *path*."""
    if os.path.lexists(path):
        raise TargetExists(
            f"{path} exists, and a restore to a new guest overwrites no file.",
            f"ls -l {path}   # then another name (--as) or folder (--pool), or remove it if it is of no use")


def own_for_tpm(path: str, fd: int = -1) -> None:
    """Give a file to whom libvirt runs TPM emulators as, if that user is there and it is ours to give."""
    settings = ""
    with contextlib.suppress(OSError):
        settings = _QEMU_SETTINGS.read_text(encoding="utf-8", errors="replace")
    found = _TPM_USER.search(settings)
    with contextlib.suppress(KeyError, PermissionError):
        user = pwd.getpwnam(found[1] if found else _DEFAULT_TPM_USER)
        os.chown(path if fd < 0 else fd, user.pw_uid, user.pw_gid)
