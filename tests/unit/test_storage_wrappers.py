"""Trying again, counting, keeping to a rate; and that the failing storages for tests fail as they say."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from stillframe.errors import (
    ObjectExists,
    ObjectMissing,
    ObjectTruncated,
    RepositoryUnsafe,
    StorageError,
    StorageFull,
    StorageLost,
)
from stillframe.storage.memory import MemoryStorage
from stillframe.storage.model import Listed, Storage
from stillframe.storage.probe import probe_create_if_absent
from stillframe.storage.wrappers import Counted, RateLimited, Retried, TimeLimited, VerbCount
from tests.storage_faults import (
    BitFlip,
    CheckThenPut,
    Failing,
    Full,
    LostReply,
    Overwriting,
    Truncated,
    verb_is,
)


class TestClock:
    """A clock that moves only when somebody pauses."""

    __test__ = False

    def __init__(self) -> None:
        self.seconds = 100.0
        self.pauses: list[float] = []

    def now(self) -> datetime:
        return datetime(2026, 11, 24, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic_s(self) -> float:
        return self.seconds

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        self.pause(timeout_s)
        return event.is_set()

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.seconds += seconds


@pytest.fixture
def clock() -> TestClock:
    return TestClock()


@pytest.fixture
def memory(clock: TestClock) -> MemoryStorage:
    return MemoryStorage(clock)


def call(storage: Storage, verb: str) -> object:
    """Carry out *verb* with plain arguments; "there" exists, "new" does not."""
    return {
        "get": lambda: storage.get("there"),
        "create": lambda: storage.create("new", b"content"),
        "replace": lambda: storage.replace("there", b"content"),
        "list": lambda: list(storage.list("")),
        "delete": lambda: storage.delete(["there"]),
        "stat": lambda: storage.stat("there"),
        "now": storage.now,
    }[verb]()


VERBS = ["get", "create", "replace", "list", "delete", "stat", "now"]


# Trying again


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_lost_is_tried_again_with_growing_pauses(
        memory: MemoryStorage, clock: TestClock, verb: str) -> None:
    memory.create("there", b"old")
    expected = call(memory.copy(), verb)
    fails = [StorageLost("away")] * 3
    told: list[tuple[str, float]] = []

    def before(found: str, _key: str) -> None:
        if found == verb and fails:
            raise fails.pop()

    memory.before = before
    retried = Retried(
        memory, clock, on_retry=lambda verb, _key, _error, pause_s: told.append((verb, pause_s)))
    found = call(retried, verb)
    assert found == expected or verb == "now"
    assert clock.pauses == [0.5, 1, 2]
    assert told == [(verb, 0.5), (verb, 1), (verb, 2)]


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_given_up_after_so_many_attempts(memory: MemoryStorage, clock: TestClock, verb: str) -> None:
    calls: list[str] = []

    def before(found: str, _key: str) -> None:
        calls.append(found)
        raise StorageLost("away for good")

    memory.before = before
    with pytest.raises(StorageLost, match="for good"):
        call(Retried(memory, clock, attempts=5, longest_pause_s=3), verb)
    assert calls == [verb] * 5
    assert clock.pauses == [0.5, 1, 2, 3]


@pytest.mark.parametrize("error", [StorageFull, ObjectExists, ObjectMissing, ObjectTruncated])
def test_only_what_is_lost_is_tried_again(
        memory: MemoryStorage, clock: TestClock, error: type[StorageError]) -> None:
    with pytest.raises(error):
        Retried(Failing(memory, verb_is("create"), error=error), clock).create("k", b"x")
    assert clock.pauses == []


def test_a_create_whose_reply_was_lost_has_succeeded(memory: MemoryStorage, clock: TestClock) -> None:
    Retried(LostReply(memory, verb_is("create")), clock).create("k", bytearray(b"mine"))
    assert memory.contents() == {"k": b"mine"}


def test_a_create_that_finds_the_bytes_of_another_has_lost(memory: MemoryStorage, clock: TestClock) -> None:
    def another_wins(verb: str, _key: str) -> bool:
        if verb == "create":
            memory.replace("k", b"another's")
        return verb == "create"

    with pytest.raises(ObjectExists):
        Retried(Failing(memory, another_wins), clock).create("k", b"mine")
    assert memory.contents() == {"k": b"another's"}


def test_a_first_attempt_never_takes_what_it_finds_for_its_own(
        memory: MemoryStorage, clock: TestClock) -> None:
    memory.create("k", b"same")
    with pytest.raises(ObjectExists):
        Retried(memory, clock).create("k", b"same")


def test_a_created_object_that_is_gone_when_it_is_looked_at_is_not_called_ours(
        memory: MemoryStorage, clock: TestClock) -> None:
    def vanishes(verb: str, _key: str) -> None:
        if verb == "get":
            memory.delete(["k"])

    memory.before = vanishes
    with pytest.raises(ObjectExists):
        Retried(LostReply(memory, verb_is("create")), clock).create("k", b"mine")


def test_looking_at_a_created_object_may_be_lost_too(memory: MemoryStorage, clock: TestClock) -> None:
    faulty = Failing(LostReply(memory, verb_is("create")), verb_is("get"), times=2)
    Retried(faulty, clock).create("k", b"mine")
    assert len(clock.pauses) == 3


def test_a_listing_goes_on_where_it_broke(memory: MemoryStorage, clock: TestClock) -> None:
    keys = [f"k{n:02d}" for n in range(30)]
    for key in keys:
        memory.create(key, b"x")

    class Breaking(MemoryStorage):
        def list(self, prefix: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
            for number, listed in enumerate(memory.list(prefix)):
                if number % 7 == 6 and listed.key not in broken:
                    broken.add(listed.key)
                    raise StorageLost("in mid-listing")
                yield listed

    broken: set[str] = set()
    retried = Retried(Breaking(), clock, attempts=2)
    assert [listed.key for listed in retried.list("")] == keys
    assert len(broken) == 4
    assert clock.pauses == [0.5] * 4


# Counting


def test_calls_bytes_and_seconds_are_counted_by_verb(memory: MemoryStorage, clock: TestClock) -> None:
    memory.before = lambda _verb, _key: clock.pause(2)
    counted = Counted(memory, clock)
    counted.create("a", memoryview(b"01234567").cast("I"))
    counted.create("b", b"01")
    counted.replace("a", b"0123")
    counted.get("a")
    counted.get("a", 1, 2)
    with pytest.raises(ObjectExists):
        counted.create("a", b"0123456789")
    assert list(counted.list("")) == [Listed("a", 4), Listed("b", 2)]
    counted.stat("a")
    counted.now()
    counted.delete(["a", "b", "c"])
    assert counted.counts() == {
        "create": VerbCount(calls=3, failed=1, size_bytes=10, seconds=6),
        "replace": VerbCount(calls=1, size_bytes=4, seconds=2),
        "get": VerbCount(calls=2, size_bytes=6, seconds=4),
        "list": VerbCount(calls=1, objects=2, seconds=2),
        "stat": VerbCount(calls=1, seconds=2),
        "now": VerbCount(calls=1, seconds=2),
        "delete": VerbCount(calls=1, objects=3, seconds=6),
    }


# Keeping to a rate


def test_writing_and_reading_keep_to_their_rates(memory: MemoryStorage, clock: TestClock) -> None:
    limited = RateLimited(memory, clock, write_bytes_per_s=100, read_bytes_per_s=50)
    limited.create("a", b"x" * 200)  # at once; the debt is 2 s
    assert clock.pauses == []
    limited.replace("b", b"x" * 100)
    assert clock.pauses == [2]
    limited.create("c", b"x")
    assert clock.pauses == [2, 1]
    clock.seconds += 10  # time that goes by is no credit for later
    limited.get("a")
    limited.get("a", 0, 100)
    assert clock.pauses == [2, 1, 4]
    limited.get("a", 0, 1)
    assert clock.pauses == [2, 1, 4, 2]


def test_without_a_rate_nothing_waits(memory: MemoryStorage, clock: TestClock) -> None:
    limited = RateLimited(memory, clock)
    limited.create("a", b"x" * 1000)
    for _ in range(10):
        limited.get("a")
    assert clock.pauses == []


@pytest.mark.parametrize("rate", [0, -1])
def test_a_rate_of_nothing_is_a_mistake(memory: MemoryStorage, clock: TestClock, rate: int) -> None:
    with pytest.raises(ValueError, match="not a rate"):
        RateLimited(memory, clock, write_bytes_per_s=rate)


# A storage that hangs


class Hanging(MemoryStorage):
    """Reads hang until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()
        self.called = threading.Semaphore(0)

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        self.called.release()
        self.goes_on.wait()
        return super().get(key, offset_bytes, length_bytes)


