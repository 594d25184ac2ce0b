"""Guests that are shut off: read under QEMU's lock, byte for byte, and never while they run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest

from lab import forked
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB, assert_equal_images, run
from lab.waiting import PATIENCE_S, wait_for
from stillframe import errors
from stillframe.block.anchor import Anchor
from stillframe.block.image import file_place
from stillframe.block.reader import open_reader
from stillframe.capture.choose import captured, planned
from stillframe.capture.journal import Journal
from stillframe.capture.method import Method
from stillframe.capture.plan import Plan, Wishes
from stillframe.capture.run import Tools
from stillframe.capture.states import Consistency, State
from stillframe.capture.stepping import Watcher
from stillframe.clock import SystemClock
from stillframe.extent import Extent
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import find_domain
from stillframe.mirror.files import OsFiles
from stillframe.mirror.layout import RECORD, read_record, write_record
from tests.fault.harness import Place
from tests.integration.repositories import Repo, make_repo
from tests.kinds import disks, each

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 32 * MIB


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    """Give an empty repository."""
    return make_repo(place, tmp_path)


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    clock = SystemClock()
    return Tools(Journal(tmp_path / "state", clock), clock,
                 Watcher(say=lambda _text: None, commit=lambda _progress: None))


def never() -> errors.StillframeError | None:
    return None


def plan_of(guest: DiskGuest, tools: Tools, method: Method = Method.AUTO) -> Plan:
    domain = find_domain(Connection("qemu:///system", tools.clock), guest.name)
    return planned(domain, Wishes(method=method), tools)


def shut_down(guest: DiskGuest) -> None:
    """End the guest as its own shutdown does: QEMU tells libvirt, and ends."""
    guest.flush()
    guest.domain().shutdown()
    guest.monitor.human("quit")
    wait_for(f"{guest.name} is off", lambda: not guest.running(), PATIENCE_S)


def change(guest: DiskGuest, round_: int) -> None:
    for target in guest.disks:
        guest.write(target, (1 + round_) * MIB, 300 * 1024, 0xA0 + round_)
        guest.write_zeroes(target, (8 + round_) * MIB, 200 * 1024)
    guest.flush()


def mirror(place: Place, *words: str) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "stillframe", "mirror", *words, str(place.destination), "--min-free", "32M",
         "--json", "--state-dir", str(place.state_dir)], timeout_s=120)


def mirrored(place: Place, *words: str, code: int = 0) -> dict[str, Any]:
    done = mirror(place, *words)
    assert done.returncode == code, done.stdout + done.stderr
    return {each["guest"]: each for each in json.loads(done.stdout)["guests"]}


def assert_mirror(place: Place, guest: DiskGuest) -> None:
    for target in guest.disks:
        assert_equal_images(place.mirror(guest) / f"{target}.img", guest.model(target).path)


@pytest.mark.parametrize("kinds", each([
    (Kind.RAW,), (Kind.QCOW2,), (Kind.BLOCK,), (Kind.CHAIN,), (Kind.NBD,), (Kind.RAW, Kind.QCOW2),
    (Kind.LVM,), (Kind.RBD,), (Kind.RBD_QCOW2,), (Kind.RBD, Kind.RBD_QCOW2)]))
def test_a_guest_that_is_off_is_read_byte_for_byte(
    disk_guest: MakeGuest, place: Place, repo: Repo, tmp_path: Path, kinds: tuple[Kind, ...]
) -> None:
    guest = disk_guest(*disks(kinds, _SIZE_BYTES))
    for round_ in range(2):
        change(guest, round_)
        shut_down(guest)
        body = mirrored(place, guest.name)[guest.name]
        assert body["consistency"] == "shutdown"
        assert {disk["method"] for disk in body["disks"]} == {"offline"}
        assert_mirror(place, guest)
        result = repo.json("backup", guest.name, "--method", "offline")["guests"][0]
        assert result["consistency"] == "shutdown"
        assert {disk["method"] for disk in result["disks"]} == {"offline"}
        assert bool(result["parent"]) is (round_ > 0)
        expected = {target: guest.model(target).copy_at_moment() for target in guest.disks}
        repo.assert_restores(result["snapshot"], expected, tmp_path)
        guest.start()
    assert repo.json("status")["open_runs"] == []
    shown = repo.json("show", "latest")["snapshot"]
    assert shown["disks"][0]["method"] == "offline"
    assert guest.name in shown["live_xml"]


def test_how_it_ended_says_what_the_copy_is_worth(
    disk_guest: MakeGuest, place: Place
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    guest.destroy()
    done = mirrored(place, guest.name, code=errors.EXIT_CRASH_CONSISTENT)[guest.name]
    assert done["consistency"] == "crash"
    assert "destroyed" in done["warnings"][0]
    assert mirrored(place, guest.name, "--quiesce", "none")[guest.name]["consistency"] == "crash"


def test_a_managed_save_makes_it_crash_consistent(disk_guest: MakeGuest, place: Place) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    change(guest, 0)
    guest.domain().managedSave()
    wait_for("off", lambda: not guest.running(), PATIENCE_S)
    body = mirrored(place, guest.name, code=errors.EXIT_CRASH_CONSISTENT)[guest.name]
    assert body["consistency"] == "crash"
    assert "memory" in body["warnings"][0]
    assert_mirror(place, guest)
    guest.domain().managedSaveRemove()


def test_a_start_fails_while_it_is_read(disk_guest: MakeGuest, tools: Tools) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))
    shut_down(guest)
    with captured(plan_of(guest, tools), tools, "nowhere", never, None) as capture:
        assert capture.consistency is Consistency.SHUTDOWN
        # The first disk's reader is not used any more, and the lock is still held.
        with capture.disks[0].read() as reader:
            assert reader.size_bytes == _SIZE_BYTES
        with pytest.raises(libvirt.libvirtError, match="lock"):
            guest.domain().create()
        capture.check_still()
    assert tools.journal.last_runs(1)[0].state is State.DONE
    guest.start()
    assert guest.running()


@pytest.mark.parametrize("kinds", each([(Kind.NBD,), (Kind.BLOCK,), (Kind.RBD,), (Kind.RBD_QCOW2,)]))
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_start_that_no_lock_prevents_is_noticed(
    disk_guest: MakeGuest, tools: Tools, kinds: tuple[Kind, ...], goes_on: bool
) -> None:
    guest = disk_guest(*disks(kinds, _SIZE_BYTES))
    shut_down(guest)

    def start_in_mid_read() -> None:
        with captured(plan_of(guest, tools), tools, "nowhere", never, None) as capture:
            guest.start()
            guest.write("vda", 5 * MIB, MIB, 0x51)
            guest.flush()
            if not goes_on:
                guest.domain().destroy()
            wait_for("noticed", lambda: capture.stop() is not None, PATIENCE_S)
            capture.check_still()

    with pytest.raises(errors.CopyFailed, match="was started"):
        start_in_mid_read()
    assert tools.journal.open_runs() == []
    assert "started" in tools.journal.last_runs(1)[0].given_up
    assert guest.running() is goes_on, "the copy is given up, not the guest"
    guest.assert_disk_equals_model()


@pytest.mark.parametrize("ends", [False, True])
def test_a_chain_of_which_the_definition_names_a_part(
    disk_guest: MakeGuest, place: Place, ends: bool
) -> None:
    """As somebody's snapshot leaves it: what is below is up to the headers, unless it is said to end."""
    guest = disk_guest(DiskSpec("vda", Kind.CHAIN, _SIZE_BYTES))
    guest.domain().snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{guest.folder}/theirs'/>"
        "</disk></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA)
    change(guest, 0)
    shut_down(guest)
    definition = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    assert definition.count("<backingStore") == 1, "libvirt names one image below theirs, of three"
    if ends:
        guest.daemons.connect().defineXML(
            definition.replace("</backingStore>", "<backingStore/></backingStore>"))
        done = mirror(place, guest.name)
        assert done.returncode == errors.GuestUnfit.exit_code, done.stderr
        assert "headers" in done.stderr
        return
    mirrored(place, guest.name)
    assert_mirror(place, guest)
    guest.start()
    guest.assert_disk_equals_model()


