"""What people, hosts and terminals do while a run is on, or between its crash and `recover`."""

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

from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB, run
from lab.waiting import PATIENCE_S, wait_for
from stillframe.capture.journal import Journal
from stillframe.capture.states import State
from stillframe.clock import SystemClock
from stillframe.errors import GuestUnfit, NeedsAttention
from tests.fault.harness import Place, Run, overlays_left, recover, small_file_system

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 16 * MIB


@pytest.fixture
def guest(disk_guest: MakeGuest) -> DiskGuest:
    return disk_guest(DiskSpec("vda", size_bytes=_SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))


def is_running(guest: DiskGuest) -> bool:
    return bool(guest.domain().info()[0] == libvirt.VIR_DOMAIN_RUNNING)


def write_some(guest: DiskGuest, at: int, pattern: int) -> None:
    for target in guest.disks:
        guest.write(target, at, MIB // 2, pattern)
    guest.flush()


@pytest.mark.parametrize(("state", "phase"), [
    (State.COPYING, "done"), (State.COMMITTING, "done"), (State.PIVOTING, "intent")])
def test_redefined_from_the_original_and_started_keeps_the_overlay(
    guest: DiskGuest, place: Place, daemons: LibvirtDaemons, state: State, phase: str
) -> None:
    """The overlay holds acknowledged writes that the base lacks: nobody may delete it."""
    original = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    stopped = Run(place, guest, state=state, phase=phase)
    assert stopped.wait_reached(), stopped.output
    stopped.kill()
    wait_for("the guest runs", lambda: is_running(guest), PATIENCE_S)
    for target in guest.disks:
        with contextlib.suppress(libvirt.libvirtError):
            guest.domain().blockJobAbort(target, 0)
    write_some(guest, MIB, 0xA9)
    daemons.kill_qemu(guest.name)
    wait_for("libvirt sees it", lambda: not guest.running(), PATIENCE_S)
    daemons.connect().defineXML(original)
    guest.start()
    answer = recover(place, guest)
    assert answer.returncode == NeedsAttention.exit_code, answer.stdout
    assert len(overlays_left(place)) == 2
    assert "qemu-img commit" not in answer.stdout, "a merge would make a disk that never was"


def test_a_tool_killed_while_the_guest_stands_still_does_not_leave_it_so(
    guest: DiskGuest, place: Place
) -> None:
    stopped = Run(place, guest, state=State.SUSPENDING, phase="done")
    assert stopped.wait_reached(), stopped.output
    assert not is_running(guest)
    stopped.kill()
    wait_for("the guard lets the guest go on", lambda: is_running(guest), PATIENCE_S)
    write_some(guest, MIB, 0xB1)
    assert recover(place, guest).returncode == 0
    assert not overlays_left(place)
    guest.destroy()
    for target in guest.disks:
        guest.assert_disk_equals_model(target)


def test_a_journal_that_is_full_in_the_pivot_does_not_leave_the_guest_paused(
    guest: DiskGuest, place: Place, tmp_path: Path
) -> None:
    with small_file_system(tmp_path / "small-state", 8 * MIB) as small:
        narrow = Place(place.destination, small, place.overlays)
        stopped = Run(narrow, guest, state=State.SUSPENDING, phase="done")
        assert stopped.wait_reached(), stopped.output
        filler = small / "filler"
        with contextlib.suppress(OSError):
            filler.write_bytes(b"x" * (8 * MIB))
        assert stopped.go_on() == NeedsAttention.exit_code, stopped.output
        assert is_running(guest), stopped.output
        filler.unlink()
        write_some(guest, MIB, 0xB2)
        answer = recover(narrow, guest)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    assert not overlays_left(place)
    guest.destroy()
    for target in guest.disks:
        guest.assert_disk_equals_model(target)


def test_a_disk_plugged_in_for_this_boot_alone_is_captured_too(guest: DiskGuest, place: Place) -> None:
    extra = guest.folder / "extra.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", extra, str(_SIZE_BYTES))
    guest.domain().attachDeviceFlags(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{extra}'/>"
        "<target dev='sdx' bus='virtio'/></disk>".replace("sdx", "vdx"), libvirt.VIR_DOMAIN_AFFECT_LIVE)
    mirrored = Run(place, guest)
    assert mirrored.end() == 0, mirrored.output
    assert not overlays_left(place)
    assert (place.mirror(guest) / "vdx.img").exists()