def test_a_storage_that_hangs_is_lost_until_it_answers() -> None:
    hanging = Hanging()
    limited = TimeLimited(hanging, 0.05)
    limited.create("a", b"x")
    for _ in range(40):  # more than there are threads
        with pytest.raises(StorageLost, match="no answer"):
            limited.get("a")
    hanging.goes_on.set()
    waits = 0
    while hanging.called.acquire(blocking=False):
        waits += 1
    assert waits < 40, "what was given up before it began is never asked"
    assert limited.get("a") == b"x"


def test_what_a_storage_says_in_time_comes_through(memory: MemoryStorage) -> None:
    limited = TimeLimited(memory, 60.0)
    limited.create("a/b", b"x")
    with pytest.raises(ObjectExists):
        limited.create("a/b", b"y")
    with pytest.raises(ObjectMissing):
        limited.get("c")
    assert [each.key for each in limited.list("a/")] == ["a/b"]


# The probe


def test_a_storage_that_overwrites_is_found(memory: MemoryStorage) -> None:
    with pytest.raises(RepositoryUnsafe, match="second object"):
        probe_create_if_absent(Overwriting(memory))
    assert memory.contents() == {}


def test_a_storage_that_looks_first_and_writes_later_is_found(memory: MemoryStorage) -> None:
    with pytest.raises(RepositoryUnsafe, match="8 won"):
        probe_create_if_absent(CheckThenPut(memory, racers=8))
    assert memory.contents() == {}


