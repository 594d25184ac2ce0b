"""Which snapshots to keep: a pure function of their names and of the rules.

Rules count per guest of a host. `last` keeps the newest; `hourly` keeps the newest of each of the latest so
many hours that have a snapshot at all, and so on up to years; `within` keeps all that are no older
than that before the newest one. A snapshot is kept if any rule wants it. The newest is kept whatever
the rules say, and a set of rules that says nothing drops nothing. What was kept once is kept by the same
rules again.

A snapshot that is known to be damaged stands in no good one's place: the good ones are judged as if it were
not there, so that the newest good one is kept whatever else is. It is itself kept if the rules want it
among all. What heals a damaged snapshot needs no rule: the collector keeps it (repository/mark.py).

A pinned snapshot is kept besides. One whose moment is yet to come, by the storage's clock, was made by a host
whose clock is wrong: it is kept, and the others are judged as if it were not there. Else one snapshot from
the year 2100 would be the newest for ever, and make all true ones old.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import groupby
from typing import Generic, Protocol, TypeVar


class Moment(Protocol):
    """What the rules look at: whose snapshot, and of when. `sid` decides between two of the same second."""

    @property
    def host(self) -> str:
        """The host that the guest ran on."""
        ...

    @property
    def guest(self) -> str:
        """The guest."""
        ...

    @property
    def utc(self) -> datetime:
        """The moment, timezone-aware."""
        ...

    @property
    def sid(self) -> str:
        """What no other snapshot has."""
        ...


M = TypeVar("M", bound=Moment)
#: So far may the clocks of a host and of the storage be apart.
_CLOCKS_APART = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules; 0 and None: no such rule. Hours, days, weeks and years are those of *zone*."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: timedelta | None = None
    zone: tzinfo = field(default=UTC)

    def __post_init__(self) -> None:
        """Raise ValueError for numbers below 0."""
        if min(self.last, *(count for _, count, _ in self._periods())) < 0:
            raise ValueError("a rule can't keep less than nothing")
        if self.within is not None and self.within < timedelta(0):
            raise ValueError("a rule can't keep less than nothing")

    @property
    def says_nothing(self) -> bool:
        """Whether there is no rule at all."""
        return self.within is None and not self.last and not any(count for _, count, _ in self._periods())

    def reasons(self, newest_first: Sequence[Moment]) -> list[list[str]]:
        """Return why each of one guest's snapshots is kept; an empty list for one that is not."""
        reasons: list[list[str]] = [[] for _ in newest_first]
        for number, moment in enumerate(newest_first):
            if number < self.last:
                reasons[number].append("last")
            if self.within is not None and newest_first[0].utc - moment.utc <= self.within:
                reasons[number].append("within")
        for name, count, period in self._periods():
            seen: set[tuple[int, ...]] = set()
            for number, moment in enumerate(newest_first):
                at = period(moment.utc.astimezone(self.zone))
                if at not in seen and len(seen) < count:
                    seen.add(at)
                    reasons[number].append(name)
        if newest_first and not reasons[0]:
            reasons[0].append("newest")
        return reasons

    def _periods(self) -> tuple[tuple[str, int, Callable[[datetime], tuple[int, ...]]], ...]:
        return (
            # An hour that comes twice when summer time ends is two hours.
            ("hourly", self.hourly, lambda at: (int(at.timestamp() // 3600),)),
            ("daily", self.daily, lambda at: (at.year, at.month, at.day)),
            ("weekly", self.weekly, lambda at: (at.isocalendar().year, at.isocalendar().week)),
            ("monthly", self.monthly, lambda at: (at.year, at.month)),
            ("yearly", self.yearly, lambda at: (at.year,)),
        )


@dataclass(frozen=True, slots=True)
class Verdict(Generic[M]):
    """What becomes of one snapshot. *reasons* are the rules that keep it, or why it is dropped."""

    snapshot: M
    keep: bool
    reasons: tuple[str, ...]


def judge(
    snapshots: Iterable[M], policy: Policy, now: datetime, pinned: Container[str] = frozenset(),
    damaged: Container[str] = frozenset(),
) -> list[Verdict[M]]:
    """Return a verdict on each snapshot; by host and guest, the newest first.

    *now* is the storage's time, *pinned* are the `sid` of snapshots that are kept in any case, *damaged* of
    those that can't be read in full.
    """
    verdicts: list[Verdict[M]] = []
    ordered = sorted(snapshots, key=lambda each: (each.utc, each.sid), reverse=True)
    ordered.sort(key=_whose)
    for _, group in groupby(ordered, key=_whose):
        of_guest = list(group)
        if policy.says_nothing:
            verdicts.extend(Verdict(each, keep=True, reasons=("no rule",)) for each in of_guest)
            continue
        present = [each for each in of_guest if each.utc <= now + _CLOCKS_APART]
        ahead = of_guest[:len(of_guest) - len(present)]
        verdicts.extend(Verdict(each, keep=True, reasons=("from the future",)) for each in ahead)
        of_good = iter(policy.reasons([each for each in present if each.sid not in damaged]))
        for each, of_all in zip(present, policy.reasons(present), strict=True):
            is_damaged = each.sid in damaged
            found = [*(of_all if is_damaged else next(of_good)), *(["pinned"] if each.sid in pinned else [])]
            known = ["damaged"] if is_damaged else []
            verdicts.append(Verdict(each, bool(found), (*(found or ["no rule keeps it"]), *known)))
    return verdicts


def _whose(moment: Moment) -> tuple[str, str]:
    return moment.host, moment.guest