def test_an_image_that_somebody_else_writes_to_is_not_read(disk_guest: MakeGuest, place: Place) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    shut_down(guest)
    holder = subprocess.Popen(["qemu-io", "-f", "qcow2", str(guest.disks["vda"].path)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        holder.stdout.readline()  # it is open now
        done = mirror(place, guest.name)
        assert done.returncode == errors.CopyFailed.exit_code, done.stderr
        assert "lock" in done.stderr
        assert "not touched" in done.stderr
    finally:
        holder.kill()
        holder.wait()
    assert mirrored(place, guest.name)[guest.name]["consistency"] == "shutdown"


def test_a_guest_that_runs_behind_libvirts_back_is_not_read(disk_guest: MakeGuest, tools: Tools) -> None:
    """libvirt and its pid file say that it is off; its QEMU is there, and no lock is on its network disk."""
    guest = disk_guest(DiskSpec("vda", Kind.NBD, _SIZE_BYTES))
    shut_down(guest)
    plan = plan_of(guest, tools)
    hidden = subprocess.Popen(
        ["qemu-system-x86_64", "-uuid", guest.domain().UUIDString(), "-nodefaults", "-display", "none", "-S",
         "-machine", "q35,accel=tcg"])
    try:
        with pytest.raises(errors.CopyFailed, match="was started"), \
                captured(plan, tools, "nowhere", never, None):
            pass
    finally:
        hidden.kill()
        hidden.wait()


def test_all_covers_guests_that_run_and_that_are_off(
    disk_guest: MakeGuest, place: Place, repo: Repo, tmp_path: Path
) -> None:
    runs, off = (disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES)) for _ in range(2))
    shut_down(off)
    options = ("--all", "--quiesce", "none")
    found = mirrored(place, *options)
    assert {name: body["disks"][0]["method"] for name, body in found.items()} == {
        runs.name: "bitmap", off.name: "offline"}
    for guest in (runs, off):
        assert_mirror(place, guest)
    stored = {each["guest"]: each for each in repo.json("backup", *options, "--min-free", "32M")["guests"]}
    assert stored.keys() == found.keys()
    for guest in (runs, off):
        repo.assert_restores(
            stored[guest.name]["snapshot"], {"vda": guest.model("vda").copy_at_moment()}, tmp_path)
    assert mirrored(place, "--all", "--method", "offline").keys() == {off.name}
    assert mirrored(place, *options, "--method", "overlay").keys() == {runs.name}


