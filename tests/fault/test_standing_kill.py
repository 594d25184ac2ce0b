"""Standing overlays: at every step, kill the tool, libvirtd or QEMU; recover; compare every byte."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB
from lab.written import WriteFailed
from stillframe.capture.journal import Journal
from stillframe.capture.states import State
from stillframe.clock import SystemClock
from tests.fault.harness import Place, Run, Victim, overlays_left, recover, strike
from tests.fault.matrix import KEPT, Step, back_steps, cells, standing_steps, steps_of
from tests.kinds import disks

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 16 * MIB


@pytest.fixture
def guest(disk_guest: MakeGuest) -> DiskGuest:
    return disk_guest(
        DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))


def held(guest: DiskGuest, folder: Path, name: str) -> dict[str, bytes]:
    """Return what each disk holds now, by its model."""
    return {
        target: guest.model(target).copy_at_moment(folder / f"{name}-{target}").read_bytes()
        for target in guest.disks
    }


def copied(place: Place, guest: DiskGuest) -> dict[str, bytes]:
    """Return what the last durable copy holds."""
    return {
        target: (place.destination / "current" / f"{target}.img").read_bytes() for target in guest.disks
    }


def write_some(guest: DiskGuest, pattern: int) -> None:
    for target in guest.disks:
        guest.write(target, MIB + pattern * 4096, MIB // 2, pattern)
        guest.write_zeroes(target, 5 * MIB + pattern * 4096, MIB // 4)
        with contextlib.suppress(WriteFailed):  # QEMU 7.2 ignores a discard while a commit runs on the disk
            guest.discard(target, 9 * MIB, MIB)
        guest.write(target, 9 * MIB + pattern * 4096, 8192, pattern)
    guest.flush()


def assert_only(place: Place, guest: DiskGuest, *, standing: bool) -> None:
    """Nothing is open; the guest is on one overlay a disk, or on none."""
    journal = Journal(place.state_dir, SystemClock())
    assert not journal.open_runs()
    records = journal.standing_runs()
    assert len(records) == int(standing)
    assert len(overlays_left(place)) == (len(guest.disks) if standing else 0)
    for target in guest.disks:
        for inactive in (True, False):
            on = guest.disk_source(target, inactive=inactive)[0]
            assert (on == records[0].disk(target).overlay_path) if standing else (
                "stillframe-overlay" not in on)


def struck(
    place: Place, guest: DiskGuest, daemons: LibvirtDaemons, run: Run, victim: Victim, moments: Path
) -> list[dict[str, bytes]]:
    """Strike while *run* stands at its step, the guest writing before; recover. Return the moments."""
    assert run.wait_reached(), run.output
    seen = [held(guest, moments, "before")]
    if guest.domain().info()[0] == 1:
        write_some(guest, 0x42)
        seen.append(held(guest, moments, "during"))
    strike(victim, run, guest, daemons)
    answer = recover(place, guest)
    assert answer.returncode == 0, run.output + answer.stdout + answer.stderr
    assert json.loads(answer.stdout)["guests"][0]["ok"]
    if victim is Victim.QEMU:
        for target in guest.disks:
            guest.assert_disk_equals_model(target)
        guest.start()
    assert guest.domain().info()[0] == 1, "the guest does not run"
    return seen


def goes_on(place: Place, guest: DiskGuest, moments: Path) -> None:
    """Whatever happened, the next runs are right, and the guest can be settled."""
    outputs = []
    for pattern in (0x51, 0x52):
        write_some(guest, pattern)
        again = Run(place, guest, what="standing")
        assert again.end() == 0, again.output
        outputs.append(again.output)
        assert copied(place, guest) == held(guest, moments, f"after-{pattern}")
        assert_only(place, guest, standing=True)
    assert outputs[-1].count("by changes") == len(guest.disks)
    settled = Run(place, guest, what="settle")
    assert settled.end() == 0, settled.output
    assert_only(place, guest, standing=False)
    guest.destroy()
    for target in guest.disks:
        guest.assert_disk_equals_model(target)


@pytest.mark.parametrize(("step", "victim"), cells(standing_steps()))
def test_a_later_run_killed_at_a_step(
    guest: DiskGuest, daemons: LibvirtDaemons, place: Place, tmp_path: Path, step: Step, victim: Victim
) -> None:
    _kill_a_later_run(step, victim, guest, daemons, place, tmp_path)


@pytest.mark.ceph
@pytest.mark.parametrize(("step", "victim"), cells(steps_of(KEPT - {State.STANDING}), KEPT))
def test_a_later_run_killed_while_overlays_on_ceph_are_committed_down(
    disk_guest: MakeGuest, daemons: LibvirtDaemons, place: Place, tmp_path: Path, step: Step, victim: Victim
) -> None:
    guest = disk_guest(*disks((Kind.RBD_QCOW2, Kind.RBD), _SIZE_BYTES))
    _kill_a_later_run(step, victim, guest, daemons, place, tmp_path)


@pytest.mark.ceph
def test_a_plain_capture_of_a_guest_that_stands_on_ceph_is_cut_short(
    disk_guest: MakeGuest, daemons: LibvirtDaemons, place: Place, tmp_path: Path
) -> None:
    """Its overlay goes back into one whose header libvirt wrote, without the user of the image below."""
    guest = disk_guest(*disks((Kind.RBD_QCOW2, Kind.RBD), _SIZE_BYTES))
    for pattern in (0x11, 0x21):
        write_some(guest, pattern)
        assert Run(place, guest, what="standing").end() == 0
    write_some(guest, 0x31)
    run = Run(place, guest, state=State.COPYING, phase="done")
    struck(place, guest, daemons, run, Victim.QEMU, tmp_path)
    assert_only(place, guest, standing=True)
    goes_on(place, guest, tmp_path)


def _kill_a_later_run(
    step: Step, victim: Victim, guest: DiskGuest, daemons: LibvirtDaemons, place: Place, tmp_path: Path
) -> None:
    write_some(guest, 0x11)
    earlier = held(guest, tmp_path, "first")
    assert Run(place, guest, what="standing").end() == 0
    write_some(guest, 0x21)
    run = Run(place, guest, what="standing", state=step[0], phase=step[1])
    moments = [earlier, *struck(place, guest, daemons, run, victim, tmp_path)]
    assert copied(place, guest) in moments, "the copy is of no single moment"
    assert_only(place, guest, standing=True)
    goes_on(place, guest, tmp_path)


@pytest.mark.parametrize(("step", "victim"), cells([(State.COPYING, "done"), (State.STANDING, "intent")]))
def test_a_first_run_killed_at_a_step(
    guest: DiskGuest, daemons: LibvirtDaemons, place: Place, tmp_path: Path, step: Step, victim: Victim
) -> None:
    write_some(guest, 0x11)
    run = Run(place, guest, what="standing", state=step[0], phase=step[1])
    struck(place, guest, daemons, run, victim, tmp_path)
    durable = (place.destination / "current").exists()
    assert_only(place, guest, standing=durable)
    goes_on(place, guest, tmp_path)


@pytest.mark.parametrize(("step", "victim"), cells(back_steps()))
@pytest.mark.parametrize("what", [pytest.param("standing-fail", marks=pytest.mark.slow), "settle"])
def test_a_run_that_is_given_up_and_a_settling_killed_at_a_step(
    guest: DiskGuest, daemons: LibvirtDaemons, place: Place, tmp_path: Path, what: str, step: Step,
    victim: Victim,
) -> None:
    write_some(guest, 0x11)
    assert Run(place, guest, what="standing").end() == 0
    durable = copied(place, guest)
    write_some(guest, 0x21)
    run = Run(place, guest, what=what, state=step[0], phase=step[1])
    struck(place, guest, daemons, run, victim, tmp_path)
    assert copied(place, guest) == durable
    assert_only(place, guest, standing=what == "standing-fail")
    goes_on(place, guest, tmp_path)
