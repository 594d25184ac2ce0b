"""Reading disks of snapshots: anywhere, in any order, as a source of another backup, and with damage."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

import pytest

from stillframe.clock import SystemClock
from stillframe.errors import SlotDamaged, StorageLost
from stillframe.extent import Kind
from stillframe.repository.heal import record_bad, write_heals
from stillframe.repository.layout import new_sid
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView
from stillframe.storage.memory import MemoryStorage
from tests.storage_faults import BitFlip
from tests.unit.repository_disks import CHUNK, Book, SourceDisk, in_pieces, noise, whole


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [thread.name for thread in threading.enumerate() if thread not in before] == []


def with_holes(seed: int = 0) -> SourceDisk:
    holes = [(9 * CHUNK, 30 * CHUNK, Kind.HOLE), (80 * CHUNK, CHUNK, Kind.ZERO)]
    return SourceDisk(noise(150 * CHUNK + 77, seed), holes)


def test_any_stretch_reads_what_was_there() -> None:
    book, chance, disk = Book(), random.Random(1), with_holes()
    book.backup(disk)
    with book.view(book.kept[0][0]) as view:
        for _ in range(300):
            at = chance.randrange(disk.size_bytes)
            buffer = bytearray(chance.randrange(min(disk.size_bytes - at, 20 * CHUNK) + 1))
            view.read_into(memoryview(buffer), at)
            assert buffer == disk.content[at : at + len(buffer)]


def test_reading_in_order_and_on_several_threads() -> None:
    book, disk = Book(), with_holes()
    book.backup(disk)
    found: dict[int, bytes] = {}

    def read(view: DiskView, start: int) -> None:
        with view.connect() as connection:
            for at in range(start, disk.size_bytes, 4 * 3000):
                buffer = bytearray(min(3000, disk.size_bytes - at))
                connection.pread_into(memoryview(buffer), at)
                found[at] = bytes(buffer)

    with book.view(book.kept[0][0]) as view:
        threads = [threading.Thread(target=read, args=(view, start * 3000)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert b"".join(found[at] for at in sorted(found)) == disk.content


def test_extents_are_those_of_the_chunks() -> None:
    book, disk = Book(), with_holes()
    book.backup(disk)
    with book.view(book.kept[0][0]) as view:
        extents = list(view.extents())
        assert [(each.offset_bytes, each.length_bytes, each.kind) for each in extents] == [
            (0, 9 * CHUNK, Kind.DATA), (9 * CHUNK, 30 * CHUNK, Kind.HOLE),
            (39 * CHUNK, 41 * CHUNK, Kind.DATA),
            (80 * CHUNK, CHUNK, Kind.HOLE), (81 * CHUNK, 69 * CHUNK + 77, Kind.DATA)]
        part = list(view.extents(10 * CHUNK + 5, 40 * CHUNK))
        assert [(each.offset_bytes, each.end_bytes) for each in part] == [
            (10 * CHUNK + 5, 39 * CHUNK), (39 * CHUNK, 50 * CHUNK + 5)]


def test_a_snapshot_is_a_source_for_another_backup() -> None:
    book, other, disk = Book(), Book(), with_holes()
    book.backup(disk)
    with book.view(book.kept[0][0]) as view, other.writer() as writer:
        assert isinstance(view, DiskView)
        written = writer.write(view)
        writer.finish()
    assert written.data_bytes == disk.size_bytes - 31 * CHUNK


def test_outside_the_disk_is_a_mistake() -> None:
    book = Book()
    book.backup(SourceDisk(noise(CHUNK)))
    with book.view(book.kept[0][0]) as view, pytest.raises(ValueError, match="not within"):
        view.read_into(memoryview(bytearray(10)), CHUNK - 5)


def test_a_flipped_bit_is_named_and_the_rest_is_read() -> None:
    storage = MemoryStorage()
    book = Book(storage)
    disk = SourceDisk(noise(100 * CHUNK))
    book.backup(disk)
    damage(storage, lambda key: key.startswith("main/p/") and key.endswith("00000001"), 30000)
    with book.view(book.kept[0][0]) as view:
        with pytest.raises(SlotDamaged):
            whole(view)
        lost, found = [], 0
        for piece in view.pieces():
            if piece.content is None:
                assert piece.damage is not None
                lost.append((piece.offset_bytes, piece.length_bytes))
            else:
                found += piece.length_bytes
                end = piece.offset_bytes + piece.length_bytes
                assert piece.content == disk.content[piece.offset_bytes : end]
    assert len(lost) == 4
    assert found + sum(length for _, length in lost) == disk.size_bytes


def damage(storage: MemoryStorage, match: Callable[[str], bool], byte: int) -> None:
    for key, content in storage.contents().items():
        if match(key):
            hurt = bytearray(content)
            hurt[byte] ^= 4
            storage.replace(key, hurt)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_damaged_node_loses_what_is_below_it(level: int) -> None:
    storage = MemoryStorage()
    book = Book(storage)
    disk = SourceDisk(noise(100 * CHUNK))
    book.backup(disk)
    content = book.kept[0][0]
    with book.view(content) as view:
        place = view._tree.node_at(level, 1)
    assert place is not None
    damage(storage, lambda key: key == place.pack.key, place.offset_bytes + 3)
    with book.view(content) as view:
        lost = [piece for piece in view.pieces() if piece.content is None]
        span = 4 ** (level + 1) * CHUNK
        assert [(piece.offset_bytes, piece.length_bytes) for piece in lost] == [
            (span, min(span, disk.size_bytes - span))]
        # Reading says that it is lost; the extents must not say that it is zero.
        assert next(iter(view.extents(span, CHUNK))).kind is Kind.DATA
        with pytest.raises(SlotDamaged):
            view.read_into(memoryview(bytearray(CHUNK)), span)


def test_the_next_backup_heals_what_it_sees_again() -> None:
    storage = MemoryStorage()
    book = Book(storage)
    disk = SourceDisk(noise(100 * CHUNK))
    book.backup(disk)
    with book.view(book.kept[0][0]) as view:
        entry = view._entries(range(40, 41))[0]
    assert entry is not None
    damage(storage, lambda key: key == entry.place.pack.key, entry.place.offset_bytes + 3)
    record_bad(storage, entry.place.pack, 1 << entry.place.slot, "flipped", SystemClock().now())
    second = book.backup(disk)
    assert (second.new_chunks, second.changed_bytes) == (4, 0)
    assert len(book.healed) == 4
    write_heals(book.repository, new_sid(), book.healed)
    book.check()


def test_storage_that_fails_is_not_taken_for_damage() -> None:
    storage = MemoryStorage()
    book = Book(storage)
    book.backup(SourceDisk(noise(100 * CHUNK)))

    def fail(verb: str, key: str) -> None:
        if verb == "get" and key.startswith("main/p/"):
            raise StorageLost("gone")

    with book.view(book.kept[0][0]) as view:
        storage.before = fail
        with pytest.raises(StorageLost):
            in_pieces(view)
        with pytest.raises(StorageLost):
            whole(view)
        storage.before = None  # it comes back, and so does what failed
        assert whole(view) == book.kept[0][1]


def test_a_read_that_is_wrong_once_in_a_bit_is_found() -> None:
    memory = MemoryStorage()
    book = Book(memory)
    book.backup(SourceDisk(noise(50 * CHUNK)))
    for bit in (40 * 8, 3000 * 8, 20000 * 8 + 5):
        flipped = replace(book.repository, storage=BitFlip(memory, lambda key: "/p/" in key, bit))
        with DiskView(Places(flipped), book.kept[0][0]) as view:
            assert [piece for piece in view.pieces() if piece.content is None]


def test_leaving_the_pieces_early_leaves_nothing_behind() -> None:
    book = Book()
    book.backup(SourceDisk(noise(300 * CHUNK)))
    with book.view(book.kept[0][0]) as view:
        pieces = view.pieces()
        assert next(pieces).offset_bytes == 0
        assert isinstance(pieces, Generator)
        pieces.close()