def test_methods_that_do_not_fit_are_refused(disk_guest: MakeGuest, place: Place) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    done = mirror(place, guest.name, "--method", "offline")
    assert done.returncode == errors.GuestUnfit.exit_code, done.stderr
    assert "--method auto" in done.stderr
    shut_down(guest)
    done = mirror(place, guest.name, "--method", "overlay")
    assert done.returncode == errors.GuestShutOff.exit_code, done.stderr
    assert "--method offline" in done.stderr


def test_a_killed_run_leaves_nothing_to_do(disk_guest: MakeGuest, place: Place) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    shut_down(guest)
    clock = SystemClock()
    journal = Journal(place.state_dir, clock)
    tools = Tools(journal, clock, Watcher(say=lambda _text: None, commit=lambda _progress: None))
    with captured(plan_of(guest, tools), tools, "nowhere", never, None):
        left = journal.open_runs()[0]
    journal._database.execute(  # as the journal of a process that was killed within the block
        "update run set state = ?, body = ? where id = ?",
        ("planned", json.dumps({**json.loads(_body(journal, left.id)), "state": "planned"}), left.id))
    assert journal.open_runs()
    body = mirrored(place, guest.name)[guest.name]
    assert "recovered" in body["recovered"][0]
    assert journal.open_runs() == []
    assert_mirror(place, guest)


def _body(journal: Journal, run_id: str) -> str:
    return str(journal._read("select body from run where id = ?", (run_id,))[0][0])


