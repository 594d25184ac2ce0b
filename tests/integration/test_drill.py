"""A drill tells a snapshot that boots from one that does not, and leaves nothing, whatever is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import libvirt
import msgspec
import pytest

from lab.daemons import UNDEFINE_WHOLLY, LibvirtDaemons
from lab.dbguest import DbGuest
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec
from lab.enter import IMAGES_DIR
from lab.images import MIB
from lab.waiting import PATIENCE_S, wait_for
from stillframe import process
from stillframe.errors import ConnectionLost, DrillExposed, DrillFailed, Interrupted
from stillframe.repository.layout import PackKind, packs_prefix
from stillframe.repository.manifest import TPM_FOLDER
from stillframe.restore.drill_place import DRILL_SOCKETS, Made
from stillframe.storage.local import LocalStorage
from tests.fault.harness import Place
from tests.integration.booting import start_uefi_guest
from tests.integration.repositories import Repo, make_repo

pytestmark = [pytest.mark.timeout(600), pytest.mark.together]

_UUID = "6c1f8f56-6ad9-4f0e-a1c1-0b3a5f1d2e70"
GREETING = "BOOTED FROM THE SNAPSHOT"
_PNG = b"\x89PNG"
_RUNNING = libvirt.VIR_DOMAIN_RUNNING
_SHORT = ("--timeout", "3s")
#: What a test that is to pass waits for, however slow the machine is.
_LONG = ("--timeout", "120s")
_SCREEN = "<graphics type='vnc' autoport='yes'/><video><model type='vga'/></video>"
_CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


def boot_sector(greeting: str) -> bytes:
    """Return a boot sector that prints the greeting on the first serial port and halts."""
    code = bytes.fromhex("31c0 8ed8 be157c baf803 ac 84c0 7403 ee ebf8 f4 ebfd")
    return (code + greeting.encode() + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa"


@dataclass(frozen=True)
class Drilled:
    """A guest that boots from a sector, and its snapshots: whole, and with the sector wiped."""

    repo: Repo
    guest: DiskGuest
    whole: str
    wiped: str


@pytest.fixture(scope="module")
def drilled(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drilled]:
    """Give the guest, which runs on, and a repository with its two snapshots."""
    session_daemons.start()
    folder = tmp_path_factory.mktemp("drill")
    repo = make_repo(Place(folder, folder / "state", IMAGES_DIR), folder)
    guest = DiskGuest(session_daemons, IMAGES_DIR, "drilled", [DiskSpec("vda", size_bytes=8 * MIB)],
                      devices=_SCREEN)
    try:
        guest.define()
        guest.start()
        guest.write_bytes("vda", 0, boot_sector(GREETING))
        guest.write("vda", MIB, 64 * 1024, 0x5A)
        guest.flush()
        whole = repo.backup(guest)["snapshot"]
        guest.write_zeroes("vda", 0, 512)
        guest.flush()
        yield Drilled(repo, guest, whole, repo.backup(guest)["snapshot"])
    finally:
        guest.remove()


@pytest.fixture
def original(drilled: Drilled) -> Iterator[Drilled]:
    """Give the guest; whatever the test did, it runs on untouched, and nothing else is left."""
    session_daemons = drilled.guest.daemons
    session_daemons.start()

    def look() -> tuple[object, ...]:
        domain = drilled.guest.domain()
        return (session_daemons.qemu_pid(drilled.guest.name),
                domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), drilled.guest.disk_source("vda"))

    before = look()
    yield drilled
    assert drilled.guest.running()
    assert look() == before
    assert_nothing_left(drilled)


def assert_nothing_left(drilled: Drilled) -> None:
    """Check that no guest, server, socket or record of a drill is left on the host."""
    assert drills_running(drilled.guest.daemons) == []
    assert not list(DRILL_SOCKETS.glob("*"))
    assert not list((drilled.repo.place.state_dir / "drills").glob("*"))
    assert not processes_of_drills()


@contextlib.contextmanager
def drill_that_waits(drilled: Drilled) -> Iterator[subprocess.Popen[bytes]]:
    """Give a drill whose guest runs, and never prints what it waits for; it is killed in the end."""
    with begun_drill(drilled.repo, drilled.guest.daemons, drilled.whole, "--expect", "never printed") as tool:
        yield tool


@contextlib.contextmanager
def begun_drill(
    repo: Repo, daemons: LibvirtDaemons, sid: str, *options: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """Give a drill whose guest runs; it is killed in the end."""
    quiet = subprocess.DEVNULL
    tool = subprocess.Popen(
        repo.command("drill", sid, *options, *_LONG),
        cwd=repo.root, env=repo.environment(), stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        wait_for("the drill's guest runs", lambda: drills_running(daemons) != [], PATIENCE_S)
        yield tool
    finally:
        tool.kill()
        tool.wait()


def drills_running(daemons: LibvirtDaemons) -> list[str]:
    return [each.name() for each in daemons.connect().listAllDomains() if each.name().startswith("drill-")]


def copy_of(repo: Repo, folder: Path) -> Repo:
    """Return a copy of a repository, which the test may hurt."""
    copy = replace(repo, path=folder / "repository")
    shutil.copytree(repo.path, copy.path)
    shutil.copy(repo.path.with_suffix(".pass"), copy.path.with_suffix(".pass"))
    return copy


def processes_of_drills() -> list[int]:
    """Return the processes (QEMU, nbdkit) that name the sockets of drills."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if os.path.basename(words[0]) in (b"nbdkit", b"qemu-system-x86_64") and any(
                    str(DRILL_SOCKETS).encode() in word for word in words):
                found.append(int(path.parent.name))
    return found


