"""Which snapshots are kept: each rule by example, and what holds for all rules whatever they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.retention import Policy, Verdict, judge


@dataclass(frozen=True)
class Shot:
    host: str
    guest: str
    utc: datetime
    sid: str = ""


NOW = datetime(2026, 11, 24, 12, 30, tzinfo=UTC)


def shots(*hours_ago: float, guest: str = "web") -> list[Shot]:
    return [Shot("alpha", guest, NOW - timedelta(hours=hours), f"{hours}") for hours in hours_ago]


def kept(verdicts: list[Verdict[Shot]]) -> list[float]:
    return [(NOW - each.snapshot.utc) / timedelta(hours=1) for each in verdicts if each.keep]


@pytest.mark.parametrize(("policy", "expected"), [
    (Policy(last=2), [0, 0.25]),
    (Policy(hourly=2), [0, 1]),
    (Policy(daily=3), [0, 20, 50]),
    (Policy(weekly=2), [0, 50]),
    (Policy(monthly=2), [0, 800]),
    (Policy(yearly=3), [0, 9000]),
    (Policy(within=timedelta(hours=2)), [0, 0.25, 1, 1.25]),
    (Policy(last=1, weekly=2), [0, 50]),
    (Policy(), [0, 0.25, 1, 1.25, 20, 50, 800, 9000]),
    (Policy(within=timedelta(0)), [0]),
])
def test_each_rule(policy: Policy, expected: list[float]) -> None:
    assert kept(judge(shots(0, 0.25, 1, 1.25, 20, 50, 800, 9000), policy, NOW)) == expected


def test_reasons_are_named() -> None:
    verdicts = judge(shots(0, 1, 30), Policy(last=1, daily=2), NOW)
    assert [each.reasons for each in verdicts] == [
        ("last", "daily"), ("no rule keeps it",), ("daily",)]


def test_guests_are_judged_by_themselves() -> None:
    verdicts = judge(shots(0, 1) + shots(5, 6, guest="db"), Policy(last=1), NOW)
    assert [(each.snapshot.guest, each.keep) for each in verdicts] == [
        ("db", True), ("db", False), ("web", True), ("web", False)]


def test_a_pinned_one_stays_besides_those_that_the_rules_keep() -> None:
    verdicts = judge(shots(0, 1, 30, 50), Policy(last=2), NOW, {"50"})
    assert [(each.keep, each.reasons) for each in verdicts] == [
        (True, ("last",)), (True, ("last",)), (False, ("no rule keeps it",)), (True, ("pinned",))]


def test_one_from_the_future_is_kept_and_makes_no_other_old() -> None:
    verdicts = judge(shots(-24 * 365, -2, -0.5, 0, 10, 60), Policy(last=1, within=timedelta(hours=24)), NOW)
    assert [each.reasons for each in verdicts] == [
        ("from the future",), ("from the future",), ("last", "within"), ("within",), ("within",),
        ("no rule keeps it",)]


def test_days_are_those_of_the_zone() -> None:
    # 23:30 and 00:30 in Berlin are one day in UTC.
    late, early = shots(14, 13)
    assert len(kept(judge([late, early], Policy(daily=2), NOW))) == 1
    assert len(kept(judge([late, early], Policy(daily=2, zone=ZoneInfo("Europe/Berlin")), NOW))) == 2


def test_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="less than nothing"):
        Policy(last=-1)
    with pytest.raises(ValueError, match="less than nothing"):
        Policy(weekly=-2)
    with pytest.raises(ValueError, match="less than nothing"):
        Policy(within=timedelta(seconds=-1))


COUNTS = st.integers(0, 5)
POLICIES = st.builds(
    Policy, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS,
    st.none() | st.timedeltas(timedelta(0), timedelta(days=60)),
    st.sampled_from([UTC, ZoneInfo("Europe/Berlin"), ZoneInfo("America/St_Johns")]))
SHOTS = st.lists(
    st.builds(Shot, st.sampled_from(["alpha", "beta"]), st.sampled_from(["web", "db"]),
              st.timedeltas(timedelta(0), timedelta(days=420)).map(lambda before: NOW - before),
              st.text("0123456789abcdef", min_size=4, max_size=4)), max_size=40, unique=True)


@given(SHOTS, POLICIES, st.timedeltas(timedelta(0), timedelta(days=500)), st.sets(st.text(max_size=4)))
def test_what_was_kept_is_kept_again(
    every: list[Shot], policy: Policy, ago: timedelta, pins: set[str],
) -> None:
    """Whatever the storage's clock says, and whatever is pinned; what lies ahead of it is kept, too."""
    once = [each.snapshot for each in judge(every, policy, NOW - ago, pins) if each.keep]
    again = judge(once, policy, NOW - ago, pins)
    ahead = NOW - ago + timedelta(hours=1)
    assert {each for each in every if each.utc > ahead or each.sid in pins} <= {*once}
    assert [each.snapshot for each in again] == once
    assert all(each.keep for each in again)


