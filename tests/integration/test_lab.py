"""The lab itself: what every other integration test takes for granted."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest

from lab import enter
from lab.daemons import LibvirtDaemons
from lab.database import check_image, make_file_system, needs_recovery
from lab.dbguest import DbGuest, boot_and_check, read_counter
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import KIB, MIB, ImagesDiffer, assert_equal_images, make_initial, run
from lab.waiting import PATIENCE_S, wait_for
from lab.written import WriteFailed
from tests.kinds import disks, each

_LAB = [sys.executable, "-m", "lab.enter", "--"]
_OVERLAY_XML = """
<domainsnapshot><disks>
  <disk name='vda' snapshot='external'><driver type='qcow2'/><source file='{folder}/vda.overlay'/></disk>
</disks></domainsnapshot>"""


def test_namespaces_are_not_those_of_the_outside(daemons: LibvirtDaemons) -> None:
    outside = os.environ[enter.OUTSIDE].split()
    assert all(inner != outer for inner, outer in zip(enter.namespaces(), outside, strict=True))
    assert daemons.libvirtd_pid() > 0
    assert daemons.connect().listAllDomains() == []


def test_another_lab_sees_nothing_of_this_one(daemons: LibvirtDaemons, tmp_path: Path) -> None:
    assert daemons.alive()
    script = "ls /run/libvirt /etc/libvirt/qemu 2>&1; ps ax | grep -c '[l]ibvirtd --daemon'; exit 7"
    done = subprocess.run([*_LAB, "sh", "-c", script], capture_output=True, text=True, check=False,
                          timeout=60, env={**os.environ, enter.PLACE: str(tmp_path)})
    assert done.returncode == 7
    assert "libvirt-sock" not in done.stdout
    assert done.stdout.splitlines()[-1] == "0"
    assert list(tmp_path.iterdir()) == []


def _start_lab(place: Path, script: str) -> subprocess.Popen[str]:
    lab = subprocess.Popen([*_LAB, "sh", "-c", script], stdout=subprocess.PIPE, text=True,
                           start_new_session=True, env={**os.environ, enter.PLACE: str(place)})
    assert lab.stdout is not None
    assert lab.stdout.readline() == "up\n"
    return lab


def _sleepers(mark: str) -> list[str]:
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if mark in path.read_text()]


def test_interrupt_reaches_the_command(tmp_path: Path) -> None:
    lab = _start_lab(tmp_path, "trap 'exit 5' INT; echo up; sleep 600.5 & wait")
    os.killpg(lab.pid, signal.SIGINT)
    assert lab.wait(PATIENCE_S) == 5
    assert _sleepers("600.5") == []
    assert list(tmp_path.iterdir()) == []


def test_ended_lab_takes_everything_with_it(tmp_path: Path) -> None:
    lab = _start_lab(tmp_path, "setsid sleep 601.5 & echo up; wait")
    wait_for("sleeper", lambda: _sleepers("601.5"), PATIENCE_S)
    lab.terminate()
    assert lab.wait(PATIENCE_S) == 128 + signal.SIGKILL
    wait_for("sleeper is gone", lambda: not _sleepers("601.5"), PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kinds", each((kind,) for kind in Kind))
def test_disk_equals_model_while_running_and_when_off(
    kinds: tuple[Kind, ...], disk_guest: Callable[..., DiskGuest], daemons: LibvirtDaemons
) -> None:
    guest = disk_guest(*disks(kinds, 64 * MIB))
    guest.assert_disk_equals_model()
    guest.write("vda", 1 * MIB, 64 * KIB, 0xBB)
    guest.write("vda", 1 * MIB + 512, 512, 0xBC)
    guest.write_zeroes("vda", 2 * MIB, 64 * KIB)
    guest.write_zeroes("vda", 3 * MIB, 64 * KIB, unmap=True)
    guest.write_bytes("vda", 40 * MIB, bytes(range(256)) * KIB)
    guest.discard("vda", 0, 1 * MIB)
    assert guest.reads_as("vda", 1 * MIB, 512, 0xBB)
    assert not guest.reads_as("vda", 1 * MIB, 1024, 0xBB)
    guest.assert_disk_equals_model()
    guest.destroy()
    guest.assert_disk_equals_model()
    guest.start()
    guest.write("vda", 50 * MIB, 4 * KIB, 0x11)
    guest.flush()
    daemons.kill_qemu(guest.name)
    wait_for("libvirt sees it", lambda: not guest.running(), PATIENCE_S)
    guest.assert_disk_equals_model()


def test_failed_write_is_noticed_and_not_modelled(disk_guest: Callable[..., DiskGuest]) -> None:
    guest = disk_guest()
    with pytest.raises(WriteFailed, match="write failed"):
        guest.write("vda", 64 * MIB, 512, 1)
    guest.assert_disk_equals_model()


def test_difference_is_reported_with_its_offset(disk_guest: Callable[..., DiskGuest], tmp_path: Path) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW))
    before = guest.model().copy_at_moment(tmp_path / "before.raw")
    guest.write("vda", 5 * MIB, 512, 0x77)
    with pytest.raises(ImagesDiffer, match=r"offset 5242880 .*1 blocks of 4 KiB"):
        assert_equal_images(before, guest.read_disk("vda"))


def test_guest_writes_while_libvirtd_is_dead(
    disk_guest: Callable[..., DiskGuest], daemons: LibvirtDaemons
) -> None:
    guest = disk_guest()
    guest.write("vda", 0, 4 * KIB, 1)
    daemons.kill_libvirtd()
    assert not daemons.alive()
    guest.write("vda", 4 * KIB, 4 * KIB, 2)
    daemons.start()
    assert guest.running()
    guest.assert_disk_equals_model()


def test_paused_libvirtd_and_guest_go_on(
    disk_guest: Callable[..., DiskGuest], daemons: LibvirtDaemons
) -> None:
    guest = disk_guest()
    pid = daemons.libvirtd_pid()
    daemons.pause_process(pid)
    guest.write("vda", 0, 4 * KIB, 1)
    daemons.continue_process(pid)
    assert guest.running()


def test_writes_land_in_an_overlay(disk_guest: Callable[..., DiskGuest]) -> None:
    guest = disk_guest()
    base_at_moment = guest.model().copy_at_moment()
    guest.domain().snapshotCreateXML(
        _OVERLAY_XML.format(folder=guest.folder),
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA)
    guest.write("vda", 7 * MIB, 4 * KIB, 0x99)
    assert guest.disk_source("vda")[0].endswith("vda.overlay")
    guest.assert_disk_equals_model()
    base = guest.folder / "base.raw"
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", guest.disks["vda"].path, base], check=True)
    assert_equal_images(base_at_moment, base)


def test_transient_guest(disk_guest: Callable[..., DiskGuest]) -> None:
    guest = disk_guest(transient=True)
    guest.write("vda", 0, 4 * KIB, 1)
    guest.destroy()
    assert not guest.running()


def test_every_domain_is_removed(
    disk_guest: Callable[..., DiskGuest], daemons: LibvirtDaemons
) -> None:
    guest = disk_guest()
    daemons.remove_all_domains()
    assert not guest.running()
    assert daemons.qemu_pid(guest.name) == 0


def test_database_guest_through_its_life(
    db_guest: Callable[..., DbGuest], daemons: LibvirtDaemons
) -> None:
    guest = db_guest()
    assert guest.wait_acknowledged(10) >= 10

    assert guest.domain().fsFreeze() == 1
    assert guest.freeze_status() == "frozen"
    # The console comes by way of virtlogd: what was said before the freeze is there once what is said now is.
    guest.command("NOTHING")
    settled = guest.acknowledged()
    frozen = guest.read_disk("vda")
    assert not needs_recovery(frozen)
    assert guest.domain().fsThaw() == 1
    guest.wait_acknowledged(settled + 5)

    daemons.kill_qemu(guest.name)
    wait_for("libvirt sees it", lambda: not guest.running(), PATIENCE_S)
    acknowledged = guest.acknowledged()
    assert needs_recovery(guest.read_disk("vda"))
    found, then = check_image(guest.disks["vda"].path, "qcow2"), check_image(frozen, "raw")
    assert found == boot_and_check(guest.disks["vda"].path, "qcow2")
    assert found.whole
    assert found.last >= acknowledged
    assert then.whole
    assert settled <= then.last <= settled + 1


def test_hanging_agent_freezes_late(db_guest: Callable[..., DbGuest]) -> None:
    guest = db_guest()
    guest.stop_agent()
    with pytest.raises(libvirt.libvirtError) as refused:
        guest.agent_command("guest-fsfreeze-freeze", 1)
    assert refused.value.get_error_code() == libvirt.VIR_ERR_AGENT_UNRESPONSIVE
    guest.wait_more_rows()
    guest.continue_agent()
    wait_for("the late freeze", lambda: guest.agent_answers(2) and guest.freeze_status() == "frozen",
             PATIENCE_S)
    guest.agent_command("guest-fsfreeze-thaw")
    guest.wait_more_rows()


def test_database_guest_shuts_down_cleanly_and_starts_again(db_guest: Callable[..., DbGuest]) -> None:
    guest = db_guest()
    guest.wait_more_rows(10)
    guest.domain().shutdown()
    wait_for("it is off", lambda: not guest.running(), PATIENCE_S)
    assert not needs_recovery(guest.read_disk("vda"))
    before = guest.acknowledged()
    guest.start()
    guest.wait_ready()
    assert guest.wait_more_rows() > before
    guest.power_off()
    assert not needs_recovery(guest.read_disk("vda"))


def test_no_command_to_the_guest_is_lost(db_guest: Callable[..., DbGuest]) -> None:
    # Each command comes over a connection of its own, at any instant of the guest's look for one.
    guest = db_guest(agent=False)
    for _ in range(40):
        guest.command("SYNC")


def test_damaged_database_is_found(tmp_path: Path) -> None:
    raw, mounted = tmp_path / "disk.raw", tmp_path / "mounted"
    make_file_system(raw, 32 * MIB)
    mounted.mkdir()
    run("mount", "-t", "ext4", "-o", "loop", raw, mounted)
    try:
        with contextlib.closing(sqlite3.connect(mounted / "rows.db")) as database, database:
            database.execute("CREATE TABLE rows(n INTEGER PRIMARY KEY, at TEXT, payload BLOB)")
            database.executemany("INSERT INTO rows VALUES(?, '', randomblob(256))",
                                 [(number,) for number in range(1, 1201)])
        damaged = (mounted / "rows.db").read_bytes()
    finally:
        run("umount", mounted)
    assert check_image(raw, "raw").whole
    half = len(damaged) // 2 // 4096 * 4096
    content = raw.read_bytes().replace(damaged[half:half + 4096], b"\xff" * 4096)
    raw.write_bytes(content)
    found = check_image(raw, "raw")
    assert found.integrity != "ok"
    assert not found.whole


def test_image_without_a_database_is_not_whole(tmp_path: Path) -> None:
    empty, no_file_system = tmp_path / "empty.raw", tmp_path / "zeroes.raw"
    make_file_system(empty, 32 * MIB)
    make_initial(no_file_system, 32 * MIB, "no file system")
    without_database, not_mountable = check_image(empty, "raw"), check_image(no_file_system, "raw")
    assert not without_database.whole
    assert without_database.integrity != not_mountable.integrity == "not-mountable"


def test_counter_is_on_the_first_disk_first(
    db_guest: Callable[..., DbGuest], daemons: LibvirtDaemons
) -> None:
    guest = db_guest(counter=True)
    guest.wait_more_rows(20)
    daemons.kill_qemu(guest.name)
    wait_for("libvirt sees it", lambda: not guest.running(), PATIENCE_S)
    first, second = (read_counter(guest.read_disk(target)) for target in ("vda", "vdb"))
    assert second <= first <= second + 1
    assert second >= guest.acknowledged() >= 20
