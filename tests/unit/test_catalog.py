"""Names of snapshots: what each kind of name finds, and what it says when it finds nothing or too much."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from stillframe.clock import SystemClock
from stillframe.errors import SnapshotAmbiguous, SnapshotUnknown
from stillframe.repository.catalog import (
    display_name,
    forget,
    list_snapshots,
    plan_forget,
    resolve,
    resolve_all,
)
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import tombstone
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.wrappers import Counted

DAY = datetime(2026, 11, 20, tzinfo=UTC)


def name(guest: str, hours: float, sid: str, host: str = "alpha") -> SnapshotName:
    return SnapshotName(host, guest, DAY + timedelta(hours=hours), sid.ljust(32, "0"))


WEB = [name("web", 1, "aaaa1"), name("web", 5, "aaaa2"), name("web", 30, "bbbb"), name("web", 30.5, "cafe1")]
DB = [name("db", 2, "dddd"), name("db", 40, "eeee")]
FAR = [name("db", 3, "ffff", "beta"), name("mail", 4, "1234", "beta")]
ODD = [name("cafe", 6, "5678"), name("a@b", 7, "9999"), name("ünï cøde", 8, "7777")]
EVERY = WEB + DB + FAR + ODD


@pytest.mark.parametrize(("text", "found"), [
    ("latest", DB[1]),
    ("aaaa1", WEB[0]),
    ("AAAA2", WEB[1]),
    ("bbbb" + "0" * 28, WEB[2]),
    ("web", WEB[3]),
    ("alpha/web", WEB[3]),
    ("web@latest", WEB[3]),
    ("web@2026-11-20", WEB[1]),
    ("alpha/web@2026-11-20", WEB[1]),
    ("web@2026-11-21T06", WEB[3]),
    ("web@2026-11-21T06:00", WEB[2]),
    ("web@2026-11-21 06:00:00", WEB[2]),
    ("web@20261121T060000Z", WEB[2]),
    ("alpha/db", DB[1]),
    ("beta/db@latest", FAR[0]),
    ("mail", FAR[1]),
    ("a@b", ODD[1]),
    ("a@b@latest", ODD[1]),
    ("a@b@2026-11-20", ODD[1]),
    ("ünï cøde", ODD[2]),
])
def test_a_name_finds_one_snapshot(text: str, found: SnapshotName) -> None:
    for _ in range(3):
        assert resolve(random.sample(EVERY, len(EVERY)), text) == found


@pytest.mark.parametrize("text", [
    "aaa", "", "nothing", "web@2026-11-22", "web@2026", "web@yesterday", "gamma/web", "bbbb1", "@latest",
    "web@", "0" * 33,
])
def test_a_name_that_finds_nothing_says_what_there_is(text: str) -> None:
    with pytest.raises(SnapshotUnknown, match="mail") as error:
        resolve(EVERY, text)
    assert error.value.next_command.startswith("stillframe list")


@pytest.mark.parametrize(("text", "named"), [
    ("aaaa", ["aaaa1", "aaaa2"]), ("db", ["alpha/db", "beta/db"]),
    ("cafe", ["cafe1", "alpha/cafe@2026-11-20T06"]),
])
def test_a_name_of_several_names_them_all(text: str, named: list[str]) -> None:
    with pytest.raises(SnapshotAmbiguous) as error:
        resolve(EVERY, text)
    assert all(each in error.value.message for each in named)


def test_in_an_empty_repository_nothing_is_found() -> None:
    with pytest.raises(SnapshotUnknown, match="no snapshot in the repository yet"):
        resolve([], "latest")


def test_what_is_shown_can_be_asked_for() -> None:
    for each in WEB:
        assert resolve(EVERY, display_name(each)) == each


def test_several_names_of_one_snapshot_are_one() -> None:
    assert resolve_all(EVERY, ["web", "cafe1", "mail"]) == [WEB[3], FAR[1]]


def test_tombstones_and_strangers_are_not_listed() -> None:
    storage = MemoryStorage(SystemClock())
    for each in EVERY:
        storage.create(each.key, b"x" * 100)
    storage.create(name("web", 9, "8888").key, tombstone("8888".ljust(32, "0")))
    storage.create("main/m/alpha/web/README", b"x" * 100)
    assert list_snapshots(storage) == sorted(EVERY)
    plan = plan_forget([WEB[0], DB[0], WEB[0]])
    assert plan.snapshots == tuple(sorted([WEB[0], DB[0]]))
    assert forget(storage, plan) == 2
    assert list_snapshots(storage) == sorted({*EVERY} - {WEB[0], DB[0]})
    assert forget(storage, plan) == 2


def test_ten_thousand_snapshots_are_listed_by_their_names_alone() -> None:
    # What makes it quick (bench/repository.py times it): one listing, and nothing is read.
    storage = Counted(MemoryStorage(SystemClock()), SystemClock())
    for number in range(10_000):
        storage.create(name(f"guest{number % 100}", number / 10, f"{number:032x}").key, b"x" * 100)
    before = storage.counts()
    snapshots = list_snapshots(storage)
    assert len(snapshots) == 10_000
    assert resolve(snapshots, "guest7").guest == "guest7"
    calls = {verb: count.calls - before[verb].calls if verb in before else count.calls
             for verb, count in storage.counts().items()}
    assert {verb: count for verb, count in calls.items() if count} == {"list": 1}


def test_of_two_in_one_second_the_later_is_the_newest() -> None:
    first, second = (SnapshotName("alpha", "web", DAY + timedelta(microseconds=at), sid * 32)
                     for at, sid in ((100, "f"), (900_000, "0")))
    pair = [first, second]
    assert resolve(pair, "latest") == resolve(pair, "web") == second
    assert resolve(pair, "web@2026-11-20T00:00:00.9") == second
    assert resolve(pair, "web@2026-11-20T00:00:00.000100Z") == first
