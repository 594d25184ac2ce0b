"""What every storage promises, tried on each of them (drivers.py)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta
from pathlib import Path

import pytest

from stillframe.errors import ObjectExists, ObjectMissing, ObjectTruncated
from stillframe.storage.model import Content, Listed, Storage
from stillframe.storage.probe import probe_create_if_absent
from stillframe.units import KIB, MIB
from tests.contract.drivers import DRIVERS, Connect, Servers

RACERS = 16
ODD_KEYS = [
    "k", "repo.json", "a..b/c...", "100%25/%2Edot", "-dash/--", "_/_",
    "main/m/host.example/vm%20one/20261124T151400Z-ff",
    "x" * 255, "/".join(["p" * 100] * 10), "a/b/c/d/e/f/g/h/i/j/k/l/m", "UPPER/lower/0",
]
NO_KEYS = [
    "", "/", "a/", "/a", "a//b", ".", "..", "a/..", "../a", "./a", ".hidden", "a/.b", "a b", "a\\b",
    "a\nb", "a\n", "ä", "a:b", "a+b", "x" * 256, "/".join(["p" * 100] * 11), "a\0b",
]


@pytest.fixture(params=list(DRIVERS))
def connect(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Connect:
    """Give a new storage; each call is one more client of it."""
    made: Connect = DRIVERS[request.param](tmp_path, servers)
    return made


@pytest.fixture
def storage(connect: Connect) -> Storage:
    """Give a storage without objects."""
    return connect()


def keys_of(storage: Storage, prefix: str = "") -> list[str]:
    return [listed.key for listed in storage.list(prefix)]


def test_what_is_created_is_there_for_every_client(connect: Connect) -> None:
    connect().create("main/p/ab/00000000", b"content")
    other = connect()
    assert other.get("main/p/ab/00000000") == b"content"
    assert list(other.list("")) == [Listed("main/p/ab/00000000", 7)]
    assert other.stat("main/p/ab/00000000").size_bytes == 7


def test_a_key_is_created_once(storage: Storage) -> None:
    storage.create("k", b"first")
    with pytest.raises(ObjectExists, match="k"):
        storage.create("k", b"second")
    with pytest.raises(ObjectExists):
        storage.create("k", b"first")
    assert storage.get("k") == b"first"


def test_a_key_is_free_again_after_its_deletion(storage: Storage) -> None:
    storage.create("a/k", b"first")
    storage.delete(["a/k"])
    storage.create("a/k", b"second")
    assert storage.get("a/k") == b"second"


def test_replace_takes_the_place_of_what_is_there_or_of_nothing(storage: Storage) -> None:
    storage.replace("s/k", b"one, and long")
    storage.replace("s/k", b"two")
    assert storage.get("s/k") == b"two"
    assert list(storage.list("s/")) == [Listed("s/k", 3)]


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda content: memoryview(content)[1:]])
def test_any_buffer_can_be_stored(storage: Storage, make: Callable[[bytes], Content]) -> None:
    content = make(b"0123456789")
    storage.create("created", content)
    storage.replace("replaced", content)
    assert storage.get("created") == storage.get("replaced") == bytes(content)


def test_a_buffer_may_be_used_again_at_once(storage: Storage) -> None:
    buffer = bytearray(b"0123456789")
    storage.create("k", memoryview(buffer)[:5])
    buffer[:] = b"x" * 10
    buffer.extend(b"longer")  # refused while anybody holds a view
    assert storage.get("k") == b"01234"


def test_words_of_a_wider_buffer_are_bytes(storage: Storage) -> None:
    storage.create("k", memoryview(b"01234567").cast("I"))
    assert storage.get("k") == b"01234567"


@pytest.mark.parametrize("verb", ["create", "replace"])
def test_an_empty_object_is_refused(storage: Storage, verb: str) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        getattr(storage, verb)("k", b"")
    assert keys_of(storage) == []


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, None, b"0123456789"), (3, None, b"3456789"), (10, None, b""), (0, 10, b"0123456789"), (0, 1, b"0"),
     (9, 1, b"9"), (4, 3, b"456"), (5, 0, b""), (10, 0, b"")])
def test_a_range_is_exact(storage: Storage, offset: int, length: int | None, expected: bytes) -> None:
    storage.create("k", b"0123456789")
    assert storage.get("k", offset, length) == expected


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (9, 2), (10, 1), (11, 0), (11, None), (1 << 40, 1)])
def test_a_range_beyond_the_end_is_never_cut_short(storage: Storage, offset: int, length: int | None) -> None:
    storage.create("k", b"0123456789")
    with pytest.raises(ObjectTruncated, match="10 bytes"):
        storage.get("k", offset, length)


@pytest.mark.parametrize(("offset", "length"), [(-1, None), (-1, 1), (0, -1)])
def test_a_negative_range_is_a_mistake(storage: Storage, offset: int, length: int | None) -> None:
    storage.create("k", b"0123456789")
    with pytest.raises(ValueError, match="not a range"):
        storage.get("k", offset, length)


@pytest.mark.parametrize("key", ["k", "a/b/c", "a/k/deeper", "a"])
def test_an_absent_object_is_missing(storage: Storage, key: str) -> None:
    storage.create("a/k", b"x")
    with pytest.raises(ObjectMissing):
        storage.get(key)
    with pytest.raises(ObjectMissing):
        storage.get(key, 5, 0)
    with pytest.raises(ObjectMissing):
        storage.stat(key)


def test_odd_keys_are_kept_as_they_are(storage: Storage) -> None:
    for number, key in enumerate(ODD_KEYS):
        storage.create(key, b"%d" % number)
    assert keys_of(storage) == sorted(ODD_KEYS)
    assert [storage.get(key) for key in ODD_KEYS] == [b"%d" % number for number in range(len(ODD_KEYS))]
    storage.delete(ODD_KEYS)
    assert keys_of(storage) == []


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key_is_refused_by_every_verb(storage: Storage, key: str) -> None:
    storage.create("a/b", b"x")
    for call in (
        lambda: storage.get(key), lambda: storage.create(key, b"x"), lambda: storage.replace(key, b"x"),
        lambda: storage.delete(["a/b", key]), lambda: storage.stat(key),
    ):
        with pytest.raises(ValueError, match="not a key"):
            call()
    assert keys_of(storage) == ["a/b"]


@pytest.mark.parametrize("prefix", ["/", "a//", "../", "a/..", ".", "a b", "a\n"])
def test_what_no_key_begins_with_is_no_prefix(storage: Storage, prefix: str) -> None:
    with pytest.raises(ValueError, match="not the beginning"):
        storage.list(prefix)


def test_a_listing_is_sorted_by_key_across_folders(storage: Storage) -> None:
    # "-", "." and "%" sort before the slash, digits and letters behind it.
    keys = ["a/b", "a-b", "a.b", "a%b", "a0", "a/b-/c", "a/b./c", "a/b0", "ab/c/d", "a_", "A/z", "b",
            "a/c/d/e", "a/c/d-"]
    for key in keys:
        storage.create(key, key.encode())
    assert list(storage.list("")) == [Listed(key, len(key)) for key in sorted(keys)]


@pytest.mark.parametrize(
    "prefix",
    ["", "m", "main/", "main/p", "main/p/", "main/p/a", "main/p/aa/0", "main/p/aa/00000001",
     "main/p/aa/00000001/", "main/x/", "zz", "main/p/a/"])
def test_a_prefix_is_text(storage: Storage, prefix: str) -> None:
    keys = ["main/p/aa/00000000", "main/p/aa/00000001", "main/p/ab/00000000", "main/px", "main/g/1", "m",
            "repo.json"]
    for key in keys:
        storage.create(key, b"x")
    assert keys_of(storage, prefix) == sorted(key for key in keys if key.startswith(prefix))


def test_a_listing_survives_what_happens_meanwhile(storage: Storage) -> None:
    keys = [f"f{n % 4}/{n:02d}" for n in range(40)]
    for key in keys:
        storage.create(key, b"x")
    listing = storage.list("")
    found = [next(listing).key]
    storage.delete([key for key in keys if key.endswith("5")])
    storage.create("f9/new", b"x")
    found += [listed.key for listed in listing]
    assert found == sorted(found)
    assert {key for key in keys if not key.endswith("5")} <= set(found) <= {*keys, "f9/new"}


def test_deleting_many_with_absent_ones_between(storage: Storage) -> None:
    for key in ("a/1", "a/2", "b/1"):
        storage.create(key, b"x")
    storage.delete(["a/1", "nowhere/at/all", "a/3", "a/1", "a", "b/1/x", "b/1"])
    assert keys_of(storage) == ["a/2"]
    storage.delete([])
    storage.delete(["a/1"])
    assert keys_of(storage) == ["a/2"]


def test_times_are_of_one_clock(storage: Storage) -> None:
    before = storage.now()
    storage.create("k", b"x")
    modified_at = storage.stat("k").modified_at
    after = storage.now()
    assert before.tzinfo is UTC
    assert modified_at.tzinfo is UTC
    assert before <= modified_at <= after
    assert after - before < timedelta(seconds=30)
    storage.replace("k", b"y")
    assert modified_at <= storage.stat("k").modified_at <= storage.now()


def test_asking_for_the_time_leaves_nothing(storage: Storage) -> None:
    storage.now()
    assert keys_of(storage) == []


def test_a_big_object(storage: Storage) -> None:
    content = os.urandom(MIB) * 32 + b"end"
    storage.create("main/p/ab/00000000", content)
    assert storage.get("main/p/ab/00000000") == content
    assert storage.get("main/p/ab/00000000", 31 * MIB, MIB + 3) == content[31 * MIB:]


def test_of_many_that_create_a_key_one_wins(connect: Connect) -> None:
    clients = [connect() for _ in range(4)]
    with ThreadPoolExecutor(RACERS) as pool:
        for race in range(10):
            key = f"race/{race % 3}/{race}"  # the folder is new too, for some
            contents = [bytes([racer]) * (64 * KIB + racer) for racer in range(RACERS)]
            start = threading.Barrier(RACERS)

            def run(racer: int, key: str = key, contents: list[bytes] = contents,
                    start: threading.Barrier = start) -> bool:
                start.wait(10)
                try:
                    clients[racer % 4].create(key, contents[racer])
                except ObjectExists:
                    # What is said to exist is there, and whole.
                    assert clients[racer % 4].get(key) in contents
                    return False
                return True

            won = list(pool.map(run, range(RACERS)))
            assert won.count(True) == 1
            assert clients[0].get(key) == contents[won.index(True)]


def test_creating_while_others_empty_the_folder(connect: Connect) -> None:
    # A driver that removes empty folders removes them under the feet of those who create.
    storage = connect()

    def churn(racer: int) -> None:
        client = connect()
        for turn in range(20):
            client.create(f"main/s/{racer}-{turn}", b"x")
            client.delete([f"main/s/{racer}-{turn}"])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(churn, range(6)))
    assert keys_of(storage) == []


def test_a_reader_sees_the_old_object_or_the_new_one(connect: Connect) -> None:
    contents = {bytes([n]) * (1000 + 5000 * n) for n in range(1, 8)}
    storage = connect()
    storage.create("k", next(iter(contents)))
    done = threading.Event()

    def read() -> set[bytes]:
        seen = set()
        reader = connect()
        while not done.is_set():
            seen.add(reader.get("k"))
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for content in sorted(contents) * 3:
                storage.replace("k", content)
        finally:
            done.set()
        for reader in readers:
            assert reader.result() <= contents


def test_it_passes_the_probe_and_the_probe_leaves_nothing(storage: Storage) -> None:
    assert storage.capabilities.create_if_absent
    assert storage.capabilities.atomic_replace
    assert storage.address
    probe_create_if_absent(storage)
    assert keys_of(storage) == []