def test_a_disk_unplugged_in_mid_run_does_not_keep_the_others_from_coming_back(
    guest: DiskGuest, place: Place
) -> None:
    stopped = Run(place, guest, state=State.COPYING, phase="done")
    assert stopped.wait_reached(), stopped.output
    live = guest.domain().XMLDesc()
    begin = live.rindex("<disk ", 0, live.index("dev='vdb'"))
    disk = live[begin:live.index("</disk>", begin) + len("</disk>")]
    # Without an operating system nobody acknowledges the unplugging, so QEMU is told to do it at once.
    guest.monitor.execute("device_del", id="virtio-disk1")
    assert disk
    stopped.kill()
    unplugged = "dev='vdb'" not in guest.domain().XMLDesc()
    answer = recover(place, guest)
    assert answer.returncode == (NeedsAttention.exit_code if unplugged else 0), answer.stdout
    assert "stillframe-overlay" not in guest.disk_source("vda")[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_with_nobody_reading_the_output_ends_the_run_cleanly(
    guest: DiskGuest, place: Place, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "stillframe", "mirror", guest.name, str(place.destination),
         "--method=overlay",
         "--quiesce", "none", "--min-free", "32M", "--overlay-dir", str(place.overlays), "--state-dir",
         str(place.state_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    wait_for("an overlay", lambda: overlays_left(place), PATIENCE_S)
    process.send_signal(number)
    process.wait(PATIENCE_S)
    assert is_running(guest)
    assert not overlays_left(place)
    assert not Journal(place.state_dir, SystemClock()).open_runs()


def test_a_reboot_that_numbers_the_devices_anew_is_recovered_from(
    guest: DiskGuest, place: Place, daemons: LibvirtDaemons
) -> None:
    stopped = Run(place, guest, state=State.COPYING, phase="done")
    assert stopped.wait_reached(), stopped.output
    write_some(guest, MIB, 0xC3)
    stopped.kill()
    daemons.kill_qemu(guest.name)
    # As after a reboot: another boot, and the file systems under other device numbers.
    database = sqlite3.connect(place.state_dir / "journal.db")
    body = database.execute("select body from run").fetchone()[0]
    device = os.stat(place.overlays).st_dev
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert f'"device":{device}' in body
    assert boot in body
    database.execute("update run set body = ?", (
        body.replace(f'"device":{device}', f'"device":{device + 7}').replace(boot, "an earlier boot"),))
    database.commit()
    database.close()
    answer = recover(place, guest)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for target in guest.disks:
        guest.assert_disk_equals_model(target)


def forget_backing_format(image: Path) -> None:
    """Make the header extension that holds the backing format one that nobody knows."""
    content = bytearray(image.read_bytes())
    at = content.index(bytes.fromhex("e2792aca"), 0, 4096)
    content[at:at + 4] = bytes.fromhex("5f5f5f5f")
    image.write_bytes(content)


@pytest.mark.parametrize("wrong", ["another image", "no format"])
def test_a_chain_that_runs_otherwise_than_its_headers_say_is_refused(
    disk_guest: MakeGuest, place: Place, daemons: LibvirtDaemons, wrong: str
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.CHAIN, _SIZE_BYTES), started=False)
    other = guest.folder / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", other, str(_SIZE_BYTES))
    if wrong == "no format":
        other = guest.disks["vda"].files[-2]
        forget_backing_format(guest.disks["vda"].path)
    xml = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    source = f"<source file='{guest.disks['vda'].path}'/>"
    assert source in xml
    below = f"<source file='{guest.disks['vda'].base}'/><backingStore/>" if wrong == "no format" else ""
    deeper = f"<backingStore type='file'><format type='qcow2'/>{below}</backingStore>" if below else (
        "<backingStore/>")
    daemons.connect().defineXML(xml.replace(source, (
        f"{source}<backingStore type='file'><format type='qcow2'/><source file='{other}'/>{deeper}"
        "</backingStore>")))
    guest.start()
    refused = Run(place, guest)
    assert refused.end() == GuestUnfit.exit_code, refused.output
    assert ("names the format nothing" if wrong == "no format" else "other.qcow2") in refused.output
