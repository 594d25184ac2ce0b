"""The tool, a server, QEMU or libvirtd is killed at each step of a boot and of a landing: nothing is lost."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import replace

import libvirt
import pytest

from lab.booted import BootedGuest
from lab.images import MIB
from lab.waiting import PATIENCE_S, wait_for
from stillframe.capture.growth import free_bytes
from stillframe.capture.lock import lock_holder
from stillframe.errors import BootFailed, GuestState, Interrupted, LandFailed
from stillframe.restore.boot_record import BootState
from tests.fault.harness import small_file_system
from tests.integration.booting import Booting, BootRun, end_servers

_NAME = "b1"
_VICTIMS = ("tool", "servers", "qemu", "libvirtd", "all")
_BOOT = (BootState.PLANNED, BootState.MAKING, BootState.SERVING, BootState.DEFINING, BootState.STARTING,
         BootState.BOOTED)
_BOOT_CELLS = [(state, phase) for state in _BOOT for phase in ("intent", "done")
               if (state, phase) not in ((BootState.PLANNED, "done"), (BootState.BOOTED, "done"))]
#: The steps of a landing of two disks in another folder, for the first one: the copy is made, the guest is
#: about to be stopped, QEMU was switched over, the guest went on; both disks have landed.
_COPY_CELLS = [
    (BootState.LANDING, "done", 4), (BootState.SWITCHING, "intent", 1), (BootState.SWITCHING, "done", 1),
    (BootState.LANDING, "intent", 2), (BootState.LANDED, "intent", 1)]
#: The steps of a landing with two disks: begun; a disk is pulled, and then seen to have landed; all have.
_LAND_CELLS = [(BootState.LANDING, "intent", 1), (BootState.LANDING, "intent", 2),
               (BootState.LANDING, "done", 2), (BootState.LANDED, "intent", 1)]


def boot_words(booting: Booting) -> list[str]:
    return ["boot", booting.snapshot.sid, "--as", _NAME, "--pool", str(booting.pool)]


def assert_whole(booting: Booting, guest: BootedGuest) -> None:
    """Recover, and check that the guest is there with every byte, or that nothing of it is."""
    done = booting.repo.call("recover")
    assert done.returncode == 0, done.stdout + done.stderr
    if booting.record(_NAME) is None and not guest.is_defined():
        booting.assert_nothing_is_left(_NAME)
        return
    if not guest.running():
        guest.domain().create()
    for target in guest.targets():
        guest.assert_disk_equals_model(target)


@pytest.mark.parametrize(("state", "phase"), _BOOT_CELLS)
def test_the_tool_is_killed_in_a_boot(booting: Booting, state: BootState, phase: str) -> None:
    run = BootRun(booting, state, phase, 1, *boot_words(booting))
    assert run.wait_reached(), run.output
    run.kill()
    guest = booting.guest(_NAME)
    assert_whole(booting, guest)
    ran = state is BootState.BOOTED or (state, phase) == (BootState.STARTING, "done")
    assert guest.is_defined() is ran
    if not ran:  # the name is free: the same command works now
        assert booting.boot(_NAME).running()


@pytest.mark.parametrize("state", [BootState.SERVING, BootState.DEFINING, BootState.STARTING])
def test_the_servers_are_killed_in_a_boot(booting: Booting, state: BootState) -> None:
    run = BootRun(booting, state, "done", 1, *boot_words(booting))
    assert run.wait_reached(), run.output
    end_servers()
    code, guest = run.go_on(), booting.guest(_NAME)
    if state is BootState.STARTING:  # QEMU had opened the disks by then
        assert code == 0, run.output
        assert guest.running()
        assert_whole(booting, guest)
        assert guest.running()
        assert booting.record(_NAME) is not None
    else:
        assert code == BootFailed.exit_code, run.output
        booting.assert_nothing_is_left(_NAME)


def test_qemu_is_killed_at_the_end_of_a_boot(booting: Booting) -> None:
    run = BootRun(booting, BootState.STARTING, "done", 1, *boot_words(booting))
    assert run.wait_reached(), run.output
    guest = booting.guest(_NAME)
    guest.write("vda", 2 * MIB, 4096, 0x77)
    guest.flush()
    booting.daemons.kill_qemu(_NAME)
    run.kill()
    assert_whole(booting, guest)
    assert guest.running()


def test_the_tool_is_killed_while_a_guest_is_thrown_away(booting: Booting) -> None:
    guest = booting.boot(_NAME)
    run = BootRun(booting, BootState.DISCARDING, "intent", 1, "discard", _NAME)
    assert run.wait_reached(), run.output
    run.kill()
    assert guest.running()
    assert_whole(booting, guest)
    booting.assert_nothing_is_left(_NAME)


def test_the_tool_is_killed_while_a_boot_is_undone(booting: Booting) -> None:
    begun = BootRun(booting, BootState.SERVING, "done", 1, *boot_words(booting))
    assert begun.wait_reached(), begun.output
    begun.kill()
    undoing = BootRun(booting, BootState.UNDOING, "intent", 1, "recover")
    assert undoing.wait_reached(), undoing.output
    undoing.kill()
    assert (booting.record(_NAME) or {})["state"] == BootState.UNDOING.value
    assert_whole(booting, booting.guest(_NAME))
    booting.assert_nothing_is_left(_NAME)


def test_the_tool_ends_in_the_middle_of_a_pull(booting: Booting) -> None:
    guest = booting.boot(_NAME)
    guest.write("vda", 6 * MIB + 512, 100 * 1024, 0x55)

    def land_slowly() -> subprocess.Popen[bytes]:
        guest.domain().blockPull("vda", 1)  # MiB a second: land finds it at work, and waits for it
        process = subprocess.Popen(
            booting.repo.command("land", _NAME, "-q"), env=booting.repo.environment(), cwd=booting.repo.root)
        uuid = guest.domain().UUIDString()
        wait_for("it holds the guest", lambda: str(process.pid) in lock_holder(
            booting.repo.place.state_dir, uuid), PATIENCE_S)
        wait_for("it lands", lambda: (booting.record(_NAME) or {})["detail"] == "pulling vda", PATIENCE_S)
        return process

    killed = land_slowly()
    assert booting.repo.json("status")["booted"][0]["trouble"] == ""
    killed.kill()
    killed.wait()
    assert guest.domain().blockJobInfo("vda")
    said = booting.repo.json("recover")["guests"][0]["did"]
    assert said == [f"it has not landed yet: stillframe land {_NAME}"]
    guest.domain().blockJobAbort("vda")
    wait_for("the job is gone", lambda: not guest.domain().blockJobInfo("vda"), PATIENCE_S)

    interrupted = land_slowly()
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(PATIENCE_S) == Interrupted.exit_code
    wait_for("the job is gone", lambda: not guest.domain().blockJobInfo("vda"), PATIENCE_S)
    assert guest.disk_xml("vda", inactive=True).find("backingStore/source") is not None
    booting.repo.json("land", _NAME)
    booting.assert_landed(guest)


@pytest.mark.parametrize("victim", ["tool", "all", *(
    pytest.param(each, marks=pytest.mark.slow) for each in ("servers", "qemu", "libvirtd"))])
@pytest.mark.parametrize(("state", "phase", "number"), _LAND_CELLS)
def test_something_is_killed_in_a_landing(
    booting: Booting, state: BootState, phase: str, number: int, victim: str,
) -> None:
    guest = booting.boot(_NAME)
    write_a_little(guest)
    run = BootRun(booting, state, phase, number, "land", _NAME)
    assert run.wait_reached(), run.output
    kill(booting, run, victim)
    assert_whole(booting, guest)
    if booting.record(_NAME) is not None:
        booting.repo.json("land", _NAME)
    booting.assert_landed(guest)


@pytest.mark.slow  # a quarter of a minute each; the next test has the cells that matter most
@pytest.mark.parametrize("victim", _VICTIMS)
@pytest.mark.parametrize(("state", "phase", "number"), _COPY_CELLS)
def test_something_is_killed_in_a_landing_elsewhere(
    booting: Booting, state: BootState, phase: str, number: int, victim: str,
) -> None:
    other = booting.pool / "other"
    other.mkdir()
    guest = booting.boot(_NAME)
    write_a_little(guest)
    run = BootRun(booting, state, phase, number, "land", _NAME, "--pool", str(other), "--format", "raw")
    assert run.wait_reached(), run.output
    kill(booting, run, victim)
    await_guard(booting)
    assert_whole(booting, guest)
    assert not is_stopped(guest)
    write_a_little(guest, 0x66)
    if booting.record(_NAME) is not None:
        booting.repo.json("land", _NAME)
    booting.assert_landed(guest, other, "raw")


@pytest.mark.parametrize("victim", ["tool", "qemu", "libvirtd"])
def test_something_is_killed_between_the_switch_and_what_follows_it(booting: Booting, victim: str) -> None:
    """QEMU is on the copy, nothing of that is written down, and the definition names the overlay.

    The guest stands still, and nobody calls `recover`: the guard lets it go on.
    """
    other = booting.pool / "other"
    other.mkdir()
    guest = booting.boot(_NAME)
    write_a_little(guest)
    run = BootRun(
        booting, BootState.SWITCHING, "intent", 1, "land", _NAME, "--pool", str(other), "--format", "qcow2")
    assert run.wait_reached(), run.output
    guest.domain().suspend()
    guest.domain().blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    assert guest.image("vda").parent == booting.pool
    if victim == "qemu":
        booting.daemons.kill_qemu(_NAME)
        assert guest.image("vda").parent == booting.pool
    if victim == "libvirtd":
        booting.daemons.kill_libvirtd()
    run.kill()
    if victim == "libvirtd":
        booting.daemons.start()
    await_guard(booting)
    assert victim == "qemu" or guest.running()
    assert not is_stopped(guest)
    wait_for("the guard says so", lambda: "the guard ended the switch" in (
        booting.record(_NAME) or {})["detail"], PATIENCE_S)
    assert_whole(booting, guest)
    assert not is_stopped(guest)
    assert guest.image("vda").parent == (booting.pool if victim == "qemu" else other)
    write_a_little(guest, 0x66)
    booting.repo.json("land", _NAME)
    booting.assert_landed(guest, other)


def test_a_copy_that_could_not_be_made_durable_does_not_leave_the_guest_so(booting: Booting) -> None:
    other = booting.pool / "other"
    other.mkdir()
    guest = booting.boot(_NAME)
    write_a_little(guest)
    run = BootRun(booting, BootState.SWITCHING, "intent", 1, "land", _NAME, "--pool", str(other))
    assert run.wait_reached(), run.output
    copy = other / f"{_NAME}-vda.qcow2"
    copy.rename(other / "away")  # opening it to make it durable fails, as on a share that is gone
    assert run.go_on() == LandFailed.exit_code, run.output
    assert "could not be made durable" in run.output
    assert GuestState.STOPPED.value in run.output
    assert is_stopped(guest)
    (other / "away").rename(copy)
    await_guard(booting)
    assert guest.running()
    assert not is_stopped(guest)
    write_a_little(guest, 0x66)
    booting.repo.json("land", _NAME)
    booting.assert_landed(guest, other)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_file_system_is_full_in_mid_landing(booting: Booting, *, elsewhere: bool) -> None:
    with small_file_system(booting.pool / "small", 200 * MIB) as small:
        if not elsewhere:
            booting = replace(booting, pool=small)
        guest = booting.boot(_NAME)
        write_a_little(guest)
        words = ["land", _NAME, *(["--pool", str(small)] if elsewhere else [])]
        run = BootRun(booting, BootState.LANDING, "done", 4 if elsewhere else 1, *words)
        assert run.wait_reached(), run.output
        filler = small / "filler"
        with filler.open("wb") as file:
            file.write(bytes(free_bytes(str(small)) - MIB))
        assert run.go_on() == LandFailed.exit_code, run.output
        assert guest.running()
        assert not is_stopped(guest)
        filler.unlink()
        assert [path.name for path in small.iterdir() if elsewhere] == []
        assert_whole(booting, guest)
        write_a_little(guest, 0x66)
        booting.repo.json("land", _NAME)
        booting.assert_landed(guest, small)
        guest.domain().undefine()


def write_a_little(guest: BootedGuest, pattern: int = 0x55) -> None:
    for target in guest.targets():
        guest.write(target, 6 * MIB + 512, 100 * 1024, pattern)
    guest.flush()


def await_guard(booting: Booting) -> None:
    """Wait until a switch that was begun is over, if there is one."""
    wait_for("no switch is under way",
             lambda: (booting.record(_NAME) or {}).get("state") != BootState.SWITCHING.value, PATIENCE_S)


def is_stopped(guest: BootedGuest) -> bool:
    return bool(guest.domain().state()[0] == libvirt.VIR_DOMAIN_PAUSED)


def kill(booting: Booting, run: BootRun, victim: str) -> None:
    if victim in ("tool", "all"):
        run.kill()
    if victim in ("servers", "all"):
        end_servers()
    if victim in ("qemu", "all"):
        booting.daemons.kill_qemu(_NAME)
    if victim == "libvirtd":
        booting.daemons.kill_libvirtd()
        booting.daemons.start()
    if victim not in ("tool", "all"):
        code = run.go_on()
        assert victim != "qemu" or code in (0, LandFailed.exit_code), run.output
