"""A whole guest restored as a new one: it is what the snapshot was, starts, and nothing half-made stays."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from lab import forked
from lab.barequemu import BareQemu
from lab.daemons import UNDEFINE_WHOLLY, LibvirtDaemons
from lab.database import check_image
from lab.dbguest import DbGuest
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB, assert_equal_images, run, to_raw
from lab.waiting import PATIENCE_S, wait_for
from stillframe import errors
from stillframe.repository.layout import PackKind, packs_prefix
from stillframe.repository.manifest import TPM_FOLDER
from tests.fault.harness import Place, small_file_system
from tests.integration.changed_snapshot import changed
from tests.integration.repositories import ROOT, Repo, make_repo

pytestmark = pytest.mark.timeout(600)
MakeDiskGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 16 * MIB
_OVMF = Path("/usr/share/OVMF")


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    """Give an empty repository."""
    return make_repo(place, tmp_path)


@pytest.fixture
def pool(images_dir: Path, tmp_path: Path) -> Iterator[Path]:
    """Give a name for a folder that is not there yet, for the disks of restored guests."""
    folder = images_dir / f"restored-{tmp_path.name}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Restored:
    """The guest that was restored as *name*, whose disks are in *pool*."""

    def __init__(self, daemons: LibvirtDaemons, name: str) -> None:
        self._connection = daemons.connect()
        self.name = name

    @property
    def domain(self) -> libvirt.virDomain:
        return self._connection.lookupByName(self.name)

    @property
    def definition(self) -> ET.Element:
        return ET.fromstring(self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))

    def assert_holds(self, expected: dict[str, Path], folder: Path) -> None:
        """Compare every byte of every disk, as the definition names it. The guest is off."""
        assert not self.domain.isActive()
        assert {each.get("dev") for each in self.definition.iterfind(".//disk/target")} >= set(expected)
        for target, moment in expected.items():
            disk = self.definition.find(f".//disk/target[@dev='{target}']/..")
            assert disk is not None
            source, driver = disk.find("source"), disk.find("driver")
            assert source is not None
            assert driver is not None
            path, image_format = source.get("file") or source.get("dev") or "", driver.get("type", "")
            assert "backing-filename" not in json.loads(
                run("qemu-img", "info", "--output=json", "-f", image_format, path))
            raw = to_raw(path, image_format, folder / f"{self.name}-{target}.raw")
            assert_equal_images(raw, moment)
            raw.unlink()

    def assert_starts(self) -> None:
        """QEMU takes all that the definition names."""
        self.domain.create()
        assert self.domain.isActive()
        self.domain.destroy()


def names(daemons: LibvirtDaemons) -> set[str]:
    return {domain.name() for domain in daemons.connect().listAllDomains()}


def moment_of(guest: DiskGuest) -> dict[str, Path]:
    return {target: guest.model(target).copy_at_moment() for target in guest.disks}


def redefine(guest: DiskGuest, old: str, new: str) -> None:
    """Change the definition of a guest that is off."""
    text = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    assert old in text
    guest.daemons.connect().defineXML(text.replace(old, new, 1))


def test_a_guest_with_two_disks_a_chain_and_a_cdrom(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons, tmp_path: Path,
    images_dir: Path,
) -> None:
    iso = images_dir / f"{tmp_path.name}.iso"
    iso.write_bytes(bytes(MIB))
    cdrom = (f"<disk type='file' device='cdrom'><source file='{iso}'/><target dev='sda' bus='sata'/></disk>"
             "<interface type='user'><mac address='52:54:00:12:34:56'/></interface>")
    guest = disk_guest(DiskSpec("vda", Kind.CHAIN, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES),
                       devices=cdrom)
    guest.write("vda", MIB, 300 * 1024, 0xA1)
    guest.flush()
    expected = moment_of(guest)
    snapshot = repo.backup(guest)["snapshot"]
    guest.write("vda", 2 * MIB, MIB, 0xB2)  # after the moment
    iso.unlink()

    shown = repo.json("restore", snapshot, "--as", "copy", "--pool", pool, "--dry-run")
    assert shown["dry_run"] is True
    assert "+  <name>copy</name>" in shown["difference"]
    assert shown["needed_bytes"] == sum(disk["needed_bytes"] for disk in shown["disks"]) > 0
    assert [(each["what"], each["is_fatal"]) for each in shown["findings"]] == [("medium", False)]
    assert not pool.exists()
    assert not (repo.place.state_dir / "restores").exists()
    assert "copy" not in names(daemons)

    done = repo.json("restore", snapshot, "--as", "copy", "--pool", pool)
    assert done["whole"] is True
    assert done["started"] is False
    assert [(disk["target"], disk["format"]) for disk in done["disks"]] == [("vda", "qcow2"), ("vdb", "raw")]
    assert {path.name for path in pool.iterdir()} == {"copy-vda.qcow2", "copy-vdb.img"}
    copy = Restored(daemons, "copy")
    assert copy.domain.UUIDString() == done["uuid"] != guest.domain().UUIDString()
    mac = copy.definition.find(".//interface/mac")
    assert mac is not None
    assert mac.get("address") == done["macs"][0] != "52:54:00:12:34:56"
    assert copy.definition.find(".//disk[@device='cdrom']/source") is None
    copy.assert_holds(expected, tmp_path)
    guest.destroy()  # the lab's second monitor is in the command line of both
    copy.assert_starts()
    assert list((repo.place.state_dir / "restores").iterdir()) == []

    again = repo.json("restore", snapshot, "--as", "copy", "--pool", pool, code=errors.GuestExists.exit_code)
    assert again["error"]["code"] == "guest-exists"
    taken = repo.json("restore", snapshot, "--as", "other", "--same-identity", "--pool", pool,
                      code=errors.GuestExists.exit_code)
    assert guest.name in taken["error"]["message"]
    (pool / "other-vdb.img").write_bytes(b"somebody's")
    repo.json("restore", snapshot, "--as", "other", "--pool", pool, code=errors.TargetExists.exit_code)
    assert (pool / "other-vdb.img").read_bytes() == b"somebody's"
    assert not (pool / "other-vda.qcow2").exists()
    assert names(daemons) == {guest.name, "copy"}


def test_the_same_identity_as_another_format_and_onto_a_device(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons, tmp_path: Path,
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), DiskSpec("vdb", Kind.QCOW2, _SIZE_BYTES))
    snapshot, expected, uuid = repo.backup(guest)["snapshot"], moment_of(guest), guest.domain().UUIDString()
    guest.destroy()
    guest.domain().undefineFlags(UNDEFINE_WHOLLY)
    with loop_device(tmp_path / "device", _SIZE_BYTES + MIB) as device:
        words = ("restore", snapshot, "--as", guest.name, "--pool", pool, "--same-identity",
                 "--format", "qcow2", "--disk", f"vdb={device}")
        refused = repo.json(*words, code=errors.TargetExists.exit_code)
        assert device in refused["error"]["message"]
        assert not pool.exists()
        done = repo.json(*words, "--force")
        assert [disk["format"] for disk in done["disks"]] == ["qcow2", "raw"]
        assert done["uuid"] == uuid == Restored(daemons, guest.name).domain.UUIDString()
        back = Restored(daemons, guest.name)
        vda = back.definition.find(".//disk/target[@dev='vda']/../source")
        assert vda is not None
        assert vda.get("file") == str(pool / f"{guest.name}-vda.qcow2")
        raw = to_raw(str(pool / f"{guest.name}-vda.qcow2"), "qcow2", tmp_path / "vda.raw")
        assert_equal_images(raw, expected["vda"])
        with Path(device).open("rb") as file:
            assert file.read(_SIZE_BYTES) == expected["vdb"].read_bytes()
        back.assert_starts()
        small = repo.json("restore", f"{snapshot}", "--as", "third", "--pool", pool, "--force",
                          "--disk", "vda=/dev/null", code=errors.TargetExists.exit_code)
        assert "neither a file nor a block device" in small["error"]["message"]
        back.domain.undefineFlags(UNDEFINE_WHOLLY)


@contextlib.contextmanager
def loop_device(path: Path, size_bytes: int) -> Iterator[str]:
    """Give a block device of that size for the length of the block."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    device = run("losetup", "--find", "--show", path).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def test_a_database_guest_backed_up_under_load_comes_back_and_starts(
    db_guest: Callable[..., DbGuest], repo: Repo, pool: Path, daemons: LibvirtDaemons, tmp_path: Path,
) -> None:
    guest = db_guest()
    acknowledged = guest.wait_more_rows(5)
    done = repo.json("backup", guest.name, "--min-free", "32M", "--quiesce", "agent", "--method", "overlay")
    snapshot = done["guests"][0]["snapshot"]
    wall = guest.wait_more_rows(3)
    assert repo.call("restore", f"{snapshot}:vda", "--to", tmp_path / "vda.img").returncode == 0
    off = repo.json("restore", snapshot, "--as", "off", "--pool", pool)
    Restored(daemons, "off").assert_holds({"vda": tmp_path / "vda.img"}, tmp_path)
    check = check_image(pool / "off-vda.qcow2", "qcow2")
    assert check.whole
    assert acknowledged <= check.last
    guest.destroy()
    started = repo.json("restore", snapshot, "--as", "started", "--pool", pool, "--start")
    assert started["started"] is True
    assert started["uuid"] != off["uuid"]
    twin = Restored(daemons, "started")
    wait_for("the restored guest's agent answers", lambda: agent_answers(twin.domain), 180)
    twin.domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
    wait_for("the restored guest is off", lambda: not twin.domain.isActive(), PATIENCE_S)
    check = check_image(pool / "started-vda.qcow2", "qcow2")
    assert check.whole
    assert acknowledged <= check.last
    assert wall >= acknowledged


