"""Search: every state that actors can reach by any interleaving of their storage operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from tests.model.collector import Collector
from tests.model.others import FAILED, Fencer, Forgetter, Reader
from tests.model.rules import PROTOCOL, Rules
from tests.model.state import Storage, lost, rubbish
from tests.model.writer import WRONG, Writer

Actor: TypeAlias = Writer | Fencer | Forgetter | Reader | Collector

Judge: TypeAlias = Callable[[Storage, Rules], str]
"""Says what is wrong with what is stored, or nothing."""

STATES_LIMIT = 3_000_000

BEGINNINGS = {"W1", "start", "tombstone", "forget", "load"}

QUIET_ROUNDS = 2
"""So many undisturbed collections leave no rubbish: one condemns, one deletes."""


class World(NamedTuple):
    """One state: what is stored, and how far everyone is."""

    storage: Storage
    actors: tuple[Actor, ...]


@dataclass
class Found:
    """What a search came to. *trouble*: the first bad state in words and the steps to it, shortest first."""

    states: int = 0
    storages: int = 0
    trouble: str = ""
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([f"{self.states} states, {self.storages} contents: {self.trouble or 'all well'}",
                          *self.trace])


def search(start: World, rules: Rules = PROTOCOL, judge: Judge | None = None) -> Found:
    """Visit every state breadth first; stop at the first that *judge* objects to.

    Unless told otherwise it is the first in which a slot is lost or rubbish would stay for ever.
    """
    judge = judge or verdict
    reached = [start]
    came_from: list[tuple[int, str]] = [(-1, "")]
    seen = {start}
    verdicts: dict[Storage, str] = {}
    for here, world in enumerate(reached):
        trouble = verdicts.get(world.storage)
        if trouble is None:
            trouble = verdicts[world.storage] = judge(world.storage, rules)
        if any(actor.at == FAILED for actor in world.actors):
            trouble = "a reader gave up"
        if any(actor.at == WRONG for actor in world.actors):
            trouble = "a writer did not know of its own snapshot"
        if trouble:
            return Found(len(reached), len(verdicts), trouble, _trace(reached, came_from, here))
        for label, after in successors(world, rules):
            if after not in seen:
                seen.add(after)
                reached.append(after)
                came_from.append((here, label))
        assert len(reached) < STATES_LIMIT, "too large: make the configuration smaller"
    return Found(len(reached), len(verdicts))


def successors(world: World, rules: Rules) -> Iterator[tuple[str, World]]:
    """Every world that one storage operation of one actor makes, with the actor's name and step.

    Of actors that differ in nothing but their name, the first begins first: the others' runs are the same
    with names exchanged.
    """
    storage, actors = world
    for index, actor in enumerate(actors):
        if index and actor == actors[index - 1]._replace(name=actor.name) and actor.at in BEGINNINGS:
            continue
        label = f"{actor.name} {actor.at}"
        for content, after in actor.steps(storage, rules):
            yield label, World(content, (*actors[:index], after, *actors[index + 1:]))


def quiet(storage: Storage, rules: Rules, rounds: int = QUIET_ROUNDS) -> Storage:
    """Everybody died just now: fence every session and collect undisturbed, *rounds* times."""
    collector = Collector("quiet", rounds=rounds)
    while collector.at != "done":
        if collector.at == "start":
            for session in storage.sessions:
                storage = storage.bury(session, tombstone=rules.tombstone).delete_session(session.name)
        storage, collector = next(collector.steps(storage, rules))
    return storage


def verdict(storage: Storage, rules: Rules) -> str:
    """What is wrong with *storage*, or would be after everybody died and two collections ran; or nothing."""
    if ref := lost(storage):
        return f"lost {ref}"
    after = quiet(storage, rules)
    if ref := lost(after):
        return f"lost {ref} once all is quiet"
    if left := rubbish(after):
        return f"left {sorted(left)} for ever"
    return ""


def _trace(reached: list[World], came_from: list[tuple[int, str]], at: int) -> list[str]:
    """Say the steps to state *at*, each with what it changed."""
    lines: list[str] = []
    while at > 0:
        before, label = came_from[at]
        lines.append(f"{label:24}{_change(reached[before].storage, reached[at].storage)}")
        at = before
    return lines[::-1]


def _change(before: Storage, after: Storage) -> str:
    said = []
    for word, old, new in zip(before._fields, before, after, strict=True):
        said += [f"+{word[:-1]} {_plain(each)}" for each in new if each not in old]
        said += [f"-{word[:-1]} {each[0]}" for each in old if each not in new]
    return ", ".join(said)


def _plain(value: object) -> str:
    """Show sets in order and without the word frozenset."""
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(_plain(each) for each in value)) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(_plain(each) for each in value) + ")"
    return str(value)
