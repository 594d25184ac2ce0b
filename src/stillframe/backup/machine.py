"""What belongs to a machine besides its disks: its NVRAM, the state of its TPM, and what ran it.

None of it stands still at the capture: QEMU writes the NVRAM, swtpm its state, whenever they like. So the
files are read right after the capture, again and again until one reading saw no change, and each
is kept with the time when that was.
"""

from __future__ import annotations

import os
import stat
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillframe import __version__
from stillframe.clock import Clock, utc_text
from stillframe.hypervisor.domain_xml import nvram_file
from stillframe.hypervisor.guest import Link
from stillframe.repository.manifest import NVRAM, TPM, TPM_FOLDER, Versions
from stillframe.units import MIB

_READ_TRIES = 5
_PAUSE_S = 0.05
#: An NVRAM has half a megabyte, a TPM's state less. What is larger is something else.
_FILE_LIMIT_BYTES = 64 * MIB
_NOT_STATE = (".lock", ".pid", ".log", ".sock")


@dataclass(frozen=True, slots=True)
class MachineFile:
    """One file, as it was *taken_at* a time."""

    role: str
    path: str
    content: bytes
    mode: int
    uid: int
    gid: int
    taken_at: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The files of a machine, and what of them could not be had."""

    files: tuple[MachineFile, ...]
    warnings: tuple[str, ...]


def take_machine(live_xml: str, uuid: str, clock: Clock, tpm_folder: Path = TPM_FOLDER) -> Machine:
    """Read the machine's files as they are now. A file that can't be had makes a warning, never an error."""
    files, warnings = [], []
    for role, path in _paths(live_xml, tpm_folder / uuid):
        try:
            file, steady = _read_steady(role, path, clock)
        except OSError as error:
            warnings.append(f"the {role} file {path} is not in the snapshot: {error.strerror or error}")
            continue
        if not steady:
            warnings.append(f"the {role} file {path} changed each time that it was read")
        if file.content:
            files.append(file)
    return Machine(tuple(files), tuple(warnings))


def versions_of(connection: Link, live_xml: str) -> Versions:
    """Return what runs the guest."""
    kind = ET.fromstring(live_xml).find("./os/type") if live_xml else None
    libvirt, qemu = connection.versions()
    return Versions(libvirt, qemu, "" if kind is None else kind.get("machine", ""), __version__)


def _paths(live_xml: str, tpm_folder: Path) -> Iterator[tuple[str, Path]]:
    if not live_xml:
        return  # without libvirt nothing tells where such files are
    domain = ET.fromstring(live_xml)
    nvram = nvram_file(domain)
    if nvram:
        yield NVRAM, Path(nvram)
    if domain.find("./devices/tpm/backend[@type='emulator']") is not None:
        for folder, _, names in os.walk(tpm_folder):
            yield from ((TPM, Path(folder, name)) for name in sorted(names) if not name.endswith(_NOT_STATE))


def _read_steady(role: str, path: Path, clock: Clock) -> tuple[MachineFile, bool]:
    """Return the file, and whether it stood still while it was read. Raises OSError."""
    file, steady = _read(role, path, clock)
    for _ in range(_READ_TRIES - 1):
        if steady:
            break
        clock.pause(_PAUSE_S)
        file, steady = _read(role, path, clock)
    return file, steady


def _read(role: str, path: Path, clock: Clock) -> tuple[MachineFile, bool]:
    # Never followed, never waited for: whatever is there was perhaps put there.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as stream:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode) or before.st_size > _FILE_LIMIT_BYTES:
            raise OSError("it is no regular file of a sensible size")
        content = stream.read(_FILE_LIMIT_BYTES)
        after = os.fstat(fd)
    # swtpm writes a new file and renames it.
    steady = _mark(before) == _mark(after) == _mark(path.stat(follow_symlinks=False))
    return MachineFile(role, str(path), content, stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid,
                       utc_text(clock.now())), steady


def _mark(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
