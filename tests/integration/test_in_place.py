"""Restoring a guest in place: equal bytes, only what differs written, and refused where it can't be safe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import libvirt
import pytest

from lab.database import check_image
from lab.dbguest import DbGuest
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB, run
from lab.waiting import PATIENCE_S, wait_for
from stillframe import errors
from stillframe.capture.journal import Journal
from stillframe.capture.restoring import MARK
from stillframe.clock import SystemClock
from stillframe.hypervisor.domain_xml import nvram_file
from stillframe.repository.manifest import TPM_FOLDER
from tests.fault.harness import Place, small_file_system
from tests.integration.repositories import Repo, make_repo
from tests.integration.test_offline import shut_down
from tests.kinds import disks, each

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 32 * MIB


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    """Give an empty repository."""
    return make_repo(place, tmp_path)


@pytest.fixture
def guest(disk_guest: MakeGuest) -> DiskGuest:
    """Give a guest with a raw disk and a qcow2 one."""
    return disk_guest(*disks((Kind.RAW, Kind.QCOW2), _SIZE_BYTES))


def snapshot_of(repo: Repo, guest: DiskGuest) -> tuple[str, dict[str, Path]]:
    """Shut the guest down and back it up; return the snapshot, and what the disks hold."""
    if guest.running():
        shut_down(guest)
    return repo.json("backup", guest.name)["guests"][0]["snapshot"], moment(guest)


def changed_snapshot(repo: Repo, guest: DiskGuest) -> tuple[str, dict[str, Path]]:
    """Return a snapshot and its moment; the guest is off, and was written to since."""
    change(guest, 0)
    snapshot, then = snapshot_of(repo, guest)
    guest.start()
    change(guest, 3)
    shut_down(guest)
    return snapshot, then


def in_place(repo: Repo, snapshot: str, *words: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = repo.json("restore", snapshot, "--in-place", *words, code=code)
    return found


def refused(repo: Repo, snapshot: str, *words: str, error: type[errors.StillframeError]) -> dict[str, Any]:
    found: dict[str, Any] = in_place(repo, snapshot, *words, code=error.exit_code)["error"]
    return found


def moment(guest: DiskGuest) -> dict[str, Path]:
    return {target: guest.model(target).copy_at_moment() for target in guest.disks}


def put_back(guest: DiskGuest, then: Mapping[str, Path]) -> None:
    """Make the models what the guest's disks were, and compare them."""
    for target, model in then.items():
        run("cp", "--sparse=always", model, guest.model(target).path)
        guest.assert_disk_equals_model(target)


def change(guest: DiskGuest, seed: int) -> None:
    for target in guest.disks:
        guest.write(target, (2 + seed) * MIB + 4096, 200 * 1024, 0xA0 + seed)
        guest.write_zeroes(target, (9 + seed) * MIB, 300 * 1024)
        guest.write(target, 20 * MIB, 64 * 1024, 0x11 + seed)
    guest.flush()


@pytest.mark.parametrize("kinds", each([
    (Kind.RAW, Kind.QCOW2), (Kind.BLOCK,), (Kind.QCOW2_BLOCK,), (Kind.CHAIN,), (Kind.NBD,), (Kind.LVM,),
    (Kind.RBD,)]))
def test_only_what_differs_is_written(
    disk_guest: MakeGuest, repo: Repo, kinds: tuple[Kind, ...]
) -> None:
    guest = disk_guest(*disks(kinds, _SIZE_BYTES))
    change(guest, 0)
    then = moment(guest)
    shut_down(guest)
    snapshot = repo.json("backup", guest.name)["guests"][0]["snapshot"]
    guest.start()
    change(guest, 3)
    shut_down(guest)
    lower = [path.read_bytes() for path in guest.disks["vda"].files[:-1]]

    would = in_place(repo, snapshot, "--dry-run")
    done = in_place(repo, snapshot)
    for disk, dry in zip(done["disks"], would["disks"], strict=True):
        assert 0 < disk["written_bytes"] + disk["zeroed_bytes"] == dry["differing_bytes"] < 3 * MIB
        assert dry["written_bytes"] == 0
    assert [path.read_bytes() for path in guest.disks["vda"].files[:-1]] == lower
    now = moment(guest)
    put_back(guest, then)
    assert not list(guest.folder.rglob(f"*{MARK}"))
    guest.start()
    shut_down(guest)

    # The state before is a snapshot, too.
    assert sum(disk["differing_bytes"] for disk in in_place(repo, done["state_before"])["disks"]) > 0
    put_back(guest, now)
    assert repo.json("status")["restoring"] == []


