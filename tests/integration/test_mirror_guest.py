"""Every mirror equals, byte for byte, what the guest's disks held at the captured moment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB, assert_equal_images
from stillframe.capture.states import State
from tests.fault.harness import Place, Run, overlays_left
from tests.kinds import disks, each

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 32 * MIB


def assert_mirror(place: Place, guest: DiskGuest, expected: dict[str, Path]) -> None:
    for target, moment in expected.items():
        assert_equal_images(place.mirror(guest) / f"{target}.img", moment)


def moment_of(guest: DiskGuest) -> dict[str, Path]:
    return {target: guest.model(target).copy_at_moment() for target in guest.disks}


def change(guest: DiskGuest, round_: int) -> None:
    for target in guest.disks:
        guest.write(target, (1 + round_) * MIB, 300 * 1024, 0xA0 + round_)
        guest.write_zeroes(target, (8 + round_) * MIB, 200 * 1024)
        guest.discard(target, (16 + round_) * MIB, MIB)
    guest.flush()


@pytest.mark.parametrize("kinds", each((kind, Kind.QCOW2) for kind in Kind))
def test_each_mirror_equals_the_disk_at_its_moment(
    disk_guest: MakeGuest, place: Place, kinds: tuple[Kind, ...]
) -> None:
    guest = disk_guest(*disks(kinds, _SIZE_BYTES))
    for round_ in range(3):
        change(guest, round_)
        expected = moment_of(guest)
        run = Run(place, guest, state=State.COPYING, phase="done")
        assert run.wait_reached(), run.output
        change(guest, round_ + 3)  # after the moment: none of it may show in the mirror
        assert run.go_on() == 0, run.output
        assert_mirror(place, guest, expected)
        assert not overlays_left(place)
    guest.destroy()
    for target in guest.disks:
        guest.assert_disk_equals_model(target)


def test_a_first_copy_keeps_holes(disk_guest: MakeGuest, place: Place) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, 256 * MIB, filled=False))
    guest.write("vda", 100 * MIB, MIB, 0x11)
    guest.flush()
    assert Run(place, guest).end() == 0
    image = place.mirror(guest) / "vda.img"
    assert image.stat().st_size == 256 * MIB
    assert image.stat().st_blocks * 512 <= 2 * MIB
    assert_mirror(place, guest, moment_of(guest))


def test_a_second_run_moves_only_what_changed(disk_guest: MakeGuest, place: Place) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, 64 * MIB))
    command = [sys.executable, "-m", "stillframe", "mirror", guest.name, str(place.destination),
               "--method=overlay", "--quiesce",
               "none", "--min-free", "32M", "--json", "--state-dir", str(place.state_dir)]
    subprocess.run(command, check=True, capture_output=True)
    guest.write("vda", 10 * MIB, 64 * 1024, 0x22)
    guest.write("vda", 30 * MIB + 5, 1, 0x33)
    guest.flush()
    done = subprocess.run(command, check=True, capture_output=True)
    disk = json.loads(done.stdout)["guests"][0]["disks"][0]
    assert disk["changed_bytes"] == 2 * 64 * 1024
    assert disk["destination_read_bytes"] == 0, "the map spares reading the destination"
    assert disk["written_bytes"] < 4 * 64 * 1024
    assert_mirror(place, guest, moment_of(guest))
    verified = subprocess.run([*command, "--verify-destination"], check=True, capture_output=True)
    disk = json.loads(verified.stdout)["guests"][0]["disks"][0]
    assert disk["destination_read_bytes"] > 0
    assert disk["changed_bytes"] == disk["healed_blocks"] == 0


def test_disks_resized_added_and_removed_between_runs(disk_guest: MakeGuest, place: Place) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))
    assert Run(place, guest).end() == 0
    guest.domain().blockResize("vda", _SIZE_BYTES + 8 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    guest.model("vda").resize(_SIZE_BYTES + 8 * MIB)
    guest.write("vda", _SIZE_BYTES + MIB, MIB, 0x44)
    guest.flush()
    assert Run(place, guest).end() == 0
    assert_mirror(place, guest, moment_of(guest))
    guest.destroy()
    xml = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    guest.daemons.connect().defineXML(xml.replace("dev='vdb'", "dev='vdc'"))
    guest.start()
    assert Run(place, guest).end() == 0
    names = sorted(path.name for path in place.mirror(guest).iterdir())
    assert "vdc.img" in names
    assert "vdb.img" not in names
    assert any(name.startswith("vdb.img.removed-") for name in names), "what was mirrored is not thrown away"
