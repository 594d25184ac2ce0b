"""At every journal step, kill the tool, libvirtd or QEMU; recover; compare every byte.

The guest here has no operating system: what it wrote is known to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import Kind
from lab.images import MIB
from stillframe.capture.journal import Journal
from stillframe.capture.states import State
from stillframe.clock import SystemClock
from stillframe.mirror.folder import MirrorFolder
from stillframe.mirror.place import LocalPlace
from tests.fault.harness import Place, Run, Victim, overlays_left, recover, strike
from tests.fault.matrix import AT_WORK, WRITING_BACK, Step, cells, plain_steps, steps_of
from tests.kinds import disks

MakeGuest = Callable[..., DiskGuest]


def model_copy(guest: DiskGuest, folder: Path, name: str) -> dict[str, bytes]:
    """Return what each disk holds now, by its model."""
    return {
        target: guest.model(target).copy_at_moment(folder / f"{name}-{target}").read_bytes()
        for target in guest.disks
    }


def mirrored(place: Place, guest: DiskGuest) -> dict[str, bytes]:
    """Return what the mirror holds."""
    return {
        target: (place.mirror(guest) / f"{target}.img").read_bytes() for target in guest.disks
    }


@pytest.mark.parametrize(("step", "victim"), cells(plain_steps(), AT_WORK))
def test_killed_at_a_step(
    disk_guest: MakeGuest, daemons: LibvirtDaemons, place: Place, tmp_path: Path, step: Step,
    victim: Victim,
) -> None:
    guest = disk_guest(*disks((Kind.QCOW2, Kind.RAW), 16 * MIB))
    _kill_at(step, victim, guest, daemons, place, tmp_path)


@pytest.mark.ceph
@pytest.mark.parametrize(("step", "victim"), cells(steps_of(WRITING_BACK), WRITING_BACK))
def test_killed_while_disks_on_ceph_are_written_back(
    disk_guest: MakeGuest, daemons: LibvirtDaemons, place: Place, tmp_path: Path, step: Step,
    victim: Victim,
) -> None:
    guest = disk_guest(*disks((Kind.RBD_QCOW2, Kind.RBD), 16 * MIB))
    _kill_at(step, victim, guest, daemons, place, tmp_path)


def _kill_at(
    step: Step, victim: Victim, guest: DiskGuest, daemons: LibvirtDaemons, place: Place, tmp_path: Path
) -> None:
    moments = [model_copy(guest, tmp_path, "first")]
    assert Run(place, guest).end() == 0
    for target in guest.disks:
        guest.write(target, MIB, MIB // 2, 0xA1)
    guest.flush()
    moments.append(model_copy(guest, tmp_path, "before"))

    run = Run(place, guest, state=step[0], phase=step[1])
    assert run.wait_reached(), run.output
    if guest.domain().info()[0] == 1:  # running: a paused guest writes nothing
        for target in guest.disks:
            guest.write(target, 5 * MIB // 4, MIB // 2, 0xB2)
            guest.write_zeroes(target, 3 * MIB, MIB // 4)
        guest.flush()
        moments.append(model_copy(guest, tmp_path, "during"))
    strike(victim, run, guest, daemons)

    answer = recover(place, guest)
    assert answer.returncode == 0, run.output + answer.stdout + answer.stderr
    assert json.loads(answer.stdout)["guests"][0]["ok"]
    assert not overlays_left(place)
    assert not Journal(place.state_dir, SystemClock()).open_runs()
    if victim is not Victim.QEMU:
        assert guest.domain().info()[0] == 1, "the guest does not run"
    for target in guest.disks:
        for inactive in (True, False):
            assert "stillframe-overlay" not in guest.disk_source(target, inactive=inactive)[0]
    guest.destroy()
    for target in guest.disks:
        guest.assert_disk_equals_model(target)
    assert MirrorFolder(LocalPlace(place.mirror(guest)), clock=SystemClock()).inspect().state.name == "WHOLE"
    assert mirrored(place, guest) in moments, "the mirror is of no single moment"

    guest.start()
    assert Run(place, guest).end() == 0
    assert mirrored(place, guest) == model_copy(guest, tmp_path, "after")
    assert step[0] in State
