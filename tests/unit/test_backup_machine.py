"""NVRAM and TPM state: read as they stand, again while they change, and never an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stillframe.backup.machine import Machine, take_machine
from stillframe.clock import SystemClock
from stillframe.repository.manifest import NVRAM, TPM

_UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
_TPM = "<devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>"


class Unhurried(SystemClock):
    """A clock that counts how often the reader waits."""

    pauses = 0

    def pause(self, seconds: float) -> None:
        assert seconds > 0
        self.pauses += 1


def take(xml: str, folder: Path) -> Machine:
    return take_machine(xml, _UUID, SystemClock(), folder)


@pytest.mark.parametrize("xml", [
    "<domain><os><nvram>{}</nvram></os></domain>",
    "<domain><os><nvram type='file'><source file='{}'/></nvram></os></domain>",
    "<domain><os><nvram template='/usr/share/OVMF/OVMF_VARS.fd'>\n  {}\n</nvram></os></domain>",
])
def test_the_nvram_is_taken_however_it_is_named(tmp_path: Path, xml: str) -> None:
    path = tmp_path / "web_VARS.fd"
    path.write_bytes(b"variables")
    path.chmod(0o640)
    machine = take(xml.format(path), tmp_path)
    file, = machine.files
    assert (file.role, file.path, file.content, file.mode) == (NVRAM, str(path), b"variables", 0o640)
    assert file.taken_at.endswith("Z")
    assert machine.warnings == ()


def test_the_state_of_an_emulated_tpm_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / _UUID / "tpm2"
    folder.mkdir(parents=True)
    (folder / "tpm2-00.permall").write_bytes(b"state")
    (folder / ".lock").touch()
    machine = take(f"<domain>{_TPM}</domain>", tmp_path)
    assert [(file.role, file.path) for file in machine.files] == [(TPM, str(folder / "tpm2-00.permall"))]
    assert take("<domain/>", tmp_path).files == (), "no TPM in the definition, no file of another's"


@pytest.mark.parametrize("make", [
    str, lambda path: path.symlink_to("/etc/passwd"), os.mkfifo, Path.mkdir,
])
def test_what_is_no_plain_file_makes_a_warning(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "VARS.fd"
    make(path)
    machine = take(f"<domain><os><nvram>{path}</nvram></os></domain>", tmp_path)
    assert machine.files == ()
    assert len(machine.warnings) == 1
    assert str(path) in machine.warnings[0]


def test_a_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "VARS.fd"
    path.write_bytes(b"old")
    xml = f"<domain><os><nvram>{path}</nvram></os></domain>"
    real, seen = os.fstat, []

    def fstat(fd: int) -> os.stat_result:
        facts = real(fd)
        seen.append(fd)
        if len(seen) == 1:  # between the look before the first reading and the one behind it
            path.write_bytes(b"new!")
        return facts

    monkeypatch.setattr("stillframe.backup.machine.os.fstat", fstat)
    clock = Unhurried()
    file, = take_machine(xml, _UUID, clock, tmp_path).files
    assert file.content == b"new!"
    assert clock.pauses == 1


def test_a_file_that_never_stands_still_is_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "VARS.fd"
    path.write_bytes(b"0")
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        facts = real(fd)
        with path.open("ab") as file:
            file.write(b".")
        return facts

    monkeypatch.setattr("stillframe.backup.machine.os.fstat", fstat)
    clock = Unhurried()
    machine = take_machine(f"<domain><os><nvram>{path}</nvram></os></domain>", _UUID, clock, tmp_path)
    assert len(machine.files) == 1
    assert "changed each time" in machine.warnings[0]
