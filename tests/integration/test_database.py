"""The database guest under load: what a mirror of it is worth, by each way of quiescing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import pytest

from lab import forked
from lab.daemons import LibvirtDaemons
from lab.database import check_image, needs_recovery
from lab.dbguest import DbGuest, read_counter
from lab.disks import DiskSpec, Kind
from lab.images import MIB
from lab.waiting import PATIENCE_S, wait_for
from stillframe.capture.states import State
from stillframe.errors import OverlayFull
from tests.fault.harness import Place, Run, overlays_left, small_file_system

pytestmark = pytest.mark.timeout(600)
MakeGuest = Callable[..., DbGuest]
_TIMEOUT_S = 200.0


class Stillframe:
    """The command, as a user runs it."""

    def __init__(self, folder: Path) -> None:
        self.destination = folder / "mirrors"
        self.destination.mkdir()
        self._state = folder / "state"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            self._command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Run a command, which must end with *code*; return its JSON."""
        done = forked.run(self._command(*arguments), timeout_s=_TIMEOUT_S)
        assert done.returncode == code, done.stdout + done.stderr
        body: dict[str, Any] = json.loads(done.stdout)
        return body

    def end(self, process: subprocess.Popen[str], code: int) -> dict[str, Any]:
        """Wait until a command that was started ends, with *code*; return its JSON."""
        out, err = process.communicate(timeout=_TIMEOUT_S)
        assert process.returncode == code, out + err
        body: dict[str, Any] = json.loads(out)
        return body

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "stillframe", *arguments, "--json", "--state-dir", str(self._state)]

    def mirror(self, guest: DbGuest, *options: str, code: int = 0) -> dict[str, Any]:
        """Mirror *guest*; return its part of the JSON."""
        # Of an option that comes twice, the last one counts.
        body = self.run("mirror", guest.name, str(self.destination),
                        "--method=overlay", "--min-free", "64M", *options, code=code)
        result: dict[str, Any] = body["guests"][0]
        return result

    def image(self, guest: DbGuest, target: str = "vda") -> Path:
        """Return the mirror's image."""
        return self.destination / guest.name / f"{target}.img"


@pytest.fixture
def stillframe(tmp_path: Path) -> Stillframe:
    return Stillframe(tmp_path)


def assert_back(stillframe: Stillframe, guest: DbGuest) -> None:
    """The guest writes on, on its own images; nothing is left."""
    guest.wait_more_rows(2)
    assert "stillframe-overlay" not in guest.disk_source("vda")[0]
    assert not list(guest.folder.glob("*.stillframe-overlay.qcow2"))
    assert stillframe.run("status")["open_runs"] == []


def has_overlay(guest: DbGuest) -> bool:
    """Whether the overlay file exists already; it is made just before the freeze."""
    return bool(list(guest.folder.glob("*.stillframe-overlay.qcow2")))


def assert_sound(stillframe: Stillframe, guest: DbGuest, acknowledged: int, *, recovered: bool) -> None:
    """The mirror's database is sound and holds every row acknowledged before the capture."""
    assert needs_recovery(stillframe.image(guest)) is recovered
    check = check_image(stillframe.image(guest), "raw")
    assert check.whole, check
    assert check.last >= acknowledged


def test_frozen_by_the_agent(stillframe: Stillframe, db_guest: MakeGuest) -> None:
    guest = db_guest()
    acknowledged = 0
    result: dict[str, Any] = {}
    for _ in range(2):
        acknowledged = guest.wait_more_rows(5)
        result = stillframe.mirror(guest)
        assert result["consistency"] == "filesystem"
        assert 0 < result["frozen_s"] < 10
        assert_back(stillframe, guest)
        assert guest.freeze_status() == "thawed"
    assert not result["disks"][0]["first_copy"]
    assert result["disks"][0]["written_bytes"] < result["disks"][0]["data_bytes"]
    assert_sound(stillframe, guest, acknowledged, recovered=False)


def test_without_an_agent_it_is_crash_consistent_and_says_so(
    stillframe: Stillframe, db_guest: MakeGuest
) -> None:
    guest = db_guest(agent=False)
    acknowledged = guest.wait_more_rows(5)
    result = stillframe.mirror(guest, code=3)
    assert result["consistency"] == "crash"
    assert "crash-consistent" in result["warnings"][0]
    assert_back(stillframe, guest)
    assert_sound(stillframe, guest, acknowledged, recovered=True)
    assert stillframe.mirror(guest, "--quiesce", "none")["consistency"] == "crash"
    refused = stillframe.mirror(guest, "--quiesce", "agent", code=19)
    assert refused["error"]["code"] == "agent-silent"


