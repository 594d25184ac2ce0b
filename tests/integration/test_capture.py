"""The overlay capture on each kind of storage: what is captured, and that the guest is back after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB, assert_equal_images, run
from stillframe.capture.journal import Journal
from stillframe.capture.plan import Wishes, make_plan
from stillframe.capture.run import Tools, captured
from stillframe.capture.states import Consistency, Quiesce, State
from stillframe.capture.stepping import Watcher
from stillframe.clock import SystemClock
from stillframe.errors import Interrupted, StillframeError
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import find_domain
from tests.kinds import disks, each

MakeGuest = Callable[..., DiskGuest]


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    clock = SystemClock()
    journal = Journal(tmp_path / "state", clock)
    return Tools(journal, clock, Watcher(say=lambda _text: None, commit=lambda _progress: None))


def never() -> StillframeError | None:
    return None


def assert_back(guest: DiskGuest, tools: Tools) -> None:
    """The guest runs on its own images, no overlay is left, and no run is open."""
    assert guest.running()
    assert not tools.journal.open_runs()
    assert tools.journal.last_runs(1)[0].state is State.DONE
    assert not list(Path("/var/lib/libvirt/images").rglob("*.stillframe-overlay.qcow2"))
    for target, disk in guest.disks.items():
        for inactive in (False, True):
            assert "stillframe-overlay" not in guest.disk_source(target, inactive=inactive)[0]
        guest.write(target, 0, 65536, 0x77)
        guest.flush(target)
        assert disk.address


@pytest.mark.parametrize("kinds", each((kind,) for kind in Kind))
def test_the_base_stands_still_while_the_guest_writes_on(
    disk_guest: MakeGuest, tools: Tools, tmp_path: Path, images_dir: Path, kinds: tuple[Kind, ...]
) -> None:
    guest = disk_guest(*disks(kinds, 64 * MIB))
    guest.write("vda", MIB, 128 * 1024, 0xA1)
    guest.write_zeroes("vda", 3 * MIB, MIB)
    guest.flush("vda")
    connection = Connection("qemu:///system", tools.clock)
    wishes = Wishes(quiesce=Quiesce.NONE, overlay_folder=images_dir)
    plan = make_plan(find_domain(connection, guest.name), wishes)
    with captured(plan, tools, "nowhere", never) as capture:
        expected = guest.model("vda").copy_at_moment(tmp_path / "expected")
        guest.write("vda", MIB, 256 * 1024, 0xB2)
        guest.write("vda", 20 * MIB, 64 * 1024, 0xB3)
        guest.discard("vda", 3 * MIB, MIB)
        guest.flush("vda")
        capture.check_still()
        assert capture.consistency is Consistency.CRASH
        read = tmp_path / "read.raw"
        run("qemu-img", "convert", "-O", "raw", capture.disks[0].base.json_name(), read)
        assert_equal_images(read, expected)
    assert_back(guest, tools)
    guest.destroy()
    guest.assert_disk_equals_model("vda")


def test_a_failed_copy_brings_the_guest_back(disk_guest: MakeGuest, tools: Tools) -> None:
    guest = disk_guest(DiskSpec("vda"), DiskSpec("vdb", Kind.RAW))
    plan = make_plan(
        find_domain(Connection("qemu:///system", tools.clock), guest.name), Wishes(Quiesce.NONE)
    )
    def fail_in_mid_copy() -> None:
        with captured(plan, tools, "nowhere", never):
            guest.write("vda", MIB, MIB, 0xC1)
            guest.write("vdb", MIB, MIB, 0xC2)
            raise Interrupted("stopped by the test")

    with pytest.raises(Interrupted):
        fail_in_mid_copy()
    assert_back(guest, tools)
    assert tools.journal.last_runs(1)[0].given_up == "stopped by the test"
    guest.destroy()
    for target in guest.disks:
        guest.assert_disk_equals_model(target)
