"""A restore in place that dies at any step: the guest can't start on torn disks, and a rerun finishes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest

from lab import forked
from lab.diskguest import DiskGuest
from lab.disks import Kind
from lab.images import MIB
from stillframe.capture.restoring import MARK
from stillframe.errors import EXIT_FELL_BACK, DestinationLost, GuestState, Interrupted, NeedsAttention
from tests.fault.harness import Place, recover
from tests.integration.repositories import ROOT, Repo, make_repo
from tests.integration.test_in_place import change, changed_snapshot, in_place, moment, put_back
from tests.integration.test_offline import shut_down
from tests.kinds import disks

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 32 * MIB
_TORN = ("writing#1", "wrote#1", "wrote#2", "writing#2", "wrote#4", "writing#3")
_UNTORN = ("renamed#1", "renamed#2", "protected#1", "written#1", "unmarked#1")
#: At which the command ends by itself, and how.
_ENDS = {"server:wrote#3": DestinationLost.exit_code, "server:wrote#4": DestinationLost.exit_code,
         "term:wrote#1": Interrupted.exit_code}


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    return make_repo(place, tmp_path)


def strike(repo: Repo, step: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command and strike at *step*."""
    command = [sys.executable, "-m", "tests.fault.in_place_driver", step, *repo.command(*words)[3:]]
    return forked.run(command, env=repo.environment(), cwd=ROOT, timeout_s=120)


def struck(repo: Repo, step: str, *words: str) -> int:
    """Run the command and strike at *step*; return the exit code, -9 if it was killed."""
    done = strike(repo, step, *words)
    if ":" in step:
        assert "are only partly restored" in done.stderr, done.stderr
        assert "Next:" in done.stderr
    return done.returncode


def assert_cant_start(guest: DiskGuest) -> None:
    assert_cant_start_now(guest)
    # Nor may a restart of libvirt forget it.
    guest.daemons.restart_libvirtd()
    assert_cant_start_now(guest)
    assert not guest.running()


def assert_named(repo: Repo, place: Place, guest: DiskGuest, snapshot: str) -> None:
    """`status`, `recover` and `doctor` name it, and say how to go on."""
    [seen] = repo.json("status", code=NeedsAttention.exit_code)["restoring"]
    assert seen["guest"] == guest.name
    assert f"restore {snapshot[:12]}" in seen["next_command"]
    done = recover(place, guest)
    assert done.returncode == NeedsAttention.exit_code, done.stdout
    assert f"restore {snapshot[:12]}" in done.stdout
    for words in (("doctor", guest.name), ("backup", guest.name)):
        assert f"restore {snapshot[:12]}" in repo.call(*words).stdout + repo.call(*words).stderr


@pytest.fixture
def torn(disk_guest: MakeGuest, repo: Repo) -> tuple[DiskGuest, str, dict[str, Path], dict[str, Path]]:
    """Give a guest of two disks that was changed since its snapshot, what it held then, and what it holds."""
    guest = disk_guest(*disks((Kind.RAW, Kind.QCOW2), _SIZE_BYTES))
    snapshot, then = changed_snapshot(repo, guest)
    return guest, snapshot, then, moment(guest)


Torn = tuple[DiskGuest, str, dict[str, Path], dict[str, Path]]


@pytest.mark.parametrize("step", [*_TORN, *_ENDS])
def test_killed_while_it_writes(torn: Torn, repo: Repo, place: Place, step: str) -> None:
    guest, snapshot, then, _ = torn
    text = inactive(guest)
    number = [*_TORN, *_ENDS].index(step)
    code = struck(repo, step, "restore", snapshot, "--in-place", "--no-backup-first")
    assert code == _ENDS.get(step, -9), step
    assert_cant_start(guest) if number == 1 else assert_cant_start_now(guest)
    if number == 4:
        assert_named(repo, place, guest, snapshot)
    # It may be killed again, and go on from there.
    assert struck(repo, "writing#1", "restore", snapshot, "--in-place") == -9
    assert_cant_start_now(guest)
    if number == 3:
        # Nor by a definition that somebody keeps elsewhere.
        guest.daemons.connect().defineXML(text)
        with pytest.raises(libvirt.libvirtError, match="No such file"):
            guest.domain().create()
    done = in_place(repo, snapshot)
    assert done["state_before"] == ""
    put_back(guest, then)
    assert inactive(guest) == text
    assert not list(guest.folder.glob(f"*{MARK}"))
    assert repo.json("status")["restoring"] == []
    # A killed qemu-nbd leaves clusters that nobody refers to (3): room is lost, no data.
    checked = subprocess.run(["qemu-img", "check", "-q", guest.disks["vdb"].path], check=False)
    assert checked.returncode in (0, 3)


