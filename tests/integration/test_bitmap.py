"""Capturing by bitmap on real guests: every restore point equals the model of its moment, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import libvirt
import pytest

from lab.diskguest import DiskGuest
from lab.disks import Disk, DiskSpec, Kind
from lab.images import MIB, assert_equal_images, run
from lab.waiting import PATIENCE_S, wait_for
from stillframe.block.anchor import Anchor
from stillframe.capture.journal import Journal
from stillframe.capture.limits import Limits
from stillframe.capture.plan import Wishes, make_plan
from stillframe.capture.run import Capture, Tools, captured
from stillframe.capture.states import Quiesce, State
from stillframe.capture.stepping import Watcher
from stillframe.clock import SystemClock
from stillframe.errors import CopyFailed, GuestBusy, GuestUnfit, Interrupted, ShutdownImpossible
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import Domain, find_domain
from tests.kinds import disks, each
from tests.pull_store import PullStore, Taken, never

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 24 * MIB
_KIB = 1024
_BOTH = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG


@dataclass
class Desk:
    """One guest, one store, and the moment of each point."""

    guest: DiskGuest
    store: PullStore
    tools: Tools
    wishes: Wishes
    moments: dict[str, dict[str, Path]] = field(default_factory=dict)

    @property
    def domain(self) -> Domain:
        return find_domain(Connection("qemu:///system", self.tools.clock), self.guest.name)

    def take(self, during: Callable[[Capture], None] = lambda _capture: None) -> Taken:
        """Take a point, with writes of the guest while it is read; compare all points that there are."""
        self.guest.flush()
        moment = {target: self.guest.model(target).copy_at_moment() for target in self.guest.disks}

        def meanwhile(capture: Capture) -> None:
            self.moments[capture.run_id] = moment
            for number, target in enumerate(self.guest.disks):
                self.guest.write(target, 9 * MIB + number * 64 * _KIB, 192 * _KIB, 0xD0 + number)
                self.guest.write_zeroes(target, 512 * _KIB, 128 * _KIB)
                # No discard: QEMU drops them while a backup job runs (its filter was opened without unmap).
            during(capture)

        taken = self.store.take(self.domain, self.tools, self.wishes, during=meanwhile)
        self.assert_clean()
        self.assert_points()
        return taken

    def assert_points(self) -> None:
        current = self.store.current()
        assert current is not None
        for target, moment in self.moments[current.name].items():
            assert_equal_images(current / f"{target}.img", moment)

    def assert_clean(self) -> None:
        """Nothing of a run is left but one checkpoint, the one that the store's anchor names."""
        assert not self.tools.journal.open_runs()
        assert self.tools.journal.last_runs(1)[0].state is State.DONE
        assert not list(Path("/var/lib/libvirt").rglob("*stillframe-*.socket"))
        assert not list(Path("/var/lib/libvirt").rglob("*.stillframe-scratch.qcow2"))
        domain = self.guest.domain()
        anchor = self.store.anchor()
        expected = [anchor.checkpoint] if anchor is not None else []
        assert [each.getName() for each in domain.listAllCheckpoints()] == expected
        if self.guest.running():
            assert domain.jobInfo()[0] == 0
            assert domain.info()[0] == libvirt.VIR_DOMAIN_RUNNING
            for bitmaps in self.bitmaps().values():
                assert bitmaps <= set(expected)

    def bitmaps(self) -> dict[str, set[str]]:
        """Return the names of the bitmaps of each node."""
        nodes = self.guest.monitor.execute("query-named-block-nodes", flat=True)
        return {
            node["node-name"]: {each["name"] for each in node.get("dirty-bitmaps", ())}
            for node in nodes if node["drv"] == "qcow2"
        }

    def node(self, target: str = "vda") -> str:
        """Return QEMU's node of the disk."""
        number = sorted(self.guest.disks).index(target)
        devices = [each for each in self.guest.monitor.execute("query-block") if "inserted" in each]
        return str(devices[number]["inserted"]["node-name"])

    def write_some(self, number: int) -> None:
        for target in self.guest.disks:
            self.guest.write(target, number * MIB, 128 * _KIB, 0xA0 + number)
        self.guest.flush()


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    clock = SystemClock()
    return Tools(Journal(tmp_path / "state", clock), clock,
                 Watcher(say=lambda _text: None, commit=lambda _progress: None))


