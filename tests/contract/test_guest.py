"""What both adapters of a guest promise to a capture: libvirt's, and that of a QEMU without libvirt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.barequemu import BareQemu
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB, assert_equal_images
from lab.waiting import PATIENCE_S, wait_for
from stillframe.block.image import file_place
from stillframe.block.reader import open_export
from stillframe.block.tools import create_overlay
from stillframe.clock import SystemClock
from stillframe.errors import GuestUnknown, HypervisorError
from stillframe.extent import Extent
from stillframe.hypervisor.bare import find_bare
from stillframe.hypervisor.checkpoint import read_checkpoint
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import find_domain
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import Power, PulledDisk, PullJob
from stillframe.hypervisor.qmp import QmpLink

_SIZE_BYTES = 16 * MIB
_DISKS = (DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))
_KIB = 1024


@dataclass
class Subject:
    """A guest as stillframe sees it, and as the lab does. *folder* is where QEMU may write."""

    guest: Guest
    lab: DiskGuest | BareQemu
    folder: Path
    end: Callable[[], None]

    def overlays(self) -> dict[str, str]:
        """Make an overlay for each disk; return them by target."""
        made = {target: str(self.folder / f"{target}.overlay") for target in self.lab.disks}
        for target, path in made.items():
            disk = self.lab.disks[target]
            create_overlay(path, file_place(str(disk.path), disk.image_format), _SIZE_BYTES)
        return made

    def job(self, number: int, since: str = "") -> PullJob:
        """Return a backup job whose checkpoint is on the disk that can keep one."""
        scratch = self.folder / f"{number}.scratch"
        disks = (PulledDisk("vda", f"{scratch}-a", since, keeps=True), PulledDisk("vdb", f"{scratch}-b"))
        return PullJob(str(self.folder / f"{number}.socket"), disks, (), f"point-{number}", {"vda": "mark"})

    def assert_pulled(self, job: PullJob, moment: dict[str, Path]) -> None:
        """Compare what the job's exports show with the disks of its moment."""
        for target, expected in moment.items():
            with open_export(job.socket, target, target) as reader, reader.connect() as connection:
                content = bytearray(reader.size_bytes)
                connection.pread_into(memoryview(content), 0)
            assert content == expected.read_bytes()

    def changed(self, job: PullJob) -> list[Extent]:
        with open_export(job.socket, "vda", "vda", bitmap="backup-vda") as reader:
            found = reader.changed()
            assert found is not None
            return list(found)

    def end_job(self, job: PullJob) -> None:
        self.guest.abort_job()
        wait_for("the job ends", lambda: not self.guest.backup_runs(job.socket), PATIENCE_S)

    def moment(self) -> dict[str, Path]:
        self.lab.flush()
        return {target: self.lab.model(target).copy_at_moment() for target in self.lab.disks}

    def tops(self) -> dict[str, tuple[str, str]]:
        """Return what the live view and QEMU name as the image of each disk."""
        view = self.guest.view()
        assert view.live is not None
        assert view.qemu is not None
        return {target: (disk.top.place, view.qemu.disks[target].files[0])
                for target, disk in view.live.disks.items()}

    def own(self) -> dict[str, tuple[str, str]]:
        return {target: (str(disk.path), str(disk.path)) for target, disk in self.lab.disks.items()}

    def files_in_qemu(self) -> set[str]:
        return {node["file"] for node in self.lab.monitor.execute("query-named-block-nodes")}


@pytest.fixture
def options() -> dict[str, bool]:
    """Give what the guest is to have besides its disks."""
    return {}


@pytest.fixture(params=["libvirt", "bare"])
def subject(
    request: pytest.FixtureRequest, tmp_path: Path, options: dict[str, bool]
) -> Iterator[Subject]:
    clock = SystemClock()
    if request.param == "libvirt":
        guest = request.getfixturevalue("disk_guest")(*_DISKS, **options)
        daemons = request.getfixturevalue("daemons")
        folder = request.getfixturevalue("overlays_dir")
        folder.chmod(0o777)
        yield Subject(find_domain(Connection("qemu:///system", clock), guest.name), guest, folder,
                      lambda: daemons.kill_qemu(guest.name))
        return
    bare = request.getfixturevalue("bare_qemu")(*_DISKS, **options)
    yield Subject(find_bare(QmpLink(str(bare.socket), clock)), bare, tmp_path, bare.kill)


def test_a_look_at_a_running_guest(subject: Subject) -> None:
    view = subject.guest.view()
    assert view.power is subject.guest.power() is subject.guest.glance_at_power() is Power.RUNNING
    assert (view.name, view.uuid) == (subject.guest.name, subject.guest.uuid) == (subject.lab.name, view.uuid)
    assert subject.tops() == subject.own()
    assert view.live is not None
    assert [disk.top.format for disk in view.live.disks.values()] == ["qcow2", "raw"]
    assert not view.jobs
    assert view.domain_job is subject.guest.has_job() is False
    assert [subject.guest.capacity_bytes(target) for target in subject.lab.disks] == [_SIZE_BYTES] * 2
    assert subject.guest.qemu_pid()
    assert subject.guest.checkpoints() == frozenset()
    assert subject.guest.snapshot_holders() == ()
    assert subject.guest.backup_problem() == ""