def assert_cant_start_now(guest: DiskGuest) -> None:
    with pytest.raises(libvirt.libvirtError, match="unfinished-stillframe-restore"):
        guest.domain().create()


def test_killed_before_the_first_write_or_after_the_last(torn: Torn, repo: Repo, place: Place) -> None:
    guest, snapshot, then, now = torn
    expected = now
    for step in _UNTORN:
        assert struck(repo, step, "restore", snapshot, "--in-place", "--no-backup-first") == -9, step
        with pytest.raises(libvirt.libvirtError):
            guest.domain().create()
        assert repo.json("status", code=NeedsAttention.exit_code)["restoring"]
        done = recover(place, guest)
        assert done.returncode == 0, done.stdout
        if step in ("written#1", "unmarked#1"):
            expected = then
        put_back(guest, expected)
        assert repo.json("status")["restoring"] == []
        guest.start()
        guest.destroy()
    # Written down, but nothing of the guest was touched: it starts.
    assert struck(repo, "protecting#1", "restore", snapshot, "--in-place", "--no-backup-first") == -9
    guest.start()
    guest.write("vda", 5 * MIB, 4096, 0x42)
    assert recover(place, guest).returncode == 0
    guest.destroy()
    guest.assert_disk_equals_model("vda")
    # Over, but for the record's end.
    assert struck(repo, "removed#1", "restore", snapshot, "--in-place", "--no-backup-first") == -9
    put_back(guest, then)


def test_an_interrupt_before_the_first_write_leaves_the_guest_alone(torn: Torn, repo: Repo) -> None:
    guest, snapshot, then, now = torn
    words = ("restore", snapshot, "--in-place", "--no-backup-first")
    done = strike(repo, "term:checked#1", *words)
    assert done.returncode == Interrupted.exit_code
    assert f"The disks of {guest.name} are as they were." in done.stderr
    assert GuestState.UNTOUCHED.value in done.stderr
    put_back(guest, now)
    # While it is waited for, too.
    guest.start()
    done = strike(repo, "term:asked#1", *words, "--shutdown", "--shutdown-timeout", "20s")
    assert done.returncode == Interrupted.exit_code, done.stderr
    assert f"{guest.name} was told to shut down, and still may." in done.stderr
    assert guest.running()
    guest.destroy()
    # A moment later it is torn, and nobody says that the disks are as they were.
    done = strike(repo, "term:writing#1", *words)
    assert done.returncode == Interrupted.exit_code
    assert "are only partly restored" in done.stderr
    assert "as they were" not in done.stderr
    in_place(repo, snapshot)
    put_back(guest, then)


def inactive(guest: DiskGuest) -> str:
    return str(guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


def set_title(guest: DiskGuest, title: str) -> None:
    guest.domain().setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, title, None, None,
                               libvirt.VIR_DOMAIN_AFFECT_CONFIG)