@pytest.fixture
def desk(disk_guest: MakeGuest, tools: Tools, tmp_path: Path, overlays_dir: Path) -> Callable[..., Desk]:
    def make(*disks: DiskSpec, **options: object) -> Desk:
        guest = disk_guest(*(disks or (DiskSpec("vda", size_bytes=_SIZE_BYTES),)), **options)
        wishes = Wishes(Quiesce.NONE, overlays_dir, limits=Limits(min_free_bytes=64 * MIB))
        return Desk(guest, PullStore(tmp_path / "store"), tools, wishes)

    return make


MakeDesk = Callable[..., Desk]


@pytest.mark.parametrize("kinds", each([(Kind.QCOW2,), (Kind.CHAIN,), (Kind.RBD_QCOW2,)]))
def test_a_full_then_incrementals(desk: MakeDesk, kinds: tuple[Kind, ...]) -> None:
    one = desk(*disks(kinds, _SIZE_BYTES))
    first = one.take()
    assert first.counted == {}
    assert first.notes == {"vda": ""}
    assert first.anchor is not None
    assert first.anchor.sizes == {"vda": _SIZE_BYTES}
    for number in range(1, 4):
        one.write_some(number)
        taken = one.take()
        assert taken.notes == {"vda": ""}
        assert 0 < taken.counted["vda"] < 9 * MIB, "zeroes at the end count as well"
        assert taken.anchor is not None
        assert taken.anchor.checkpoint != first.anchor.checkpoint


def test_two_disks_and_a_raw_one(desk: MakeDesk) -> None:
    one = desk(*(DiskSpec(name, kind, _SIZE_BYTES) for name, kind in (
        ("vda", Kind.QCOW2), ("vdb", Kind.QCOW2), ("vdc", Kind.RAW))))
    for number in range(1, 4):
        one.write_some(number)
        taken = one.take()
        assert taken.anchor is not None
        assert set(taken.anchor.sizes) == {"vda", "vdb"}
        assert "raw" in taken.notes["vdc"]
        assert set(taken.counted) == (set() if number == 1 else {"vda", "vdb"})