def test_suspended_and_resumed(subject: Subject) -> None:
    subject.guest.suspend()
    assert subject.guest.power() is subject.guest.view().power is Power.PAUSED
    subject.guest.resume()
    assert subject.guest.power() is Power.RUNNING


def test_overlays_go_on_together_and_are_committed(subject: Subject) -> None:
    overlays = subject.overlays()
    moment = subject.moment()
    subject.guest.put_overlays_on(overlays, ())
    assert subject.tops() == {target: (path, path) for target, path in overlays.items()}
    for target in subject.lab.disks:
        subject.lab.write(target, 2 * MIB, 300 * _KIB, 0xB1)
        subject.lab.write_zeroes(target, 64 * _KIB, 128 * _KIB)
    live = subject.guest.view().live
    assert live is not None
    for target, disk in live.disks.items():
        assert disk.chain[1].place == str(subject.lab.disks[target].path)
        subject.guest.start_commit(target, disk.chain[1].index, disk.chain[0].index)
    wait_for("both are ready", lambda: all(_ready(subject, target) for target in overlays), PATIENCE_S)
    subject.guest.suspend()
    for target in overlays:
        subject.guest.pivot(target)
    wait_for("the bases are in use", lambda: subject.tops() == subject.own(), PATIENCE_S)
    subject.guest.resume()
    wait_for("no job is left", lambda: not subject.guest.view().jobs, PATIENCE_S)
    wait_for("nobody uses the overlays", lambda: not subject.files_in_qemu() & set(overlays.values()),
             PATIENCE_S)
    assert subject.lab.monitor.execute("query-jobs") == []
    for target, before in moment.items():
        subject.lab.assert_disk_equals_model(target)
        with pytest.raises(AssertionError):
            assert_equal_images(subject.lab.model(target).path, before)


def _ready(subject: Subject, target: str) -> bool:
    view = subject.guest.view()
    assert view.live is not None
    mirror = view.live.disks[target].mirror
    return mirror is not None and mirror.ready


def test_an_overlay_that_is_not_there_changes_nothing(subject: Subject) -> None:
    overlays = subject.overlays()
    Path(overlays["vdb"]).unlink()
    with pytest.raises(HypervisorError):
        subject.guest.put_overlays_on(overlays, ())
    assert subject.tops() == subject.own()
    assert not subject.files_in_qemu() & set(overlays.values())
    subject.lab.write("vda", MIB, 64 * _KIB, 0xB2)
    subject.lab.assert_disk_equals_model("vda")


def test_a_commit_that_is_given_up_leaves_the_overlay_whole(subject: Subject) -> None:
    overlays = {"vda": subject.overlays()["vda"]}
    subject.guest.put_overlays_on(overlays, ("vdb",))
    assert subject.tops()["vdb"] == subject.own()["vdb"]
    subject.lab.write("vda", 3 * MIB, MIB, 0xB3)
    for _ in range(2):
        subject.guest.start_commit("vda", *_indexes(subject))
        subject.guest.abort_block_job("vda")
        wait_for("the commit is over", lambda: not subject.guest.view().jobs, PATIENCE_S)
        assert subject.tops()["vda"] == (overlays["vda"], overlays["vda"])
        subject.lab.assert_disk_equals_model("vda")


def _indexes(subject: Subject) -> tuple[int, int]:
    live = subject.guest.view().live
    assert live is not None
    chain = live.disks["vda"].chain
    return chain[1].index, chain[0].index


def test_a_pivot_without_a_commit_is_refused(subject: Subject) -> None:
    with pytest.raises(HypervisorError):
        subject.guest.pivot("vda")
    assert subject.tops() == subject.own()


@pytest.mark.parametrize("options", [{"io_thread": True}], ids=[""])
def test_io_threads_and_a_qemu_that_they_would_end(subject: Subject) -> None:
    """QEMU 7.2 fails an assertion once a client of such an export has gone: the guest would be gone, too."""
    major = subject.lab.monitor.execute("query-version")["qemu"]["major"]
    assert ("crashes" in subject.guest.backup_problem()) is (major < 9)