def test_a_storage_that_refuses_and_overwrites_all_the_same_is_found(memory: MemoryStorage) -> None:
    class Lying(Overwriting):
        def create(self, key: str, content: object) -> None:
            taken = key in memory.contents()
            memory.replace(key, content)  # type: ignore[arg-type]
            if taken:
                raise ObjectExists(key)

    with pytest.raises(RepositoryUnsafe, match="stored it all the same"):
        probe_create_if_absent(Lying(memory))


def test_a_probe_that_is_lost_says_nothing(memory: MemoryStorage) -> None:
    with pytest.raises(StorageLost):
        probe_create_if_absent(Failing(memory, verb_is("get")))
    with pytest.raises(StorageLost, match="create"):
        probe_create_if_absent(Failing(Failing(memory, verb_is("create")), verb_is("delete")))


# Memory as a model


def test_the_hook_comes_before_each_operation(memory: MemoryStorage) -> None:
    memory.create("there", b"x")
    steps: list[tuple[str, str]] = []
    memory.before = lambda verb, key: steps.append((verb, key))
    for verb in ("get", "stat", "create", "replace", "list", "now"):
        call(memory, verb)
    memory.delete(["there", "new"])
    assert steps == [("get", "there"), ("stat", "there"), ("create", "new"), ("replace", "there"),
                     ("list", ""), ("now", ""), ("delete", "there"), ("delete", "new")]


def test_a_crash_in_the_hook_does_nothing_of_that_step(memory: MemoryStorage) -> None:
    for key in ("a", "b", "c"):
        memory.create(key, b"x")

    def crash(verb: str, key: str) -> None:
        if (verb, key) == ("delete", "b") or verb == "create":
            raise RuntimeError("crash")

    memory.before = crash
    with pytest.raises(RuntimeError):
        memory.delete(["a", "b", "c"])
    with pytest.raises(RuntimeError):
        memory.create("d", b"x")
    assert list(memory.contents()) == ["b", "c"]


def test_a_copy_goes_its_own_way(memory: MemoryStorage) -> None:
    memory.create("a", b"x")
    copy = memory.copy()
    copy.create("b", b"y")
    memory.delete(["a"])
    assert (memory.contents(), copy.contents()) == ({}, {"a": b"x", "b": b"y"})


# The failing storages


def test_a_bit_is_flipped_wherever_it_is_read(memory: MemoryStorage) -> None:
    memory.create("bad", b"\0\0\0\0")
    memory.create("good", b"\0\0\0\0")
    faulty = BitFlip(memory, lambda key: key == "bad", bit=17)
    assert faulty.get("bad") == b"\0\0\2\0"
    assert faulty.get("bad", 2, 1) == b"\2"
    assert faulty.get("bad", 0, 2) == b"\0\0"
    assert faulty.get("good") == b"\0\0\0\0"


def test_a_cut_object_is_cut_for_every_verb(memory: MemoryStorage) -> None:
    memory.create("bad", b"0123456789")
    memory.create("good", b"0123456789")
    faulty = Truncated(memory, lambda key: key == "bad", 4)
    assert faulty.get("bad") == b"0123"
    with pytest.raises(ObjectTruncated):
        faulty.get("bad", 2, 3)
    assert faulty.stat("bad").size_bytes == 4
    assert list(faulty.list("")) == [Listed("bad", 4), Listed("good", 10)]
    assert faulty.get("good", 2, 3) == b"234"


def test_a_full_storage_has_room_for_so_much(memory: MemoryStorage) -> None:
    faulty = Full(memory, 10)
    faulty.create("a", b"x" * 6)
    with pytest.raises(StorageFull):
        faulty.replace("b", b"x" * 5)
    faulty.replace("b", b"x" * 4)
    assert sorted(memory.contents()) == ["a", "b"]


def test_a_failure_does_nothing_and_a_lost_reply_everything(memory: MemoryStorage) -> None:
    with pytest.raises(StorageLost):
        Failing(memory, verb_is("create")).create("a", b"x")
    assert memory.contents() == {}
    faulty = LostReply(memory, verb_is("create", "delete"), times=2)
    with pytest.raises(StorageLost):
        faulty.create("a", b"x")
    assert memory.contents() == {"a": b"x"}
    with pytest.raises(StorageLost):
        faulty.delete(["a"])
    faulty.create("a", b"y")
    assert memory.contents() == {"a": b"y"}
