"""The kill matrix of captures by bitmap: at every journal step, kill the tool, libvirtd or QEMU; recover.

Each point that the store holds is compared with the model, and so is one that is made afterwards: it counts
from whatever the blow left.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest

from lab.daemons import LibvirtDaemons
from lab.database import check_image
from lab.dbguest import DbGuest
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.guest import Guest
from lab.images import MIB
from lab.waiting import PATIENCE_S, wait_for
from stillframe.capture.journal import Journal
from stillframe.capture.states import PULL_STATES, State
from stillframe.clock import SystemClock
from stillframe.errors import NeedsAttention, OverlayFull
from tests.fault.harness import Place, Run, Victim, recover, small_file_system, strike
from tests.fault.matrix import AGENT, Step, cells, steps_of
from tests.fault.test_kill_matrix import model_copy
from tests.pull_store import PullStore

MakeGuest = Callable[..., DiskGuest]
#: The states of other methods, too, that a run by bitmap comes to without an agent or a full file system.
_SHARED = frozenset({State.PLANNED, State.RELEASED, State.DONE})


def pulled(store: PullStore, guest: DiskGuest) -> dict[str, bytes]:
    """Return what the newest durable point holds."""
    point = store.current()
    assert point is not None
    return {target: (point / f"{target}.img").read_bytes() for target in guest.disks}


def journal_of(place: Place) -> Journal:
    return Journal(place.state_dir, SystemClock())


def lose_metadata(guest: DiskGuest) -> None:
    for checkpoint in guest.domain().listAllCheckpoints():
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def stopped_at(place: Place, guest: DiskGuest, step: Step) -> Run:
    """Return a run that stands at the step."""
    if step[0] is State.REDEFINING:
        lose_metadata(guest)
    if step[0] is not State.SWEEPING:
        run = Run(place, guest, what="bitmap", state=step[0], phase=step[1])
        assert run.wait_reached(), run.output
        return run
    # libvirt deletes the files itself when a job ends in good order: one is put there again.
    run = Run(place, guest, what="bitmap", state=State.ENDING, phase="done")
    assert run.wait_reached(), run.output
    run.kill()
    pull = journal_of(place).open_runs()[0].pull
    assert pull is not None
    Path(pull.scratch[0]).touch()
    run = Run(place, guest, what="recover", state=step[0], phase=step[1])
    assert run.wait_reached(), run.output
    return run


def assert_nothing_left(place: Place, guest: Guest, store: PullStore) -> None:
    """No run, job, scratch or socket is left, and no checkpoint that the next run does not count from."""
    assert not journal_of(place).open_runs()
    assert not list(Path("/var/lib/libvirt").rglob("*.stillframe-scratch.qcow2"))
    assert not list(Path("/var/lib/libvirt").rglob("*stillframe-*.socket"))
    anchor = store.anchor()
    names = {each.getName() for each in guest.domain().listAllCheckpoints()}
    assert names <= ({anchor.checkpoint} if anchor else set())
    if guest.running():
        assert guest.domain().info()[0] == libvirt.VIR_DOMAIN_RUNNING
        assert guest.domain().jobInfo()[0] == 0
        nodes = guest.monitor.execute("query-named-block-nodes", flat=True)
        bitmaps = {each["name"] for node in nodes for each in node.get("dirty-bitmaps", ())}
        assert bitmaps <= ({anchor.checkpoint} if anchor else set())
        assert not guest.monitor.execute("query-jobs")


def assert_goes_on(place: Place, guest: DiskGuest, store: PullStore, folder: Path) -> None:
    """Two more runs, the guest writing in between, give what the model has."""
    for number in range(2):
        for target in guest.disks:
            guest.write(target, (5 + number) * MIB, MIB // 4, 0xC1 + number)
            guest.write_zeroes(target, MIB + number * MIB // 8, MIB // 16)
        guest.flush()
        run = Run(place, guest, what="bitmap")
        assert run.end() == 0, run.output
        assert pulled(store, guest) == model_copy(guest, folder, f"after-{number}")
    assert_nothing_left(place, guest, store)


@pytest.fixture
def guest(disk_guest: MakeGuest) -> DiskGuest:
    return disk_guest(DiskSpec("vda", size_bytes=16 * MIB), DiskSpec("vdb", Kind.RAW, 16 * MIB))


@pytest.fixture
def store(place: Place) -> PullStore:
    return PullStore(place.destination)


@pytest.mark.parametrize(("step", "victim"), cells(steps_of(PULL_STATES | _SHARED)))
def test_killed_at_a_step(
    guest: DiskGuest, store: PullStore, daemons: LibvirtDaemons, place: Place, tmp_path: Path, step: Step,
    victim: Victim,
) -> None:
    moments = [model_copy(guest, tmp_path, "first")]
    assert Run(place, guest, what="bitmap").end() == 0
    for target in guest.disks:
        guest.write(target, MIB, MIB // 2, 0xA1)
    guest.flush()
    moments.append(model_copy(guest, tmp_path, "before"))

    run = stopped_at(place, guest, step)
    for target in guest.disks:
        guest.write(target, 5 * MIB // 4, MIB // 2, 0xB2)
        guest.write_zeroes(target, 3 * MIB, MIB // 4)
    guest.flush()
    strike(victim, run, guest, daemons)

    answer = recover(place, guest)
    assert answer.returncode == 0, run.output + answer.stdout + answer.stderr
    assert json.loads(answer.stdout)["guests"][0]["ok"]
    assert_nothing_left(place, guest, store)
    assert guest.running() is (victim is not Victim.QEMU)
    guest.destroy()
    for target in guest.disks:
        guest.assert_disk_equals_model(target)
    if step[0] in (State.PLANNED, State.REDEFINING, State.BEGINNING):  # the moment may lie behind the blow
        moments.append(model_copy(guest, tmp_path, "during"))
    assert pulled(store, guest) in moments, "the point is of no single moment"
    guest.start()
    assert_goes_on(place, guest, store, tmp_path)


@pytest.mark.parametrize("delay_s", [
    0.005, 0.04, 0.1, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.02, 0.06, 0.08, 0.15))])
def test_libvirtd_killed_while_it_begins_the_job(
    guest: DiskGuest, store: PullStore, daemons: LibvirtDaemons, place: Place, tmp_path: Path, delay_s: float
) -> None:
    """Where exactly the blow falls differs from run to run; a wedged libvirt is mended by its status file."""
    assert Run(place, guest, what="bitmap").end() == 0
    for target in guest.disks:
        guest.write(target, MIB, MIB // 2, 0xA1)
    guest.flush()
    run = Run(place, guest, what="bitmap", state=State.BEGINNING, phase="intent")
    assert run.wait_reached(), run.output
    run.resume_only()
    time.sleep(delay_s)
    daemons.kill_libvirtd()
    daemons.start()
    run.end()
    answer = recover(place, guest)
    if answer.returncode == NeedsAttention.exit_code:
        assert "--repair-status" in answer.stdout, answer.stdout
        daemons.stop()
        mended = recover(place, guest, "--repair-status")
        assert mended.returncode == 0, mended.stdout + mended.stderr
        daemons.start()
        answer = recover(place, guest)
    assert answer.returncode == 0, run.output + answer.stdout + answer.stderr
    assert_nothing_left(place, guest, store)
    assert_goes_on(place, guest, store, tmp_path)


def assert_whole(place: Place, guest: DbGuest, store: PullStore) -> None:
    """The guest writes on, and its disk and the newest point hold all that was acknowledged by then."""
    acknowledged = guest.acknowledged()
    if guest.running():
        wait_for("the guest writes", lambda: guest.acknowledged() > acknowledged, PATIENCE_S)
        wait_for(
            "the agent says thawed", lambda: guest.agent_answers() and guest.freeze_status() == "thawed",
            PATIENCE_S,
        )
    assert_nothing_left(place, guest, store)
    guest.destroy()
    point = store.current()
    assert point is not None
    check = check_image(*guest.disk_source("vda", inactive=True))
    stored = check_image(point / "vda.img", "raw")
    assert check.whole, check
    assert check.last >= acknowledged
    assert stored.whole, stored


@pytest.mark.parametrize(("step", "victim"), cells(steps_of(AGENT)))
def test_killed_while_frozen(
    db_guest: Callable[..., DbGuest], store: PullStore, daemons: LibvirtDaemons, place: Place, step: Step,
    victim: Victim,
) -> None:
    guest = db_guest()
    guest.wait_more_rows(5)
    assert Run(place, guest, what="bitmap", quiesce="agent").end() == 0
    guest.wait_more_rows(5)
    run = Run(place, guest, what="bitmap", quiesce="agent", state=step[0], phase=step[1])
    assert run.wait_reached(), run.output
    strike(victim, run, guest, daemons)
    answer = recover(place, guest)
    assert answer.returncode == 0, run.output + answer.stdout + answer.stderr
    assert_whole(place, guest, store)


@pytest.mark.parametrize("step", [None, (State.RESUMING, "intent"), (State.RESUMING, "done")])
def test_no_space_for_the_scratch_file(
    db_guest: Callable[..., DbGuest], store: PullStore, place: Place, step: Step | None
) -> None:
    """QEMU pauses the guest; the job is ended, and the guest goes on: also if the tool was killed."""
    # Mounted before the guest starts: its QEMU has mounts of its own.
    with small_file_system(place.overlays / "small", 80 * MIB) as small:
        small.chmod(0o777)
        guest = db_guest()
        guest.wait_more_rows(5)
        assert Run(place, guest, what="bitmap").end() == 0
        full = Place(place.destination, place.state_dir, small)
        run = Run(full, guest, what="bitmap", state=State.READING, phase="done")
        assert run.wait_reached(), run.output
        with contextlib.suppress(OSError):
            (small / "filler").write_bytes(bytes(80 * MIB))
        wait_for("QEMU pauses the guest", lambda: guest.domain().state() == [
            libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR], PATIENCE_S)
        if step is None:
            assert run.go_on() == OverlayFull.exit_code, run.output
        else:
            run.kill()
            run = Run(full, guest, what="recover", state=step[0], phase=step[1])
            assert run.wait_reached(), run.output
            run.kill()
        answer = recover(place, guest)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert_whole(place, guest, store)
