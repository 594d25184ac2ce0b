"""In the middle of letting an older overlay go, or while a guest stands; and what the commands say of it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import forked
from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB
from lab.monitor import MonitorFailed
from lab.waiting import PATIENCE_S, wait_for
from stillframe.capture.journal import Journal
from stillframe.capture.states import State
from stillframe.clock import SystemClock
from stillframe.errors import NeedsAttention
from tests.fault.harness import Place, Run, overlays_left, recover, small_file_system
from tests.fault.test_standing_kill import assert_only, goes_on, write_some

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 16 * MIB


@pytest.fixture
def guest(disk_guest: MakeGuest) -> DiskGuest:
    return disk_guest(
        DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))


def stopped_at(place: Place, guest: DiskGuest, state: State, phase: str) -> Run:
    """A later run that stands still at a step; the older overlays hold data."""
    write_some(guest, 0x11)
    assert Run(place, guest, what="standing").end() == 0
    for at in range(4):
        for target in guest.disks:
            guest.write(target, at * 3 * MIB, MIB, 0x20 + at)
    guest.flush()
    run = Run(place, guest, what="standing", state=state, phase=phase)
    assert run.wait_reached(), run.output
    return run


def start_slowly(place: Place, guest: DiskGuest) -> None:
    """Begin what the run was about to: committing the older overlays down, one MiB a second."""
    # The run writes down that the base is about to change before it starts them; that is done for it here.
    database = sqlite3.connect(place.state_dir / "journal.db")
    database.execute("update run set body = replace(body, '\"overlaid\"', '\"committing\"') "
                     "where state = 'lowering'")
    database.commit()
    database.close()
    old = Journal(place.state_dir, SystemClock()).standing_runs()[0]
    for target, disk in guest.disks.items():
        guest.domain().blockCommit(target, str(disk.path), old.disk(target).overlay_path, 1, 0)
    write_some(guest, 0x31)
    assert all(guest.domain().blockJobInfo(target) for target in guest.disks), "they are to be under way"


def jobs(guest: DiskGuest) -> list[str]:
    with contextlib.suppress(MonitorFailed):
        return [job["status"] for job in guest.monitor.execute("query-jobs")]
    return ["unknown"]


def assert_recovered(place: Place, guest: DiskGuest, folder: Path) -> None:
    answer = recover(place, guest)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    if not guest.running():
        for target in guest.disks:
            guest.assert_disk_equals_model(target)
        guest.start()
    assert_only(place, guest, standing=True)
    goes_on(place, guest, folder)


@pytest.mark.parametrize("then", ["adopted", "ended meanwhile", "qemu", "qemu and started"])
def test_killed_while_the_older_overlay_is_being_committed(
    guest: DiskGuest, place: Place, daemons: LibvirtDaemons, tmp_path: Path, then: str
) -> None:
    run = stopped_at(place, guest, State.LOWERING, "intent")
    start_slowly(place, guest)
    run.kill()
    if then.startswith("qemu"):
        daemons.kill_qemu(guest.name)
        wait_for("libvirt sees it", lambda: not guest.running(), PATIENCE_S)
        if then == "qemu and started":
            guest.start()
            write_some(guest, 0x32)
    else:
        daemons.kill_libvirtd()
        if then == "ended meanwhile":
            wait_for("the jobs end", lambda: set(jobs(guest)) <= {"concluded"}, PATIENCE_S)
        daemons.start()
    assert_recovered(place, guest, tmp_path)


def forget_boot(place: Place) -> None:
    """Make it another boot than the one that the runs began in."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    database = sqlite3.connect(place.state_dir / "journal.db")
    database.execute("update run set body = replace(body, ?, 'an earlier boot')", (boot,))
    database.commit()
    database.close()


@pytest.mark.parametrize("lost", [False, True])
def test_a_host_that_went_down_before_the_base_was_durable(
    guest: DiskGuest, place: Place, daemons: LibvirtDaemons, tmp_path: Path, lost: bool
) -> None:
    run = stopped_at(place, guest, State.LOWERING, "done")
    wait_for("the commits end", lambda: not jobs(guest), PATIENCE_S)
    run.kill()
    daemons.kill_qemu(guest.name)
    wait_for("libvirt sees it", lambda: not guest.running(), PATIENCE_S)
    forget_boot(place)
    if not lost:
        guest.start()
        assert_recovered(place, guest, tmp_path)
        return
    # What the base had not yet on disk, and the guest was started before anybody looked.
    with guest.disks["vdb"].path.open("r+b") as base:
        base.seek(3 * MIB)
        base.write(bytes(4096))
    guest.start()
    answer = recover(place, guest)
    assert answer.returncode == NeedsAttention.exit_code, answer.stdout
    assert "lacks writes" in answer.stdout
    assert len(overlays_left(place)) == 4
    # Off, it is simply committed once more.
    guest.destroy()
    assert recover(place, guest).returncode == 0
    for target in guest.disks:
        guest.assert_disk_equals_model(target)


