"""Guests that QEMU runs without libvirt: every restore point is the disk at its moment, whatever dies."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lab.barequemu import Attach, BareQemu
from lab.disks import DiskSpec, Kind
from lab.images import MIB, assert_equal_images
from stillframe.capture.journal import Journal
from stillframe.capture.states import State
from stillframe.cli.main import app
from stillframe.clock import SystemClock
from stillframe.errors import (
    AgentSilent,
    CopyFailed,
    GuestUnfit,
    GuestUnknown,
    MonitorBusy,
    NeedsAttention,
    ShutdownImpossible,
)
from tests.fault.harness import Place, Run, Victim, named, overlays_left, recover
from tests.integration.repositories import Repo, make_repo
from tests.pull_store import PullStore

MakeBare = Callable[..., BareQemu]
Steps = tuple[tuple[State, str], ...]
_KIB = 1024
_SIZE_BYTES = 24 * MIB
TWO = (DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))
UUID = "6f1b7c52-3a80-4b5e-9d0c-2f4f6b1d7a11"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("mirrors", "overlays"):
        (tmp_path / name).mkdir()
    return Place(tmp_path / "mirrors", tmp_path / "state", tmp_path / "overlays")


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    return make_repo(place, tmp_path)


def moment_of(guest: BareQemu) -> dict[str, Path]:
    return {target: guest.model(target).copy_at_moment() for target in guest.disks}


def change(guest: BareQemu, round_: int) -> None:
    for target in guest.disks:
        guest.write(target, (1 + round_) * MIB, 192 * _KIB, 0xA0 + round_)
        guest.write_zeroes(target, (8 + round_) * MIB, 128 * _KIB)
    guest.flush()


def assert_clean(guest: BareQemu, place: Place) -> None:
    """Nothing of a run is left in QEMU or beside the images, and the guest runs on its own."""
    assert not overlays_left(place)
    assert not list(guest.folder.rglob("*stillframe*"))
    assert not list(place.overlays.iterdir())
    if guest.running():
        assert guest.monitor.execute("query-jobs") == []
        assert guest.monitor.execute("query-block-exports") == []
        nodes = guest.monitor.execute("query-named-block-nodes")
        assert [node["node-name"] for node in nodes if "stillframe" in node["file"] + node["node-name"]] == []
        assert guest.monitor.execute("query-status")["status"] == "running"
    for target in guest.disks:
        assert guest.top(target) == str(guest.disks[target].path)
        guest.assert_disk_equals_model(target)


def test_an_overlay_backup(bare_qemu: MakeBare, repo: Repo, tmp_path: Path) -> None:
    """Of disks that are given to QEMU in each way there is, and of a guest that bitmaps would end."""
    guest = bare_qemu(*TWO, DiskSpec("vdc", Kind.RAW, _SIZE_BYTES), attach=tuple(Attach), io_thread=True)
    change(guest, 0)
    expected = moment_of(guest)
    error = repo.backup(
        guest, "--method", "bitmap", "--overlay-dir", str(repo.place.overlays), code=GuestUnfit.exit_code)
    assert "I/O threads" in error["error"]["message"]
    result = repo.backup(guest, "--overlay-dir", str(repo.place.overlays))  # auto knows, too
    assert [disk["method"] for disk in result["disks"]] == ["overlay"] * 3
    assert [disk["target"] for disk in result["disks"]] == ["vda", "vdb", "vdc"]
    assert_clean(guest, repo.place)
    repo.assert_restores(result["snapshot"], expected, tmp_path)


def test_writes_during_the_copy_are_not_in_it(bare_qemu: MakeBare, repo: Repo, tmp_path: Path) -> None:
    guest = bare_qemu(*TWO, uuid=UUID)
    place = replace(repo.place, destination=repo.path)
    chain = []
    for round_ in range(2):
        change(guest, round_)
        expected = moment_of(guest)
        run = Run(place, guest, what="backup", state=State.COPYING, phase="done")
        assert run.wait_reached(), run.output
        change(guest, round_ + 3)
        assert run.go_on() == 0, run.output
        assert_clean(guest, place)
        chain.append((run.output.rpartition("snapshot ")[2].split()[0], expected))
    for snapshot, expected in chain:
        repo.assert_restores(snapshot, expected, tmp_path)


def stopped(
    guest: BareQemu, place: Place, round_: int, state: State, phase: str, *, what: str = "mirror"
) -> Run:
    """Return a run that stands at a step; the guest has written, unless its CPUs stand still."""
    change(guest, round_)
    run = Run(place, guest, what=what, state=state, phase=phase)
    assert run.wait_reached(), run.output
    if guest.monitor.execute("query-status")["running"]:
        for target in guest.disks:
            guest.write(target, 20 * MIB + round_ * 65536, 65536, 0xE0 + round_)
        guest.flush()
    return run


def strike(run: Run, guest: BareQemu, place: Place, victims: set[Victim]) -> None:
    """Kill *victims*; what survives, or `recover`, goes on to its end, and nothing of the run is left."""
    if Victim.TOOL in victims:
        run.kill()
    if Victim.QEMU in victims:
        guest.kill()
    if Victim.TOOL in victims:
        done = recover(place, guest)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        run.go_on()
    assert not Journal(place.state_dir, SystemClock()).open_runs()
    assert_clean(guest, place)
    if not guest.running():
        guest.start()


# --- by bitmap ------------------------------------------------------------------------------------


@pytest.fixture
def store(place: Place) -> PullStore:
    return PullStore(place.destination)


def bitmaps_of(guest: BareQemu) -> set[str]:
    nodes = guest.monitor.execute("query-named-block-nodes")
    return {each["name"] for node in nodes for each in node.get("dirty-bitmaps", ())}


def assert_pulled(store: PullStore, expected: dict[str, Path]) -> None:
    point = store.current()
    assert point is not None
    for target, moment in expected.items():
        assert_equal_images(point / f"{target}.img", moment)


def pull(guest: BareQemu, place: Place, store: PullStore, round_: int) -> None:
    """Take a point, the guest writing before it and while it is read; compare it."""
    change(guest, round_)
    expected = moment_of(guest)
    run = Run(place, guest, what="bitmap", state=State.READING, phase="done")
    assert run.wait_reached(), run.output
    change(guest, round_ + 3)
    assert run.go_on() == 0, run.output
    assert_pulled(store, expected)
    assert_clean(guest, place)
    anchor = store.anchor()
    assert anchor is not None
    assert bitmaps_of(guest) == {anchor.checkpoint}


def test_bitmap_backups(bare_qemu: MakeBare, repo: Repo, tmp_path: Path) -> None:
    """Through the command: a first one is read whole, the next reads what changed; a restart keeps that."""
    guest = bare_qemu(*TWO)
    options = ("--overlay-dir", str(repo.place.overlays))
    chain = []
    for round_ in range(3):
        change(guest, round_)
        expected = moment_of(guest)
        result = repo.backup(guest, *options)  # auto comes to bitmap, as for libvirt's guests
        assert [disk["method"] for disk in result["disks"]] == ["bitmap", "bitmap"]
        chain.append((result["snapshot"], expected))
        assert_clean(guest, repo.place)
        if round_:
            assert result["disks"][0]["note"] == ""
            assert result["disks"][0]["read_bytes"] < 2 * MIB
        if round_ == 1:
            guest.quit()
            guest.start()
    for snapshot, expected in chain:
        repo.assert_restores(snapshot, expected, tmp_path)
    shown = repo.call("show", chain[-1][0])
    assert "no libvirt" in shown.stdout, shown.stdout


def test_writes_while_a_bitmap_point_is_read(
    bare_qemu: MakeBare, place: Place, store: PullStore
) -> None:
    guest = bare_qemu(*TWO)
    for round_ in range(2):
        pull(guest, place, store, round_)
    guest.kill()  # what the bitmap knows is lost with QEMU
    guest.start()
    pull(guest, place, store, 2)


PULL_STEPS = ((State.BEGINNING, "intent"), (State.BEGINNING, "done"), (State.READING, "done"),
              (State.RELEASED, "intent"), (State.ENDING, "intent"))


@pytest.mark.parametrize(("victims", "steps"), [
    pytest.param({Victim.TOOL}, ((State.READING, "done"), (State.FORGETTING, "intent")), id="tool"),
    pytest.param({Victim.QEMU}, PULL_STEPS[2:3], id="qemu"),
    pytest.param({Victim.TOOL}, PULL_STEPS, id="tool-all", marks=pytest.mark.slow),
    pytest.param({Victim.QEMU}, PULL_STEPS, id="qemu-all", marks=pytest.mark.slow),
    pytest.param({Victim.TOOL, Victim.QEMU}, PULL_STEPS, id="both-all", marks=pytest.mark.slow)])
def test_killed_by_bitmap(
    bare_qemu: MakeBare, place: Place, store: PullStore, victims: set[Victim], steps: Steps
) -> None:
    """Wherever in the job: nothing is left of it, and the next point is right."""
    guest = bare_qemu(*TWO)
    pull(guest, place, store, 0)
    for round_, (state, phase) in enumerate(steps):
        strike(stopped(guest, place, round_, state, phase, what="bitmap"), guest, place, victims)
    pull(guest, place, store, 2)


def test_the_guest_shuts_down_while_it_is_read(
    bare_qemu: MakeBare, place: Place, store: PullStore
) -> None:
    guest = bare_qemu(*TWO)
    pull(guest, place, store, 0)
    run = Run(place, guest, what="bitmap", state=State.READING, phase="done")
    assert run.wait_reached(), run.output
    guest.quit()
    assert run.go_on() == CopyFailed.exit_code, run.output
    assert_clean(guest, place)
    guest.start()
    pull(guest, place, store, 1)


# --- overlays, and somebody dies ---------------------------------------------------------------------


STEPS = ((State.SNAPSHOT, "intent"), (State.COPYING, "done"), (State.COMMITTING, "done"),
         (State.PIVOTING, "intent"), (State.PIVOTING, "done"), (State.CLEANING, "intent"))


def mirrored(guest: BareQemu, place: Place) -> dict[str, Path]:
    return {target: place.mirror(guest) / f"{target}.img" for target in guest.disks}


def assert_mirror(guest: BareQemu, place: Place) -> None:
    """One more mirror, of a guest at rest, is what the guest holds."""
    expected = moment_of(guest)
    assert Run(place, guest).end() == 0
    for target, moment in expected.items():
        assert_equal_images(mirrored(guest, place)[target], moment)
    assert_clean(guest, place)


@pytest.mark.parametrize(("victims", "steps"), [
    pytest.param({Victim.TOOL}, STEPS[1:4], id="tool"),
    pytest.param({Victim.QEMU}, STEPS[1:4], id="qemu"),
    pytest.param({Victim.TOOL, Victim.QEMU}, STEPS[1:4:2], id="both"),
    pytest.param({Victim.TOOL}, STEPS, id="tool-all", marks=pytest.mark.slow),
    pytest.param({Victim.QEMU}, STEPS, id="qemu-all", marks=pytest.mark.slow),
    pytest.param({Victim.TOOL, Victim.QEMU}, STEPS, id="both-all", marks=pytest.mark.slow)])
def test_killed_while_overlaid(
    bare_qemu: MakeBare, place: Place, victims: set[Victim], steps: Steps
) -> None:
    """At any step, in the pivot with the CPUs stopped: the guest is on its own images, no write is lost.

    A QEMU that died finds them complete when it is started again: overlays were written back meanwhile.
    """
    guest = bare_qemu(*TWO)
    for round_, (state, phase) in enumerate(steps):
        strike(stopped(guest, place, round_, state, phase), guest, place, victims)
    assert_mirror(guest, place)


def test_qemu_is_started_on_its_base_before_anybody_recovered(bare_qemu: MakeBare, place: Place) -> None:
    """Two histories: nothing is merged, a person is asked, and both files stay."""
    guest = bare_qemu(*TWO)
    run = Run(place, guest, state=State.COPYING, phase="done")
    assert run.wait_reached(), run.output
    guest.write("vda", 3 * MIB, 65536, 0xE1)
    guest.flush()
    run.kill()
    guest.kill()
    guest.start()
    done = recover(place, guest)
    assert done.returncode == NeedsAttention.exit_code, done.stdout
    assert "overlay holds writes that the base lacks" in done.stdout
    assert len(overlays_left(place)) == 2


@pytest.mark.slow
def test_a_qemu_that_cannot_be_asked_is_not_taken_for_one_that_ended(
    bare_qemu: MakeBare, place: Place
) -> None:
    guest = bare_qemu(*TWO)
    run = Run(place, guest, state=State.COPYING, phase="done")
    assert run.wait_reached(), run.output
    run.kill()
    away = guest.socket.rename(guest.socket.with_suffix(".away"))
    done = recover(place, guest)
    assert done.returncode == NeedsAttention.exit_code, done.stdout
    assert "can't be reached there" in done.stdout
    assert len(overlays_left(place)) == 2
    away.rename(guest.socket)
    assert recover(place, guest).returncode == 0
    assert_clean(guest, place)


def test_recover_finds_a_bare_guest_without_being_told(bare_qemu: MakeBare, place: Place) -> None:
    guest = bare_qemu(*TWO)
    run = Run(place, guest, state=State.COPYING, phase="done")
    assert run.wait_reached(), run.output
    run.kill()
    status = call(place, "status")
    assert status.exit_code == NeedsAttention.exit_code
    assert f"stillframe recover {guest.name}" in status.stdout
    assert "would give up" in call(place, "recover", "--dry-run", guest.name).stdout
    assert call(place, "recover").exit_code == 0
    assert_clean(guest, place)


# --- what is refused ---------------------------------------------------------------------------------


def call(place: Place, *words: str) -> Any:
    """Call stillframe in this process."""
    return CliRunner().invoke(
        app, [*words, "--state-dir", str(place.state_dir)], env={"STILLFRAME_CONFIG": "/dev/null"},
        catch_exceptions=False)


def refused(place: Place, guest: BareQemu, *options: str) -> dict[str, Any]:
    done = call(place, "mirror", named(guest), str(place.destination), "--json", "--min-free", "32M",
                "--overlay-dir", str(place.overlays), *options)
    body = json.loads(done.stdout)["guests"][0]
    assert not body["ok"], body
    error: dict[str, Any] = body["error"]
    assert done.exit_code == error["exit_code"]
    return error


@pytest.mark.parametrize(("options", "code", "words"), [
    (("--quiesce", "agent"), AgentSilent.code, "can't be reached without libvirt"),
    (("--quiesce", "shutdown"), ShutdownImpossible.code, "gone after a shutdown"),
    (("--method", "standing-overlay"), GuestUnfit.code, "in no definition that libvirt keeps"),
    (("--method", "offline"), GuestUnfit.code, "reads guests that are shut off"),
], ids=lambda value: value[-1] if isinstance(value, tuple) else "")
def test_refused(
    bare_qemu: MakeBare, place: Place, options: tuple[str, ...], code: str, words: str
) -> None:
    guest = bare_qemu(*TWO)
    error = refused(place, guest, *options)
    assert error["code"] == code
    assert words in error["message"]
    assert named(guest) in error["next_command"] or code == AgentSilent.code
    assert_clean(guest, place)


def test_a_monitor_that_somebody_else_holds(bare_qemu: MakeBare, place: Place) -> None:
    guest = bare_qemu(*TWO)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as other:
        other.connect(str(guest.socket))
        assert other.recv(100)
        error = refused(place, guest)
    assert error["code"] == MonitorBusy.code
    assert "another client holds the monitor" in error["message"]
    assert "-qmp unix:" in error["next_command"]


def test_a_socket_that_nobody_listens_at(bare_qemu: MakeBare, place: Place) -> None:
    guest = bare_qemu(*TWO)
    guest.socket.rename(guest.socket.with_suffix(".away"))
    error = refused(place, guest)
    assert "can't be reached there" in error["message"]  # QEMU runs, and is not taken for one that ended
    guest.kill()
    assert refused(place, guest)["code"] == GuestUnknown.code


def test_doctor(bare_qemu: MakeBare, place: Place) -> None:
    guest = bare_qemu(*TWO, DiskSpec("vdc", Kind.BLOCK, _SIZE_BYTES), options=(
        "-drive", "if=none,id=cd", "-device", "ide-cd,drive=cd"))
    done = call(place, "doctor", named(guest), "--overlay-dir", str(place.overlays))
    assert done.exit_code == 0, done.stdout
    assert "can be captured by the bitmap method" in done.stdout
    assert "vdc: raw /dev/loop" in done.stdout
    assert "cd: left out, it is a removable medium" in done.stdout
    assert "libvirt" not in done.stdout.replace("without libvirt", "")