@pytest.mark.parametrize("step", ["protecting#1", "freed#1"])
def test_a_guest_that_went_on_elsewhere_keeps_its_definition(
    torn: Torn, repo: Repo, place: Place, step: str
) -> None:
    guest, snapshot, then, now = torn
    words = ("restore", snapshot, "--in-place", "--no-backup-first", "--with-definition")
    assert struck(repo, step, *words) == -9
    # It can start, and goes on above the image that the record names.
    guest.start()
    guest.domain().snapshotCreateXML(
        f"<domainsnapshot><name>theirs</name><disks><disk name='vda' snapshot='external'>"
        f"<source file='{guest.folder}/theirs.qcow2'/></disk><disk name='vdb' snapshot='no'/></disks>"
        f"</domainsnapshot>", libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
    set_title(guest, "mine")
    text = inactive(guest)
    assert "theirs.qcow2" in text
    assert recover(place, guest).returncode == 0
    assert inactive(guest) == text
    assert repo.json("status")["restoring"] == []
    guest.destroy()
    put_back(guest, now if step == "protecting#1" else then)


def test_what_was_given_up_leaves_the_definition(torn: Torn, repo: Repo, place: Place) -> None:
    guest, snapshot, _then, now = torn
    set_title(guest, "mine")
    text = inactive(guest)
    words = ("restore", snapshot, "--in-place", "--no-backup-first", "--with-definition")
    for step in ("renamed#1", "protected#1"):
        assert struck(repo, step, *words) == -9
        assert inactive(guest) != text
        assert recover(place, guest).returncode == 0
        assert inactive(guest) == text
    put_back(guest, now)
    # Once all is written, the snapshot's takes its place, whoever ends it.
    assert struck(repo, "unmarked#2", *words) == -9
    assert recover(place, guest).returncode == 0
    assert "<title>" not in inactive(guest)
    assert guest.disk_source("vda")[0] == str(guest.disks["vda"].path)


def test_another_snapshot_takes_its_place(torn: Torn, repo: Repo, place: Place) -> None:
    guest, snapshot, _then, now = torn
    assert struck(repo, "writing#2", "restore", snapshot, "--in-place") == -9
    [seen] = repo.json("status", code=NeedsAttention.exit_code)["restoring"]
    assert f"with {seen['state_before'][:12]} in its place" in seen["next_command"]
    # One disk of two would leave the other torn.
    in_place(repo, f"{snapshot}:vda", code=NeedsAttention.exit_code)
    in_place(repo, seen["state_before"])
    put_back(guest, now)
    guest.start()


def test_what_was_done_is_not_read_again(torn: Torn, repo: Repo) -> None:
    guest, snapshot, then, _ = torn
    assert struck(repo, "writing#3", "restore", snapshot, "--in-place", "--no-backup-first") == -9
    done = in_place(repo, snapshot)
    assert sum(disk["skipped_bytes"] for disk in done["disks"]) > 0
    put_back(guest, then)


def test_an_image_that_was_put_in_its_place_is_not_overwritten(torn: Torn, repo: Repo, place: Place) -> None:
    guest, snapshot, then, _ = torn
    struck(repo, "writing#2", "restore", snapshot, "--in-place", "--no-backup-first")
    path = guest.disks["vda"].path
    path.unlink()
    path.write_bytes(b"mine")
    said = in_place(repo, snapshot, code=NeedsAttention.exit_code)["error"]
    assert str(path) in said["message"]
    assert path.read_bytes() == b"mine"
    path.unlink()
    in_place(repo, snapshot)
    put_back(guest, then)


def test_a_device_is_protected_by_the_definition(disk_guest: MakeGuest, repo: Repo, place: Place) -> None:
    guest = disk_guest(*disks((Kind.BLOCK, Kind.NBD), _SIZE_BYTES))
    snapshot, then = changed_snapshot(repo, guest)
    text = inactive(guest)
    for step in ("protected#1", "wrote#2", "writing#3", "written#1"):
        assert struck(repo, step, "restore", snapshot, "--in-place", "--no-backup-first") == -9
        assert_cant_start(guest)
        # What a person changes elsewhere meanwhile stays.
        set_title(guest, step.rstrip("#123"))
        in_place(repo, snapshot)
        after = inactive(guest)
        title = f"<title>{step.rstrip('#123')}</title>"
        assert title in after
        assert [line for line in after.splitlines() if "title" not in line] == text.splitlines()
        put_back(guest, then)
        guest.start()
        change(guest, 4)
        guest.destroy()
    assert os.path.lexists(guest.disks["vda"].path)


def test_a_bitmap_that_was_torn_is_not_believed(disk_guest: MakeGuest, repo: Repo, tmp_path: Path) -> None:
    guest = disk_guest(*disks((Kind.QCOW2,), _SIZE_BYTES))
    change(guest, 0)
    then = moment(guest)
    snapshot = repo.backup(guest, "--method", "bitmap")["snapshot"]
    change(guest, 3)
    shut_down(guest)
    words = ("restore", snapshot, "--in-place", "--no-backup-first")
    assert struck(repo, "server:wrote#1", *words) == DestinationLost.exit_code
    assert not in_place(repo, snapshot)["disks"][0]["by_bitmap"]
    put_back(guest, then)
    guest.start()
    change(guest, 4)
    now = moment(guest)
    taken = repo.backup(guest, "--method", "bitmap", code=EXIT_FELL_BACK)
    assert taken["disks"][0]["note"]
    repo.assert_restores(taken["snapshot"], now, tmp_path)