def test_a_snapshot_that_boots_passes_and_is_written_down(original: Drilled, tmp_path: Path) -> None:
    picture = tmp_path / "screen.png"
    said = original.repo.json("drill", original.whole, "--expect", GREETING, "--screenshot", picture, *_LONG)
    drill, = said["drills"]
    assert drill["passed"] is True
    assert drill["waited_for"] == ["console"]
    assert drill["boot_s"] > 0
    assert GREETING in drill["console"]
    assert picture.read_bytes().startswith(_PNG)
    shown = original.repo.json("show", original.whole, "--screenshot", tmp_path / "again.png")["last_drill"]
    assert shown["began_at"] == drill["began_at"]
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()
    assert original.repo.json("show", original.wiped)["last_drill"] is None
    last, = original.repo.json("list")["drills"]
    assert (last["guest"], last["passed"], last["snapshot"]) == (original.guest.name, True, original.whole)


def test_a_wiped_boot_sector_fails(original: Drilled) -> None:
    said = original.repo.json(
        "drill", original.wiped, "--expect", GREETING, *_SHORT, code=DrillFailed.exit_code)
    drill, = said["drills"]
    assert drill["passed"] is False
    assert drill["boot_s"] is None
    assert "did not print" in drill["reason"]
    last, = original.repo.json("list")["drills"]
    assert last["passed"] is False
    # The latest snapshot of the guest is the wiped one.
    again = original.repo.json("drill", "--all-latest", "--expect", GREETING, *_SHORT,
                               code=DrillFailed.exit_code)
    assert [each["sid"] for each in again["drills"]] == [original.wiped]


def test_a_bad_chunk_where_it_boots_fails_and_is_named(original: Drilled, tmp_path: Path) -> None:
    broken = copy_of(original.repo, tmp_path)
    storage = LocalStorage(broken.path)
    packs = [broken.path / each.key for each in storage.list(packs_prefix(PackKind.DATA))
             if original.whole in each.key]
    assert packs
    for path in packs:
        path.chmod(0o600)
        data = bytearray(path.read_bytes())
        data[64:4096] = bytes(len(data[64:4096]))
        path.write_bytes(data)
    said = broken.json("drill", original.whole, "--expect", GREETING, *_LONG, code=DrillFailed.exit_code)
    drill, = said["drills"]
    assert "could not be read" in drill["reason"]
    assert "vda" in drill["reason"]


def test_a_dry_run_boots_nothing(original: Drilled) -> None:
    before = original.guest.daemons.connect().listAllDomains()
    would, = original.repo.json("drill", original.whole, "--expect", GREETING, "--dry-run")["drills"]
    assert would["waits_for"] == ["console"]
    assert GREETING not in would["definition"]
    assert len(original.guest.daemons.connect().listAllDomains()) == len(before)
    assert not list(original.repo.place.state_dir.glob("drills/*"))


def test_a_script_decides(original: Drilled, tmp_path: Path) -> None:
    script = tmp_path / "prove"
    script.write_text("#!/bin/sh\necho looked at $STILLFRAME_DRILL_DOMAIN of $STILLFRAME_DRILL_GUEST\n"
                      "virsh -c $STILLFRAME_DRILL_URI domstate $STILLFRAME_DRILL_DOMAIN\nexit ${1:-0}\n")
    script.chmod(0o755)
    drill, = original.repo.json("drill", original.whole, "--script", script)["drills"]
    assert drill["waited_for"] == ["script"]
    assert f"of {original.guest.name}\nrunning" in drill["checks"][0]["output"]
    child = tmp_path / "child"
    script.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {child}\nwait\n")
    late, = original.repo.json("drill", original.whole, "--script", script, *_SHORT,
                               code=DrillFailed.exit_code)["drills"]
    assert "did not end within" in late["checks"][0]["output"]
    wait_for("what it started has ended, too",
             lambda: not process.start_mark(int(child.read_text())), PATIENCE_S)
    script.write_text("#!/bin/sh\necho no good\nexit 7\n")
    drill, = original.repo.json(
        "drill", original.whole, "--script", script, code=DrillFailed.exit_code)["drills"]
    assert drill["checks"][0]["exit_code"] == 7
    assert "no good" in drill["checks"][0]["output"]


