"""The protocol of the repository loses nothing and leaves no rubbish; without any of its rules it would.

The model searches every interleaving of a few actors, storage operation by storage operation, in a small
world. In each state every slot of every snapshot must be there for a reader with the latest generation, and
if everybody died there and then, two collections must leave no pack that nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.model.collector import Collector
from tests.model.others import Fencer, Forgetter, Reader
from tests.model.rules import PROTOCOL, Beneath, Look, LostReply, Reuse, Rules
from tests.model.scenes import (
    BENEATH,
    FORGOTTEN,
    GONE,
    HINT,
    LATE,
    ONE,
    P0,
    P1,
    TAKEN_BACK,
    TWO,
)
from tests.model.search import World, search
from tests.model.state import Storage
from tests.model.writer import Writer

WRITER = Writer("w")
UNSURE = Writer("w", loses_reply=True)
REPEATED = Writer("w", twice=True)
UNSURE_REPEATED = Writer("w", twice=True, loses_reply=True)
MOVER = Writer("w", foreign=frozenset({P0, ("z", 0)}))
OTHER_MOVER = MOVER._replace(name="v")
HINTED = Writer("w", hints=HINT)
REUSER = Writer("w", new_slots=0)
SECOND_REUSER = Writer("v", new_slots=0)
REUSER_HINTED = Writer("v", new_slots=0, hints=HINT)
ONCE = Collector("a")
TWICE = Collector("a", rounds=2)
THRICE = Collector("b", rounds=3)
OTHER = Collector("b")
COMPACTS_TOO = Collector("b", compacts=True)
COMPACTS = Collector("a", compacts=True)
COMPACTS_TWICE = Collector("a", compacts=True, rounds=2)
GETS_EACH = Collector("a", gets_each=True)
GETS_EACH_TOO = Collector("b", gets_each=True)
FENCER = Fencer("x")
FORGETTER = Forgetter("f")
READER = Reader("r", P0)

LAX = replace(PROTOCOL, reuse=Reuse.ANY_HOME)
MARKED = replace(PROTOCOL, beneath=Beneath.MARKED)
LAX_MARKED = replace(LAX, beneath=Beneath.MARKED)


@pytest.mark.parametrize(("start", "rules"), [
    pytest.param(World(ONE, (WRITER, TWICE, FENCER, FORGETTER)), PROTOCOL, id="writer, fencer, forget"),
    pytest.param(World(ONE, (REUSER, SECOND_REUSER, ONCE)), PROTOCOL, id="two writers"),
    pytest.param(World(FORGOTTEN, (REUSER, REUSER_HINTED, TWICE, FORGETTER)), PROTOCOL, id="a late parent"),
    pytest.param(World(FORGOTTEN, (HINTED, ONCE, THRICE)), PROTOCOL, id="hints, two collectors"),
    pytest.param(
        World(FORGOTTEN, (HINTED._replace(beats=True), TWICE, FENCER)), PROTOCOL, id="fenced, beats on"),
    pytest.param(
        World(FORGOTTEN, (UNSURE, TWICE, FENCER, FORGETTER)), PROTOCOL,
        id="the commit's reply is lost"),
    pytest.param(
        World(FORGOTTEN, (REPEATED, TWICE, FENCER, FORGETTER)), PROTOCOL, id="the commit is sent on twice"),
    pytest.param(
        World(FORGOTTEN, (UNSURE_REPEATED, ONCE, FENCER)), PROTOCOL, id="sent on twice, a reply is lost"),
    pytest.param(World(FORGOTTEN, (MOVER, ONCE, FENCER, FORGETTER)), PROTOCOL, id="slots of elsewhere"),
    pytest.param(World(FORGOTTEN, (MOVER, OTHER_MOVER, ONCE)), PROTOCOL, id="the same slots of elsewhere"),
    pytest.param(World(LATE, (MOVER, COMPACTS)), PROTOCOL, id="slots of elsewhere, compaction"),
    pytest.param(World(TAKEN_BACK, (MOVER, ONCE, OTHER)), PROTOCOL, id="slots of elsewhere, taken back"),
    pytest.param(World(GONE, (MOVER, ONCE, FORGETTER)), PROTOCOL, id="slots of elsewhere, moved before"),
    pytest.param(World(TWO, (WRITER, GETS_EACH._replace(rounds=2), FORGETTER)), PROTOCOL, id="gets each"),
    pytest.param(World(TWO, (REUSER, COMPACTS, OTHER, FORGETTER)), PROTOCOL, id="compaction"),
    pytest.param(World(LATE, (REUSER, COMPACTS, FORGETTER)), PROTOCOL, id="a condemned pack is compacted"),
    pytest.param(World(LATE, (COMPACTS, THRICE)), PROTOCOL, id="a slow compaction"),
    pytest.param(World(TAKEN_BACK, (HINTED, ONCE, OTHER)), PROTOCOL, id="taken back"),
    pytest.param(World(TAKEN_BACK, (HINTED, ONCE, OTHER)), LAX, id="taken back, lax reuse"),
    pytest.param(World(GONE, (HINTED, ONCE, THRICE)), PROTOCOL, id="moved and forgotten"),
    pytest.param(World(FORGOTTEN, (MOVER, REUSER, ONCE, FORGETTER)), MARKED, id="marked, from elsewhere"),
    pytest.param(World(BENEATH, (WRITER, TWICE, FORGETTER)), MARKED, id="marked parents"),
    pytest.param(World(LATE, (REUSER, TWICE, FORGETTER)), MARKED, id="marked, a late parent"),
    pytest.param(World(FORGOTTEN, (REUSER, REUSER_HINTED, TWICE, FORGETTER)), MARKED,
                 id="marked, a parent becomes late"),
    pytest.param(World(TWO, (REUSER, COMPACTS, OTHER, FORGETTER)), MARKED, id="marked, compaction"),
    pytest.param(World(TAKEN_BACK, (HINTED, REUSER, ONCE)), LAX_MARKED, id="marked, taken back, lax"),
    pytest.param(World(ONE, (READER, COMPACTS._replace(rounds=4))), PROTOCOL, id="a slow reader"),
])
def test_nothing_is_lost_and_no_rubbish_stays(start: World, rules: Rules) -> None:
    found = search(start, rules)
    assert not found.trouble, found
    assert found.states > 100


@pytest.mark.slow
@pytest.mark.parametrize(("start", "rules"), [
    pytest.param(World(ONE, (WRITER, Writer("v"), ONCE, FENCER)), PROTOCOL, id="two writers, fencer"),
    pytest.param(World(ONE, (REUSER, SECOND_REUSER, TWICE, FORGETTER)), PROTOCOL, id="two writers"),
    pytest.param(World(TWO, (WRITER, GETS_EACH, GETS_EACH_TOO, FORGETTER)), PROTOCOL, id="gets"),
    pytest.param(World(LATE, (REUSER, COMPACTS._replace(gets_each=True), OTHER, FORGETTER)), PROTOCOL,
                 id="gets each, compacts"),
    pytest.param(World(TWO, (WRITER, COMPACTS_TWICE, FENCER, FORGETTER)), PROTOCOL, id="compaction, fencer"),
    pytest.param(World(TWO, (REUSER, COMPACTS, COMPACTS_TOO, FORGETTER)), PROTOCOL,
                 id="two compactions"),
    pytest.param(World(FORGOTTEN, (MOVER, TWICE, FENCER, FORGETTER)), PROTOCOL, id="slots of elsewhere"),
    pytest.param(World(GONE, (MOVER, ONCE, THRICE)), PROTOCOL, id="slots of elsewhere, moved before"),
    pytest.param(World(FORGOTTEN, (MOVER, OTHER_MOVER, TWICE)), PROTOCOL, id="the same slots of elsewhere"),
    pytest.param(World(ONE, (MOVER, REUSER_HINTED, ONCE)), PROTOCOL, id="reused from elsewhere"),
    pytest.param(World(TWO, (MOVER, COMPACTS, FORGETTER)), PROTOCOL, id="elsewhere, compaction"),
    pytest.param(World(TWO, (COMPACTS_TWICE, COMPACTS_TWICE._replace(name="b"), FORGETTER)), PROTOCOL,
                 id="two compact twice"),
    pytest.param(World(TWO, (REUSER, COMPACTS._replace(rounds=3), FORGETTER)), PROTOCOL, id="thrice"),
    pytest.param(World(TWO, (REUSER, COMPACTS, OTHER, FORGETTER)), LAX, id="compaction, lax reuse"),
    pytest.param(World(TAKEN_BACK, (HINTED, ONCE, THRICE)), PROTOCOL, id="taken back"),
    pytest.param(World(TAKEN_BACK, (HINTED, ONCE, THRICE)), LAX, id="taken back, lax reuse"),
    pytest.param(World(BENEATH, (REUSER, COMPACTS, OTHER, FORGETTER)), MARKED, id="marked, compaction"),
    pytest.param(World(BENEATH, (REUSER, SECOND_REUSER, TWICE, FORGETTER)), MARKED,
                 id="marked, two writers"),
    pytest.param(World(LATE, (REUSER, COMPACTS, OTHER, FORGETTER)), MARKED, id="marked, late, compaction"),
    pytest.param(World(TWO, (WRITER, TWICE, FENCER, FORGETTER)), MARKED, id="marked, fencer"),
    pytest.param(World(FORGOTTEN, (UNSURE, REUSER, TWICE, FENCER)), MARKED, id="marked, a lost reply"),
    pytest.param(World(TAKEN_BACK, (HINTED, REUSER, THRICE)), LAX_MARKED, id="marked, taken back, lax"),
    pytest.param(World(GONE, (HINTED, REUSER, ONCE, THRICE)), LAX_MARKED, id="marked, gone, lax"),
])
def test_nothing_is_lost_in_larger_worlds(start: World, rules: Rules) -> None:
    found = search(start, rules)
    assert not found.trouble, found


def _without(**rules: object) -> Rules:
    return replace(PROTOCOL, **rules)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rules", "start"), [
    pytest.param(_without(reread=False), World(FORGOTTEN, (HINTED, TWICE)), id="W2 with hints"),
    pytest.param(
        _without(reread=False), World(FORGOTTEN, (REUSER, REUSER_HINTED, TWICE, FORGETTER)), id="W2"),
    pytest.param(_without(reuse=Reuse.ALWAYS), World(FORGOTTEN, (HINTED, TWICE)), id="W3 condemned"),
    pytest.param(_without(reuse=Reuse.MOVED), World(GONE, (HINTED, ONCE)), id="W3 the home is condemned"),
    pytest.param(_without(hints_listed=False), World(FORGOTTEN, (HINTED, THRICE)), id="W3 hints are listed"),
    pytest.param(_without(beneath=Beneath.UNKNOWN), World(LATE, (REUSER, ONCE, FORGETTER)), id="W3 beneath"),
    pytest.param(_without(beneath=Beneath.ALWAYS), World(LATE, (REUSER, ONCE, FORGETTER)), id="W3 unseen"),
    pytest.param(_without(beneath=Beneath.ALWAYS),
                 World(FORGOTTEN, (REUSER, REUSER_HINTED, TWICE, FORGETTER)), id="W3 unseen, at first"),
    pytest.param(_without(beneath=Beneath.COMMITTED_BEFORE), World(LATE, (REUSER, ONCE, FORGETTER)),
                 id="W3 committed in g"),
    pytest.param(_without(beneath=Beneath.LISTED_LATE),
                 World(FORGOTTEN, (REUSER, REUSER_HINTED, TWICE, FORGETTER)), id="G3 marked, not just there"),
    pytest.param(
        _without(lost_reply=LostReply.AGAIN), World(FORGOTTEN, (UNSURE, TWICE, FENCER, FORGETTER)),
        id="W5 does not create again"),
    pytest.param(
        _without(lost_reply=LostReply.LOOK), World(FORGOTTEN, (UNSURE, TWICE)), id="W5 closes its place"),
    pytest.param(_without(adopted_seen=False), World(FORGOTTEN, (MOVER, TWICE)), id="W4 is seen"),
    pytest.param(
        _without(copies_end=False), World(FORGOTTEN, (REPEATED, TWICE, FENCER, FORGETTER)),
        id="no copy of a commit comes for ever"),
    pytest.param(_without(tombstone=False), World(FORGOTTEN, (HINTED, TWICE, FENCER)), id="G0 tombstone"),
    pytest.param(
        _without(order=(Look.LATEST, Look.PACKS, Look.MANIFESTS, Look.SESSIONS)),
        World(ONE, (WRITER, TWICE, FORGETTER)), id="G2 before G3"),
    pytest.param(
        _without(order=(Look.PACKS, Look.SESSIONS, Look.LATEST, Look.MANIFESTS)),
        World(FORGOTTEN, (HINTED, ONCE, OTHER)), id="latest before G2"),
    pytest.param(_without(wait_for_sessions=False), World(ONE, (WRITER, TWICE, FORGETTER)), id="G5 waits"),
    pytest.param(
        _without(condemned_until_gone=False), World(FORGOTTEN, (HINTED, TWICE)), id="G5 till gone"),
    pytest.param(_without(win_first=False), World(LATE, (COMPACTS, OTHER)), id="G6 wins first"),
    pytest.param(_without(stop_losers=False), World(LATE, (COMPACTS, OTHER)), id="G6 losers stop"),
    pytest.param(_without(still_latest=False), World(LATE, (COMPACTS, THRICE)), id="G6 still the latest"),
    pytest.param(
        _without(keep_moved=False), World(TWO, (REUSER, COMPACTS, OTHER, FORGETTER)), id="moved stays"),
    pytest.param(
        replace(LAX, drop_moved=False), World(TAKEN_BACK, (HINTED, OTHER)), id="moved goes with its pack"),
])
def test_without_this_rule_a_slot_is_lost(rules: Rules, start: World) -> None:
    assert search(start, rules).trouble.startswith("lost")
    assert not search(start, LAX if rules.reuse is LAX.reuse else PROTOCOL).trouble


def test_a_writer_that_does_not_look_whose_manifest_it_found_is_wrong() -> None:
    start = World(FORGOTTEN, (REPEATED, FENCER))
    assert search(start, _without(own_bytes=False)).trouble == "a writer did not know of its own snapshot"
    assert not search(start, PROTOCOL).trouble


def test_one_reload_is_not_enough_for_a_slow_reader() -> None:
    start = World(ONE, (READER, COMPACTS._replace(rounds=4)))
    assert search(start, _without(reload_often=False)).trouble == "a reader gave up"


def test_rubbish_that_stays_is_noticed() -> None:
    """As with a collector that never lists packs."""
    start = World(FORGOTTEN, (WRITER,))
    never = replace(PROTOCOL, order=(Look.LATEST, Look.SESSIONS, Look.MANIFESTS))
    assert search(start, never).trouble == "left ['p'] for ever"


@pytest.mark.parametrize("rules", [
    pytest.param(_without(order=(Look.LATEST, Look.SESSIONS, Look.MANIFESTS, Look.PACKS)), id="packs last"),
    pytest.param(_without(spare_sessions=False), id="G4 spares listed sessions"),
    pytest.param(_without(homes_listed=False), id="homes are listed"),
    pytest.param(_without(drop_moved=False), id="moved goes with its pack"),
])
def test_rules_that_only_save_work(rules: Rules) -> None:
    """G4 would condemn a live writer's packs, and the next collection take them back: nothing is lost."""
    for start in (
            World(FORGOTTEN, (HINTED, TWICE)), World(LATE, (REUSER, COMPACTS, FORGETTER)),
            World(TAKEN_BACK, (HINTED, ONCE, OTHER))):
        found = search(start, rules)
        assert not found.trouble, found


