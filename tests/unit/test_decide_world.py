"""Decision after decision in a world where everything fails: it ends, and no write is lost."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.capture import decide as decide_module
from stillframe.capture.decide import Action, Decision, Sight, Why, decide
from stillframe.capture.journal import RunRecord
from tests.unit.capture_world import Decide, Lost, World

_SCENARIOS = 6000


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 6))
def test_a_run_always_ends_and_loses_nothing(chance: random.Random, faults: int) -> None:
    play(chance, faults, decide)


def test_a_great_many_runs_end_and_lose_nothing_and_have_seen_it_all() -> None:
    happened: Counter[str] = Counter()
    for seed in range(_SCENARIOS):
        chance = random.Random(seed)
        world = play(chance, chance.randint(0, 6), decide)
        happened += world.happened
    never = {action.name for action in Action} - {"FINISH", "ASK"} - set(happened)
    assert never == set()
    faults = {"QEMU dies", "tool dies", "a commit fails", "libvirt loses a job", "I/O error",
              "somebody starts the guest", "somebody resumes the guest"}
    assert faults <= set(happened)


def play(chance: random.Random, faults: int, decision: Decide) -> World:
    world = World(chance, decision, faults)
    end = world.run()
    # Only where the guest was started or let go behind stillframe's back may a person be needed; or
    # where it might have been, its definition naming a base that is half committed.
    half = end.action is Action.ASK and "names the base, but" in end.reason
    # Or where it was started between two steps of the recovery itself.
    astray = end.why is Why.DIVERGED and world.happened["somebody starts the guest"] > 0
    assert end.action is Action.FINISH or world.person_needed or half or astray, (end, world.happened)
    return world


# --- What the rules are there for: without each of them, something is lost -------------------


def pivot_while_running(record: RunRecord, sight: Sight) -> Decision:
    found = decide(record, sight)
    return replace(found, action=Action.PIVOT) if found.action is Action.SUSPEND else found


def unlink_without_asking_the_definition(record: RunRecord, sight: Sight) -> Decision:
    found = decide(record, sight)
    return replace(found, action=Action.UNLINK) if found.action is Action.POINT_TO_BASE else found


def confirm_instead_of_commit(record: RunRecord, sight: Sight) -> Decision:
    found = decide(record, sight)
    return replace(found, action=Action.CONFIRM_BASE) if found.action is Action.COMMIT_OFFLINE else found


def commit_instead_of_compare(record: RunRecord, sight: Sight) -> Decision:
    found = decide(record, sight)
    return replace(found, action=Action.COMMIT_OFFLINE) if found.action is Action.COMPARE else found


@pytest.mark.parametrize("broken", [
    pivot_while_running, unlink_without_asking_the_definition, confirm_instead_of_commit,
    commit_instead_of_compare,
])
def test_a_decision_without_a_rule_loses_writes(broken: Decide) -> None:
    assert loses(broken)


@pytest.mark.parametrize("rule", ["_ask_if_astray"])
def test_without_a_part_of_the_decision_writes_are_lost(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    monkeypatch.setattr(decide_module, rule, lambda *_arguments: None)
    assert loses(decide)


def loses(broken: Decide) -> bool:
    for seed in range(_SCENARIOS):
        chance = random.Random(seed)
        try:
            World(chance, broken, chance.randint(0, 6)).run()
        except Lost:
            return True
        except AssertionError:
            continue
    return False
