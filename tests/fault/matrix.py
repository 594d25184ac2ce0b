"""Which cells the kill matrix has: every step of the journal, from the transition table itself."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from _pytest.mark import ParameterSet

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
#: Steps in which libvirt and QEMU change which image the guest writes to.
AT_WORK = frozenset({State.SNAPSHOT, State.COMMITTING, State.PIVOTING})
#: Steps of a run, of either kind, until its copy is durable or given up.
FORWARD = frozenset({State.PLANNED, State.OVERLAYS, State.SNAPSHOT, State.COPYING})


def cells(steps: Iterable[Step], every_victim: frozenset[State] = frozenset()) -> list[ParameterSet]:
    """Return (step, victim) for each step and each process that can be killed in it.

    `make test` kills the tool before each step, and everything before and after those of *every_victim*,
    where libvirt or QEMU is at work on the disks; the slow suite has all others. Between the end of a step
    and the beginning of the next one nothing is done to a guest: what differs is the journal, and what is
    decided by it has tests of its own (tests/unit/test_decide*.py).
    """
    return [
        pytest.param(step, victim, id=f"{name_of(step)}-{victim.value}",
                     marks=[] if step[0] in every_victim or (victim is Victim.TOOL and step[1] == "intent")
                     else pytest.mark.slow)
        for step in steps for victim in Victim
    ]


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
