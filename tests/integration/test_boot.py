"""A snapshot runs as a guest at once, and comes home while it runs: every byte."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from lab.booted import BootedGuest
from lab.daemons import UNDEFINE_WHOLLY
from lab.images import MIB, to_raw
from lab.waiting import PATIENCE_S, wait_for
from lab.written import WriteFailed
from stillframe.capture.growth import free_bytes
from stillframe.clock import SystemClock
from stillframe.errors import (
    BootFailed,
    GuestExists,
    GuestShutOff,
    GuestState,
    GuestUnfit,
    GuestUnknown,
    NeedsAttention,
    StorageLost,
    TargetExists,
    TargetSmall,
)
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import find_domain
from stillframe.repository.manifest import TPM_FOLDER
from stillframe.restore.boot_record import BootState
from tests.fault.harness import small_file_system
from tests.integration.booting import Booting, BootRun, end_servers, start_uefi_guest


def write_here_and_there(guest: BootedGuest, pattern: int) -> None:
    for target in guest.targets():
        guest.write(target, 3 * MIB + 512 * pattern, 200 * 1024, pattern)
        guest.write_zeroes(target, 1 * MIB, 100 * 1024, unmap=True)
        guest.write(target, 20 * MIB, 512, pattern + 1)
    guest.flush()


def test_a_booted_guest_reads_the_snapshot_and_keeps_what_it_writes(booting: Booting) -> None:
    guest = booting.boot("b1")
    assert guest.running()
    write_here_and_there(guest, 0x31)
    for target in guest.targets():
        guest.assert_disk_equals_model(target)
    origin = booting.snapshot.moment
    record = booting.record("b1")
    assert record is not None
    assert guest.domain().UUIDString() == record["uuid"] != record["origin"]
    # What the firmware read is known for the next boot.
    assert (booting.repo.place.state_dir / "boot-order" / f"{record['origin']}-vda").read_text()
    guest.domain().destroy()
    guest.domain().create()
    for target in guest.targets():
        guest.assert_disk_equals_model(target)
    assert all(path.exists() for path in origin.values())


@contextlib.contextmanager
def writing(guest: BootedGuest) -> Iterator[None]:
    """Have the guest write all the while."""
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            for target in guest.targets():
                guest.write(target, (number * 7919 * 512) % (23 * MIB), 4096, 1 + number % 255)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()


def test_a_guest_lands_while_it_writes(booting: Booting) -> None:
    guest = booting.boot("b1")
    write_here_and_there(guest, 0x31)
    with writing(guest):
        said = booting.repo.json("land", "b1")
    assert [disk["target"] for disk in said["disks"]] == ["vda", "vdb"]
    # It is a guest like any other now.
    booting.repo.json("backup", "b1", "--quiesce", "none", "--min-free", "32M", "--method", "overlay")
    booting.assert_landed(guest)
    guest.domain().create()
    guest.assert_disk_equals_model("vda")


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_guest_lands_in_another_folder_while_it_writes(booting: Booting, image_format: str) -> None:
    other = booting.pool / "other"
    other.mkdir()
    guest = booting.boot("b1")
    write_here_and_there(guest, 0x31)
    words = ("land", "b1", "--pool", str(other), "--format", image_format)
    planned = booting.repo.json(*words, "--dry-run")["disks"]
    assert [(each["target"], each["copied"]) for each in planned] == [("vda", True), ("vdb", True)]
    assert not list(other.iterdir())
    landing = BootRun(booting, BootState.SWITCHING, "intent", 1, *words)
    # Not beyond that: a guest that stands still does not write, but qemu-io would, and ends QEMU 7.2 if it
    # does so while the copy takes over. What a real guest writes at the switch: test_boot_database.
    with writing(guest):
        assert landing.wait_reached(), landing.output
    assert landing.go_on() == 0, landing.output
    assert [str(guest.image(each["target"])) for each in planned] == [each["image"] for each in planned]
    # It is a guest like any other now.
    booting.repo.json("backup", "b1", "--quiesce", "none", "--min-free", "32M", "--method", "overlay")
    booting.assert_landed(guest, other, image_format)
    guest.domain().create()
    guest.assert_disk_equals_model("vda")


def test_qemu_is_not_asked_for_its_nodes_while_it_pulls(booting: Booting) -> None:
    guest = booting.boot("b1")
    guest.domain().blockPull("vda", 1)  # MiB a second
    domain = find_domain(Connection("qemu:///system", SystemClock()), "b1")
    view = domain.view()
    assert view.qemu is None
    assert view.jobs
    assert booting.repo.json("status")["booted"][0]["trouble"] == ""
    guest.domain().blockJobAbort("vda")
    wait_for("the job is gone", lambda: domain.view().qemu is not None, PATIENCE_S)


def read_by_the_guest_itself(guest: BootedGuest) -> None:
    """Have the guest's firmware read the first sector, by its device and so under its error policy."""
    guest.domain().reset(0)