def test_shut_down_and_started_again_while_the_copy_runs(
    stillframe: Stillframe, db_guest: MakeGuest
) -> None:
    guest = db_guest()
    acknowledged = guest.wait_more_rows(5)
    boots = guest.console().count("READY")
    result = stillframe.mirror(guest, "--quiesce", "shutdown")
    assert result["consistency"] == "shutdown"
    guest.wait_ready()
    assert guest.console().count("READY") == boots + 1
    assert_back(stillframe, guest)
    assert_sound(stillframe, guest, acknowledged, recovered=False)


@pytest.mark.parametrize(("quiesce", "consistency"), [("agent", "filesystem"), ("shutdown", "shutdown")])
def test_standing_on_overlays_it_is_brought_to_rest_all_the_same(
    stillframe: Stillframe, db_guest: MakeGuest, quiesce: str, consistency: str
) -> None:
    """Two runs: onto overlays, and from these to others, only what changed being read."""
    guest = db_guest()
    for number in range(2):
        acknowledged, boots = guest.wait_more_rows(5), guest.console().count("READY")
        result = stillframe.mirror(guest, "--method=standing-overlay", "--quiesce", quiesce)
        assert result["consistency"] == consistency
        guest.wait_ready()
        assert guest.freeze_status() == "thawed"
        assert guest.console().count("READY") == boots + (quiesce == "shutdown")
        assert len(list(guest.folder.glob("*.stillframe-overlay.qcow2"))) == 1
        for inactive in (False, True):
            assert "stillframe-overlay" in guest.disk_source("vda", inactive=inactive)[0]
        assert stillframe.run("status")["open_runs"] == []
        disk = result["disks"][0]
        assert (disk["method"], disk["note"], disk["first_copy"]) == ("standing-overlay", "", number == 0)
        assert bool(disk["unchanged_bytes"]) is (number > 0)
        assert_sound(stillframe, guest, acknowledged, recovered=False)
    stillframe.run("settle", guest.name)
    assert_back(stillframe, guest)
    acknowledged = guest.acknowledged()
    guest.power_off()
    check = check_image(*guest.disk_source("vda"))
    assert check.whole
    assert check.last >= acknowledged


def test_a_guest_that_does_not_shut_down_runs_on(stillframe: Stillframe, db_guest: MakeGuest) -> None:
    guest = db_guest()
    guest.stop_agent()  # the request waits in the agent's queue
    failed = stillframe.mirror(guest, "--quiesce", "shutdown", "--shutdown-timeout", "3s", code=46)
    assert failed["error"]["code"] == "shutdown-timed-out"
    assert_back(stillframe, guest)


def mirror_while_the_agent_stops(stillframe: Stillframe, guest: DbGuest) -> dict[str, Any]:
    """Stop the agent between the ping of the plan and the freeze: nobody answers any more."""
    process = stillframe.start("mirror", guest.name, str(stillframe.destination),
                               "--method=overlay", "--min-free", "64M",
                               "--quiesce", "agent", "--freeze-timeout", "4s", "--agent-timeout", "1s")
    wait_for("an overlay", lambda: has_overlay(guest), PATIENCE_S)
    # Held meanwhile: the guest may take longer to stop its agent than the run to begin the freeze.
    process.send_signal(signal.SIGSTOP)
    guest.stop_agent()
    process.send_signal(signal.SIGCONT)
    failed: dict[str, Any] = stillframe.end(process, 60)["guests"][0]
    return failed


def test_a_freeze_that_never_answers_ends_and_leaves_the_guest_writing(
    stillframe: Stillframe, db_guest: MakeGuest
) -> None:
    guest = db_guest()
    failed = mirror_while_the_agent_stops(stillframe, guest)
    assert "did not freeze in time" in failed["error"]["message"]
    guest.wait_more_rows(2)
    assert "stillframe-overlay" not in guest.disk_source("vda")[0]
    assert not list(guest.folder.glob("*.stillframe-overlay.qcow2"))
    # The run stays open until the agent confirms the thaw; a new run says so, too.
    assert stillframe.run("status", code=60)["open_runs"]


