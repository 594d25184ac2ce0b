"""The tool, a server, QEMU or libvirtd is killed at each step of a boot and of a landing: nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.booted import BootedGuest
from lab.daemons import LibvirtDaemons
from lab.images import MIB
from lab.waiting import PATIENCE_S, wait_for
from stillframe.restore.boot_record import BootState
from tests.fault.harness import Place, Run
from tests.integration.booting import Booting, Snapshot, servers, take_snapshot

_NAME = "b1"
_BOOT = (BootState.PLANNED, BootState.MAKING, BootState.SERVING, BootState.DEFINING, BootState.STARTING,
         BootState.BOOTED)
_BOOT_CELLS = [(state, phase) for state in _BOOT for phase in ("intent", "done")
               if (state, phase) not in ((BootState.PLANNED, "done"), (BootState.BOOTED, "done"))]
#: The steps of a landing with two disks: begun; a disk is pulled, and then seen to have landed; all have.
_LAND_CELLS = [(BootState.LANDING, "intent", 1), (BootState.LANDING, "intent", 2),
               (BootState.LANDING, "done", 1), (BootState.LANDED, "intent", 1)]


@pytest.fixture(scope="module")
def snapshot(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Give a snapshot for all tests here: none of them changes it."""
    session_daemons.start()
    return take_snapshot(session_daemons, tmp_path_factory.mktemp("boot"))


@pytest.fixture
def booting(daemons: LibvirtDaemons, snapshot: Snapshot, place: Place, tmp_path: Path) -> Iterator[Booting]:
    """Give a test's own places."""
    yield Booting(daemons, snapshot, replace(snapshot.repo, place=place), place.overlays, tmp_path)
    end_servers()
    shutil.rmtree("/run/stillframe", ignore_errors=True)


class BootRun(Run):
    """The command, stopped at a step of the record."""

    def __init__(self, booting: Booting, state: BootState, phase: str, number: int, *words: str) -> None:
        line = booting.repo.command(*words)[3:]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.boot_driver", state.value, phase, str(number), *line],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=booting.repo.root,
            env=booting.repo.environment(), stdin=subprocess.DEVNULL)
        self.output = ""


def end_servers() -> None:
    for pid in servers():
        os.kill(pid, signal.SIGKILL)
    wait_for("the servers are gone", lambda: not servers(), PATIENCE_S)


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


@pytest.mark.parametrize(("state", "phase"), [
    (BootState.SERVING, "done"), (BootState.DEFINING, "done"), (BootState.STARTING, "done")])
def test_the_servers_are_killed_in_a_boot(booting: Booting, state: BootState, phase: str) -> None:
    run = BootRun(booting, state, phase, 1, *boot_words(booting))
    assert run.wait_reached(), run.output
    end_servers()
    run.go_on()
    assert_whole(booting, booting.guest(_NAME))


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


@pytest.mark.parametrize("victim", ["tool", "servers", "qemu", "libvirtd", "all"])
@pytest.mark.parametrize(("state", "phase", "number"), _LAND_CELLS)
def test_something_is_killed_in_a_landing(
    booting: Booting, state: BootState, phase: str, number: int, victim: str,
) -> None:
    guest = booting.boot(_NAME)
    for target in guest.targets():
        guest.write(target, 6 * MIB + 512, 100 * 1024, 0x55)
    guest.flush()
    run = BootRun(booting, state, phase, number, "land", _NAME)
    assert run.wait_reached(), run.output
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
        run.go_on()
    assert_whole(booting, guest)
    if booting.record(_NAME) is not None:
        booting.repo.json("land", _NAME)
    booting.assert_landed(guest)