def is_paused(guest: BootedGuest) -> bool:
    return bool(guest.domain().state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR])


def test_a_killed_server_pauses_the_guest_and_recover_lets_it_go_on(booting: Booting) -> None:
    guest = booting.boot("b1")
    guest.write("vda", 5 * MIB, 4096, 0x44)
    end_servers()
    status = booting.repo.json("status", code=NeedsAttention.exit_code)
    assert "reads from it" in status["booted"][0]["trouble"]
    read_by_the_guest_itself(guest)
    wait_for("the guest is paused", lambda: is_paused(guest), PATIENCE_S)
    before = guest.domain().ID()
    did = booting.repo.json("recover", "b1")["guests"][0]["did"]
    assert did == ["started its servers again (vda, vdb)", "resumed it"]
    for target in guest.targets():
        guest.assert_disk_equals_model(target)
    assert guest.domain().ID() == before
    assert not is_paused(guest)
    assert booting.repo.json("status")["booted"][0]["trouble"] == ""


def test_after_a_restart_of_the_host_recover_makes_the_guest_startable(booting: Booting) -> None:
    guest = booting.boot("b1")
    guest.write("vda", 5 * MIB, 4096, 0x44)
    guest.flush()
    booting.daemons.kill_qemu("b1")
    end_servers()
    wait_for("the guest is off", lambda: not guest.running(), PATIENCE_S)
    with pytest.raises(libvirt.libvirtError):
        guest.domain().create()
    booting.repo.json("recover")
    guest.domain().create()
    guest.assert_disk_equals_model("vda")


def moved(booting: Booting, folder: Path) -> Booting:
    """Return the same with a copy of the repository, which a test may move and damage."""
    folder.mkdir()
    repo = replace(booting.repo, path=folder / "repository")
    shutil.copytree(booting.repo.path, repo.path)
    shutil.copy(booting.repo.path.with_suffix(".pass"), repo.path.with_suffix(".pass"))
    return replace(booting, repo=repo)


def test_a_guest_is_paused_while_the_repository_is_away(booting: Booting, tmp_path: Path) -> None:
    booting = moved(booting, tmp_path / "copy")
    guest = booting.boot("b1", "--patience", "1s")
    # Else its first read might wait for the servers that come back, and they would have the sector at hand.
    wait_for("the firmware has read", lambda: guest.domain().blockStats("vda")[0], PATIENCE_S)
    guest.write("vda", 5 * MIB, 4096, 0x44)
    away = booting.repo.path.rename(tmp_path / "away")
    # Started anew, the servers remember nothing of what was read before.
    shutil.rmtree(booting.repo.place.state_dir / "boot-order")
    end_servers()
    booting.repo.json("recover", "b1", code=StorageLost.exit_code)
    away.rename(booting.repo.path)
    booting.repo.json("recover", "b1")
    booting.repo.path.rename(away)
    read_by_the_guest_itself(guest)
    wait_for("the guest is paused", lambda: is_paused(guest), PATIENCE_S)
    error = booting.repo.json("recover", "b1", code=StorageLost.exit_code)["guests"][0]["error"]
    assert "can be read again" in error["next_command"]
    assert any("can't be read" in line for line in booting.repo.json(
        "status", code=NeedsAttention.exit_code)["booted"][0]["log"])
    away.rename(booting.repo.path)
    assert booting.repo.json("recover", "b1")["guests"][0]["did"] == ["resumed it"]
    assert not is_paused(guest)
    for target in guest.targets():
        guest.assert_disk_equals_model(target)


def test_a_guest_that_asked_for_them_gets_io_errors(booting: Booting) -> None:
    guest = booting.boot("b1", "--on-error", "report")
    end_servers()
    read_by_the_guest_itself(guest)
    with pytest.raises(WriteFailed):
        guest.reads_as("vda", 9 * MIB, 512, 0)
    assert not is_paused(guest)
    booting.repo.json("recover", "b1")
    guest.assert_disk_equals_model("vda")


def test_what_is_asked_wrongly_is_refused_and_leaves_nothing(booting: Booting) -> None:
    guest = booting.boot("b1")
    again = ("boot", booting.snapshot.sid, "--as", "b1", "--pool", booting.pool)
    booting.repo.json(*again, code=GuestExists.exit_code)
    (booting.pool / "b2-vdb.qcow2").write_bytes(b"mine")
    booting.repo.json(*again[:3], "b2", *again[4:], code=TargetExists.exit_code)
    assert (booting.pool / "b2-vdb.qcow2").read_bytes() == b"mine"
    assert not booting.guest("b2").is_defined()
    booting.repo.json("land", "nobody", code=GuestUnknown.exit_code)
    error = booting.repo.json("backup", "b1", code=GuestUnfit.exit_code)["guests"][0]["error"]
    assert "stillframe land b1" in error["next_command"]
    kept = booting.repo.json("forget", booting.snapshot.sid)
    assert not kept["dropped"]
    assert "b1 runs from it" in kept["kept"][0]["reasons"][0]
    guest.domain().destroy()
    booting.repo.json("land", "b1", code=GuestShutOff.exit_code)
    assert len(list(booting.repo.place.state_dir.glob("booted/*"))) == 1


