"""Standing overlays: runs in a chain, each of which reads only what changed; and the way back."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import libvirt
import pytest

from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import KIB, MIB, assert_equal_images, run
from lab.waiting import PATIENCE_S, wait_for
from stillframe.block.anchor import Anchor
from stillframe.block.image import overlay_place
from stillframe.block.reader import DiskReader
from stillframe.block.tools import chain_info
from stillframe.capture.journal import Journal
from stillframe.capture.limits import Limits
from stillframe.capture.lock import domain_lock
from stillframe.capture.plan import Plan, Wishes, make_plan
from stillframe.capture.recover import recover_domain
from stillframe.capture.run import StillDisk, Tools, captured
from stillframe.capture.standing import (
    captured_by_standing_overlay,
    past_limit,
    settle,
    settle_past_limit,
)
from stillframe.capture.states import Quiesce, State
from stillframe.capture.stepping import Watcher
from stillframe.clock import SystemClock
from stillframe.errors import GuestUnfit, Interrupted, NeedsAttention, OverlayTaken, StillframeError
from stillframe.extent import Extent
from stillframe.extent import Kind as Holds
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import Domain, find_domain
from tests.fault.harness import Place
from tests.kinds import disks, each
from tests.pull_store import PullStore

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 16 * MIB


def never() -> StillframeError | None:
    return None


@dataclass
class Kept:
    """What a destination has of a guest: images, the anchor of the last durable run, and notes."""

    folder: Path
    overlays: Path
    tools: Tools
    anchor: Anchor | None = None
    notes: dict[str, str] = field(default_factory=dict)
    read_bytes: dict[str, int] = field(default_factory=dict)

    def plan(self, guest: DiskGuest, **wishes: object) -> Plan:
        domain = self.domain(guest)
        asked = Wishes(quiesce=Quiesce.NONE, overlay_folder=self.overlays,
                       limits=Limits(min_free_bytes=64 * MIB), **wishes)  # type: ignore[arg-type]
        return make_plan(domain, asked, self.tools.journal.standing(domain.uuid))

    def domain(self, guest: DiskGuest) -> Domain:
        return find_domain(Connection("qemu:///system", self.tools.clock), guest.name)

    def image(self, target: str) -> Path:
        return self.folder / f"{target}.img"

    def take(
        self, guest: DiskGuest, *, fail: bool = False, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """One run: the images become what the disks held at its moment, to the byte."""
        plan = self.plan(guest)
        with captured_by_standing_overlay(plan, self.tools, "here", never, self.anchor) as capture:
            moments = {
                target: guest.model(target).copy_at_moment(self.folder / f"{target}.expected")
                for target in guest.disks
            }
            meanwhile()
            if fail:
                raise Interrupted("stopped by the test")
            for disk in capture.disks:
                self._copy(disk)
                assert_equal_images(self.image(disk.target), moments[disk.target])
            capture.check_still()
        self.anchor = capture.anchor
        self.notes = {disk.target: disk.note for disk in capture.disks}

    def _copy(self, disk: StillDisk) -> None:
        with disk.read() as reader, reader.connect() as connection:
            changed = reader.changed()
            whole = changed is None
            if whole:
                self.image(disk.target).unlink(missing_ok=True)
            extents = list(reader.extents() if changed is None else changed)
            self.read_bytes[disk.target] = sum(
                each.length_bytes for each in extents if each.kind is Holds.DATA) if not whole else -1
            with self.image(disk.target).open("r+b" if not whole else "w+b") as image:
                image.truncate(reader.size_bytes)
                for each in extents:
                    _apply(image.fileno(), each, connection.pread_into)
        assert reader.size_bytes == disk.size_bytes


def _apply(fd: int, extent: Extent, pread: Callable[[memoryview, int], None]) -> None:
    offset = extent.offset_bytes
    while offset < extent.end_bytes:
        buffer = bytearray(min(MIB, extent.end_bytes - offset))
        if extent.kind is Holds.DATA:
            pread(memoryview(buffer), offset)
        os.pwrite(fd, buffer, offset)
        offset += len(buffer)


@pytest.fixture
def kept(tmp_path: Path, overlays_dir: Path) -> Kept:
    clock = SystemClock()
    journal = Journal(tmp_path / "state", clock)
    tools = Tools(journal, clock, Watcher(say=lambda _text: None, commit=lambda _progress: None))
    folder = tmp_path / "images"
    folder.mkdir()
    return Kept(folder, overlays_dir, tools)


def overlays(kept: Kept) -> list[str]:
    return sorted(path.name for path in kept.overlays.iterdir())


def assert_standing(guest: DiskGuest, kept: Kept) -> None:
    """The guest is on one overlay a disk, right over its own image, and the journal knows."""
    record = kept.tools.journal.standing(guest.domain().UUIDString())
    assert record is not None
    assert kept.anchor is not None
    assert record.id == kept.anchor.capture
    assert not kept.tools.journal.open_runs()
    assert len(kept.tools.journal.standing_runs()) == 1
    assert len(overlays(kept)) == len(guest.disks)
    for target, disk in guest.disks.items():
        for inactive in (False, True):
            assert guest.disk_source(target, inactive=inactive)[0] == record.disk(target).overlay_path
        known = record.disk(target)
        chain = chain_info(overlay_place(known.overlay_path, known.base))
        assert len(chain) == 1 + max(1, len(disk.files))
        assert known.base.is_named(chain[0].backing)


def assert_settled(guest: DiskGuest, kept: Kept) -> None:
    assert kept.tools.journal.standing(guest.domain().UUIDString()) is None
    assert not kept.tools.journal.open_runs()
    assert not overlays(kept)
    for target in guest.disks:
        for inactive in (False, True):
            assert "stillframe-overlay" not in guest.disk_source(target, inactive=inactive)[0]


def some_writes(guest: DiskGuest, chance: random.Random) -> None:
    for target in guest.disks:
        for _ in range(4):
            at, length = chance.randrange(0, 255) * 64 * KIB, chance.choice([512, 4 * KIB, 64 * KIB])
            guest.write(target, at + chance.choice([0, 512]), length - 512 or 512, chance.randrange(1, 256))
        guest.write_zeroes(target, chance.randrange(0, 200) * 64 * KIB, 3 * 64 * KIB)
        guest.discard(target, chance.randrange(0, 200) * 64 * KIB, 2 * 64 * KIB)
    guest.flush()


@pytest.mark.parametrize("kinds", each([
    (Kind.RAW,), (Kind.QCOW2,), (Kind.BLOCK,), (Kind.NBD,), (Kind.CHAIN,), (Kind.QCOW2, Kind.RAW),
    (Kind.LVM,), (Kind.RBD,), (Kind.RBD_QCOW2,), (Kind.RBD, Kind.QCOW2)]))
def test_a_chain_of_runs_reads_only_what_changed_and_every_image_is_right(
    disk_guest: MakeGuest, kept: Kept, kinds: tuple[Kind, ...]
) -> None:
    guest = disk_guest(*disks(kinds, _SIZE_BYTES))
    chance = random.Random(len(kinds))
    some_writes(guest, chance)
    kept.take(guest, meanwhile=lambda: some_writes(guest, chance))
    assert_standing(guest, kept)
    for number in range(5):
        some_writes(guest, chance)
        if number == 2:
            with pytest.raises(Interrupted):
                kept.take(guest, fail=True, meanwhile=lambda: some_writes(guest, chance))
            assert_standing(guest, kept)
            some_writes(guest, chance)
        kept.take(guest, meanwhile=lambda: some_writes(guest, chance))
        assert_standing(guest, kept)
        for target in guest.disks:
            assert not kept.notes[target]
            assert 0 < kept.read_bytes[target] < _SIZE_BYTES // 4
    for target in guest.disks:
        guest.assert_disk_equals_model(target)
    assert settle(kept.domain(guest), kept.tools, Limits()) is not None
    assert_settled(guest, kept)
    some_writes(guest, chance)
    kept.take(guest)
    assert kept.notes == dict.fromkeys(guest.disks, "no overlay stands on it")
    guest.destroy()
    assert settle(kept.domain(guest), kept.tools, Limits()) is not None
    assert_settled(guest, kept)
    for target in guest.disks:
        guest.assert_disk_equals_model(target)


@pytest.fixture
def guest(disk_guest: MakeGuest) -> DiskGuest:
    return disk_guest(
        DiskSpec("vda", Kind.RAW, _SIZE_BYTES), DiskSpec("vdb", Kind.QCOW2, _SIZE_BYTES))


def write(guest: DiskGuest, at: int, pattern: int) -> None:
    for target in guest.disks:
        guest.write(target, at, MIB // 2, pattern)
    guest.flush()


def test_another_destination_has_an_anchor_of_its_own(guest: DiskGuest, kept: Kept, tmp_path: Path) -> None:
    kept.take(guest)
    write(guest, MIB, 0xA1)
    other = Kept(tmp_path / "other", kept.overlays, kept.tools, kept.anchor)
    other.folder.mkdir()
    other.anchor = Anchor(capture="an older run", sizes={"vda": _SIZE_BYTES, "vdb": _SIZE_BYTES})
    other.take(guest)
    assert all("counts from" in note for note in other.notes.values())
    write(guest, 2 * MIB, 0xA2)
    kept.take(guest)
    assert all("counts from" in note for note in kept.notes.values()), "the overlay lacks what came before"
    assert_standing(guest, kept)


def test_a_destination_without_an_anchor_reads_all_of_a_guest_that_stands(
    guest: DiskGuest, kept: Kept, place: Place
) -> None:
    """What the overlay holds counts from the run that put it on, which was another destination's."""
    mirror = [
        sys.executable, "-m", "stillframe", "mirror", guest.name, str(place.destination), "--quiesce=none",
        "--min-free=32M", f"--overlay-dir={kept.overlays}", f"--state-dir={kept.tools.journal.folder}"]
    subprocess.run([*mirror, "--method=overlay"], check=True)
    write(guest, MIB, 0xA1)
    kept.take(guest)
    write(guest, 2 * MIB, 0xA2)
    with captured_by_standing_overlay(kept.plan(guest), kept.tools, "elsewhere", never, None) as capture:
        for disk in capture.disks:
            with disk.read() as reader:
                assert reader.changed() is None
    subprocess.run(mirror, check=True)
    for target in guest.disks:
        guest.model(target).assert_equal(place.mirror(guest) / f"{target}.img")


