"""What the loops that end a run step by step have in common: whom they tell, and when they give up.

A call that fails is not believed: it is noted, and the next look tells what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stillframe.capture.journal import Journal, RunRecord
from stillframe.capture.limits import Limits
from stillframe.capture.states import State
from stillframe.capture.thaw import thaw_until_verified
from stillframe.clock import Clock
from stillframe.errors import ConnectionLost, NeedsAttention, StillframeError
from stillframe.hypervisor.guest import Guest

REPEATS_LIMIT = 3
_FAILURES_LIMIT = 8


@dataclass(frozen=True, slots=True)
class CommitProgress:
    """How far the commits of all disks are, in bytes."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who is told what happens: words for people, and how far a commit is."""

    say: Callable[[str], None]
    commit: Callable[[CommitProgress], None]


class Stepping:
    """The state of one such loop, for one run of one domain."""

    #: What is said of the guest when the loop gives up because calls go on failing.
    stuck = NeedsAttention.guest
    #: How long it is waited between looks, and longer after each failure.
    poll_s = 0.1

    def __init__(
        self, journal: Journal, domain: Guest, clock: Clock, limits: Limits, watcher: Watcher
    ) -> None:
        self._journal = journal
        self._domain = domain
        self._clock = clock
        self._limits = limits
        self._watcher = watcher
        #: What was done so far, one sentence a step, for people.
        self.did: list[str] = []
        self._thaw_hopeless = False
        self._failures = 0

    def _failed(self, record: RunRecord, what: str, error: StillframeError) -> None:
        self._failures += 1
        self._journal.note(self._journal.current(record), f"could not {what}: {error.message}")
        if self._failures >= _FAILURES_LIMIT:
            raise NeedsAttention(f"Could not {what}: {error.message}", again(record), self.stuck) from error
        if isinstance(error, ConnectionLost):
            self._domain.connection.ensure()
        else:
            self._domain.connection.wait_change(self.poll_s * self._failures)

    def _given_up(self, record: RunRecord, reason: str) -> RunRecord:
        """Write down that the copy of a run that died was given up."""
        record = self._journal.enter(record, State.RELEASED, reason, given_up=record.given_up or reason)
        return self._journal.done(record)

    def _thawed(self, record: RunRecord) -> RunRecord:
        """Thaw the guest, and write down whether that is verified."""
        self._watcher.say("thawing the guest's file systems")
        if thaw_until_verified(self._domain, self._clock, self._limits.thaw_s, self._limits.agent_s):
            return self._journal.note(record, "thaw verified", thaw_verified=True)
        self._thaw_hopeless = True
        return self._journal.note(record, "the guest agent did not confirm a thaw")


def again(record: RunRecord) -> str:
    """Return the command to go on with."""
    return f"stillframe recover {record.name}"
