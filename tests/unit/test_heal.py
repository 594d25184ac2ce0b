"""Records of bad slots and of heals: what is merged, what is refused; damage of them hurts nobody."""

from __future__ import annotations

import pytest

from stillframe.clock import SystemClock
from stillframe.repository import heal as heal_module
from stillframe.repository.heal import (
    SLOTS_LIMIT,
    BadSlots,
    bad_key,
    clear_bad,
    read_bad,
    read_heals,
    record_bad,
    write_heals,
)
from stillframe.repository.layout import PackName, new_sid
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.pack import SlotRef
from stillframe.storage.memory import MemoryStorage
from tests.unit.repository_disks import small_repository

NOW = SystemClock().now()
A = PackName("p", b"a" * 16, 3)
B = PackName("t", b"b" * 16, 123_456_789)


def test_slots_are_merged_with_what_is_there() -> None:
    storage = MemoryStorage()
    record_bad(storage, A, 0b101, "first", NOW)
    record_bad(storage, A, 0b010, "second", NOW)
    record_bad(storage, B, None, "all of it", NOW)
    bad = read_bad(storage)
    assert bad.packs == {A: 0b111, B: None}
    assert (A, 1) in bad
    assert (A, 3) not in bad
    assert (B, 77) in bad
    assert (PackName("p", B.sid, B.number), 77) not in bad
    assert "nonsense" not in bad
    assert bad.within(A, 0b1100) == 0b100
    assert bad.within(B, 0b1100) == 0b1100
    record_bad(storage, A, None, "all", NOW)
    record_bad(storage, A, 1, "one more", NOW)
    assert read_bad(storage).packs[A] is None


def test_what_is_good_again_is_taken_off() -> None:
    storage = MemoryStorage()
    record_bad(storage, A, 0b111, "test", NOW)
    clear_bad(storage, A, 0b001, NOW)
    assert read_bad(storage).packs == {A: 0b110}
    clear_bad(storage, A, 0b111, NOW)
    assert not read_bad(storage)
    clear_bad(storage, A, None, NOW)
    record_bad(storage, B, None, "test", NOW)
    clear_bad(storage, B, 0b1, NOW)
    assert read_bad(storage).packs == {B: None}
    clear_bad(storage, B, None, NOW)
    assert not read_bad(storage)
    assert not BadSlots()


@pytest.mark.parametrize("content", [
    b"{", b"nonsense", b"\xff\xfe", b'{"pack":"p","slots":"-1","why":"","at":"","version":1}',
    b'{"pack":"p","slots":"xyz","why":"","at":"","version":1}',
    b'{"pack":"p","slots":"' + b"f" * (SLOTS_LIMIT // 4 + 1) + b'","why":"","at":"","version":1}',
])
def test_a_record_that_cannot_be_read_means_the_whole_pack(content: bytes) -> None:
    storage = MemoryStorage()
    storage.create(bad_key(A), content)
    assert read_bad(storage).packs == {A: None}


def test_a_slot_that_no_pack_can_have_means_the_whole_pack() -> None:
    storage = MemoryStorage()
    record_bad(storage, A, 1 << SLOTS_LIMIT, "forged", NOW)
    assert read_bad(storage).packs == {A: None}


def test_foreign_names_are_passed_over() -> None:
    storage = MemoryStorage()
    storage.create("main/v/bad/notes", b"x")
    assert not read_bad(storage)


def ref(number: int) -> ChunkRef:
    return ChunkRef(number.to_bytes(32, "big"), SlotRef(A, number, 28 + number, 100), number % 16)


def test_heals_come_back() -> None:
    repository = small_repository()
    write_heals(repository, new_sid(), {})
    assert list(repository.storage.list("main/v/")) == []
    heals = {ref(number).id: ref(number) for number in range(10)}
    write_heals(repository, new_sid(), heals)
    write_heals(repository, new_sid(), {ref(77).id: ref(77)})
    assert read_heals(repository) == {**heals, ref(77).id: ref(77)}


def test_heals_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = small_repository()
    monkeypatch.setattr(heal_module, "HEALS_LIMIT", 3)
    write_heals(repository, new_sid(), {ref(number).id: ref(number) for number in range(10)})
    assert read_heals(repository) == {ref(number).id: ref(number) for number in range(3)}


def test_a_damaged_heal_is_left_out() -> None:
    repository = small_repository()
    first, second = new_sid(), new_sid()
    write_heals(repository, first, {ref(1).id: ref(1)})
    write_heals(repository, second, {ref(2).id: ref(2)})
    content = bytearray(repository.storage.get(f"main/v/heal/{first}"))
    content[-1] ^= 1
    repository.storage.replace(f"main/v/heal/{first}", content)
    assert read_heals(repository) == {ref(2).id: ref(2)}