# --- Counting by the bitmap of a checkpoint ---------------------------------------------------------


def add_bitmap(guest: DiskGuest, name: str) -> Anchor:
    """Put a bitmap into the image of vda, the guest being off, as a checkpoint would; return its anchor."""
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", guest.disks["vda"].address, name)
    return Anchor(capture="test", sizes={"vda": _SIZE_BYTES}, checkpoint=name)


def changed(plan: Plan, tools: Tools, anchor: Anchor) -> tuple[list[Extent] | None, str, Anchor | None]:
    with captured(plan, tools, "nowhere", never, anchor) as capture, capture.disks[0].read() as reader:
        extents = reader.changed()
        return None if extents is None else list(extents), capture.disks[0].note, capture.anchor


@pytest.mark.parametrize("kinds", each([(Kind.QCOW2,), (Kind.CHAIN,), (Kind.RBD_QCOW2,)]))
def test_the_bitmap_of_a_checkpoint_says_what_changed(
    disk_guest: MakeGuest, tools: Tools, kinds: tuple[Kind, ...]
) -> None:
    guest = disk_guest(*disks(kinds, _SIZE_BYTES))
    shut_down(guest)
    anchor = add_bitmap(guest, "one")
    found, note, kept = changed(plan_of(guest, tools), tools, anchor)
    # Zeroes at the end always count as changed: the disk may have been cut, and made as large again.
    assert found is not None
    tail = found.pop()
    assert (tail.end_bytes, tail.kind.reads_as_zero) == (_SIZE_BYTES, True)
    zeroes = (tail.offset_bytes, tail.length_bytes)
    assert (found, note, kept) == ([], "", msgspec.structs.replace(anchor, marked={"vda": (zeroes,)}))
    guest.start()
    guest.write("vda", 5 * MIB, 64 * 1024, 0x31)
    guest.write_zeroes("vda", 9 * MIB, 128 * 1024)
    shut_down(guest)
    found, note, kept = changed(plan_of(guest, tools), tools, anchor)
    assert found is not None
    assert found.pop() == tail
    assert [(each.offset_bytes, each.length_bytes, each.kind.reads_as_zero) for each in found] == [
        (5 * MIB, 64 * 1024, False), (9 * MIB, 128 * 1024, True)]
    marked = ((5 * MIB, 64 * 1024), (9 * MIB, 128 * 1024), zeroes)
    assert (note, kept) == ("", msgspec.structs.replace(anchor, marked={"vda": marked}))


def test_a_bitmap_that_was_not_closed_well_is_not_believed(disk_guest: MakeGuest, tools: Tools) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    shut_down(guest)
    anchor = add_bitmap(guest, "one")
    guest.start()
    guest.write("vda", 5 * MIB, 64 * 1024, 0x31)
    guest.daemons.kill_qemu(guest.name)
    wait_for("off", lambda: not guest.running(), PATIENCE_S)
    found, note, kept = changed(plan_of(guest, tools), tools, anchor)
    assert (found, kept) == (None, None)
    assert "not closed well" in note