def test_one_disk_alone(guest: DiskGuest, repo: Repo) -> None:
    snapshot, then = changed_snapshot(repo, guest)
    done = in_place(repo, f"{snapshot}:vdb", "--no-backup-first")
    assert [disk["target"] for disk in done["disks"]] == ["vdb"]
    assert done["state_before"] == ""
    put_back(guest, {"vdb": then["vdb"]})
    guest.assert_disk_equals_model("vda")


def test_a_guest_that_runs_is_refused_or_ended(guest: DiskGuest, repo: Repo) -> None:
    snapshot, then = changed_snapshot(repo, guest)
    guest.start()
    for word in ((), ("--dry-run",)):
        said = refused(repo, snapshot, *word, error=errors.TargetInUse)
        assert "--shutdown" in said["next_command"]
        assert said["guest"] == "untouched"
    # What would be refused of it once it is off leaves it running.
    connect = guest.daemons.connect()
    text = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    connect.defineXML(text.replace("dev='vdb'", "dev='vdc'"))
    assert "no disk vdb" in refused(repo, snapshot, "--force", error=errors.GuestUnfit)["message"]
    connect.defineXML(text)
    assert guest.running()
    # There is no system in it that would listen.
    said = refused(repo, snapshot, "--shutdown", "--shutdown-timeout", "1s", error=errors.ShutdownTimedOut)
    assert "--force" in said["next_command"]
    assert guest.running()
    for target in guest.disks:
        guest.assert_disk_equals_model(target)
    guest.domain().suspend()
    refused(repo, snapshot, "--shutdown", error=errors.TargetInUse)
    in_place(repo, snapshot, "--force")
    assert not guest.running()
    put_back(guest, then)


def test_a_database_guest_goes_back_to_its_moment(
    db_guest: Callable[..., DbGuest], repo: Repo
) -> None:
    guest = db_guest()
    repo.json("backup", guest.name, "--quiesce", "agent", "--min-free", "64M")
    guest.wait_more_rows(20)
    before = guest.acknowledged()
    taken = repo.json("backup", guest.name, "--quiesce", "agent", "--min-free", "64M")["guests"][0]
    guest.wait_more_rows(20)
    after = guest.acknowledged()
    done = in_place(repo, taken["snapshot"], "--shutdown")
    assert not guest.running()
    check = check_image(guest.disks["vda"].path, guest.disks["vda"].image_format)
    assert check.whole, check
    assert before <= check.last < after
    guest.start()
    guest.wait_ready()
    # The state before that: all rows are there.
    in_place(repo, done["state_before"], "--shutdown", "--no-backup-first")
    check = check_image(guest.disks["vda"].path, guest.disks["vda"].image_format)
    assert check.whole, check
    assert check.last >= after


