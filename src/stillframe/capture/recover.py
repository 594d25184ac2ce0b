"""Recovering a domain from whatever an earlier run left: the same loop as a normal run's end."""

from __future__ import annotations

from dataclasses import dataclass

from stillframe.capture.bring_back import BringBack
from stillframe.capture.decide import decide
from stillframe.capture.journal import RunRecord
from stillframe.capture.limits import Limits
from stillframe.capture.run import Tools
from stillframe.capture.standing_decide import decide_lowering
from stillframe.capture.standing_lower import LowerRun
from stillframe.capture.states import KEPT
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import Domain


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was done for one run that had been left open: the words of each step, in order."""

    run: RunRecord
    words: tuple[str, ...]

    @property
    def told(self) -> list[str]:
        """What to tell a person: which run it was, then the steps."""
        return [f"recovered run {self.run.id}:", *(f"  {word}" for word in self.words)]


@dataclass(frozen=True, slots=True)
class NextStep:
    """What recover would do first: in words, on which disks, and why."""

    words: str
    targets: tuple[str, ...]
    reason: str


def recover_domain(domain: Domain, tools: Tools, limits: Limits) -> list[Recovered]:
    """Bring *domain* back from every run that was left open. Needs the domain's lock.

    Overlays that it stands on by intention are left alone; a run that was to leave such ones behind is
    taken to where they stand. Raises NeedsAttention where only a person may choose; nothing is changed then.
    """
    recovered = []
    for left in tools.journal.open_runs(domain.uuid):
        tools.watcher.say(f"an earlier run of {left.name} ended while {left.state.value}: recovering")
        kind = LowerRun if left.state in KEPT else BringBack
        back = kind(tools.journal, domain, tools.clock, limits, tools.watcher)
        recovered.append(Recovered(back.finish(left), tuple(back.did)))
    return recovered


def next_steps(domain: Domain, tools: Tools, limits: Limits) -> list[tuple[RunRecord, NextStep]]:
    """Return for every open run of *domain* what recover would do first, without doing it."""
    return [(run, _next_step(run, domain, tools, limits)) for run in tools.journal.open_runs(domain.uuid)]


def _next_step(run: RunRecord, domain: Domain, tools: Tools, limits: Limits) -> NextStep:
    if run.state in KEPT:
        lower = LowerRun(tools.journal, domain, tools.clock, limits, tools.watcher)
        step = decide_lowering(run, lower.look(run))
        return NextStep(step.step.value, step.targets, step.reason)
    back = BringBack(tools.journal, domain, tools.clock, limits, tools.watcher)
    decision = decide(run, back.look(run))
    return NextStep(decision.action.value, decision.targets, decision.reason)


def domain_of(connection: Connection, run: RunRecord) -> Domain:
    """Return the domain of a run, even if libvirt no longer knows it."""
    return Domain(connection, run.uuid, run.name)