@pytest.mark.parametrize("kinds", each([(Kind.RAW, Kind.QCOW2), (Kind.RBD, Kind.RBD_QCOW2)]))
def test_the_plain_overlay_method_leaves_a_standing_guest_standing(
    disk_guest: MakeGuest, kept: Kept, kinds: tuple[Kind, ...]
) -> None:
    guest = disk_guest(*disks(kinds, _SIZE_BYTES))
    kept.take(guest)
    write(guest, MIB, 0xA1)
    plan = kept.plan(guest)
    with captured(plan, kept.tools, "elsewhere", never) as capture:
        expected = guest.model("vda").copy_at_moment(kept.folder / "expected")
        write(guest, 3 * MIB, 0xA2)
        run("qemu-img", "convert", "-O", "raw", plan.disks[0].base.json_name(), kept.folder / "plain")
        assert_equal_images(kept.folder / "plain", expected)
        capture.check_still()
    assert_standing(guest, kept)
    kept.take(guest)
    assert not any(kept.notes.values())
    assert_standing(guest, kept)


@pytest.mark.parametrize("kinds", each([(Kind.RAW, Kind.QCOW2), (Kind.RBD, Kind.RBD_QCOW2)]))
def test_killed_and_started_while_it_stands(
    disk_guest: MakeGuest, kept: Kept, daemons: LibvirtDaemons, kinds: tuple[Kind, ...]
) -> None:
    guest = disk_guest(*disks(kinds, _SIZE_BYTES))
    kept.take(guest)
    write(guest, MIB, 0xA1)
    daemons.kill_qemu(guest.name)
    wait_for("libvirt sees it", lambda: not guest.running(), PATIENCE_S)
    recover_domain(kept.domain(guest), kept.tools, Limits())
    guest.start()
    write(guest, 2 * MIB, 0xA2)
    daemons.kill_libvirtd()
    daemons.start()
    kept.take(guest)
    assert not any(kept.notes.values())
    assert_standing(guest, kept)
    daemons.kill_qemu(guest.name)
    wait_for("libvirt sees it", lambda: not guest.running(), PATIENCE_S)
    settle(kept.domain(guest), kept.tools, Limits())
    assert_settled(guest, kept)
    for target in guest.disks:
        guest.assert_disk_equals_model(target)