@given(SHOTS, POLICIES, st.data())
def test_the_newest_good_one_of_each_guest_stays(
    every: list[Shot], policy: Policy, data: st.DataObject,
) -> None:
    """Damaged ones take no good one's place, and what was kept once is kept again."""
    damaged = {each.sid for each in every if data.draw(st.booleans())}
    verdicts = judge(every, policy, NOW, damaged=damaged)
    keeps = [each.snapshot for each in verdicts if each.keep]
    good = [each for each in every if each.sid not in damaged]
    assert {each.snapshot for each in judge(good, policy, NOW) if each.keep} == {
        each for each in keeps if each.sid not in damaged}
    for whose in {(each.host, each.guest) for each in good}:
        assert max((each for each in good if (each.host, each.guest) == whose), key=_age) in keeps
    again = judge(keeps, policy, NOW, damaged=damaged)
    assert [each.snapshot for each in again if each.keep] == keeps
    assert all(each.reasons for each in verdicts)


def _age(shot: Shot) -> tuple[datetime, str]:
    return shot.utc, shot.sid


def test_a_damaged_one_counts_for_no_good_one() -> None:
    verdicts = judge(shots(0, 1, 30, 31, 60), Policy(daily=2), NOW, damaged={"0", "30"})
    assert [each.reasons for each in verdicts] == [
        ("daily", "damaged"), ("daily",), ("daily", "damaged"), ("daily",), ("no rule keeps it",)]
    verdicts = judge(shots(0, 1), Policy(last=1), NOW, damaged={"0", "1"})
    assert [each.reasons for each in verdicts] == [("last", "damaged"), ("no rule keeps it", "damaged")]


@given(SHOTS, POLICIES)
def test_the_newest_of_each_guest_stays(every: list[Shot], policy: Policy) -> None:
    verdicts = judge(every, policy, NOW)
    assert sorted(map(repr, every)) == sorted(repr(each.snapshot) for each in verdicts)
    for shot in every:
        rivals = [each for each in every if (each.host, each.guest) == (shot.host, shot.guest)]
        if shot == max(rivals, key=lambda each: (each.utc, each.sid)):
            assert next(each for each in verdicts if each.snapshot == shot).keep


@given(SHOTS, POLICIES, POLICIES)
def test_more_rules_keep_more(every: list[Shot], policy: Policy, other: Policy) -> None:
    within = max((each.within for each in (policy, other) if each.within is not None), default=None)
    more = Policy(
        max(policy.last, other.last), max(policy.hourly, other.hourly), max(policy.daily, other.daily),
        max(policy.weekly, other.weekly), max(policy.monthly, other.monthly),
        max(policy.yearly, other.yearly), within, policy.zone)
    if policy.says_nothing:
        return
    keeps = {each.snapshot for each in judge(every, policy, NOW) if each.keep}
    assert keeps <= {each.snapshot for each in judge(every, more, NOW) if each.keep}


@given(SHOTS, POLICIES)
def test_the_order_does_not_matter(every: list[Shot], policy: Policy) -> None:
    assert judge(every, policy, NOW) == judge(every[::-1], policy, NOW)


@given(SHOTS, st.integers(1, 5))
def test_last_keeps_so_many(every: list[Shot], count: int) -> None:
    verdicts = judge(every, Policy(last=count), NOW)
    for whose in {(each.host, each.guest) for each in every}:
        of_guest = [each for each in verdicts if (each.snapshot.host, each.snapshot.guest) == whose]
        assert sum(each.keep for each in of_guest) == min(count, len(of_guest))


@given(SHOTS, SHOTS, POLICIES, st.timedeltas(timedelta(hours=1), timedelta(days=90)))
def test_snapshots_that_somebody_adds_push_none_out_that_is_kept_for_its_age(
    true: list[Shot], forged: list[Shot], policy: Policy, within: timedelta,
) -> None:
    """Whatever the other rules are; the hour is how far a clock may be ahead and be believed."""
    ahead = [replace(each, utc=each.utc + timedelta(days=400)) for each in forged]
    verdicts = judge([*true, *forged, *ahead], replace(policy, within=within), NOW)
    keeps = {each.snapshot for each in verdicts if each.keep}
    assert {each for each in true if NOW - each.utc <= within - timedelta(hours=1)} <= keeps