def test_no_incremental_believes_a_bitmap_across_it(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path
) -> None:
    guest = disk_guest(*disks((Kind.QCOW2, Kind.CHAIN), _SIZE_BYTES))
    moments, snapshots = list[dict[str, Path]](), list[str]()
    for number in range(3):
        change(guest, number)
        moments.append(moment(guest))
        snapshots.append(repo.backup(guest, "--method", "bitmap")["snapshot"])
    change(guest, 5)
    shut_down(guest)
    done = in_place(repo, snapshots[0])
    put_back(guest, moments[0])
    whole = in_place(repo, snapshots[0], "--read-all", "--dry-run")
    for disk, other in zip(done["disks"], whole["disks"], strict=True):
        assert disk["by_bitmap"]
        assert not other["by_bitmap"]
        assert 0 < disk["read_bytes"] < other["read_bytes"]
        assert other["differing_bytes"] == 0
    # Counted offline, from the anchor that the backup before kept.
    offline = repo.json("backup", guest.name)["guests"][0]
    assert offline["parent"] == done["state_before"]
    repo.assert_restores(offline["snapshot"], moments[0], tmp_path)
    guest.start()
    guest.write("vda", 30 * MIB, 64 * 1024, 0x77)
    guest.flush()
    now = moment(guest)
    taken = repo.backup(guest, "--method", "bitmap")
    repo.assert_restores(taken["snapshot"], now, tmp_path)
    # Without a backup in between: an older state under a bitmap that a running guest left.
    shut_down(guest)
    in_place(repo, snapshots[1], "--no-backup-first")
    put_back(guest, moments[1])
    guest.start()
    change(guest, 6)
    now = moment(guest)
    taken = repo.backup(guest, "--method", "bitmap")
    assert [disk["note"] for disk in taken["disks"]] == ["", ""]
    assert taken["parent"]
    repo.assert_restores(taken["snapshot"], now, tmp_path)


def test_images_that_changed_places_are_read_whole(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path
) -> None:
    guest = disk_guest(*disks((Kind.QCOW2, Kind.QCOW2), _SIZE_BYTES))
    then = moment(guest)
    snapshot = repo.backup(guest, "--method", "bitmap")["snapshot"]
    shut_down(guest)
    one, other = (disk.path for disk in guest.disks.values())
    os.rename(one, one.with_suffix(".swap"))
    os.rename(other, one)
    os.rename(one.with_suffix(".swap"), other)
    # Both have a bitmap of the checkpoint's name, which marks nothing.
    taken = repo.json("backup", guest.name, code=errors.EXIT_FELL_BACK)["guests"][0]
    repo.assert_restores(taken["snapshot"], {"vda": then["vdb"], "vdb": then["vda"]}, tmp_path)
    done = in_place(repo, snapshot, "--no-backup-first")
    assert not any(disk["by_bitmap"] for disk in done["disks"])
    put_back(guest, then)


def test_a_disk_of_another_size(guest: DiskGuest, repo: Repo) -> None:
    snapshot, then = changed_snapshot(repo, guest)
    for disk, sizes in zip(guest.disks.values(), ((40, 16), (16, 40)), strict=True):
        for size in sizes:
            run("qemu-img", "resize", "-q", "--shrink", "-f", disk.image_format, disk.path, f"{size}M")
            in_place(repo, f"{snapshot}:{disk.spec.target}", "--no-backup-first")
            put_back(guest, {disk.spec.target: then[disk.spec.target]})
    vdb = guest.disks["vdb"].path
    run("qemu-img", "resize", "-q", "-f", "qcow2", vdb, "40M")
    run("qemu-img", "snapshot", "-c", "mine", vdb)
    said = refused(repo, snapshot, error=errors.GuestUnfit)
    assert "internal snapshots" in said["message"]
    assert "vdb" in said["message"]


def test_a_device_of_another_size_is_refused(disk_guest: MakeGuest, repo: Repo) -> None:
    guest = disk_guest(*disks((Kind.BLOCK,), _SIZE_BYTES))
    snapshot, _ = changed_snapshot(repo, guest)
    device = guest.disks["vda"].path
    for size, error in ((40, errors.GuestUnfit), (16, errors.TargetSmall)):
        os.truncate(guest.disks["vda"].files[0], size * MIB)
        run("losetup", "--set-capacity", device)
        said = refused(repo, snapshot, error=error)
        assert str(device) in said["message"]


def test_a_disk_that_was_replaced_is_written_whole(guest: DiskGuest, repo: Repo) -> None:
    snapshot, then = changed_snapshot(repo, guest)
    vda, vdb = guest.disks["vda"], guest.disks["vdb"]
    for disk in (vda, vdb):
        disk.path.unlink()
        run("qemu-img", "create", "-q", "-f", disk.image_format, disk.path, str(_SIZE_BYTES))
    done = in_place(repo, snapshot, "--no-backup-first")
    assert all(disk["read_bytes"] <= 64 * 1024 for disk in done["disks"])
    put_back(guest, then)


