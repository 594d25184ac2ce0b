"""What belongs to a booted guest besides its disks, written for it anew: its NVRAM and its TPM's state."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillframe.capture.let_go_on import fsync
from stillframe.errors import BootFailed, SlotDamaged
from stillframe.repository.manifest import FileEntry, Manifest
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView
from stillframe.restore.definition import Place

#: As in backup/machine.py, which reads them.
_NVRAM = "nvram"
_TPM = "tpm"
_TPM_FOLDER = Path("/var/lib/libvirt/swtpm")
_NVRAM_FOLDER = Path("/var/lib/libvirt/qemu/nvram")


@dataclass(frozen=True, slots=True)
class MachineFiles:
    """The files of the snapshot with their new places. *tpm_folder* is "" where there is no TPM."""

    entries: Sequence[tuple[FileEntry, str]]
    places: Places
    nvram: str
    tpm_folder: str

    @property
    def own_files(self) -> tuple[str, ...]:
        """The files that are made for the guest, by us or by libvirt."""
        return (self.nvram,) if self.nvram else ()

    @property
    def own_folders(self) -> tuple[str, ...]:
        """The folders that are made for the guest."""
        return (self.tpm_folder,) if self.tpm_folder else ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All that must not be there yet."""
        return (*self.own_files, *self.own_folders)

    def write(self) -> None:
        """Write the files. Raises BootFailed, SlotDamaged, StorageError."""
        for entry, path in self.entries:
            content = bytearray(entry.size_bytes)
            try:
                with DiskView(self.places, entry) as view:
                    view.read_into(memoryview(content), 0)
            except SlotDamaged as damage:
                raise BootFailed(f"The {entry.role} file {entry.path} is lost: {damage.why}.",
                                 "stillframe verify --repo REPO") from damage
            try:
                _write(Path(path), bytes(content), entry)
            except OSError as error:
                raise BootFailed(
                    f"{path} can't be written: {error}.", f"ls -ld {os.path.dirname(path)}") from error


def nvram_path(text: str, name: str) -> str:
    """Return where the NVRAM of a guest of that definition goes under its new name, "" if it has none."""
    nvram = ET.fromstring(text).find("os/nvram")
    return "" if nvram is None else str(_NVRAM_FOLDER / f"{name}_VARS.fd")


def machine_of(manifest: Manifest, place: Place, places: Places) -> MachineFiles:
    """Return the machine's files of a snapshot, for *place*."""
    tpm = _TPM_FOLDER / place.identity.uuid
    entries = [(entry, _path(entry, manifest, place, tpm)) for entry in manifest.files]
    has_tpm = any(entry.role == _TPM for entry in manifest.files)
    return MachineFiles(
        [(entry, path) for entry, path in entries if path], places, place.nvram, str(tpm) if has_tpm else "")


def _path(entry: FileEntry, manifest: Manifest, place: Place, tpm: Path) -> str:
    if entry.role == _NVRAM:
        return place.nvram
    _, found, rest = entry.path.partition(f"/{manifest.uuid}/")
    return str(tpm / rest) if entry.role == _TPM and found and ".." not in rest.split("/") else ""


def _write(path: Path, content: bytes, entry: FileEntry) -> None:
    for folder in reversed(path.parents):
        if not folder.exists():
            folder.mkdir(mode=0o711)
            if entry.role == _TPM:
                os.chown(folder, entry.uid, entry.gid)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(fd, entry.mode)
        os.fchown(fd, entry.uid, entry.gid)
        os.fsync(fd)
    fsync(path.parent)