def agent_answers(domain: libvirt.virDomain) -> bool:
    import libvirt_qemu

    try:
        libvirt_qemu.qemuAgentCommand(domain, '{"execute": "guest-ping"}', 5, 0)
    except libvirt.libvirtError:
        return False
    return True


def firmware_guest(make: MakeDiskGuest, name: str, folder: Path, devices: str = "") -> DiskGuest:
    """Return a running guest with UEFI."""
    nvram = folder / f"{name}_VARS.fd"
    guest = make(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), name=name, started=False, devices=devices,
                 memory_mib=128)
    redefine(guest, "<cpu ", "<features><acpi/></features><cpu ")
    redefine(guest, "hvm</type>",
             f"hvm</type><loader readonly='yes' type='pflash'>{_OVMF}/OVMF_CODE_4M.fd</loader>"
             f"<nvram template='{_OVMF}/OVMF_VARS_4M.fd'>{nvram}</nvram>")
    guest.start()
    return guest


def test_a_uefi_guest_with_its_variables(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons, tmp_path: Path,
    images_dir: Path,
) -> None:
    guest = firmware_guest(disk_guest, "uefi", images_dir)
    nvram = images_dir / "uefi_VARS.fd"
    template = (_OVMF / "OVMF_VARS_4M.fd").read_bytes()
    wait_for("the firmware writes its variables", lambda: nvram.read_bytes() != template, 180)
    expected, snapshot = moment_of(guest), repo.backup(guest)["snapshot"]
    assert repo.call("restore", snapshot, "--to", f"{tmp_path}/files/").returncode == 0
    variables = (tmp_path / "files" / f"nvram-{nvram.name}").read_bytes()
    assert variables != template
    done = repo.json("restore", snapshot, "--as", "uefi-2", "--pool", pool)
    kept, = done["files"]
    assert kept != str(nvram)
    assert Path(kept).read_bytes() == variables
    copy = Restored(daemons, "uefi-2")
    assert copy.definition.findtext("os/nvram") == kept
    copy.assert_holds(expected, tmp_path)
    guest.destroy()
    copy.assert_starts()
    copy.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
    taken = repo.json("restore", snapshot, "--as", "uefi-2", "--pool", pool.parent,
                      code=errors.TargetExists.exit_code)
    assert kept in taken["error"]["message"]
    assert not (pool.parent / "uefi-2-vda.qcow2").exists()
    Path(kept).unlink()