def test_a_mirror_is_updated_by_the_bitmap(disk_guest: MakeGuest, place: Place) -> None:
    """The mirror's own anchor decides; what the bitmap leaves out is found, the disk being almost empty."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES, filled=False))
    guest.write("vda", 3 * MIB, 4 * 64 * 1024, 0x21)
    shut_down(guest)
    mirrored(place, guest.name)
    anchor = add_bitmap(guest, "one")
    files = OsFiles(place.mirror(guest))
    record = read_record(files, RECORD)
    assert record is not None
    write_record(files, RECORD, msgspec.structs.replace(record, anchor=anchor))

    for round_ in range(2):  # the same anchor serves twice
        guest.start()
        guest.write("vda", (5 + round_) * MIB, 64 * 1024, 0x31 + round_)
        guest.write_zeroes("vda", 3 * MIB, 64 * 1024)
        shut_down(guest)
        disk = mirrored(place, guest.name)[guest.name]["disks"][0]
        assert_mirror(place, guest)
        assert disk["data_bytes"] == (1 + round_) * 64 * 1024
        assert disk["zero_bytes"] >= 64 * 1024  # and the zeroes at the end, which are never believed
        assert disk["changed_bytes"] == (2 - round_) * 64 * 1024
        assert disk["unchanged_bytes"] == _SIZE_BYTES - disk["data_bytes"] - disk["zero_bytes"]
        assert disk["audited_blocks"] == 3
        assert (disk["note"], disk["fell_back"]) == ("", "")

    due = mirrored(place, guest.name, "--full-read-every", "1ms")[guest.name]["disks"][0]
    assert "last read whole" in due["note"]
    assert due["unchanged_bytes"] == 0

    path = guest.disks["vda"].path
    run("qemu-img", "bitmap", "--disable", "-f", "qcow2", path, "one")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x55 3136k 64k", path)
    run("qemu-img", "bitmap", "--enable", "-f", "qcow2", path, "one")
    guest.model("vda").write(3136 * 1024, bytes([0x55]) * 64 * 1024)
    body = mirrored(place, guest.name, code=errors.EXIT_FELL_BACK)[guest.name]
    assert body["fell_back"]
    assert body["disks"][0]["audit_differs_at_bytes"] == 3136 * 1024
    assert any("AUDIT" in warning for warning in body["warnings"])
    assert_mirror(place, guest)


def test_an_older_copy_of_the_image_that_is_put_back_is_seen(disk_guest: MakeGuest, place: Place) -> None:
    """The bitmap comes back with it and knows nothing of what the mirror got since: the audit may miss it."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    shut_down(guest)
    mirrored(place, guest.name)
    files = OsFiles(place.mirror(guest))
    record = read_record(files, RECORD)
    assert record is not None
    write_record(files, RECORD, msgspec.structs.replace(record, anchor=add_bitmap(guest, "one")))
    path = guest.disks["vda"].path
    copy, model = guest.folder / "copy", guest.model("vda").copy_at_moment()
    run("cp", path, copy)
    guest.start()
    guest.write("vda", 5 * MIB, 64 * 1024, 0x31)
    shut_down(guest)
    mirrored(place, guest.name)
    assert_mirror(place, guest)
    run("cp", copy, path)
    run("cp", model, guest.model("vda").path)
    guest.start()
    guest.write("vda", 6 * MIB, 64 * 1024, 0x32)
    shut_down(guest)
    disk = mirrored(place, guest.name)[guest.name]["disks"][0]
    assert disk["fell_back"] == ""
    assert disk["data_bytes"] == 64 * 1024  # what the mirror had got at 5 MiB is zero in the older copy
    assert disk["changed_bytes"] == 2 * 64 * 1024
    assert_mirror(place, guest)


@pytest.mark.parametrize("why", ["gone", "off", "size"])
def test_a_bitmap_that_does_not_fit_is_not_believed(disk_guest: MakeGuest, tools: Tools, why: str) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    shut_down(guest)
    anchor = add_bitmap(guest, "one")
    path = guest.disks["vda"].path
    if why == "gone":
        run("qemu-img", "bitmap", "--remove", "-f", "qcow2", path, "one")
    elif why == "off":
        run("qemu-img", "bitmap", "--disable", "-f", "qcow2", path, "one")
    else:
        run("qemu-img", "resize", "-f", "qcow2", path, str(_SIZE_BYTES + MIB))
    found, note, kept = changed(plan_of(guest, tools), tools, anchor)
    assert (found, kept) == (None, None)
    assert note


def test_a_start_of_a_guest_fails_while_a_reader_is_open(disk_guest: MakeGuest) -> None:
    """What the method leans on: qemu-nbd with a bitmap holds the lock as well."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    shut_down(guest)
    add_bitmap(guest, "one")
    place = file_place(str(guest.disks["vda"].path), "qcow2")
    with open_reader(place, clock=SystemClock(), bitmap="one"), \
            pytest.raises(libvirt.libvirtError, match="lock"):
        guest.domain().create()
