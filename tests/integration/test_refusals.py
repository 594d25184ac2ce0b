"""What bad input gets: a clear error with its own exit code, nothing changed, nothing lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from lab import forked
from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.enter import SOCKETS_DIR
from lab.images import MIB, run
from stillframe import errors
from stillframe.capture.states import State
from tests.fault.harness import Place, Run, overlays_left, small_file_system

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 16 * MIB
_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


class Caller:
    """Calls the command and looks at what it left."""

    def __init__(self, folder: Path, overlays: Path) -> None:
        self.destination = folder / "mirrors"
        self.destination.mkdir()
        self.place = Place(self.destination, folder / "state", overlays)

    def call(self, *arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        """Return exit code, JSON and what was said."""
        done = forked.run(
            [sys.executable, "-m", "stillframe", *map(str, arguments), "--json", "--state-dir",
             str(self.place.state_dir)], timeout_s=120)
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr

    def mirror(self, guest: str, *options: str | Path) -> tuple[int, dict[str, Any], str]:
        """Mirror one guest; return exit code, its part of the JSON, and what was said."""
        code, body, said = self.call(
            "mirror", guest, self.destination,
            "--method=overlay", "--quiesce", "none", "--min-free", "32M", *options)
        return code, body.get("guests", [{}])[0], said

    def refused(
        self, error: type[errors.StillframeError], guest: DiskGuest | str, *options: str | Path
    ) -> str:
        """The mirror ends with *error*, and guest and host are as they were; return the message."""
        name = guest if isinstance(guest, str) else guest.name
        before = None if isinstance(guest, str) else descriptions(guest)
        code, body, said = self.mirror(name, *options)
        assert code == error.exit_code, f"{body} {said}"
        assert body["error"]["code"] == error.code
        assert body["error"]["next_command"]
        assert f"error {error.code}" in said
        if not isinstance(guest, str):
            assert descriptions(guest) == before
        assert not overlays_left(self.place)
        assert self.call("status")[1]["open_runs"] == []
        message: str = body["error"]["message"]
        return message


def descriptions(guest: DiskGuest) -> tuple[str, ...]:
    domain = guest.domain()
    inactive = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    # The live XML counts up a few numbers by itself; which image each disk uses is what matters.
    return (inactive, *(guest.disk_source(target)[0] for target in guest.disks))


@pytest.fixture
def caller(tmp_path: Path, overlays_dir: Path) -> Caller:
    return Caller(tmp_path, overlays_dir)


@pytest.fixture
def guest(disk_guest: MakeGuest) -> DiskGuest:
    return disk_guest(DiskSpec("vda", size_bytes=_SIZE_BYTES))


def test_a_guest_that_is_not_there(caller: Caller, daemons: LibvirtDaemons) -> None:
    assert "nobody" in caller.refused(errors.GuestUnknown, "nobody")


def test_a_guest_without_disks(caller: Caller, disk_guest: MakeGuest) -> None:
    guest = disk_guest(DiskSpec("vda", elements="<shareable/>", kind=Kind.RAW, size_bytes=_SIZE_BYTES))
    assert "shareable" in caller.refused(errors.GuestHasNoDisks, guest)


def test_a_disk_of_a_kind_that_cant_be_captured_is_not_left_out_unasked(
    caller: Caller, disk_guest: MakeGuest
) -> None:
    guest = disk_guest(DiskSpec("vda", size_bytes=_SIZE_BYTES), started=False)
    connection = guest.daemons.connect()
    pool = connection.storagePoolCreateXML(
        f"<pool type='dir'><name>p</name><target><path>{guest.folder}</path></target></pool>")
    pool.createXML(f"<volume><name>v</name><capacity>{_SIZE_BYTES}</capacity></volume>")
    try:
        xml = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        connection.defineXML(xml.replace("</devices>", (
            "<disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vdv' bus='virtio'/>"
            "</disk></devices>")))
        guest.start()
        assert "vdv" in caller.refused(errors.GuestUnfit, guest)
        code, body, _said = caller.mirror(guest.name, "--exclude", "vdv")
        assert code == 0
        assert [each["target"] for each in body["excluded"]] == ["vdv"]
    finally:
        guest.destroy()
        pool.destroy()


def test_disks_that_are_left_out_are_named(caller: Caller, disk_guest: MakeGuest) -> None:
    guest = disk_guest(
        DiskSpec("vda", size_bytes=_SIZE_BYTES),
        DiskSpec("vdb", Kind.RAW, _SIZE_BYTES, elements="<readonly/>"),
        DiskSpec("vdc", Kind.RAW, _SIZE_BYTES),
        devices="<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>",
    )
    code, body, said = caller.mirror(guest.name, "--exclude", "vdc")
    assert code == 0
    excluded = {each["target"]: each["reason"] for each in body["excluded"]}
    assert excluded == {"vdb": "it is readonly", "sda": "it is a cdrom", "vdc": "you excluded it"}
    assert "vdb is left out" in said
    assert [path.name for path in (caller.destination / guest.name).glob("*.img")] == ["vda.img"]


def test_a_guest_that_is_shut_off_or_paused(caller: Caller, guest: DiskGuest) -> None:
    guest.domain().suspend()
    caller.refused(errors.GuestPaused, guest)
    assert guest.domain().info()[0] == libvirt.VIR_DOMAIN_PAUSED
    guest.destroy()
    caller.refused(errors.GuestShutOff, guest, "--method", "overlay")


def test_a_guest_under_a_block_job(caller: Caller, guest: DiskGuest, tmp_path: Path) -> None:
    copy = guest.folder / "copy.raw"
    guest.domain().blockCopy(
        "vda", f"<disk type='file'><source file='{copy}'/><driver type='raw'/></disk>",
        flags=libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
    assert "copy" in caller.refused(errors.GuestBusy, guest)
    assert guest.domain().blockJobInfo("vda"), "the job of another program goes on"
    guest.domain().blockJobAbort("vda")


def test_a_guest_under_a_backup_job(caller: Caller, guest: DiskGuest) -> None:
    guest.domain().backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{SOCKETS_DIR}/b.sock'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{guest.folder}/scratch'/></disk>"
        "</disks></domainbackup>", None)
    caller.refused(errors.GuestBusy, guest)
    guest.domain().abortJob()


def test_a_guest_on_a_foreign_snapshot(caller: Caller, guest: DiskGuest) -> None:
    guest.domain().snapshotCreateXML(
        "<domainsnapshot><name>before-upgrade</name></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
    assert "before-upgrade" in caller.refused(errors.ForeignSnapshot, guest)


def test_a_definition_that_names_another_image(caller: Caller, guest: DiskGuest) -> None:
    other = guest.folder / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", other, str(_SIZE_BYTES))
    xml = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    guest.daemons.connect().defineXML(xml.replace(str(guest.disks["vda"].path), str(other)))
    assert "other.qcow2" in caller.refused(errors.GuestUnfit, guest)


def test_an_image_that_another_guest_stands_on(
    caller: Caller, guest: DiskGuest, disk_guest: MakeGuest
) -> None:
    clone = disk_guest(DiskSpec("vda", size_bytes=_SIZE_BYTES), started=False)
    image = clone.disks["vda"].path
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", guest.disks["vda"].path, "-F", "qcow2", image,
        str(_SIZE_BYTES))
    assert clone.name in caller.refused(errors.ImageShared, guest)


def test_an_overlay_name_that_is_taken(caller: Caller, guest: DiskGuest) -> None:
    taken = guest.folder / f"{guest.name}-vda.stillframe-overlay.qcow2"
    taken.write_text("somebody's")
    assert str(taken) in caller.refused(errors.OverlayTaken, guest)
    assert taken.read_text() == "somebody's"


def test_a_device_without_a_folder_for_overlays(caller: Caller, disk_guest: MakeGuest) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.BLOCK, _SIZE_BYTES))
    assert "no folder" in caller.refused(errors.OverlayFolderNeeded, guest)
    caller.refused(errors.OverlayFolderNeeded, guest, "--overlay-dir", "/nonexistent")


def test_overlays_on_the_backup_storage_itself(caller: Caller, guest: DiskGuest) -> None:
    assert "backup storage" in caller.refused(
        errors.OverlayFolderNeeded, guest, "--overlay-dir", caller.destination)


def test_too_little_room_for_overlays(caller: Caller, guest: DiskGuest) -> None:
    caller.refused(errors.OverlaySpace, guest, "--min-free", "1000T")


def test_a_transient_guest_is_not_shut_down(caller: Caller, disk_guest: MakeGuest) -> None:
    guest = disk_guest(DiskSpec("vda", size_bytes=_SIZE_BYTES), transient=True)
    caller.refused(errors.ShutdownImpossible, guest, "--quiesce", "shutdown")
    assert caller.mirror(guest.name)[0] == 0


def test_destinations_that_will_not_do(caller: Caller, guest: DiskGuest) -> None:
    caller.destination.rmdir()
    caller.refused(errors.DestinationUnwritable, guest)
    caller.destination.write_text("a file")
    caller.refused(errors.DestinationUnwritable, guest)
    caller.destination.unlink()
    (caller.destination / guest.name).mkdir(parents=True)
    precious = caller.destination / guest.name / "precious.txt"
    precious.write_text("not ours")
    assert "precious.txt" in caller.refused(errors.DestinationForeign, guest)
    assert precious.read_text() == "not ours"
    caller.destination = guest.folder
    caller.refused(errors.DestinationInsideGuest, guest)


def test_a_destination_that_is_too_small_or_read_only(
    caller: Caller, disk_guest: MakeGuest, tmp_path: Path
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, 64 * MIB))
    guest.write("vda", 0, 32 * MIB, 0x55)
    guest.flush()
    with small_file_system(tmp_path / "small", 4 * MIB) as small:
        caller.destination = small
        caller.refused(errors.DestinationSpace, guest)
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        caller.refused(errors.DestinationUnwritable, guest)


def test_a_destination_that_fills_up_in_mid_copy(
    caller: Caller, disk_guest: MakeGuest, tmp_path: Path
) -> None:
    guest = disk_guest(DiskSpec("vda", size_bytes=64 * MIB))
    with small_file_system(tmp_path / "small", 80 * MIB) as small:
        caller.destination = small
        assert caller.mirror(guest.name)[0] == 0
        mirrored = (small / guest.name / "vda.img").read_bytes()
        guest.write("vda", 0, 60 * MIB, 0x66)
        guest.flush()
        caller.refused(errors.DestinationFull, guest)
        assert (small / guest.name / "vda.img").read_bytes() == mirrored, "the old mirror is whole"
        assert caller.call("recover", guest.name)[0] == 0
    guest.destroy()
    guest.assert_disk_equals_model()


def test_a_destination_that_vanishes_in_mid_copy(caller: Caller, guest: DiskGuest, tmp_path: Path) -> None:
    with vanishing(tmp_path / "share") as (share, vanish):
        caller.destination = share
        place = Place(share, caller.place.state_dir, caller.place.overlays)
        held = Run(place, guest, state=State.COPYING, phase="done")
        assert held.wait_reached(), held.output
        vanish()
        assert held.go_on() == errors.DestinationLost.exit_code, held.output
    assert not overlays_left(place)
    assert "stillframe-overlay" not in guest.disk_source("vda")[0]
    guest.destroy()
    guest.assert_disk_equals_model()


def test_another_run_holds_the_guest(caller: Caller, guest: DiskGuest) -> None:
    held = Run(caller.place, guest, state=State.COPYING, phase="done")
    assert held.wait_reached(), held.output
    code, body, _said = caller.mirror(guest.name)
    assert code == errors.RunInProgress.exit_code
    assert "mirror to" in body["error"]["message"], "the other run is named"
    assert "process" in body["error"]["message"]
    status = caller.call("status")[1]
    assert status["open_runs"][0]["running"]
    assert held.go_on() == 0, held.output


def test_another_guests_mirror_is_not_overwritten(
    caller: Caller, guest: DiskGuest, disk_guest: MakeGuest
) -> None:
    assert caller.mirror(guest.name)[0] == 0
    name, xml = guest.name, guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    guest.destroy()
    guest.domain().undefine()
    begin = xml.index("<uuid>")
    other = xml[:begin] + xml[xml.index("</uuid>") + len("</uuid>"):]
    guest.daemons.connect().defineXML(other).create()
    caller.refused(errors.DestinationForeign, guest)
    assert guest.name == name


def test_a_corrupted_map_is_noticed_and_the_mirror_compared_in_full(caller: Caller, guest: DiskGuest) -> None:
    assert caller.mirror(guest.name)[0] == 0
    folder = caller.destination / guest.name
    damaged = bytearray((folder / "vda.map").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "vda.map").write_bytes(damaged)
    guest.write("vda", MIB, MIB, 0x44)
    guest.flush()
    code, body, _said = caller.mirror(guest.name)
    assert code == errors.EXIT_FELL_BACK
    assert body["fell_back"]
    assert "map" in body["disks"][0]["fell_back"]
    assert (folder / "vda.img").read_bytes() == guest.model().path.read_bytes()
    assert caller.mirror(guest.name)[0] == 0


def test_a_mirror_that_somebody_wrote_to_is_noticed(caller: Caller, guest: DiskGuest) -> None:
    assert caller.mirror(guest.name)[0] == 0
    image = caller.destination / guest.name / "vda.img"
    with image.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"booted by hand")
    code, body, _said = caller.mirror(guest.name)
    assert code == errors.EXIT_FELL_BACK, body
    assert image.read_bytes() == guest.model().path.read_bytes()


def test_one_guests_failure_does_not_stop_the_others(
    caller: Caller, guest: DiskGuest, disk_guest: MakeGuest
) -> None:
    paused = disk_guest(DiskSpec("vda", size_bytes=_SIZE_BYTES))
    paused.domain().suspend()
    off = disk_guest(DiskSpec("vda", size_bytes=_SIZE_BYTES), started=False)
    options = (caller.destination, "--quiesce", "none", "--min-free", "32M")
    code, body, _said = caller.call("mirror", paused.name, guest.name, *options)
    assert code == errors.EXIT_PARTIAL
    assert [each["ok"] for each in body["guests"]] == [False, True]
    code, body, _said = caller.call("mirror", "--all", *options)
    assert code == errors.EXIT_PARTIAL
    assert {each["guest"]: each["ok"] for each in body["guests"]} == {
        paused.name: False, guest.name: True, off.name: True}


def test_doctor_says_what_is_in_the_way(caller: Caller, guest: DiskGuest) -> None:
    code, body, _said = caller.call("doctor", guest.name)
    assert code == 0
    assert body["guests"][0]["disks"][0]["target"] == "vda"
    guest.domain().suspend()
    code, body, _said = caller.call("doctor", guest.name)
    assert code == errors.GuestPaused.exit_code
    assert body["guests"][0]["error"]["next_command"].startswith("virsh resume")


def test_no_libvirt(caller: Caller) -> None:
    code, body, said = caller.call("mirror", "any", caller.destination, "--connect",
                                   "qemu+unix:///system?socket=/nonexistent")
    assert code == errors.NoHypervisor.exit_code
    assert "Traceback" not in said
    assert body["guests"][0]["error"]["code"] == "no-hypervisor"


@contextlib.contextmanager
def vanishing(folder: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Give a file system that can be taken away from under its users: everything there is EIO then."""
    backing = folder.with_suffix(".ext4")
    run("truncate", "-s", "64M", backing)
    run("mke2fs", "-q", "-t", "ext4", backing)
    folder.mkdir()
    run("mount", "-o", "loop", backing, folder)

    def vanish() -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    try:
        yield folder, vanish
    finally:
        run("umount", "-l", folder)