def test_a_guest_with_a_tpm(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons, tmp_path: Path,
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES),
                       devices="<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>")
    state = TPM_FOLDER / guest.domain().UUIDString() / "tpm2/tpm2-00.permall"
    snapshot = repo.backup(guest)["snapshot"]
    expected = state.read_bytes()
    done = repo.json("restore", snapshot, "--as", "tpm-2", "--pool", pool)
    kept, = done["files"]
    assert kept == str(TPM_FOLDER / done["uuid"] / "tpm2/tpm2-00.permall")
    assert Path(kept).read_bytes() == expected
    assert Path(kept).stat().st_uid == state.stat().st_uid
    guest.destroy()
    Restored(daemons, "tpm-2").assert_starts()
    # What makes a TPM this one (its seeds) is in there: a new one would have others.
    assert Path(kept).read_bytes()[:512] == expected[:512]
    Restored(daemons, "tpm-2").domain.undefine()
    shutil.rmtree(TPM_FOLDER / done["uuid"], ignore_errors=True)


def test_what_the_host_lacks_is_said_before_anything_is_made(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons, tmp_path: Path,
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    snapshot, expected = repo.backup(guest)["snapshot"], moment_of(guest)
    guest.destroy()
    machine = ET.fromstring(guest.domain().XMLDesc()).find("os/type").get("machine")  # type: ignore[union-attr]
    assert machine is not None
    newer = changed(repo, snapshot, machine, "pc-q35-99.1")
    refused = repo.json("restore", newer, "--as", "old", "--pool", pool, code=errors.HostLacks.exit_code)
    assert "pc-q35-99.1" in refused["error"]["message"]
    assert "--nearest" in refused["error"]["next_command"]
    assert not pool.exists()
    repo.json("restore", newer, "--as", "old", "--pool", pool, "--nearest")
    copy = Restored(daemons, "old")
    kind = copy.definition.find("os/type")
    assert kind is not None
    assert kind.get("machine", "").startswith("pc-q35-")
    copy.assert_holds(expected, tmp_path)
    copy.assert_starts()

    foreign = changed(repo, snapshot, "arch='x86_64'", "arch='aarch64'")
    refused = repo.json("restore", foreign, "--as", "arm", "--pool", pool, "--nearest",
                        code=errors.HostLacks.exit_code)
    assert "aarch64" in refused["error"]["message"]
    assert names(daemons) == {guest.name, "old"}
    with small_file_system(pool / "small", 3 * MIB) as small:
        refused = repo.json("restore", snapshot, "--as", "big", "--pool", small,
                            code=errors.TargetSmall.exit_code)
        assert str(small) in refused["error"]["message"]
        assert [path.name for path in small.iterdir() if path.name != "lost+found"] == []


def test_a_bare_guest_has_no_definition(
    bare_qemu: Callable[..., BareQemu], daemons: LibvirtDaemons, repo: Repo, pool: Path,
) -> None:
    guest = bare_qemu(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    snapshot = repo.backup(guest)["snapshot"]
    refused = repo.json("restore", snapshot, "--as", "bare", "--pool", pool,
                        code=errors.DefinitionMissing.exit_code)
    assert "restore" in refused["error"]["next_command"]
    assert "--to" in refused["error"]["next_command"]
    assert not pool.exists()


def killed(repo: Repo, snapshot: str, pool: Path, step: str) -> None:
    """Restore as "back", killed by SIGKILL once *step* was reached."""
    done = forked.run(
        [sys.executable, "-m", "tests.fault.restore_driver", step, "restore", snapshot, "--as", "back",
         "--pool", str(pool), "--state-dir", str(repo.place.state_dir)],
        cwd=ROOT, env=repo.environment(), timeout_s=120)
    assert done.returncode == -9, done.stdout + done.stderr


@pytest.mark.parametrize("step", ["claimed", "in vda", "vda", "in vdb", "vdb", "files"])
def test_a_killed_restore_defines_nothing_and_goes_on(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons, tmp_path: Path, step: str,
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))
    older = repo.backup(guest)["snapshot"]
    guest.write("vdb", MIB, MIB, 0x77)
    guest.flush()
    snapshot, expected = repo.backup(guest)["snapshot"], moment_of(guest)
    guest.destroy()
    for wrong in (older, snapshot):  # the second takes the place of what is left of the first
        killed(repo, wrong, pool, step)
        assert "back" not in names(daemons)
        assert {path.name for path in pool.glob("*") if not path.name.startswith(".")} <= {
            "back-vda.qcow2", "back-vdb.img"}
    [seen] = repo.json("status")["restores"]
    assert (seen["guest"], seen["snapshot"], seen["holder"]) == ("back", snapshot, "")
    assert seen["next_command"].startswith(f"stillframe restore {snapshot[:12]} --as back --pool {pool} ")
    [told] = repo.json("recover")["restores"]
    assert seen["next_command"] in told
    done = repo.json("restore", snapshot, "--as", "back", "--pool", pool)
    finished = {"vda": ("vda", "in vdb", "vdb", "files"), "vdb": ("vdb", "files")}
    assert {disk["target"]: disk["kept"] for disk in done["disks"]} == {
        target: step in steps for target, steps in finished.items()}
    assert {path.name for path in pool.iterdir()} == {"back-vda.qcow2", "back-vdb.img"}
    assert list((repo.place.state_dir / "restores").iterdir()) == []
    back = Restored(daemons, "back")
    back.assert_holds(expected, tmp_path)
    back.assert_starts()


def test_killed_once_it_is_defined(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons, tmp_path: Path,
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    snapshot, expected = repo.backup(guest)["snapshot"], moment_of(guest)
    guest.destroy()
    killed(repo, snapshot, pool, "defined")
    back = Restored(daemons, "back")
    back.assert_holds(expected, tmp_path)
    [told] = repo.json("recover")["restores"]
    assert "back is defined" in told
    repo.json("restore", snapshot, "--as", "back", "--pool", pool, code=errors.GuestExists.exit_code)
    assert list((repo.place.state_dir / "restores").iterdir()) == []
    back.assert_holds(expected, tmp_path)
    back.assert_starts()


def test_an_image_that_somebody_took_meanwhile_is_left_alone(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons,
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))
    snapshot = repo.backup(guest)["snapshot"]
    killed(repo, snapshot, pool, "vda")
    image = pool / "back-vda.qcow2"
    os.utime(image, ns=(1, 1))
    content = image.read_bytes()
    refused = repo.json("restore", snapshot, "--as", "back", "--pool", pool,
                        code=errors.TargetExists.exit_code)
    assert str(image) in refused["error"]["message"]
    assert image.read_bytes() == content
    assert "back" not in names(daemons)


def test_a_bad_chunk_is_named_and_what_is_left_can_be_had(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons, tmp_path: Path,
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))
    snapshot, expected = repo.backup(guest)["snapshot"], moment_of(guest)
    guest.destroy()
    pack = max((repo.path / packs_prefix(PackKind.DATA)).glob("*/*"))
    pack.chmod(0o600)
    with pack.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(64 * 1024))
    words = ("restore", snapshot, "--as", "hurt", "--pool", pool)
    refused = repo.json(*words, code=errors.SlotDamaged.exit_code)
    assert "--skip-bad" in refused["error"]["next_command"]
    assert not pool.exists()
    assert "hurt" not in names(daemons)
    done = repo.json(*words, "--skip-bad", code=errors.RepositoryDamaged.exit_code)
    assert done["whole"] is False
    whole, = (disk["target"] for disk in done["disks"] if not disk["lost"])
    Restored(daemons, "hurt").assert_holds({whole: expected[whole]}, tmp_path)


def test_an_error_removes_what_was_made(
    disk_guest: MakeDiskGuest, repo: Repo, pool: Path, daemons: LibvirtDaemons,
) -> None:
    """libvirt refuses the definition when all else is made."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    snapshot = changed(repo, repo.backup(guest)["snapshot"], "<on_crash>destroy<", "<on_crash>dance<")
    refused: dict[str, Any] = repo.json("restore", snapshot, "--as", "no", "--pool", pool,
                                        code=errors.HypervisorError.exit_code)
    assert "dance" in refused["error"]["message"]
    assert not pool.exists()
    assert list((repo.place.state_dir / "restores").iterdir()) == []
    assert names(daemons) == {guest.name}
