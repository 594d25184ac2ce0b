"""Which cells the kill matrix has: every step of the journal, from the transition table itself."""

from __future__ import annotations

import pytest

from stillframe.capture.states import PULL_STATES, State
from tests.fault.harness import Victim

Step = tuple[State, str]

#: These only mark a place: nothing is done in them whose outcome could be written down.
NO_OUTCOME = frozenset({State.PLANNED, State.RELEASED, State.STANDING, State.DONE})
#: Steps that need a guest agent, a guest that shuts down, and one that was left shut down.
AGENT = frozenset({State.FREEZING, State.THAWING})
SHUTDOWN = frozenset({State.SHUTTING_DOWN, State.STARTING})
RESTART = frozenset({State.RESTARTING})
#: Steps of a run whose overlays stay, from the moment when its copy is durable.
KEPT = frozenset({State.LOWERING, State.SHEDDING, State.STANDING})
#: Steps in which a base is written to, or about to be.
WRITING_BACK = frozenset({State.RELEASED, State.COMMITTING, State.PIVOTING})
#: Steps of a run, of either kind, until its copy is durable or given up.
FORWARD = frozenset({State.PLANNED, State.OVERLAYS, State.SNAPSHOT, State.COPYING})


#: The tool is killed each time; of the newer methods, libvirtd and QEMU only in the slow suite.
VICTIMS = [
    Victim.TOOL, *(pytest.param(each, marks=pytest.mark.slow) for each in (Victim.LIBVIRTD, Victim.QEMU))]


def all_steps() -> list[Step]:
    """Return every step that a journal can hold."""
    return [
        (state, phase) for state in State for phase in ("intent", "done")
        if not (phase == "done" and state in NO_OUTCOME)
    ]


def steps_of(states: frozenset[State]) -> list[Step]:
    """Return the steps of *states*."""
    return [step for step in all_steps() if step[0] in states]


def plain_steps() -> list[Step]:
    """Return the steps that any guest goes through, without an agent or a shutdown."""
    return steps_of(frozenset(State) - AGENT - SHUTDOWN - RESTART - PULL_STATES - KEPT)


def standing_steps() -> list[Step]:
    """Return the steps of a run that takes the place of another whose overlays stand."""
    return steps_of(FORWARD | KEPT)


def back_steps() -> list[Step]:
    """Return the steps by which a guest is brought back to the images below its overlays."""
    return steps_of(frozenset(State) - FORWARD - AGENT - SHUTDOWN - RESTART - PULL_STATES - KEPT)


def name_of(step: object) -> str:
    """Return a step's name for pytest."""
    assert isinstance(step, tuple)
    return f"{step[0].value}-{step[1]}"
