"""The local index: it finds what was stored, may be lost at any time, and is never believed blindly."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.clock import SystemClock
from stillframe.repository.generation import Generation, create_generation, latest_number
from stillframe.repository.heal import record_bad
from stillframe.repository.hints import ChunkHints
from stillframe.repository.layout import PackKind, PackName, packs_prefix
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.pack import SlotRef
from stillframe.storage.memory import MemoryStorage
from tests.unit.repository_disks import CHUNK, Book, SourceDisk, noise

REPOSITORY = "ab" * 16


def refs(count: int, seed: int = 0) -> list[ChunkRef]:
    chance = random.Random(seed)
    pack = PackName(PackKind.DATA.value, chance.randbytes(16), 7)
    return [ChunkRef(chance.randbytes(32), SlotRef(pack, number, 28 + number, 99), number % 16)
            for number in range(count)]


@pytest.fixture
def hints(tmp_path: Path) -> Iterator[ChunkHints]:
    with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as made:
        yield made


@pytest.mark.parametrize("count", [1, 16, 2047, 2048, 5000])
def test_what_was_added_is_found(hints: ChunkHints, count: int) -> None:
    added = refs(count)
    for ref in added:
        hints.add([ref])
    assert hints.find([ref.id for ref in added[:900]]) == {ref.id: ref for ref in added[:900]}
    assert hints.find([ref.id for ref in refs(5, seed=1)]) == {}
    assert hints.find([]) == {}


def test_a_folder_keeps_it_for_the_next_run(tmp_path: Path) -> None:
    added = refs(10)
    for expected in ({}, {ref.id: ref for ref in added}):
        with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as hints:
            assert hints.find([ref.id for ref in added]) == expected
            hints.add(added)
    with contextlib.closing(ChunkHints("cd" * 16, tmp_path)) as other:
        assert other.find([ref.id for ref in added]) == {}


def test_without_a_folder_it_goes_with_the_run() -> None:
    added = refs(5000)
    with contextlib.closing(ChunkHints(REPOSITORY)) as hints:
        hints.add(added)
        assert len(hints.find([added[0].id])) == 1
    with contextlib.closing(ChunkHints(REPOSITORY)) as hints:
        assert hints.find([added[0].id]) == {}


@pytest.mark.parametrize("content", [b"", b"nonsense" * 1000, b"SQLite format 3\0" + bytes(4080)])
def test_a_file_that_is_none_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hints.sqlite").write_bytes(content)
    added = refs(10)
    for _ in range(2):
        with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as hints:
            hints.add(added)
            assert len(hints.find([ref.id for ref in added])) == 10
    with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as hints:
        assert len(hints.find([ref.id for ref in added])) == 10


def test_a_file_damaged_in_the_middle_gives_right_answers_or_none(tmp_path: Path) -> None:
    added = refs(3000)
    path = tmp_path / "hints.sqlite"
    with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as hints:
        hints.add(added)
    good, chance = path.read_bytes(), random.Random(2)
    for _ in range(40):
        hurt = bytearray(good)
        for _ in range(20):
            hurt[chance.randrange(len(hurt))] ^= 1 << chance.randrange(8)
        path.write_bytes(hurt)
        with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as hints:
            found: dict[bytes, ChunkRef] = {}
            for at in range(0, len(added), 500):
                found |= hints.find([ref.id for ref in added[at : at + 500]])
            assert all(ref == found[ref.id] for ref in added if ref.id in found)
            hints.add(refs(10, seed=3))


def test_a_row_that_does_not_check_is_no_row(tmp_path: Path) -> None:
    added = refs(3)
    with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as hints:
        hints.add(added)
    with contextlib.closing(sqlite3.connect(tmp_path / "hints.sqlite")) as file:
        table = f"chunks_{REPOSITORY}"
        for key, value in file.execute(f"SELECT key, value FROM {table}").fetchall():
            # Another slot of the same pack: nothing but the checksum can tell.
            wrong = value[:52] + bytes((value[52] ^ 1,)) + value[53:]
            file.execute(f"UPDATE {table} SET value = ? WHERE key = ?", (wrong, key))
        file.commit()
    with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as hints:
        assert hints.find([ref.id for ref in added]) == {}
        assert hints.dropped == 3


def test_two_runs_at_once_do_not_disturb_each_other(hints: ChunkHints, tmp_path: Path) -> None:
    first, second = refs(3000), refs(3000, seed=1)
    with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as other:
        hints.add(first)
        other.add(second)
        assert len(hints.find([ref.id for ref in first[:500]])) == 500
        assert len(other.find([ref.id for ref in second[:500]])) == 500


def test_a_file_that_grew_too_large_is_begun_anew(tmp_path: Path) -> None:
    added = refs(3000)
    with contextlib.closing(ChunkHints(REPOSITORY, tmp_path)) as hints:
        hints.add(added)
    with contextlib.closing(ChunkHints(REPOSITORY, tmp_path, limit_bytes=100_000)) as hints:
        assert hints.find([added[0].id]) == {}


def test_a_file_that_fails_in_a_run_does_not_end_it(hints: ChunkHints) -> None:
    assert hints._file is not None
    hints._file.close()
    hints.add(refs(3000))
    assert hints.find([refs(1)[0].id]) == {}
    added = refs(5, seed=4)
    hints.add(added)
    assert len(hints.find([ref.id for ref in added])) == 5


# --- what a writer makes of it ------------------------------------------------------------------


def test_chunks_of_another_guest_are_not_stored_again(tmp_path: Path) -> None:
    book = Book(hints=tmp_path)
    book.backup(SourceDisk(noise(60 * CHUNK)))
    with book.writer() as writer:  # no parent: another disk with the same content, shifted
        written = writer.write(SourceDisk(noise(CHUNK, 9) + noise(60 * CHUNK)))
        writer.finish()
    assert (written.new_chunks, written.known_chunks) == (1, 60)


def test_hints_of_packs_that_are_gone_condemned_or_bad_do_not_count(tmp_path: Path) -> None:
    storage = MemoryStorage()
    book = Book(storage, hints=tmp_path)
    book.backup(SourceDisk(noise(60 * CHUNK)))
    packs = [listed.key for listed in storage.list(packs_prefix(PackKind.DATA))]
    names = [PackName("p", bytes.fromhex(key.split("/")[2]), int(key.split("/")[3])) for key in packs]
    storage.delete([packs[0]])
    condemned = Generation(latest_number(storage) + 1, {names[1]: 1})
    assert create_generation(storage, condemned, book.repository.key)
    record_bad(storage, names[2], None, "", SystemClock().now())
    with book.writer() as writer:
        written = writer.write(SourceDisk(noise(60 * CHUNK)))
        writer.finish()
        healed = writer.healed
    slots = 60 // 4
    per_pack = -(-slots // len(packs)) * 4
    assert len(packs) == 4
    assert written.new_chunks == 3 * per_pack
    assert len(healed) == per_pack
    book.kept.clear()