def test_what_is_refused_is_not_written_down(original: Drilled) -> None:
    before = original.repo.json("list")["drills"]
    daemons = original.guest.daemons
    without = original.repo.json("drill", original.whole, code=31)
    assert "no channel for a guest agent" in without["error"]["message"]
    network = daemons.connect().networkDefineXML(
        "<network><name>open</name><forward mode='bridge'/><bridge name='br7'/></network>")
    try:
        said = original.repo.json("drill", original.whole, "--network", "open", "--expect", GREETING,
                                  code=DrillExposed.exit_code)
        assert said["error"]["code"] == "drill-exposed"
    finally:
        network.undefine()
    assert original.repo.json("list")["drills"] == before


@pytest.mark.parametrize("with_libvirtd", [False, True], ids=["tool", "tool and libvirtd"])
def test_a_killed_drill_leaves_no_guest(original: Drilled, *, with_libvirtd: bool) -> None:
    daemons = original.guest.daemons
    with drill_that_waits(original) as tool:
        if with_libvirtd:
            daemons.kill_libvirtd()
        tool.kill()
        tool.wait()
    if with_libvirtd:
        daemons.start()
    else:
        wait_for("libvirt ends the guest", lambda: drills_running(daemons) == [], PATIENCE_S)
    told, = original.repo.json("recover")["drills"]
    assert told.startswith("removed what a killed drill left (drill-drilled-")
    wait_for("its processes are gone", lambda: not processes_of_drills(), PATIENCE_S)
    assert original.repo.json("recover")["drills"] == []


def test_a_guest_that_outlived_its_drill_is_ended_and_no_other(original: Drilled) -> None:
    """As after a restart of libvirt that made it forget whose the guest is."""
    folder = original.repo.place.state_dir / "drills" / _UUID
    folder.mkdir(parents=True)
    (folder / "made.json").write_bytes(msgspec.json.encode(Made(_UUID, "drill-left", "qemu:///system")))
    elsewhere = folder.with_name(_UUID[::-1])
    elsewhere.mkdir()
    (elsewhere / "made.json").write_bytes(msgspec.json.encode(Made(_UUID[::-1], "x", "qemu+ssh://other/system")))
    original.guest.daemons.connect().createXML(
        f"<domain type='qemu'><name>drill-left</name><uuid>{_UUID}</uuid><memory unit='MiB'>32</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>"
        "<emulator>/usr/bin/qemu-system-x86_64</emulator></devices></domain>")
    assert original.repo.json("recover", "--dry-run")["drills"][0].startswith("would remove")
    assert drills_running(original.guest.daemons) == ["drill-left"]
    assert original.repo.json("recover")["drills"] == [
        "removed what a killed drill left (drill-left, which still ran)"]
    assert drills_running(original.guest.daemons) == []
    assert elsewhere.exists()
    shutil.rmtree(elsewhere)


def test_a_drilled_guest_is_not_backed_up_with_all(original: Drilled, tmp_path: Path) -> None:
    repo = copy_of(original.repo, tmp_path)
    with drill_that_waits(original):
        done = repo.json("backup", "--all", "--method", "overlay", "--quiesce", "none",
                         "--min-free", "32M")
    assert [each["guest"] for each in done["guests"]] == [original.guest.name]
    original.repo.json("recover")


def test_a_restart_of_libvirt_is_not_held_against_the_snapshot(original: Drilled) -> None:
    before = original.repo.json("list")["drills"]
    with drill_that_waits(original) as tool:
        original.guest.daemons.kill_libvirtd()
        original.guest.daemons.start()
        assert tool.wait(PATIENCE_S) == ConnectionLost.exit_code
    assert original.repo.json("list")["drills"] == before


def test_a_signal_ends_a_drill_and_nothing_is_written_down(original: Drilled) -> None:
    before = original.repo.json("list")["drills"]
    with drill_that_waits(original) as tool:
        tool.send_signal(signal.SIGTERM)
        assert tool.wait(PATIENCE_S) == Interrupted.exit_code
    assert original.repo.json("list")["drills"] == before


def test_a_prune_drops_drills_of_snapshots_that_are_gone(original: Drilled, tmp_path: Path) -> None:
    repo = copy_of(original.repo, tmp_path)
    for sid in (original.whole, original.whole, original.wiped):
        repo.call("drill", sid, "--script", "/bin/true")
    drills = repo.path / "main" / "d"
    count = len([path for path in drills.rglob("*-*") if path.is_file()])
    repo.call("forget", original.whole)
    repo.json("prune")
    left = [path.name for path in drills.rglob("*-*") if path.is_file()]
    assert 0 < len(left) < count
    assert all(original.wiped in name for name in left)
    assert repo.json("list")["drills"][0]["snapshot"] == original.wiped