def test_a_backup_job_shows_the_moment_that_it_began(subject: Subject) -> None:
    subject.lab.write("vda", MIB, 128 * _KIB, 0xC1)
    moment, first = subject.moment(), subject.job(1)
    assert not subject.guest.backup_runs(first.socket)
    subject.guest.begin_backup(first)
    assert subject.guest.backup_runs(first.socket)
    assert not subject.guest.backup_runs(subject.job(2).socket)
    for target in subject.lab.disks:
        subject.lab.write(target, MIB, 256 * _KIB, 0xC2)
        subject.lab.write_zeroes(target, 0, 64 * _KIB)
    subject.assert_pulled(first, moment)
    assert subject.guest.checkpoints() == {"point-1"}
    told = read_checkpoint(subject.guest.checkpoint_text(first))
    assert told is not None
    assert (told.name, told.targets, dict(told.about)) == ("point-1", ("vda",), {"vda": "mark"})
    assert told.places["vda"] == f"file:{subject.lab.disks['vda'].path}"
    subject.end_job(first)
    wait_for("nothing of it is open", lambda: not any("scratch" in file for file in subject.files_in_qemu()),
             PATIENCE_S)
    assert subject.lab.monitor.execute("query-block-exports") == []


def test_a_second_job_tells_what_changed_since_the_first(subject: Subject) -> None:
    first, second = subject.job(1), subject.job(2, since="point-1")
    subject.guest.begin_backup(first)
    subject.lab.write("vda", 4 * MIB, 64 * _KIB, 0xC3)  # while the first is read: it counts
    subject.end_job(first)
    subject.lab.write_zeroes("vda", 6 * MIB, 64 * _KIB)
    moment = subject.moment()
    subject.guest.begin_backup(second)
    subject.lab.write("vda", 8 * MIB, 64 * _KIB, 0xC4)  # behind the moment: it does not
    changed = [(each.offset_bytes, each.end_bytes) for each in subject.changed(second)]
    assert changed[:2] == [(4 * MIB, 4 * MIB + 64 * _KIB), (6 * MIB, 6 * MIB + 64 * _KIB)]
    # The reader takes zeroes at the end of a disk for changed, too.
    assert [begin for begin, _end in changed[2:]] == [8 * MIB + 64 * _KIB]
    subject.assert_pulled(second, moment)
    subject.end_job(second)
    assert subject.guest.checkpoints() == {"point-1", "point-2"}
    subject.guest.delete_checkpoint("point-1", bitmaps=True)
    assert subject.guest.checkpoints() == {"point-2"}


def test_a_job_that_cannot_begin_leaves_nothing(subject: Subject) -> None:
    good = subject.job(1)
    bad = PullJob(good.socket, tuple(
        PulledDisk(disk.target, f"{disk.scratch}/no/such/folder" if disk.target == "vdb" else disk.scratch,
                   keeps=disk.keeps) for disk in good.disks), (), good.checkpoint, {})
    with pytest.raises(HypervisorError):
        subject.guest.begin_backup(bad)
    assert not subject.guest.backup_runs(good.socket)
    assert subject.guest.checkpoints() == frozenset()
    moment = subject.moment()
    subject.guest.begin_backup(good)
    subject.assert_pulled(good, moment)
    subject.end_job(good)


def test_a_bitmap_that_has_the_name_already_is_left_alone(subject: Subject) -> None:
    node = next(each["inserted"]["node-name"] for each in subject.lab.monitor.execute("query-block")
                if each.get("inserted", {}).get("drv") == "qcow2")
    subject.lab.monitor.execute("block-dirty-bitmap-add", node=node, name="point-1", persistent=True)
    with pytest.raises(HypervisorError):
        subject.guest.begin_backup(subject.job(1))
    found = subject.lab.monitor.execute("query-named-block-nodes")
    names = [each["name"] for one in found if one["node-name"] == node for each in one["dirty-bitmaps"]]
    assert names == ["point-1"]
    assert not subject.guest.backup_runs(subject.job(1).socket)


def test_what_is_left_of_a_job_is_closed(subject: Subject) -> None:
    job = subject.job(1)
    subject.guest.begin_backup(job)
    files = {disk.scratch for disk in job.disks}
    nodes = [node for node in subject.lab.monitor.execute("query-named-block-nodes") if node["file"] in files]
    names = tuple(node["node-name"] for node in sorted(nodes, key=lambda node: node["drv"] != "qcow2"))

    def closed() -> bool:
        with contextlib.suppress(HypervisorError):
            subject.guest.close_backup(job.socket, names)
        return not subject.files_in_qemu() & files

    wait_for("all of it is closed", closed, PATIENCE_S)
    assert subject.lab.monitor.execute("query-block-exports") == []
    assert not Path(job.socket).exists()


def test_a_guest_whose_qemu_is_gone(subject: Subject) -> None:
    subject.end()
    wait_for("it is gone", lambda: not subject.guest.power().has_qemu, PATIENCE_S)
    view = subject.guest.view()
    assert not view.power.has_qemu
    assert view.live is None
    assert subject.guest.qemu_pid() is None
    with pytest.raises((HypervisorError, GuestUnknown)):
        subject.guest.suspend()
