"""A snapshot runs as a guest at once, and comes home while it runs: every byte."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.booted import BootedGuest
from lab.daemons import LibvirtDaemons
from lab.images import MIB
from lab.waiting import PATIENCE_S, wait_for
from stillframe.errors import GuestBooted, GuestShutOff, NeedsAttention, TargetExists
from tests.fault.harness import Place
from tests.integration.booting import Booting, Snapshot, servers, take_snapshot


@pytest.fixture(scope="module")
def snapshot(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Give a snapshot for all tests here: none of them changes it."""
    session_daemons.start()
    return take_snapshot(session_daemons, tmp_path_factory.mktemp("boot"))


@pytest.fixture
def booting(daemons: LibvirtDaemons, snapshot: Snapshot, place: Place, tmp_path: Path) -> Iterator[Booting]:
    """Give a test's own places."""
    yield Booting(daemons, snapshot, replace(snapshot.repo, place=place), place.overlays, tmp_path)
    for pid in servers():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree("/run/stillframe", ignore_errors=True)


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
    assert guest.domain().UUIDString() != booting.record("b1")["origin"]  # type: ignore[index]
    guest.domain().destroy()
    guest.domain().create()
    for target in guest.targets():
        guest.assert_disk_equals_model(target)
    assert all(path.exists() for path in origin.values())


def test_a_guest_lands_while_it_writes(booting: Booting) -> None:
    guest = booting.boot("b1")
    write_here_and_there(guest, 0x31)
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
        said = booting.repo.json("land", "b1")
    finally:
        over.set()
        writer.join()
    assert [disk["target"] for disk in said["disks"]] == ["vda", "vdb"]
    booting.assert_landed(guest)
    guest.domain().create()
    guest.assert_disk_equals_model("vda")
