"""The files of a machine, its NVRAM and the state of its TPM, put back where its guest has them now.

They belong to the state that the disks had: what the firmware boots is in the one, what disks are encrypted
with may be in the other. A file takes the old one's place as a whole or not at all.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass

from stillframe.errors import SlotDamaged
from stillframe.hypervisor.domain_xml import nvram_file
from stillframe.hypervisor.guest import Guest
from stillframe.repository.manifest import NVRAM, TPM, FileEntry, Manifest
from stillframe.repository.places import Places
from stillframe.repository.reader import read_whole
from stillframe.restore.machine_files import (
    MachineTarget,
    make_folder,
    missing_folders,
    tpm_path,
    write_machine_file,
)


@dataclass(frozen=True, slots=True)
class MachineInPlace:
    """What was written, what could not be read, and what has no place in this guest."""

    files: tuple[str, ...]
    lost: tuple[str, ...]
    warnings: tuple[str, ...]


def check_machine(manifest: Manifest, domain: Guest, places: Places) -> None:
    """Read the machine's files that would be written. Raises SlotDamaged, StorageError."""
    for entry, path in _placed(manifest, domain):
        if path:
            read_whole(places, entry)


def write_machine(manifest: Manifest, domain: Guest, places: Places, *, skip_bad: bool) -> MachineInPlace:
    """Write the machine's files; it can be repeated. Raises SlotDamaged and what a target raises."""
    files, lost, warnings = list[str](), list[str](), list[str]()
    for entry, path in _placed(manifest, domain):
        if not path:
            warnings.append(f"the guest has no {entry.role} now: {entry.path} was not restored")
            continue
        try:
            content = read_whole(places, entry)
        except SlotDamaged as damage:
            if not skip_bad:
                raise
            # Half of a firmware's variables is worse than the ones that are there.
            lost.append(f"{path} ({damage.why})")
            continue
        target = MachineTarget(entry, path)
        for folder in missing_folders([target]):
            make_folder(folder)
        write_machine_file(target, content, replace=True)
        files.append(path)
    return MachineInPlace(tuple(files), tuple(lost), tuple(warnings))


def _placed(manifest: Manifest, domain: Guest) -> Iterator[tuple[FileEntry, str]]:
    definition = domain.view().inactive
    for entry in manifest.files:
        yield entry, _path(entry, manifest.uuid, domain.uuid, "" if definition is None else definition.text)


def _path(entry: FileEntry, old_uuid: str, uuid: str, definition: str) -> str:
    """Return where the guest has the file now, "" if it has none like it."""
    root = ET.fromstring(definition) if definition else ET.Element("domain")
    if entry.role == NVRAM:
        return nvram_file(root) or ""
    if entry.role == TPM and root.find("./devices/tpm/backend[@type='emulator']") is not None:
        return tpm_path(entry, old_uuid, uuid)
    return ""