def test_a_guest_that_is_thrown_away_leaves_nothing(booting: Booting) -> None:
    guest = booting.boot("b1")
    guest.write("vda", 5 * MIB, 4096, 0x44)
    did = booting.repo.json("discard", "b1", "--dry-run")["did"]
    assert any(str(booting.pool / "b1-vda.qcow2") in line for line in did)
    assert guest.running()
    booting.repo.json("discard", "b1")
    booting.assert_nothing_is_left("b1")


def test_a_guest_has_variables_and_a_tpm_of_its_own(booting: Booting, images_dir: Path) -> None:
    guest, nvram = start_uefi_guest(booting.daemons, images_dir)
    state = TPM_FOLDER / guest.domain().UUIDString() / "tpm2/tpm2-00.permall"
    sid = str(booting.repo.backup(guest, "--method", "overlay")["snapshot"])
    guest.destroy()
    before = nvram.read_bytes(), state.read_bytes()
    words = ("boot", sid, "--as", "b1", "--pool", str(booting.pool))
    own = assert_only_what_it_made_is_removed(booting, *words)
    done = booting.repo.json(*words)
    record = booting.record("b1")
    assert record is not None
    assert str(own) in record["files"]
    assert own.read_bytes()[-4096:] == before[0][-4096:]
    assert (TPM_FOLDER / done["uuid"] / "tpm2/tpm2-00.permall").exists()
    assert booting.guest("b1").running()
    booting.repo.json("discard", "b1")
    booting.assert_nothing_is_left("b1")
    assert not own.exists()
    assert not (TPM_FOLDER / done["uuid"]).exists()
    assert (nvram.read_bytes(), state.read_bytes()) == before
    guest.domain().undefineFlags(UNDEFINE_WHOLLY)
    guest.remove()


def assert_only_what_it_made_is_removed(booting: Booting, *words: str) -> Path:
    """Begin boots while somebody else makes a guest of that name; return where its variables go."""
    begun = BootRun(booting, BootState.MAKING, "intent", 1, *words)
    assert begun.wait_reached(), begun.output
    record = booting.record("b1")
    assert record is not None
    own = next(Path(path) for path in record["files"] if "VARS" in path)
    own.write_bytes(b"another guest's")
    assert begun.go_on() == TargetExists.exit_code, begun.output
    assert own.read_bytes() == b"another guest's"
    own.unlink()
    booting.assert_nothing_is_left("b1")

    killed = BootRun(booting, BootState.MAKING, "intent", 1, *words)
    assert killed.wait_reached(), killed.output
    killed.kill()
    for way in (("restore", *words[1:]), words):
        error = booting.repo.json(*way, code=GuestExists.exit_code)["error"]
        assert "stillframe discard b1" in error["next_command"]
    own.write_bytes(b"another guest's")
    booting.repo.json("recover")
    assert own.read_bytes() == b"another guest's"
    own.unlink()
    booting.assert_nothing_is_left("b1")

    made = BootRun(booting, BootState.MAKING, "done", len(record["files"]), *words)
    assert made.wait_reached(), made.output
    made.kill()
    left = booting.record("b1")
    assert left is not None
    assert left["made"].keys() == set(left["files"])
    assert own.exists()
    assert not all(Path(path).exists() for path in left["files"]), "the last one has no name yet"
    booting.repo.json("recover")
    assert not any(Path(path).exists() for path in left["folders"])
    assert not [path for path in own.parent.iterdir() if "b1" in path.name]
    booting.assert_nothing_is_left("b1")
    return own


def test_what_somebody_else_made_is_not_thrown_away(booting: Booting) -> None:
    guest = booting.boot("b1")
    guest.domain().destroy()
    ours = booting.pool / "b1-vda.qcow2"
    ours.rename(booting.pool / "kept")
    shutil.copy(booting.pool / "kept", ours)
    error = booting.repo.json("discard", "b1", code=GuestUnfit.exit_code)["error"]
    assert str(ours) in error["message"]
    assert guest.is_defined()
    assert ours.exists()


