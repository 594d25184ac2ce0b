"""Recovering a domain from whatever an earlier run left: the same loop as a normal run's end."""

from __future__ import annotations

from dataclasses import dataclass

from stillframe.capture.bring_back import BringBack
from stillframe.capture.decide import decide
from stillframe.capture.decide_pull import decide_pull
from stillframe.capture.end_pull import EndPull
from stillframe.capture.journal import RunRecord
from stillframe.capture.limits import Limits
from stillframe.capture.method import Method
from stillframe.capture.run import Tools
from stillframe.capture.standing_decide import decide_lowering
from stillframe.capture.standing_lower import LowerRun
from stillframe.capture.states import KEPT
from stillframe.hypervisor.guest import Guest


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


def recover_domain(domain: Guest, tools: Tools, limits: Limits) -> list[Recovered]:
    """Bring *domain* back from every run that was left open. Needs the domain's lock.

    Overlays that it stands on by intention are left alone; a run that was to leave such ones behind is
    taken to where they stand. Raises NeedsAttention where only a person may choose; nothing is changed then.
    """
    recovered = []
    for left in tools.journal.open_runs(domain.uuid):
        tools.watcher.say(f"an earlier run of {left.name} ended while {left.state.value}: recovering")
        back = _back(left, domain, tools, limits)
        recovered.append(Recovered(back.finish(left), tuple(back.did)))
    return recovered


def _back(run: RunRecord, domain: Guest, tools: Tools, limits: Limits) -> BringBack | EndPull | LowerRun:
    kind = EndPull if run.method is Method.BITMAP else LowerRun if run.state in KEPT else BringBack
    return kind(tools.journal, domain, tools.clock, limits, tools.watcher)


def next_steps(domain: Guest, tools: Tools, limits: Limits) -> list[tuple[RunRecord, NextStep]]:
    """Return for every open run of *domain* what recover would do first, without doing it."""
    return [(run, _next_step(run, _back(run, domain, tools, limits)))
            for run in tools.journal.open_runs(domain.uuid)]


def _next_step(run: RunRecord, back: BringBack | EndPull | LowerRun) -> NextStep:
    if isinstance(back, LowerRun):
        step = decide_lowering(run, back.look(run))
        return NextStep(step.step.value, step.targets, step.reason)
    if isinstance(back, EndPull):
        pulled = decide_pull(run, back.look(run))
        return NextStep(pulled.action.value, pulled.targets, pulled.reason)
    decision = decide(run, back.look(run))
    return NextStep(decision.action.value, decision.targets, decision.reason)