def test_an_agent_that_freezes_late_is_thawed_by_the_guard(
    stillframe: Stillframe, db_guest: MakeGuest
) -> None:
    guest = db_guest()
    failed = mirror_while_the_agent_stops(stillframe, guest)
    assert failed["error"]["guest"] == "unknown", "nobody can know yet whether it will freeze"
    guest.continue_agent()  # now the agent finds the freeze in its queue
    wait_for("the guest is thawed", lambda: guest.freeze_status() == "thawed", PATIENCE_S)
    guest.wait_more_rows(20)
    assert guest.freeze_status() == "thawed"
    stillframe.run("recover", guest.name)
    assert stillframe.mirror(guest)["consistency"] == "filesystem"
    assert_back(stillframe, guest)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_cleanly(
    stillframe: Stillframe, db_guest: MakeGuest, number: signal.Signals
) -> None:
    guest = db_guest()
    process = stillframe.start("mirror", guest.name, str(stillframe.destination),
                               "--method=overlay", "--min-free", "64M")
    wait_for("an overlay", lambda: has_overlay(guest), PATIENCE_S)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    # The signal may come when the copy is already durable; then the run just ends well.
    assert process.returncode in (48, 0), out + err
    assert guest.freeze_status() == "thawed"
    assert_back(stillframe, guest)
    assert stillframe.mirror(guest)["consistency"] == "filesystem"


def test_libvirtd_away_for_ten_seconds_in_mid_copy(
    stillframe: Stillframe, db_guest: MakeGuest, daemons: LibvirtDaemons, tmp_path: Path
) -> None:
    guest = db_guest()
    acknowledged = guest.wait_more_rows(5)
    place = Place(stillframe.destination, tmp_path / "state", guest.folder)
    run = Run(place, guest, quiesce="agent", state=State.COPYING, phase="done")
    assert run.wait_reached(), run.output
    daemons.stop()
    run.resume_only()
    threading.Event().wait(10)
    daemons.start()
    assert run.end() == 0, run.output
    assert_back(stillframe, guest)
    assert_sound(stillframe, guest, acknowledged, recovered=False)


def test_a_full_overlay_pauses_the_guest_and_recover_lets_it_go_on(
    stillframe: Stillframe, db_guest: MakeGuest, tmp_path: Path, images_dir: Path
) -> None:
    # Mounted before the guest starts: QEMU has a mount namespace of its own and sees no later mounts.
    with small_file_system(images_dir / "small-overlays", 80 * MIB) as small:
        guest = db_guest()
        place = Place(stillframe.destination, tmp_path / "state", small)
        run = Run(place, guest, state=State.COPYING, phase="done")
        assert run.wait_reached(), run.output
        with contextlib.suppress(OSError):
            (small / "filler").write_bytes(bytes(range(256)) * (80 * 4096))
        wait_for("the guest is paused", lambda: guest.domain().info()[0] == libvirt.VIR_DOMAIN_PAUSED,
                 PATIENCE_S)
        acknowledged = guest.acknowledged()
        run.kill()
        stillframe.run("recover", guest.name)
        assert not overlays_left(place)
        assert_back(stillframe, guest)
        guest.power_off()
    check = check_image(*guest.disk_source("vda"))
    assert check.whole
    assert check.last >= acknowledged


def test_the_watermark_ends_the_copy_before_the_overlay_is_full(
    stillframe: Stillframe, db_guest: MakeGuest, tmp_path: Path
) -> None:
    guest = db_guest()
    place = Place(stillframe.destination, tmp_path / "state", guest.folder)
    run = Run(place, guest, state=State.COPYING, phase="done", overlay_limit_bytes=2 * MIB)
    assert run.wait_reached(), run.output
    overlay = overlays_left(place)[0]
    wait_for("the overlay to grow", lambda: overlay.stat().st_blocks * 512 > 2 * MIB, PATIENCE_S)
    assert run.go_on() == OverlayFull.exit_code, run.output
    assert_back(stillframe, guest)
    assert not stillframe.image(guest).exists()


def test_two_disks_are_of_one_moment(stillframe: Stillframe, db_guest: MakeGuest) -> None:
    guest = db_guest(counter=True, agent=False, disks=[
        DiskSpec("vda", size_bytes=16 * MIB), DiskSpec("vdb", Kind.RAW, 16 * MIB)])
    for _ in range(4):
        before = guest.wait_more_rows(3)
        stillframe.mirror(guest, "--quiesce", "none")
        first, second = (read_counter(stillframe.image(guest, target)) for target in ("vda", "vdb"))
        assert 0 <= first - second <= 1, "vda is written first, then vdb"
        assert second >= before - 1
    assert os.path.exists(stillframe.image(guest, "vdb"))
