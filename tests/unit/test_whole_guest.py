"""What a restore of a whole guest goes by: its claim, where the machine's files go, what is shown."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from stillframe.block.image import file_identity
from stillframe.cli.main import app
from stillframe.clock import SystemClock
from stillframe.errors import EXIT_USAGE, StateFolderUnusable, TargetExists
from stillframe.repository.manifest import NVRAM, TPM, TPM_FOLDER, FileEntry, Manifest, Versions
from stillframe.restore.claim import Claim, Claims
from stillframe.restore.guest_plan import GuestPlan
from stillframe.restore.machine_files import (
    MachineTarget,
    machine_targets,
    missing_folders,
    nvram_path,
    write_machine_file,
)

_OLD, _NEW = "11111111-2222-4333-8444-555555555555", "99999999-2222-4333-8444-555555555555"


def claim(folder: Path, **more: object) -> Claim:
    places = {"vda": str(folder / "web-vda.img"), "vdb": str(folder / "web-vdb.img")}
    made = Claim(name="web", sid="5" * 32, uuid=_NEW, macs=(), places=places,
                 formats={"vda": "raw", "vdb": "raw"}, folders=(str(folder),))
    return msgspec.structs.replace(made, **more)


def entry(role: str, path: str) -> FileEntry:
    return FileEntry(size_bytes=4, root=None, role=role, path=path, mode=0o640, uid=0, gid=0, taken_at="")


def manifest(*files: FileEntry) -> Manifest:
    return Manifest(
        sid="5" * 32, guest="web", uuid=_OLD, host="host", captured_at="", began_at="", ended_at="",
        consistency="crash", quiesce="none", parent="", live_xml="", inactive_xml="", disks=(), excluded=(),
        files=files, versions=Versions("", "", "", ""), warnings=(), frozen_s=0, stored_bytes=0)


def test_a_claim_is_read_as_it_was_written(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "state", SystemClock())
    assert claims.read("web") is None
    image = tmp_path / "web-vda.img"
    image.write_bytes(b"whole")
    one = claim(tmp_path, made={str(image): file_identity(str(image))})
    claims.write(one)
    found = claims.read("web")
    assert found == one
    assert found is not None
    assert found.finished(str(image))
    assert not found.finished(one.places["vdb"])
    claims.remove("web")
    assert claims.read("web") is None
    (tmp_path / "state/restores/web.json").write_text("{")
    with pytest.raises(StateFolderUnusable):
        claims.read("web")


def test_a_claim_is_of_the_same_work_or_of_other(tmp_path: Path) -> None:
    one = claim(tmp_path)
    assert one.same_work(claim(tmp_path, made={"x": file_identity(str(tmp_path))}))
    assert not one.same_work(claim(tmp_path, sid="6" * 32))
    assert not one.same_work(claim(tmp_path, formats={"vda": "qcow2", "vdb": "raw"}))


def test_only_what_was_made_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    mine, touched, foreign, half = (
        folder / name for name in ("web-vda.img", "web-vdb.img", "web-vdc.img", ".web-vda.img.00.unfinished"))
    for path in (mine, touched, foreign, half):
        path.write_bytes(b"content")
    one = claim(folder, made={str(path): file_identity(str(path)) for path in (mine, touched)})
    os.utime(touched, ns=(1, 1))
    assert one.remove_made() == (str(touched),)
    assert sorted(folder.iterdir()) == [touched, foreign]
    touched.unlink()
    foreign.unlink()
    assert one.remove_made() == ()
    assert not folder.exists()


def test_the_machines_files_get_places_of_the_new_guest() -> None:
    tpm = entry(TPM, f"/var/lib/libvirt/swtpm/{_OLD}/tpm2/tpm2-00.permall")
    outside = entry(TPM, f"/var/lib/libvirt/swtpm/{_OLD}/../../../../etc/passwd")
    nvram = entry(NVRAM, "/var/lib/libvirt/qemu/nvram/web_VARS.fd")
    found = machine_targets(manifest(nvram, tpm, outside), _NEW, "/nvram/web-2.fd")
    assert [each.path for each in found] == [
        "/nvram/web-2.fd", str(TPM_FOLDER / _NEW / "tpm2/tpm2-00.permall")]
    assert machine_targets(manifest(nvram), _NEW, "") == (), "a guest without NVRAM gets none"
    assert missing_folders(found)[-2:] == (str(TPM_FOLDER / _NEW), str(TPM_FOLDER / _NEW / "tpm2"))


@pytest.mark.parametrize(("element", "name"), [
    ("<nvram>/x/web_VARS.fd</nvram>", "web-2_VARS.fd"),
    ("<nvram type='file'><source file='/x/web.qcow2'/></nvram>", "web-2_VARS.qcow2"),
    ("<nvram template='/t'/>", "web-2_VARS.fd"), ("", ""),
])
def test_nvram_never_is_the_originals(element: str, name: str) -> None:
    path = nvram_path(f"<domain><os>{element}</os></domain>", "web-2", "/pool")
    assert os.path.basename(path) == name


def test_a_file_of_the_machine_is_written_where_none_is(tmp_path: Path) -> None:
    target = MachineTarget(entry(NVRAM, "/old"), str(tmp_path / "new.fd"))
    write_machine_file(target, b"vars")
    made = tmp_path / "new.fd"
    assert (made.read_bytes(), made.stat().st_mode & 0o777) == (b"vars", 0o640)
    with pytest.raises(TargetExists):
        write_machine_file(target, b"others")
    assert made.read_bytes() == b"vars"
    assert list(tmp_path.iterdir()) == [made]


def test_the_difference_shows_no_password(tmp_path: Path) -> None:
    old = "<domain><name>web</name><graphics type='vnc' passwd='secret' port='5900'/></domain>"
    new = '<domain><name>web-2</name><graphics type="vnc" passwd="secret" autoport="yes"/></domain>'
    plan = GuestPlan(claim(tmp_path), None, old, new, (), (), (), (), ())
    shown = plan.difference()
    assert "-  <name>web</name>\n" in shown
    assert "+  <name>web-2</name>\n" in shown
    assert 'autoport="yes"' in shown
    assert "secret" not in shown


@pytest.mark.parametrize("words", [
    ("--as", "a/b"), ("--as", ""), ("--as", ".x"), ("--as", "x", "--to", "/y"), ("--as", "x", "--delta"),
    ("--to", "/y", "--start"), ("--to", "/y", "--dry-run"), ("--as", "x", "--disk", "vda"),
    ("--as", "x", "--disk", "vda=/tmp/file"), ("--as", "x", "--network", "n", "--no-network"), (),
])
def test_options_that_do_not_go_together(words: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, ["restore", "web", "--repo", "/nowhere", *words]).exit_code == EXIT_USAGE