def test_zeroes_and_discards_over_earlier_data(desk: MakeDesk) -> None:
    one = desk()
    one.guest.write("vda", 2 * MIB, 2 * MIB, 0x11)
    one.take()
    one.guest.write_zeroes("vda", 2 * MIB, 256 * _KIB)
    one.guest.write_zeroes("vda", 5 * MIB // 2, 256 * _KIB, unmap=True)
    one.guest.discard("vda", 3 * MIB, 256 * _KIB)
    one.guest.write("vda", 7 * MIB // 2, 64 * _KIB, 0)
    taken = one.take()
    assert taken.notes == {"vda": ""}
    assert taken.counted["vda"] >= 768 * _KIB


def interrupt(_capture: Capture) -> None:
    raise Interrupted("SIGINT")


def fail(_capture: Capture) -> None:
    raise CopyFailed("the copy failed")


@pytest.mark.parametrize("how", [interrupt, fail])
def test_a_run_that_ended_after_the_job_began_then_an_incremental(
    desk: MakeDesk, how: Callable[[Capture], None]
) -> None:
    one = desk()
    first = one.take()
    one.write_some(1)
    with pytest.raises((Interrupted, CopyFailed)):
        one.take(how)
    one.assert_clean()
    assert one.store.anchor() == first.anchor
    one.write_some(2)
    taken = one.take()
    assert taken.notes == {"vda": ""}, "it counts from the last durable point"
    assert taken.counted["vda"] >= 256 * _KIB


def test_a_point_in_the_middle_is_lost(desk: MakeDesk) -> None:
    """Every point is whole, so one that goes takes no other with it; the anchor is the newest one's."""
    one = desk()
    one.take()
    one.write_some(1)
    one.take()
    middle = one.store.current()
    one.write_some(2)
    one.take()
    assert middle is not None
    one.store.drop(middle)
    one.write_some(3)
    assert one.take().notes == {"vda": ""}


def test_the_newest_point_is_lost_and_the_one_before_is_the_anchor_again(desk: MakeDesk) -> None:
    one = desk()
    one.take()
    older = one.store.current()
    assert older is not None
    one.write_some(1)
    one.take()
    (one.store.folder / "current").unlink()
    (one.store.folder / "current").symlink_to(older.name)
    one.write_some(2)
    taken = one.take()
    assert "lost" in taken.notes["vda"], "its checkpoint was deleted when the next became durable"
    one.write_some(3)
    assert one.take().notes == {"vda": ""}


def test_a_transient_guest_that_was_started_anew(desk: MakeDesk) -> None:
    one = desk(transient=True)
    one.take()
    one.write_some(1)
    xml = one.guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    one.guest.domain().destroy()
    one.guest.daemons.connect().createXML(xml)
    assert not one.guest.domain().listAllCheckpoints()
    one.write_some(2)
    taken = one.take()
    assert taken.notes == {"vda": ""}, "libvirt was told of the checkpoint again"
    assert taken.counted["vda"] >= 256 * _KIB


def test_the_guest_was_shut_down_and_started(desk: MakeDesk) -> None:
    one = desk()
    one.take()
    one.write_some(1)
    one.guest.destroy()  # orderly for QEMU: bitmaps are saved
    one.guest.start()
    one.write_some(2)
    assert one.take().notes == {"vda": ""}


def test_qemu_was_killed(desk: MakeDesk) -> None:
    one = desk()
    one.take()
    one.write_some(1)
    one.guest.daemons.kill_qemu(one.guest.name)
    one.guest.start()
    one.write_some(2)
    taken = one.take()
    assert "inconsistent" in taken.notes["vda"] or "lost" in taken.notes["vda"]
    assert taken.counted == {}
    one.write_some(3)
    assert one.take().notes == {"vda": ""}


def test_the_bitmap_is_lost(desk: MakeDesk) -> None:
    one = desk()
    taken = one.take()
    assert taken.anchor is not None
    one.guest.monitor.execute("block-dirty-bitmap-remove", node=one.node(), name=taken.anchor.checkpoint)
    one.write_some(1)
    assert "lost" in one.take().notes["vda"]
    one.write_some(2)
    assert one.take().notes == {"vda": ""}


def test_one_disk_of_two_lost_its_bitmap_and_libvirt_its_memory(desk: MakeDesk) -> None:
    one = desk(DiskSpec("vda", size_bytes=_SIZE_BYTES), DiskSpec("vdb", size_bytes=_SIZE_BYTES))
    taken = one.take()
    assert taken.anchor is not None
    name = taken.anchor.checkpoint
    one.guest.monitor.execute("block-dirty-bitmap-remove", node=one.node("vdb"), name=name)
    one.guest.domain().checkpointLookupByName(name).delete(
        libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    one.write_some(1)
    taken = one.take()
    assert taken.notes["vda"] == ""
    assert "lost" in taken.notes["vdb"]


@pytest.mark.parametrize("change", ["checkpoint", "capture", "destination"])
def test_an_anchor_that_is_not_of_this_destination(desk: MakeDesk, change: str) -> None:
    one = desk()
    taken = one.take()
    anchor = taken.anchor
    assert anchor is not None
    if change == "destination":
        one.store.name = "another"
    else:
        foreign = Anchor(
            capture="x" if change == "capture" else anchor.capture, sizes=anchor.sizes,
            checkpoint="x" if change == "checkpoint" else anchor.checkpoint,
            checkpoint_xml=anchor.checkpoint_xml)
        one.store.anchor = lambda: foreign  # type: ignore[method-assign]
    one.write_some(1)
    domain = one.domain
    taken = one.store.take(domain, one.tools, one.wishes)
    assert "not the checkpoint" in taken.notes["vda"]


def test_checkpoints_and_bitmaps_of_others_are_left_alone(desk: MakeDesk) -> None:
    one = desk()
    one.take()
    one.guest.domain().checkpointCreateXML("<domaincheckpoint><name>theirs</name></domaincheckpoint>", 0)
    one.guest.monitor.execute("block-dirty-bitmap-add", node=one.node(), name="own", persistent=True)
    one.write_some(1)
    taken = one.store.take(one.domain, one.tools, one.wishes)
    assert taken.notes == {"vda": ""}
    names = {each.getName() for each in one.guest.domain().listAllCheckpoints()}
    assert taken.anchor is not None
    assert names == {"theirs", taken.anchor.checkpoint}
    assert {"own", "theirs"} <= set().union(*one.bitmaps().values())


def test_two_destinations_each_have_their_own_checkpoint(desk: MakeDesk, tmp_path: Path) -> None:
    one = desk()
    other = Desk(one.guest, PullStore(tmp_path / "other", "other"), one.tools, one.wishes)
    one.take()
    for number in range(1, 3):
        one.write_some(number)
        for store in (other.store, one.store):
            taken = store.take(one.domain, one.tools, one.wishes)
            point = store.current()
            assert point is not None
            one.guest.flush()
            assert_equal_images(point / "vda.img", one.guest.model("vda").path)
            assert bool(taken.counted) is (number > 1 or store is one.store)
    assert len(one.guest.domain().listAllCheckpoints()) == 2


def test_a_resized_disk(desk: MakeDesk) -> None:
    one = desk()
    one.take()
    one.guest.domain().blockResize("vda", _SIZE_BYTES + MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    one.guest.model("vda").resize(_SIZE_BYTES + MIB)
    one.write_some(1)
    assert "resized" in one.take().notes["vda"]
    one.write_some(2)
    assert one.take().notes == {"vda": ""}


def test_images_that_changed_places(desk: MakeDesk) -> None:
    """Both have a bitmap of the same name, and the same size: only what the checkpoint kept tells."""
    one = desk(DiskSpec("vda", size_bytes=_SIZE_BYTES), DiskSpec("vdb", size_bytes=_SIZE_BYTES))
    one.write_some(1)
    one.take()
    one.guest.destroy()
    paths = [disk.path for disk in one.guest.disks.values()]
    models = [one.guest.model(target).path for target in one.guest.disks]
    for first, second in (paths, models):
        aside = first.with_suffix(".aside")
        first.rename(aside)
        second.rename(first)
        aside.rename(second)
    one.guest.start()
    one.write_some(2)
    taken = one.take()
    assert all("another image" in note for note in taken.notes.values()), taken.notes


def test_an_image_that_was_replaced_by_another(desk: MakeDesk) -> None:
    one = desk()
    one.take()
    one.guest.destroy()
    path = one.guest.disks["vda"].path
    run("qemu-img", "create", "-f", "qcow2", path.with_suffix(".new"), str(_SIZE_BYTES))
    path.with_suffix(".new").rename(path)
    one.guest.model("vda").zero(0, _SIZE_BYTES)
    one.guest.start()
    one.write_some(1)
    assert "another image" in one.take().notes["vda"]


def test_a_disk_that_was_added(desk: MakeDesk) -> None:
    one = desk(DiskSpec("vda", size_bytes=_SIZE_BYTES), DiskSpec("vdb", size_bytes=_SIZE_BYTES))
    wishes = one.wishes
    one.wishes = Wishes(wishes.quiesce, wishes.overlay_folder, ("vdb",), wishes.limits)
    taken = one.store.take(one.domain, one.tools, one.wishes)
    assert set(taken.notes) == {"vda"}
    one.wishes = wishes
    one.write_some(1)
    taken = one.take()
    assert taken.notes["vda"] == ""
    assert "added" in taken.notes["vdb"]


def test_a_disk_that_was_plugged_in_replaced_and_taken_out(desk: MakeDesk) -> None:
    one = desk(devices="<controller type='scsi' model='virtio-scsi'/>")  # QEMU asks no guest about its disks
    one.take()
    for label, note in (("first", "added"), ("second", "another image")):
        folder = one.guest.folder / label
        folder.mkdir()
        disk = one.guest.disks["sda"] = Disk(
            DiskSpec("sda", size_bytes=_SIZE_BYTES, bus="scsi"), folder, f"{one.guest.name}-{label}")
        one.guest.domain().attachDeviceFlags(disk.xml(), _BOTH)
        one.guest._learn_aliases()
        one.write_some(1)
        taken = one.take()
        assert taken.notes["vda"] == ""
        assert note in taken.notes["sda"]
        one.write_some(2)
        assert one.take().notes == {"vda": "", "sda": ""}
        one.guest.domain().detachDeviceFlags(one.guest.disks.pop("sda").xml(), _BOTH)
        wait_for("it is gone", lambda: "dev='sda'" not in one.guest.domain().XMLDesc(), PATIENCE_S)
    one.write_some(3)
    assert one.take().notes == {"vda": ""}, "what went with the disk is not missed"


def test_an_image_with_others_below_it(desk: MakeDesk) -> None:
    """Zeroes and discards over what lower images hold are changes, too."""
    one = desk(DiskSpec("vda", Kind.CHAIN, _SIZE_BYTES))
    one.take()
    for number in range(1, 4):
        one.write_some(number)
        one.guest.write_zeroes("vda", (2 * number) * MIB + 512, 256 * _KIB)
        one.guest.write_zeroes("vda", (6 + number) * MIB, 128 * _KIB, unmap=True)
        one.guest.discard("vda", (11 + number) * MIB, 192 * _KIB)
        taken = one.take()
        assert taken.notes == {"vda": ""}
        assert 0 < taken.counted["vda"] < _SIZE_BYTES // 2
    one.guest.destroy()
    one.guest.assert_disk_equals_model()


@pytest.mark.parametrize("kinds", each([(Kind.RAW,), (Kind.BLOCK,), (Kind.NBD,), (Kind.LVM,), (Kind.RBD,)]))
def test_no_disk_that_keeps_a_bitmap(desk: MakeDesk, kinds: tuple[Kind, ...]) -> None:
    one = desk(*disks(kinds, _SIZE_BYTES))
    with pytest.raises(GuestUnfit, match="raw images keep no bitmap") as error:
        one.store.take(one.domain, one.tools, one.wishes)
    assert "--method standing-overlay" in error.value.next_command
    assert not one.tools.journal.last_runs(1)


def test_a_qcow2_of_version_2(desk: MakeDesk) -> None:
    one = desk(
        DiskSpec("vda", size_bytes=_SIZE_BYTES), DiskSpec("vdb", size_bytes=_SIZE_BYTES), started=False)
    run("qemu-img", "amend", "-f", "qcow2", "-o", "compat=0.10", one.guest.disks["vdb"].path)
    one.guest.start()
    for number in range(1, 3):
        one.write_some(number)
        taken = one.take()
        assert "version 2" in taken.notes["vdb"]
        assert taken.notes["vda"] == ""


def test_a_shutdown_is_refused(desk: MakeDesk) -> None:
    one = desk()
    one.wishes = Wishes(Quiesce.SHUTDOWN, one.wishes.overlay_folder)
    with pytest.raises(ShutdownImpossible):
        one.store.take(one.domain, one.tools, one.wishes)


def test_another_backup_job(desk: MakeDesk, overlays_dir: Path) -> None:
    one = desk()
    overlays_dir.chmod(0o777)  # QEMU makes the socket there, as its own user
    one.guest.domain().backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{overlays_dir}/their.socket'/>"
        f"<disks><disk name='vda' type='file'><scratch file='{overlays_dir}/theirs'/></disk></disks>"
        "</domainbackup>", None, 0)
    with pytest.raises(GuestBusy):
        one.store.take(one.domain, one.tools, one.wishes)
    assert one.guest.domain().jobInfo()[0] != 0, "their job goes on"
    one.guest.domain().abortJob()


def hooked(one: Desk, tools: Tools, tmp_path: Path, act: Callable[[], None]) -> None:
    """Have *act* called right before the job is begun."""
    done: list[int] = []

    def hook(state: State, phase: str) -> None:
        if (state, phase) == (State.BEGINNING, "intent") and not done:
            done.append(1)
            act()

    one.tools = Tools(Journal(tmp_path / "state", tools.clock, hook), tools.clock, tools.watcher)


def test_the_bitmap_goes_right_before_the_job(desk: MakeDesk, tools: Tools, tmp_path: Path) -> None:
    """libvirt says that it is not found in the backing chain, or inconsistent."""
    one = desk()
    taken = one.take()
    assert taken.anchor is not None
    name = taken.anchor.checkpoint
    hooked(one, tools, tmp_path, lambda: one.guest.monitor.execute(
        "block-dirty-bitmap-remove", node=one.node(), name=name))
    one.write_some(1)
    assert "refused to count" in one.take().notes["vda"]
    one.write_some(2)
    assert one.take().notes == {"vda": ""}


def test_a_bitmap_of_the_new_name_is_there(desk: MakeDesk, tools: Tools, tmp_path: Path) -> None:
    """libvirt says: Bitmap already exists."""
    one = desk()
    one.take()

    def act() -> None:
        pull = one.tools.journal.open_runs()[0].pull
        assert pull is not None
        one.guest.monitor.execute("block-dirty-bitmap-add", node=one.node(), name=pull.checkpoint)

    hooked(one, tools, tmp_path, act)
    one.write_some(1)
    taken = one.store.take(one.domain, one.tools, one.wishes)
    assert "refused to count" in taken.notes["vda"]
    assert taken.anchor is not None
    assert taken.anchor.checkpoint.endswith("-2")
    point = one.store.current()
    assert point is not None
    one.guest.flush()
    assert_equal_images(point / "vda.img", one.guest.model("vda").path)
    one.write_some(2)
    assert one.store.take(one.domain, one.tools, one.wishes).notes == {"vda": ""}


def test_the_guest_is_shut_down_in_mid_job(desk: MakeDesk) -> None:
    one = desk()
    one.take()
    one.write_some(1)
    with pytest.raises(CopyFailed):
        one.take(lambda _capture: one.guest.destroy())
    one.guest.start()
    one.assert_clean()
    one.write_some(2)
    taken = one.take()
    assert taken.notes == {"vda": ""}, "the bitmaps were saved"
    assert taken.counted["vda"] >= 256 * _KIB


def test_libvirtd_is_killed_in_mid_job(desk: MakeDesk) -> None:
    one = desk()
    one.take()
    one.write_some(1)

    def kill(_capture: Capture) -> None:
        one.guest.daemons.kill_libvirtd()
        one.guest.daemons.start()

    assert one.take(kill).notes == {"vda": ""}
    one.write_some(2)
    assert one.take().notes == {"vda": ""}


def test_a_disk_that_was_cut_and_made_larger_again(desk: MakeDesk) -> None:
    """It has the old size, and zeroes where data was."""
    one = desk()
    one.guest.write("vda", 22 * MIB, MIB, 0x22)
    one.take()
    for size_bytes in (20 * MIB, _SIZE_BYTES):
        one.guest.domain().blockResize("vda", size_bytes, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        one.guest.model("vda").resize(size_bytes)
    one.write_some(1)
    one.take()


def test_an_overlay_that_came_and_went_in_between(desk: MakeDesk, overlays_dir: Path) -> None:
    one = desk()
    one.take()
    one.write_some(1)
    overlay = overlays_dir / "theirs.qcow2"
    one.guest.domain().snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{overlay}'/></disk>"
        "</disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA)
    one.write_some(2)
    one.guest.domain().blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    wait_for("the commit is ready", lambda: "ready='yes'" in one.guest.domain().XMLDesc(), PATIENCE_S)
    one.write_some(3)
    one.guest.domain().blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    wait_for("the mirror is gone", lambda: "<mirror" not in one.guest.domain().XMLDesc(), PATIENCE_S)
    one.write_some(4)
    one.take()


def test_a_capture_by_overlay_in_between(desk: MakeDesk) -> None:
    one = desk()
    one.take()
    one.write_some(1)
    with captured(make_plan(one.domain, one.wishes), one.tools, "elsewhere", never):
        one.write_some(2)
    one.write_some(3)
    assert one.take().notes == {"vda": ""}


@pytest.mark.parametrize("kinds", each(
    (Kind.QCOW2, kind) for kind in (Kind.RAW, Kind.BLOCK, Kind.NBD, Kind.LVM, Kind.RBD)))
def test_a_raw_disk_beside_a_qcow2_one_is_pulled_whole(desk: MakeDesk, kinds: tuple[Kind, ...]) -> None:
    """Also those without a folder of their own: the scratch files lie in the overlays' folder."""
    one = desk(*disks(kinds, _SIZE_BYTES))
    for number in range(1, 3):
        one.write_some(number)
        taken = one.take()
        assert taken.notes["vda"] == ""
        assert "raw" in taken.notes["vdb"]
        assert "vdb" not in taken.counted