def test_a_base_that_is_touched_once_the_copy_is_durable_is_not_committed_to(
    guest: DiskGuest, place: Place
) -> None:
    run = stopped_at(place, guest, State.LOWERING, "intent")
    base = guest.disks["vdb"].path
    before = base.read_bytes()
    os.utime(base)
    assert run.go_on() == NeedsAttention.exit_code
    assert "base was written to" in run.output
    assert base.read_bytes() == before
    assert len(overlays_left(place)) == 4


def test_a_full_base_in_the_commit_keeps_both_overlays_until_there_is_room(
    daemons: LibvirtDaemons, place: Place, images_dir: Path
) -> None:
    with small_file_system(images_dir / "small-standing", 48 * MIB) as small:
        guest = DiskGuest(
            daemons, small, "full-standing", (DiskSpec("vda", Kind.RAW, 64 * MIB, filled=False),))
        try:
            guest.define()
            guest.start()
            assert Run(place, guest, what="standing").end() == 0
            guest.write("vda", 0, 8 * MIB, 0xF1)
            guest.flush()
            filler = small / "filler"
            with contextlib.suppress(OSError):
                filler.write_bytes(b"x" * (48 * MIB))
            run = Run(place, guest, what="standing")
            assert run.end() == NeedsAttention.exit_code, run.output
            assert len(overlays_left(place)) == 2
            filler.unlink()
            guest.write("vda", 8 * MIB, MIB, 0xF2)
            guest.flush()
            assert recover(place, guest).returncode == 0
            assert_only(place, guest, standing=True)
            guest.destroy()
            guest.assert_disk_equals_model("vda")
        finally:
            guest.remove()


def command(place: Place, *words: str, code: int = 0) -> dict[str, Any]:
    answer = forked.run(
        [sys.executable, "-m", "stillframe", *words, "--state-dir", str(place.state_dir), "--json"],
        timeout_s=120)
    assert answer.returncode == code, answer.stdout + answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def test_the_commands_know_a_guest_that_stands(guest: DiskGuest, place: Place, tmp_path: Path) -> None:
    assert Run(place, guest, what="standing").end() == 0
    record = Journal(place.state_dir, SystemClock()).standing_runs()[0]
    status = command(place, "status")
    assert [(each["guest"], each["run"]) for each in status["standing"]] == [(guest.name, record.id)]
    assert {each["run"] for each in status["guests_on_overlays"]} == {record.id}
    doctor = command(place, "doctor", guest.name, "--quiesce", "none", "--overlay-dir", str(place.overlays))
    assert doctor["guests"][0]["standing"] == record.id
    assert recover(place, guest).returncode == 0
    assert "would start writing" in command(place, "settle", "--dry-run")["guests"][0]["did"][0]
    assert command(place, "settle", "--past-limit")["guests"][0]["did"] == []
    assert_only(place, guest, standing=True)
    # Another command captures it without ending that.
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(
        [sys.executable, "-m", "stillframe", "mirror", guest.name, str(tmp_path / "elsewhere"),
         "--method=overlay", "--quiesce",
         "none", "--overlay-dir", str(place.overlays), "--state-dir", str(place.state_dir), "--min-free",
         "32M"], check=True, timeout=120)
    for target in guest.disks:
        guest.model(target).assert_equal(tmp_path / "elsewhere" / guest.name / f"{target}.img")
    kept = (tmp_path / "elsewhere" / guest.name / "domain.xml").read_text()
    assert "stillframe-overlay" not in kept
    assert str(guest.disks["vda"].path) in kept
    assert_only(place, guest, standing=True)
    assert command(place, "settle", guest.name)["guests"][0]["ok"]
    assert_only(place, guest, standing=False)
    assert command(place, "settle")["guests"] == []
    assert command(place, "status")["standing"] == []