def test_an_overlay_that_was_deleted_under_a_running_guest_is_asked_about(booting: Booting) -> None:
    guest = booting.boot("b1")
    guest.write("vda", 5 * MIB, 4096, 0x44)
    guest.flush()
    (booting.pool / "b1-vda.qcow2").unlink()
    assert "copy it before you shut" in booting.repo.json(
        "status", code=NeedsAttention.exit_code)["booted"][0]["trouble"]
    booting.repo.json("land", "b1", "--dry-run", code=NeedsAttention.exit_code)
    error = booting.repo.json("land", "b1", code=NeedsAttention.exit_code)["error"]
    assert "b1-vda.qcow2" in error["message"]
    assert "b1-vdb.qcow2" not in error["message"]
    assert guest.running()
    saved = booting.pool / "saved"
    advice = error["next_command"].partition(";")[0].replace("FILE", str(saved))
    subprocess.run(shlex.split(advice), check=True)
    guest.model("vda").assert_equal(to_raw(saved, "qcow2", booting.folder / "saved.raw"))
    booting.repo.json("discard", "b1")
    booting.assert_nothing_is_left("b1")


def test_a_guest_whose_boot_fails_leaves_nothing(booting: Booting) -> None:
    with small_file_system(booting.pool / "small", 64 * 1024) as full:
        (full / "fill").write_bytes(bytes(60 * 1024))
        done = booting.repo.call("boot", booting.snapshot.sid, "--as", "b1", "--pool", full)
        assert done.returncode == TargetSmall.exit_code, done.stderr
        assert [path.name for path in full.iterdir()] == ["fill"]
    booting.assert_nothing_is_left("b1")


def test_a_guest_whose_boot_fails_half_made_leaves_nothing(booting: Booting) -> None:
    with small_file_system(booting.pool / "small", 20 * MIB) as small:
        run = BootRun(booting, BootState.MAKING, "done", 1, "boot", booting.snapshot.sid, "--as", "b1",
                      "--pool", str(small))
        assert run.wait_reached(), run.output
        with (small / "fill").open("wb") as file:
            file.write(bytes(free_bytes(str(small))))
        made = [path.name for path in small.iterdir() if "b1-vda" in path.name]
        assert made
        assert run.go_on() == BootFailed.exit_code, run.output
        assert "b1-vdb.qcow2 can't be made" in run.output
        assert GuestState.UNTOUCHED.value in run.output
        assert [path.name for path in small.iterdir()] == ["fill"]
    booting.assert_nothing_is_left("b1")


@pytest.mark.parametrize("runs", [True, False])
def test_a_boot_that_fails_after_the_guest_ran_says_that_it_is_there(booting: Booting, *, runs: bool) -> None:
    run = BootRun(booting, BootState.STARTING, "intent", 1, "boot", booting.snapshot.sid, "--as", "b1",
                  "--pool", str(booting.pool))
    assert run.wait_reached(), run.output
    guest = booting.guest("b1")
    guest.domain().create()  # so that its start is refused, or fails, once it has run
    guest.write("vda", 5 * MIB, 4096, 0x44)
    guest.flush()
    if not runs:
        guest.domain().destroy()
        end_servers()
    assert run.go_on() == BootFailed.exit_code, run.output
    assert f"b1 ran all the same, and is there: it is {'running' if runs else 'shut off'}" in run.output
    assert GuestState.OVERLAID.value in run.output
    assert "stillframe discard b1" in run.output
    assert guest.running() is runs
    if not runs:
        guest.domain().create()
    guest.assert_disk_equals_model("vda")
    booting.repo.json("discard", "b1")
    booting.assert_nothing_is_left("b1")


def test_a_guest_without_room_runs_on_and_lands_when_there_is_some(booting: Booting) -> None:
    with small_file_system(booting.pool / "small", 20 * MIB) as small:
        guest = replace(booting, pool=small).boot("b1")
        booting.repo.json("land", "b1", code=TargetSmall.exit_code)
        assert guest.running()
        guest.assert_disk_equals_model("vda")
        subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
        booting.repo.json("land", "b1")
        replace(booting, pool=small).assert_landed(guest)
        guest.domain().undefine()


def test_a_bad_chunk_is_an_io_error_that_the_log_names(booting: Booting, tmp_path: Path) -> None:
    booting = moved(booting, tmp_path / "copy")
    packs = [path for path in booting.repo.path.glob("*/p/**/*") if path.is_file()]
    largest = max(packs, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[2 * MIB] ^= 0xFF
    largest.chmod(0o600)
    largest.write_bytes(content)
    guest = booting.boot("b1")
    step = 64 * 1024
    broken = [(target, at) for target in guest.targets() for at in range(0, 4 * MIB, step)
              if fails(guest, target, at)]
    assert 0 < len(broken) < 64
    log = booting.repo.json("status")["booted"][0]["log"]
    assert any("data is lost" in line for line in log)


def fails(guest: BootedGuest, target: str, offset: int) -> bool:
    try:
        guest.reads_as(target, offset, 512, 0)
    except WriteFailed:
        return True
    return False