def test_variables_and_a_tpm_are_copies(
    place: Place, tmp_path: Path, daemons: LibvirtDaemons, images_dir: Path,
) -> None:
    repo = make_repo(place, tmp_path)
    guest, nvram = start_uefi_guest(daemons, images_dir)
    try:
        state = TPM_FOLDER / guest.domain().UUIDString() / "tpm2/tpm2-00.permall"
        sid = repo.backup(guest, "--method", "overlay")["snapshot"]
        guest.destroy()
        before, folders = (nvram.read_bytes(), state.read_bytes()), set(TPM_FOLDER.iterdir())
        script = tmp_path / "prove"
        script.write_text(
            "#!/bin/sh\nnvram=$(virsh -c $STILLFRAME_DRILL_URI dumpxml $STILLFRAME_DRILL_DOMAIN"
            " | sed -n 's/.*<nvram.*>\\(.*\\)<.nvram>/\\1/p')\n"
            f"echo $nvram; test $nvram != {nvram} && tail -c 4096 $nvram | cmp - {tmp_path}/tail"
            f" && test -s {TPM_FOLDER}/$STILLFRAME_DRILL_UUID/tpm2/tpm2-00.permall\n")
        script.chmod(0o755)
        (tmp_path / "tail").write_bytes(before[0][-4096:])
        drill, = repo.json("drill", sid, "--script", script, *_LONG)["drills"]
        own = drill["checks"][0]["output"].split()[0]
        assert own.endswith("_VARS.fd")
        assert not Path(own).exists()
        assert (nvram.read_bytes(), state.read_bytes(), set(TPM_FOLDER.iterdir())) == (*before, folders)
    finally:
        guest.domain().undefineFlags(UNDEFINE_WHOLLY)
        guest.remove()


def test_a_guest_that_ends_while_its_agent_is_waited_for_fails(
    daemons: LibvirtDaemons, place: Place, tmp_path: Path, images_dir: Path,
) -> None:
    repo = make_repo(place, tmp_path)
    guest = DiskGuest(daemons, images_dir, "leaving", [DiskSpec("vda", size_bytes=MIB)], devices=_CHANNEL)
    try:
        guest.define()
        guest.start()
        sid = str(repo.backup(guest)["snapshot"])
        with begun_drill(repo, daemons, sid) as tool:
            name, = drills_running(daemons)
            drilled = daemons.connect().lookupByName(name)
            wait_for("its start is over", lambda: drilled.state()[0] == _RUNNING, PATIENCE_S)
            daemons.kill_qemu(name)
            assert tool.wait(PATIENCE_S) == DrillFailed.exit_code
        last, = repo.json("list")["drills"]
        assert (last["snapshot"], last["passed"]) == (sid, False)
        shown = repo.json("show", sid)["last_drill"]
        assert "the guest stopped by itself" in shown["reason"]
        assert shown["waited_for"] == ["agent"]
    finally:
        guest.remove()


@pytest.mark.slow  # four guests boot; `make demo` ends with such a drill
def test_a_database_guest_is_checked_by_its_agent_while_the_original_writes_on(
    place: Place, tmp_path: Path, db_guest: Callable[..., DbGuest],
) -> None:
    guest = db_guest()
    repo = make_repo(place, tmp_path)
    guest.wait_more_rows(20)
    sid = repo.json("backup", guest.name, "--quiesce", "agent", "--min-free", "64M")["guests"][0]["snapshot"]
    machine, before = guest.daemons.qemu_pid(guest.name), guest.acknowledged()
    settings = tmp_path / "stillframe.toml"
    settings.write_text(
        f"[guests.{guest.name}]\ndrill_check = [\"sqlite3 /data/rows.db 'pragma integrity_check'\"]\n")
    drill, = repo.json("drill", sid, "--config", settings, *_LONG)["drills"]
    assert drill["passed"] is True
    assert drill["waited_for"] == ["agent"]
    assert drill["checks"][0]["output"].strip() == "ok"
    failed, = repo.json("drill", sid, "--check", "echo it is broken; exit 3", "--check", "sleep 600",
                        "--check-timeout", "2s", *_LONG, code=DrillFailed.exit_code)["drills"]
    assert [each["exit_code"] for each in failed["checks"]] == [3, None]
    assert "it is broken" in failed["checks"][0]["output"]
    ended, = repo.json("drill", sid, "--check", "echo o > /proc/sysrq-trigger; sleep 600", *_LONG,
                       code=DrillFailed.exit_code)["drills"]
    assert "the guest stopped by itself" in ended["reason"]
    assert guest.daemons.qemu_pid(guest.name) == machine
    assert guest.wait_more_rows(5) > before