def test_over_another_guest(guest: DiskGuest, repo: Repo, disk_guest: MakeGuest) -> None:
    snapshot, then = changed_snapshot(repo, guest)
    other = disk_guest(*disks((Kind.QCOW2, Kind.RAW), _SIZE_BYTES), started=False)
    in_place(repo, snapshot, "--guest", other.name)
    put_back(other, then)
    guest.remove()
    said = refused(repo, snapshot, error=errors.GuestUnknown)
    assert "--guest NAME" in said["next_command"]


@pytest.fixture
def unfit(guest: DiskGuest, repo: Repo) -> tuple[DiskGuest, str]:
    return guest, changed_snapshot(repo, guest)[0]


def test_what_stands_in_the_way_is_named(
    unfit: tuple[DiskGuest, str], repo: Repo, place: Place, tmp_path: Path
) -> None:
    guest, snapshot = unfit
    then = moment(guest)
    text = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    connect = guest.daemons.connect()

    connect.defineXML(text.replace("<source file=", "<source startupPolicy='optional' file=", 1))
    assert "startupPolicy" in refused(repo, snapshot, error=errors.GuestUnfit)["message"]
    lacking = text.replace("dev='vdb'", "dev='vdc'")
    connect.defineXML(lacking)
    assert "no disk vdb" in refused(repo, snapshot, error=errors.GuestUnfit)["message"]
    connect.defineXML(text)

    guest.start()
    guest.domain().managedSave()
    assert "managedsave-remove" in refused(repo, snapshot, error=errors.GuestUnfit)["next_command"]
    guest.domain().managedSaveRemove()

    overlay = guest.folder / "foreign.qcow2"
    guest.start()
    guest.domain().snapshotCreateXML(
        f"<domainsnapshot><name>theirs</name><disks><disk name='vda' snapshot='external'>"
        f"<source file='{overlay}'/></disk><disk name='vdb' snapshot='no'/></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
    guest.domain().destroy()
    assert "theirs" in refused(repo, snapshot, error=errors.ForeignSnapshot)["message"]
    guest.domain().snapshotLookupByName("theirs").delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    connect.defineXML(text)

    # Another program has an image open, which libvirt does not know of.
    with subprocess.Popen(["qemu-nbd", "-f", "qcow2", "--socket", str(tmp_path / "s"), "--persistent",
                           str(guest.disks["vdb"].path)]) as other:
        wait_for("qemu-nbd listens", (tmp_path / "s").exists, PATIENCE_S)
        said = refused(repo, snapshot, "--no-backup-first", error=errors.TargetInUse)
        other.terminate()
    assert said["guest"] == "untouched"
    put_back(guest, then)

    journal = Journal(place.state_dir, SystemClock())
    assert journal.open_runs() == []
    assert repo.json("status")["restoring"] == []


def test_a_guest_on_standing_overlays_is_refused(guest: DiskGuest, repo: Repo) -> None:
    snapshot = repo.backup(guest, "--method", "standing-overlay")["snapshot"]
    assert "settle" in refused(repo, snapshot, "--force", error=errors.GuestUnfit)["next_command"]
    assert guest.running()


def spoil(repo: Repo, snapshot: str) -> None:
    """Change a byte in the middle of the snapshot's first data pack."""
    [pack, *_] = sorted((repo.path / "main" / "p").glob(f"{snapshot}/*"))
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.write_bytes(content)


def test_a_lost_chunk_is_named_before_the_first_write(guest: DiskGuest, repo: Repo) -> None:
    change(guest, 0)
    snapshot, then = snapshot_of(repo, guest)
    in_place(repo, snapshot, "--no-backup-first")
    spoil(repo, snapshot)
    # What is lost is there on the disks, so it is not missed.
    assert in_place(repo, snapshot, "--no-backup-first")["whole"]
    put_back(guest, then)

    for disk in guest.disks.values():
        run("qemu-io", "-f", disk.image_format, "-c", "write -P 0x55 0 32M", disk.path)
    now = {target: guest.read_disk(target) for target in guest.disks}
    said = refused(repo, snapshot, "--no-backup-first", error=errors.SlotDamaged)
    assert said["guest"] == "untouched"
    put_back(guest, now)
    guest.start()
    said = refused(repo, snapshot, "--no-backup-first", "--force", error=errors.SlotDamaged)
    assert said["guest"] == "off"
    assert f"virsh start {guest.name}" in said["next_command"]
    assert not guest.running()
    put_back(guest, now)

    damaged = errors.RepositoryDamaged.exit_code
    done = in_place(repo, snapshot, "--no-backup-first", "--skip-bad", code=damaged)
    assert not done["whole"]
    lost = {disk["target"]: disk["lost"] for disk in done["disks"]}
    assert any(lost.values())
    for target, model in then.items():
        expected = bytearray(model.read_bytes())
        for each_ in lost[target]:
            begin, end = each_["offset_bytes"], each_["offset_bytes"] + each_["length_bytes"]
            expected[begin:end] = b"\x55" * (end - begin)
        guest.model(target).path.write_bytes(expected)
        guest.assert_disk_equals_model(target)


def test_no_space_leaves_it_protected_until_there_is_some(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    guest.write("vda", 0, 24 * MIB, 0x33)
    snapshot, then = snapshot_of(repo, guest)
    with small_file_system(guest.folder.parent / "small", 12 * MIB) as small:
        image = small / "vda.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", image, str(_SIZE_BYTES))
        text = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        guest.daemons.connect().defineXML(text.replace(str(guest.disks["vda"].path), str(image)))
        said = refused(repo, snapshot, "--no-backup-first", error=errors.DestinationFull)
        assert said["guest"] == "restoring"
        with pytest.raises(libvirt.libvirtError):
            guest.domain().create()
        [seen] = repo.json("status", code=errors.NeedsAttention.exit_code)["restoring"]
        assert seen["guest"] == guest.name
        subprocess.run(["mount", "-o", "remount,size=64M", small], check=True)
        in_place(repo, snapshot)
        assert (small / "vda.qcow2").is_file()
        put_back(guest, then)
        guest.domain().create()
        guest.domain().destroy()


def with_nvram(guest: DiskGuest, nvram: Path) -> None:
    """Define the guest with a firmware, whose variables are there."""
    text = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    firmware = (f"<loader readonly='yes' type='pflash'>{nvram.parent}/code.fd</loader>"
                f"<nvram>{nvram}</nvram></os><features><acpi/></features>")
    guest.daemons.connect().defineXML(text.replace("</os>", firmware))


def nvram_of(guest: DiskGuest) -> str | None:
    return nvram_file(ET.fromstring(guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))


@pytest.fixture
def firmware_guest(disk_guest: MakeGuest, tmp_path: Path) -> tuple[DiskGuest, Path]:
    """Give a guest that is off, and the file with its firmware's variables."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), started=False)
    nvram = tmp_path / "vars.fd"
    with_nvram(guest, nvram)
    nvram.write_bytes(b"boot from vda")
    nvram.chmod(0o640)
    return guest, nvram


def test_a_lost_file_of_the_machine_is_named_before_the_first_write(
    firmware_guest: tuple[DiskGuest, Path], repo: Repo
) -> None:
    guest, nvram = firmware_guest
    variables = os.urandom(256 * 1024)
    nvram.write_bytes(variables)
    image = guest.disks["vda"].path
    run("qemu-io", "-f", "qcow2", "-c", "write -z 0 32M", image)  # of such a disk no pack has anything
    snapshot = repo.json("backup", guest.name, "--quiesce", "none")["guests"][0]["snapshot"]
    spoil(repo, snapshot)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x55 0 1M", image)
    now = guest.read_disk("vda")
    said = refused(repo, snapshot, "--no-backup-first", error=errors.SlotDamaged)
    assert said["guest"] == "untouched"
    put_back(guest, {"vda": now})
    damaged = errors.RepositoryDamaged.exit_code
    done = in_place(repo, snapshot, "--no-backup-first", "--skip-bad", code=damaged)
    assert str(nvram) in done["lost_files"][0]
    assert nvram.read_bytes() == variables


def test_the_machines_files_go_back_with_its_disks(
    firmware_guest: tuple[DiskGuest, Path], repo: Repo
) -> None:
    guest, nvram = firmware_guest
    connect = guest.daemons.connect()
    text = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    plain = re.sub("<loader.*</nvram>", "", text, flags=re.DOTALL)
    snapshot = repo.json("backup", guest.name, "--quiesce", "none")["guests"][0]["snapshot"]
    nvram.write_bytes(b"boot from the network")
    changed = text.replace(">32768<", ">65536<")
    connect.defineXML(changed)
    assert in_place(repo, f"{snapshot}:vda", "--no-backup-first")["files"] == []
    assert nvram.read_bytes() == b"boot from the network"

    assert in_place(repo, snapshot, "--no-backup-first")["files"] == [str(nvram)]
    assert nvram.read_bytes() == b"boot from vda"
    assert nvram.stat().st_mode & 0o777 == 0o640
    assert guest.domain().maxMemory() == 65536
    in_place(repo, snapshot, "--no-backup-first", "--with-definition")
    assert guest.domain().maxMemory() == 32768
    assert guest.disk_source("vda")[0] == str(guest.disks["vda"].path)

    # The guest has its variables elsewhere now, and then none at all.
    moved = nvram.with_name("moved.fd")
    connect.defineXML(changed.replace(f">{nvram}<", f">{moved}<"))
    moved.write_bytes(b"boot from the network")
    assert in_place(repo, snapshot, "--no-backup-first", "--with-definition")["files"] == [str(moved)]
    assert moved.read_bytes() == b"boot from vda"
    assert nvram_of(guest) == str(moved)
    connect.defineXML(plain)
    assert nvram_of(guest) is None
    nvram.unlink()
    assert in_place(repo, snapshot, "--no-backup-first", "--with-definition")["files"] == [str(nvram)]
    assert nvram.read_bytes() == b"boot from vda"
    assert nvram_of(guest) == str(nvram)


def test_another_guest_keeps_its_own_files_of_the_machine(
    firmware_guest: tuple[DiskGuest, Path], repo: Repo, disk_guest: MakeGuest
) -> None:
    guest, nvram = firmware_guest
    then = moment(guest)
    snapshot = repo.json("backup", guest.name, "--quiesce", "none")["guests"][0]["snapshot"]
    nvram.write_bytes(b"boot from the network")
    other = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), started=False)
    own = nvram.with_name("other.fd")
    with_nvram(other, own)
    own.write_bytes(b"")
    done = in_place(repo, snapshot, "--no-backup-first", "--with-definition", "--guest", other.name)
    assert done["files"] == [str(own)]
    assert own.read_bytes() == b"boot from vda"
    assert nvram.read_bytes() == b"boot from the network"
    assert nvram_of(other) == str(own)
    assert other.disk_source("vda")[0] == str(other.disks["vda"].path)
    put_back(other, then)


def test_the_state_of_a_tpm_goes_back(disk_guest: MakeGuest, repo: Repo) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES),
                       devices="<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>")
    state = TPM_FOLDER / guest.domain().UUIDString() / "tpm2/tpm2-00.permall"
    snapshot = repo.backup(guest)["snapshot"]
    expected = state.read_bytes()
    owners = [(each.st_uid, each.st_gid, each.st_mode)
              for each in map(Path.stat, (state, *state.parents[:2]))]
    guest.destroy()
    state.write_bytes(b"another TPM")
    assert in_place(repo, snapshot, "--no-backup-first")["files"] == [str(state)]
    assert state.read_bytes() == expected
    # The TPM was taken away meanwhile, with its folder.
    shutil.rmtree(state.parents[1])
    in_place(repo, snapshot, "--no-backup-first")
    assert state.read_bytes() == expected
    assert owners == [
        (each.st_uid, each.st_gid, each.st_mode) for each in map(Path.stat, (state, *state.parents[:2]))]
    guest.start()
    guest.destroy()
    assert state.read_bytes()[:512] == expected[:512]
