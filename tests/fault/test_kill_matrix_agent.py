"""The rest of the kill matrix: the steps that need a guest agent, a shutdown, or a guest left shut down.

The guest is the database guest: what it acknowledged must be there, whatever was killed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from lab.daemons import LibvirtDaemons
from lab.database import check_image
from lab.dbguest import DbGuest
from lab.waiting import PATIENCE_S, wait_for
from stillframe.capture.journal import Journal
from stillframe.capture.states import PULL_STATES, State
from stillframe.clock import SystemClock
from stillframe.mirror.folder import MirrorFolder
from stillframe.mirror.place import LocalPlace
from tests.fault.harness import Place, Run, Victim, overlays_left, recover, strike
from tests.fault.matrix import (
    AGENT,
    KEPT,
    RESTART,
    SHUTDOWN,
    Step,
    all_steps,
    cells,
    name_of,
    plain_steps,
    steps_of,
)

MakeGuest = Callable[..., DbGuest]


def test_the_matrix_leaves_no_step_out() -> None:
    covered = [*plain_steps(), *steps_of(AGENT), *steps_of(SHUTDOWN), *steps_of(RESTART),
        *steps_of(PULL_STATES), *steps_of(KEPT)]  # these in test_kill_matrix_pull and test_standing_kill
    assert sorted(map(name_of, covered)) == sorted(map(name_of, all_steps()))


def strike_and_look(
    place: Place, guest: DbGuest, daemons: LibvirtDaemons, run: Run, victim: Victim, *, starts: bool
) -> None:
    """Kill *victim*, recover, and find the guest whole; *starts*: stillframe must start it itself."""
    acknowledged = guest.acknowledged()
    strike(victim, run, guest, daemons)
    answer = recover(place, guest)
    assert answer.returncode == 0, run.output + answer.stdout + answer.stderr
    assert not overlays_left(place)
    assert not Journal(place.state_dir, SystemClock()).open_runs()
    assert MirrorFolder(LocalPlace(place.mirror(guest)), clock=SystemClock()).inspect().state.name == "WHOLE"
    if not guest.running():
        assert victim is Victim.QEMU, run.output + answer.stdout + answer.stderr
        assert not starts, "stillframe had shut the guest down and must start it again"
    else:
        wait_for("the guest writes", lambda: guest.acknowledged() > acknowledged, PATIENCE_S)
        wait_for(
            "the agent says thawed", lambda: guest.agent_answers() and guest.freeze_status() == "thawed",
            PATIENCE_S,
        )
        with contextlib.suppress(Exception):
            guest.power_off()
    guest.destroy()
    source, image_format = guest.disk_source("vda", inactive=True)
    assert "stillframe-overlay" not in source
    check = check_image(source, image_format)
    mirror = check_image(place.mirror(guest) / "vda.img", "raw")
    assert check.whole, check
    assert check.last >= acknowledged
    assert mirror.whole, mirror


@pytest.mark.parametrize(("step", "victim"), cells(steps_of(AGENT)))
def test_killed_while_frozen(
    db_guest: MakeGuest, daemons: LibvirtDaemons, place: Place, step: Step, victim: Victim
) -> None:
    guest = db_guest()
    guest.wait_more_rows(5)
    assert Run(place, guest, quiesce="agent").end() == 0
    run = Run(place, guest, quiesce="agent", state=step[0], phase=step[1])
    assert run.wait_reached(), run.output
    strike_and_look(place, guest, daemons, run, victim, starts=False)


@pytest.mark.parametrize(("step", "victim"), cells(steps_of(SHUTDOWN)))
def test_killed_around_a_shutdown(
    db_guest: MakeGuest, daemons: LibvirtDaemons, place: Place, step: Step, victim: Victim
) -> None:
    guest = db_guest()
    guest.wait_more_rows(5)
    assert Run(place, guest, quiesce="agent").end() == 0
    run = Run(place, guest, quiesce="shutdown", state=step[0], phase=step[1])
    assert run.wait_reached(), run.output
    # Once it was started again, a guest that dies is not stillframe's to start a second time.
    strike_and_look(
        place, guest, daemons, run, victim, starts=step not in ((State.STARTING, "done"),)
    )


@pytest.mark.parametrize(("step", "victim"), cells(steps_of(RESTART)))
def test_killed_while_a_guest_left_shut_down_is_started(
    db_guest: MakeGuest, daemons: LibvirtDaemons, place: Place, step: Step, victim: Victim
) -> None:
    guest = db_guest()
    guest.wait_more_rows(5)
    assert Run(place, guest, quiesce="agent").end() == 0
    run = Run(place, guest, quiesce="shutdown", state=State.SHUTTING_DOWN, phase="done")
    assert run.wait_reached(), run.output
    run.kill()
    assert not guest.running()
    run = Run(place, guest, what="recover", state=step[0], phase=step[1])
    assert run.wait_reached(), run.output
    strike_and_look(place, guest, daemons, run, victim, starts=step[1] == "intent")
