"""The table of states is sound, and docs/CAPTURE.md shows the same."""

from __future__ import annotations

import enum
import re
from pathlib import Path

import pytest

from stillframe.capture import states
from stillframe.capture.decide import Action
from stillframe.capture.standing_decide import Step
from stillframe.capture.states import BEFORE_RELEASE, KEPT, TRANSITIONS, DiskPhase, State

_PAGE = Path(__file__).parents[2] / "docs" / "CAPTURE.md"
_ROW = re.compile(r"^\| `(?P<name>[a-z-]+)` \| (?P<rest>.*) \|$", re.MULTILINE)


def reachable(start: State) -> set[State]:
    found = {start}
    while True:
        further = {state for each in found for state in TRANSITIONS[each]} - found
        if not further:
            return found
        found |= further


def comments(kind: type[enum.Enum]) -> dict[str, str]:
    """Return what the source says behind each member, by value."""
    text = Path(str(states.__file__)).read_text()
    body = text.split(f"class {kind.__name__}(enum.Enum):")[1].split("\nclass ")[0]
    found = dict(re.findall(r'^    [A-Z_]+ = "([a-z-]+)"  # (.+)$', body, re.MULTILINE))
    assert set(found) == {member.value for member in kind}, "each member has its line and its comment"
    return found


def table(heading: str) -> list[tuple[str, list[str]]]:
    """Return the rows of the page's first table with the columns *heading*: first cell, the others."""
    text = _PAGE.read_text().split(heading, 1)[1].split("\n\n", 1)[0]
    return [(match["name"], match["rest"].split(" | ")) for match in _ROW.finditer(text)]


def test_every_state_has_a_row_in_the_table() -> None:
    assert set(TRANSITIONS) == set(State)


def test_every_state_is_reached_from_the_first() -> None:
    assert reachable(State.PLANNED) == set(State)


def test_a_run_can_end_from_everywhere_and_done_is_the_end() -> None:
    assert not TRANSITIONS[State.DONE]
    for state in State:
        assert State.DONE in reachable(state)


@pytest.mark.parametrize("state", [state for state in State if state in BEFORE_RELEASE])
def test_every_state_before_the_release_can_be_given_up_at_once(state: State) -> None:
    assert State.RELEASED in TRANSITIONS[state]


def test_only_the_release_leads_to_a_commit_and_nothing_leads_back() -> None:
    behind = set(State) - BEFORE_RELEASE - KEPT
    for state in BEFORE_RELEASE:
        assert TRANSITIONS[state] & behind == {State.RELEASED}
    for state in behind:
        assert not TRANSITIONS[state] & (BEFORE_RELEASE | KEPT | {State.RELEASED})


def test_overlays_that_stay_are_committed_only_when_the_guest_is_settled() -> None:
    assert {state for state in BEFORE_RELEASE if TRANSITIONS[state] & KEPT} == {State.COPYING}
    assert TRANSITIONS[State.STANDING] == {State.RELEASED, State.DONE}
    for state in KEPT - {State.STANDING}:
        assert TRANSITIONS[state] <= KEPT


def test_the_way_to_the_release_has_no_loop() -> None:
    for state in BEFORE_RELEASE:
        assert all(state not in reachable(following) for following in TRANSITIONS[state])


def test_the_page_shows_the_table_of_states() -> None:
    meant = comments(State)
    expected = [
        (state.value, [meant[state.value], ", ".join(
            f"`{following.value}`" for following in State if following in TRANSITIONS[state]) or "none"])
        for state in State
    ]
    assert table("| state | what it means | next states |") == expected


def test_the_page_shows_the_phases_of_a_disk() -> None:
    expected = [(value, [text]) for value, text in comments(DiskPhase).items()]
    assert table("| phase | what is known |") == expected


@pytest.mark.parametrize("action", Action)
def test_the_page_names_every_action(action: Action) -> None:
    assert f"`{action.name}`" in decision_section()


def test_the_page_names_no_action_that_does_not_exist() -> None:
    named = set(re.findall(r"`([A-Z_]{3,})`", decision_section()))
    assert named <= {action.name for action in Action}


def test_the_page_shows_the_steps_of_letting_older_overlays_go() -> None:
    expected = {f"`{step.name}`": step.value for step in Step}
    text = _PAGE.read_text().split("| step | what it does | when |", 1)[1].split("\n\n", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert {row[0]: row[1] for row in cells} == expected


def decision_section() -> str:
    return _PAGE.read_text().split("\n## The decision\n", 1)[1].split("\n## ", 1)[0]
