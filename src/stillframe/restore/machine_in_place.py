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


def check_machine(manifest: Manifest, definition: str, places: Places) -> None:
    """Read the machine's files that would be written. Raises SlotDamaged, StorageError."""
    for entry, path in _placed(manifest, definition):
        if path:
            read_whole(places, entry)


def write_machine(
    manifest: Manifest, definition: str, places: Places, *, skip_bad: bool
) -> MachineInPlace:
    """Write the files of a machine that will be defined so; it can be repeated.

    Raises SlotDamaged and what a target raises.
    """
    files, lost, warnings = list[str](), list[str](), list[str]()
    for entry, path in _placed(manifest, definition):
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


def _placed(manifest: Manifest, definition: str) -> Iterator[tuple[FileEntry, str]]:
    """Yield the files, each with where the guest has it, "" if it has none like it."""
    root = ET.fromstring(definition)
    has_tpm = root.find("./devices/tpm/backend[@type='emulator']") is not None
    for entry in manifest.files:
        if entry.role == NVRAM:
            yield entry, nvram_file(root) or ""
        else:
            is_wanted = entry.role == TPM and has_tpm
            yield entry, tpm_path(entry, manifest.uuid, root.findtext("uuid", "")) if is_wanted else ""