def test_a_disk_added_between_runs_is_read_whole_and_stands_from_then_on(
    guest: DiskGuest, kept: Kept
) -> None:
    kept.take(guest)
    write(guest, MIB, 0xA1)
    extra = guest.folder / "extra.raw"
    extra.write_bytes(bytes(_SIZE_BYTES))
    guest.domain().attachDeviceFlags(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{extra}'/>"
        "<target dev='vdx' bus='virtio'/></disk>",
        libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    plan = kept.plan(guest)
    with captured_by_standing_overlay(plan, kept.tools, "here", never, kept.anchor) as capture:
        notes = {disk.target: disk.note for disk in capture.disks}
    assert notes == {"vda": "", "vdb": "", "vdx": "no overlay stands on it"}
    record = kept.tools.journal.standing(guest.domain().UUIDString())
    assert record is not None
    assert [disk.target for disk in record.disks] == ["vda", "vdb", "vdx"]
    assert len(overlays(kept)) == 3
    assert settle(kept.domain(guest), kept.tools, Limits()) is not None
    assert not overlays(kept)


def test_a_disk_resized_between_runs_is_read_whole(disk_guest: MakeGuest, kept: Kept) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    kept.take(guest)
    guest.domain().blockResize("vda", _SIZE_BYTES + MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    guest.model("vda").resize(_SIZE_BYTES + MIB)
    guest.write("vda", _SIZE_BYTES, MIB // 2, 0xA4)
    guest.flush()
    kept.take(guest)
    assert kept.notes == {"vda": "its size has changed"}
    assert_standing(guest, kept)
    guest.write("vda", 0, MIB // 2, 0xA5)
    guest.flush()
    kept.take(guest)
    assert kept.notes == {"vda": ""}
    settle(kept.domain(guest), kept.tools, Limits())
    guest.destroy()
    guest.assert_disk_equals_model("vda")


@pytest.mark.parametrize("kind", [Kind.QCOW2, Kind.RAW], ids=lambda kind: kind.name)
@pytest.mark.parametrize("runs_between", [0, 1])
def test_a_disk_that_was_cut_while_it_stands_is_not_made_larger_by_settling(
    disk_guest: MakeGuest, kept: Kept, kind: Kind, runs_between: int
) -> None:
    """A commit leaves a larger base as large as it is, with what the guest had cut off at its end."""
    guest = disk_guest(DiskSpec("vda", kind, _SIZE_BYTES))
    guest.write("vda", _SIZE_BYTES - 2 * MIB, 2 * MIB, 0xA1)
    guest.flush()
    kept.take(guest)
    resize(guest, _SIZE_BYTES - MIB)
    for _ in range(runs_between):
        kept.take(guest)
        assert kept.notes == {"vda": "its size has changed"}
    with pytest.raises(GuestUnfit, match="made smaller") as error:
        settle(kept.domain(guest), kept.tools, Limits())
    assert_standing(guest, kept)
    assert f"virsh blockresize {guest.name} vda {_SIZE_BYTES}B" in error.value.next_command
    guest.assert_disk_equals_model("vda")
    resize(guest, _SIZE_BYTES)  # as the error says
    guest.assert_disk_equals_model("vda")
    settle(kept.domain(guest), kept.tools, Limits())
    assert_settled(guest, kept)
    guest.assert_disk_equals_model("vda")
    resize(guest, _SIZE_BYTES - MIB)
    guest.destroy()
    guest.assert_disk_equals_model("vda")


@pytest.mark.parametrize("how", ["settled", "a later run", "the plain overlay"])
def test_a_disk_that_grows_over_a_bitmap_that_a_killed_qemu_left(
    disk_guest: MakeGuest, kept: Kept, tmp_path: Path, daemons: LibvirtDaemons, how: str
) -> None:
    """QEMU makes no image larger that has an inconsistent bitmap: the commit would fail for ever."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    wishes = Wishes(Quiesce.NONE, kept.overlays, limits=Limits(min_free_bytes=64 * MIB))
    PullStore(tmp_path / "store").take(kept.domain(guest), kept.tools, wishes)
    guest.destroy()  # now the bitmap is in the image, and the next QEMU marks it as in use
    guest.start()
    daemons.kill_qemu(guest.name)
    wait_for("libvirt sees it", lambda: not guest.running(), PATIENCE_S)
    guest.start()
    if how == "the plain overlay":
        with captured(kept.plan(guest), kept.tools, "elsewhere", never):
            resize(guest, _SIZE_BYTES + MIB)
    else:
        kept.take(guest)
        resize(guest, _SIZE_BYTES + MIB)
        guest.write("vda", _SIZE_BYTES, MIB // 2, 0xA4)
        if how == "a later run":
            kept.take(guest)
        settle(kept.domain(guest), kept.tools, Limits())
    assert_settled(guest, kept)
    guest.assert_disk_equals_model("vda")
    taken = PullStore(tmp_path / "store").take(kept.domain(guest), kept.tools, wishes)
    assert "resized" in taken.notes["vda"]
    assert len(guest.domain().listAllCheckpoints()) == 1, "what is left of the older one is gone"


def resize(guest: DiskGuest, size_bytes: int) -> None:
    guest.domain().blockResize("vda", size_bytes, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    guest.model("vda").resize(size_bytes)


def test_a_base_that_somebody_wrote_to_is_never_committed_to(guest: DiskGuest, kept: Kept) -> None:
    kept.take(guest)
    write(guest, MIB, 0xA1)
    base = guest.disks["vda"].path
    before = base.read_bytes()
    os.utime(base)
    with pytest.raises(NeedsAttention, match="base was written to"):
        kept.take(guest)
    with pytest.raises(NeedsAttention, match="base was written to"):
        settle(kept.domain(guest), kept.tools, Limits())
    assert base.read_bytes() == before
    assert len(overlays(kept)) == 2
    assert kept.tools.journal.standing(guest.domain().UUIDString()) is not None


def test_a_snapshot_that_somebody_made_on_top_is_left_alone(guest: DiskGuest, kept: Kept) -> None:
    kept.take(guest)
    xml = "<domainsnapshot><disks>" + "".join(
        f"<disk name='{target}' snapshot='external'><source file='{kept.overlays}/theirs-{target}'/></disk>"
        for target in guest.disks) + "</disks></domainsnapshot>"
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    guest.domain().snapshotCreateXML(xml, flags)
    with pytest.raises(NeedsAttention):
        kept.take(guest)
    with pytest.raises(NeedsAttention, match="another overlay on top"):
        settle(kept.domain(guest), kept.tools, Limits())
    assert len(overlays(kept)) == 4


def test_an_overlay_that_was_deleted_or_unplugged_is_named(guest: DiskGuest, kept: Kept) -> None:
    kept.take(guest)
    record = kept.tools.journal.standing(guest.domain().UUIDString())
    assert record is not None
    path = Path(record.disk("vdb").overlay_path)
    path.rename(path.with_suffix(".aside"))
    with pytest.raises((NeedsAttention, StillframeError), match="overlay"):
        kept.take(guest)
    with pytest.raises(NeedsAttention, match=path.name):
        settle(kept.domain(guest), kept.tools, Limits())
    path.with_suffix(".aside").rename(path)
    assert settle(kept.domain(guest), kept.tools, Limits()) is not None
    assert_settled(guest, kept)


def test_an_overlay_of_an_unknown_journal_is_refused_and_a_disk_left_out_too(
    guest: DiskGuest, kept: Kept
) -> None:
    kept.take(guest)
    with pytest.raises(OverlayTaken):
        make_plan(kept.domain(guest), Wishes(Quiesce.NONE, kept.overlays))
    plan = kept.plan(guest, exclude=("vdb",))
    with (pytest.raises(GuestUnfit, match="vdb"),
          captured_by_standing_overlay(plan, kept.tools, "here", never, kept.anchor)):
        raise AssertionError("it began")
    assert_standing(guest, kept)


def test_what_the_next_start_would_not_find_on_its_overlay_is_refused(
    disk_guest: MakeGuest, kept: Kept, daemons: LibvirtDaemons
) -> None:
    transient = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), transient=True)
    with pytest.raises(GuestUnfit, match="no definition"):
        kept.take(transient)
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    original = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    kept.take(guest)
    guest.write("vda", MIB, MIB, 0xA1)
    guest.flush()
    daemons.connect().defineXML(original)
    with pytest.raises(GuestUnfit, match="its definition names"):
        kept.take(guest)
    guest.destroy()
    guest.start()
    with pytest.raises(NeedsAttention, match="stood on"):
        kept.take(guest)
    with pytest.raises(NeedsAttention, match="holds writes that the base lacks"):
        settle(kept.domain(guest), kept.tools, Limits())


def test_past_its_limit_it_is_settled_early_and_the_next_run_reads_all(guest: DiskGuest, kept: Kept) -> None:
    kept.take(guest)
    uuid = guest.domain().UUIDString()
    limits = Limits(standing_bytes=2 * MIB, min_free_bytes=16 * MIB)
    assert settle_past_limit(kept.domain(guest), kept.tools, limits) is None
    for at in range(4, 10):
        write(guest, at * MIB, 0xA0 + at)
    record = kept.tools.journal.standing(uuid)
    assert record is not None
    assert "its limit is" in past_limit(record, limits)
    with domain_lock(kept.tools.journal.folder, uuid, guest.name, "timer", kept.tools.clock):
        assert settle_past_limit(kept.domain(guest), kept.tools, limits) is not None
    assert_settled(guest, kept)
    kept.take(guest)
    assert set(kept.notes.values()) == {"no overlay stands on it"}
    assert_standing(guest, kept)


def test_a_watch_settles_a_guest_as_soon_as_its_overlay_passes_the_limit(
    guest: DiskGuest, kept: Kept, tmp_path: Path
) -> None:
    kept.take(guest)
    uuid = guest.domain().UUIDString()
    # Without looks of its own it has nothing but libvirt's event to go by.
    code = ("import stillframe.cli.settle as settle; settle._LOOK_EVERY_S = 1e6\n"
            "from stillframe.__main__ import main; main()")
    watch = subprocess.Popen(
        [sys.executable, "-c", code, "settle", "--watch", "--standing-limit", "2M",
         "--config", "/dev/null", "--state-dir", str(kept.tools.journal.folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for("libvirt knows the limits", lambda: _thresholds(guest) == {2 * MIB}, PATIENCE_S)
        assert kept.tools.journal.standing(uuid) is not None
        for at in range(4, 10):
            write(guest, at * MIB, 0xA0 + at)
        wait_for("it is settled", lambda: kept.tools.journal.standing(uuid) is None, PATIENCE_S)
        with domain_lock(kept.tools.journal.folder, uuid, guest.name, "test", kept.tools.clock, PATIENCE_S):
            assert_settled(guest, kept)
    finally:
        watch.terminate()
        said, _ = watch.communicate()
    assert watch.returncode == 0, said
    assert "its limit is 2.0 MiB" in said


def _thresholds(guest: DiskGuest) -> set[int]:
    nodes = guest.monitor.execute("query-named-block-nodes", flat=True)
    return {node["write_threshold"] for node in nodes} - {0}


def test_recover_leaves_a_standing_guest_alone(guest: DiskGuest, kept: Kept) -> None:
    kept.take(guest)
    before = kept.tools.journal.standing(guest.domain().UUIDString())
    assert recover_domain(kept.domain(guest), kept.tools, Limits()) == []
    assert kept.tools.journal.standing(guest.domain().UUIDString()) == before
    assert before is not None
    assert before.state is State.STANDING
    assert_standing(guest, kept)


def test_a_reader_of_the_top_tells_zeroes_from_data(disk_guest: MakeGuest, kept: Kept) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    guest.write("vda", MIB, MIB, 0xA1)
    guest.flush()
    kept.take(guest)
    guest.write_zeroes("vda", MIB, 128 * KIB)
    guest.write("vda", 4 * MIB, 64 * KIB, 0xA2)
    guest.flush()
    seen: list[Extent] = []

    def look(reader: DiskReader) -> None:
        changed = reader.changed()
        assert changed is not None
        seen.extend(changed)

    with captured_by_standing_overlay(kept.plan(guest), kept.tools, "here", never, kept.anchor) as capture, \
            capture.disks[0].read() as reader:
        look(reader)
    # Zeroes at the end always count as changed: the disk may have been cut, and made as large again.
    assert seen[-1].kind.reads_as_zero
    assert seen.pop().end_bytes == _SIZE_BYTES
    assert [(each.offset_bytes, each.length_bytes, each.kind.reads_as_zero) for each in seen] == [
        (MIB, 128 * KIB, True), (4 * MIB, 64 * KIB, False)]