def _late(storage: Storage) -> bool:
    """A snapshot of its own pack and of a condemned one."""
    return "p" in storage.latest().condemned_names() and P0 in storage.live() and len(storage.live()) > 1


def _taken_back(storage: Storage) -> bool:
    latest = storage.latest()
    home = latest.homes(P0)[0]
    return (home != "p" and latest.condemned_names() == {home} and storage.pack_names() >= {"p", home}
            and storage.live() == {P1})


def _gone(storage: Storage) -> bool:
    latest = storage.latest()
    home = latest.homes(P0)[0]
    return home in latest.condemned_names() and storage.pack_names() == {home} and not storage.live()


@pytest.mark.parametrize(("start", "reached"), [
    pytest.param(World(FORGOTTEN, (HINTED, ONCE)), _late, id="LATE"),
    pytest.param(
        World(TWO._replace(manifests=frozenset(each for each in TWO.manifests if each.name == "m")),
              (REUSER._replace(hints=frozenset({P1})), COMPACTS, OTHER, FORGETTER)), _taken_back,
        id="TAKEN_BACK"),
    pytest.param(World(ONE, (COMPACTS._replace(rounds=3), FORGETTER)), _gone, id="GONE"),
])
def test_the_scenes_can_be_reached(start: World, reached: Callable[[Storage], bool]) -> None:
    found = search(start, PROTOCOL, lambda storage, _: "reached" if reached(storage) else "")
    assert found.trouble == "reached"
