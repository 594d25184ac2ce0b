"""Writing disks: every snapshot of a chain reads back, the same chunk is stored once, and nothing is left."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest

from stillframe.errors import CopyFailed, Interrupted, StillframeError, StorageFull
from stillframe.extent import Kind
from stillframe.repository.layout import Parameters, new_sid
from stillframe.repository.places import Places
from stillframe.repository.scan import data_runs, units
from stillframe.repository.slots import SlotCodec
from stillframe.repository.tree import Tree
from stillframe.storage.memory import MemoryStorage
from stillframe.units import GIB, KIB, MIB, TIB
from tests.unit.repository_disks import CHUNK, SMALL, Book, SourceDisk, content_of, noise, whole


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [thread.name for thread in threading.enumerate() if thread not in before] == []


def test_every_snapshot_of_a_chain_reads_back() -> None:
    book, chance = Book(), random.Random(1)
    disk = SourceDisk(noise(120 * CHUNK + 1234))
    for _ in range(12):
        book.backup(disk)
        for _ in range(chance.randrange(6)):
            at = chance.randrange(disk.size_bytes - 3 * CHUNK)
            length = chance.randrange(1, 3 * CHUNK)
            if chance.random() < 0.3:
                disk.content[at : at + length] = bytes(length)
            else:
                disk.content[at : at + length] = chance.randbytes(length)
    book.check()


@pytest.mark.parametrize(
    "size", [1, 511, CHUNK, CHUNK + 1, 4 * CHUNK, 16 * CHUNK, 16 * CHUNK + 1, 65 * CHUNK - 1])
def test_any_size_reads_back(size: int) -> None:
    book = Book()
    written = book.backup(SourceDisk(noise(size)))
    assert written.data_bytes == written.changed_bytes == written.read_bytes == size
    book.check()


def test_a_disk_of_nothing() -> None:
    book = Book()
    assert book.backup(SourceDisk(b"")).root is None
    book.check()


def test_all_zero_stores_nothing() -> None:
    book = Book()
    written = book.backup(SourceDisk(bytes(50 * CHUNK)))
    assert (written.root, written.stored_bytes, written.data_bytes) == (None, 0, 0)
    assert written.read_bytes == 50 * CHUNK
    assert book.objects("main/p/") + book.objects("main/t/") == []
    book.check()


def test_holes_are_not_read() -> None:
    book = Book()
    holes = [(3 * CHUNK, 10 * CHUNK, Kind.HOLE), (20 * CHUNK + 5, 2 * CHUNK, Kind.ZERO),
             (30 * CHUNK, CHUNK, Kind.HOLE)]
    disk = SourceDisk(noise(40 * CHUNK), holes)
    written = book.backup(disk)
    # The chunks at 20 and 22 are partly data: they are read whole.
    lost = {*range(3, 13), 21, 30}
    read = {at // CHUNK for offset, length in disk.reads for at in range(offset, offset + length, CHUNK)}
    assert read == set(range(40)) - lost
    assert written.read_bytes == (40 - len(lost)) * CHUNK
    book.check()


def test_an_unchanged_disk_stores_nothing_at_all() -> None:
    book = Book()
    disk = SourceDisk(noise(200 * CHUNK))
    first = book.backup(disk)
    before = book.objects("main/")
    second = book.backup(disk)
    assert second.root == first.root
    assert (second.stored_bytes, second.changed_bytes, second.new_chunks, second.known_chunks) == (0, 0, 0, 0)
    assert book.objects("main/") == before


def test_one_changed_chunk_rewrites_its_path_only() -> None:
    book = Book()
    disk = SourceDisk(noise(200 * CHUNK))
    book.backup(disk)
    disk.content[77 * CHUNK + 9] ^= 1
    written = book.backup(disk)
    assert (written.new_chunks, written.changed_bytes) == (1, CHUNK)
    old, new = (nodes(book, number) for number in (0, 1))
    assert len(new - old) == Tree(Places(book.repository), written.size_bytes, written.root).height + 1
    book.check()


def nodes(book: Book, number: int) -> set[object]:
    content = book.kept[number][0]
    tree = Tree(Places(book.repository), content.size_bytes, content.place)
    return {tree.node_at(level, index) for level in range(tree.height + 1)
            for index in range(-(-tree.leaf_count // tree.span(level)))}


@pytest.mark.parametrize(("before", "after"), [(10, 300), (64, 65), (4, 5), (16, 64)])
def test_grown_and_shrunk_disks_keep_what_they_have(before: int, after: int) -> None:
    book = Book()
    content = noise(after * CHUNK + 100)
    book.backup(SourceDisk(content[: before * CHUNK]))
    grown = book.backup(SourceDisk(content))
    assert grown.new_chunks == after - before + 1
    shrunk = book.backup(SourceDisk(content[: before * CHUNK]))
    assert shrunk.new_chunks == 0
    odd = book.backup(SourceDisk(content[: before * CHUNK - 7]))
    assert odd.new_chunks == 1
    book.check()


def test_the_same_content_is_stored_once() -> None:
    book = Book()
    chunks = [noise(CHUNK, seed) for seed in range(20)]
    order = random.Random(3).choices(range(20), k=500)
    written = book.backup(SourceDisk(b"".join(chunks[each] for each in order)))
    assert written.new_chunks == len(set(order))
    assert written.known_chunks == len(order) - len(set(order))
    book.check()


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 8, 4), (16, 4, 4), (2, 64, 64)])
def test_the_same_content_is_stored_once_whatever_the_shape(shape: tuple[int, int, int]) -> None:
    slot, leaf, inner = shape
    book = Book(parameters=Parameters(id=new_sid(), created_at="", chunk_bytes=CHUNK, slot_chunks=slot,
                                      leaf_chunks=leaf, inner_nodes=inner, pack_bytes=64 * KIB))
    order = random.Random(4).choices(range(60), k=700)
    written = book.backup(SourceDisk(b"".join(noise(CHUNK, each) for each in order)))
    assert written.new_chunks == len(set(order))
    book.check()


def test_a_pack_of_very_small_nodes_is_closed_before_its_end_is_as_large() -> None:
    # A sparse disk has leaves of some hundred bytes; each costs as much again in the pack's footer.
    book = Book(parameters=Parameters(id=new_sid(), created_at="", chunk_bytes=CHUNK, slot_chunks=1,
                                      leaf_chunks=4, inner_nodes=64, pack_bytes=64 * KIB))
    disk = SourceDisk(bytes(4 * 3000 * CHUNK))
    for leaf in range(3000):
        disk.content[4 * leaf * CHUNK : (4 * leaf + 1) * CHUNK] = noise(CHUNK, leaf % 7)
    book.backup(disk)
    book.check()
    packs = [listed.size_bytes for listed in book.repository.storage.list("main/t/")]
    assert len(packs) > 5
    assert max(packs) < 64 * KIB + 2 * CHUNK


def test_two_disks_of_a_run_share_what_is_equal() -> None:
    book = Book()
    content = noise(50 * CHUNK)
    with book.writer() as writer:
        first = writer.write(SourceDisk(content))
        second = writer.write(SourceDisk(content[5 * CHUNK :]))
        small = writer.write_bytes(content[:CHUNK] + b"end")
        stored = writer.finish()
    assert (first.new_chunks, second.new_chunks, second.known_chunks) == (50, 0, 45)
    assert (small.new_chunks, small.known_chunks) == (1, 1)
    sizes = sum(listed.size_bytes for prefix in ("main/p/", "main/t/")
                for listed in book.repository.storage.list(prefix))
    assert stored == sizes
    with book.view(content_of(small)) as view:
        assert whole(view) == content[:CHUNK] + b"end"


def test_zeroed_chunks_count_as_changed() -> None:
    book = Book()
    disk = SourceDisk(noise(100 * CHUNK))
    book.backup(disk)
    disk.holes = [(0, 40 * CHUNK, Kind.HOLE)]
    disk.content[: 40 * CHUNK] = bytes(40 * CHUNK)
    disk.content[99 * CHUNK :] = bytes(CHUNK)
    written = book.backup(disk)
    assert written.changed_bytes == 41 * CHUNK
    assert written.data_bytes == 59 * CHUNK
    book.check()


def test_packs_are_the_same_however_threads_run() -> None:
    sizes = []
    for _ in range(3):
        book = Book()
        book.backup(SourceDisk(noise(300 * CHUNK)))
        sizes.append([listed.size_bytes for listed in book.repository.storage.list("main/p/")])
    assert sizes[0] == sizes[1] == sizes[2]
    assert len(sizes[0]) > 10


def test_stop_ends_the_run() -> None:
    book, calls = Book(), iter(range(1000))

    def stop() -> StillframeError | None:
        return Interrupted("stopped") if next(calls) == 20 else None

    disk = SourceDisk(noise(400 * CHUNK))
    with pytest.raises(Interrupted):
        book.backup(disk, stop=stop)
    assert disk.connected == 0
    assert len(disk.reads) < 60
    assert book.objects("main/s/") == []


def test_stop_is_asked_while_an_upload_hangs() -> None:
    storage = MemoryStorage()
    book, let_go, stop_now = Book(storage), threading.Event(), threading.Event()

    def hang(verb: str, key: str) -> None:
        if verb == "create" and key.startswith("main/p/"):
            stop_now.set()
            assert let_go.wait(20)

    def stop() -> StillframeError | None:
        if not stop_now.is_set():
            return None
        let_go.set()
        return Interrupted("stopped")

    storage.before = hang
    with pytest.raises(Interrupted):
        book.backup(SourceDisk(noise(400 * CHUNK)), stop=stop)


def test_finishing_can_be_stopped() -> None:
    storage = MemoryStorage()
    book, let_go = Book(storage), threading.Event()

    def hang(verb: str, key: str) -> None:
        if verb == "create" and key.startswith("main/p/"):
            assert let_go.wait(20)

    storage.before = hang

    def stop() -> StillframeError | None:
        let_go.set()
        return Interrupted("stopped")

    with book.writer() as writer:
        writer.write(SourceDisk(noise(4 * CHUNK)))
        with pytest.raises(Interrupted):
            writer.finish(stop)


def test_a_read_that_fails_ends_the_run() -> None:
    book = Book()
    disk = SourceDisk(noise(400 * CHUNK))

    def fail(offset: int) -> None:
        if offset > 100 * CHUNK:
            raise CopyFailed("the cable is out")

    disk.before_read = fail
    with pytest.raises(CopyFailed, match="cable"):
        book.backup(disk)
    assert disk.connected == 0


def test_a_full_storage_ends_the_run() -> None:
    storage = MemoryStorage()
    book = Book(storage)

    def fail(verb: str, key: str) -> None:
        if verb == "create" and key.startswith("main/p/"):
            raise StorageFull("full")

    storage.before = fail
    disk = SourceDisk(noise(4000 * CHUNK))
    with pytest.raises(StorageFull):
        book.backup(disk)
    assert len(disk.reads) < 500


def test_a_fault_while_compressing_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    book = Book()
    done = iter(range(1000))
    real = SlotCodec.chunks_content

    def fail(codec: SlotCodec, ids: Sequence[bytes], body: memoryview) -> bytes:
        if next(done) == 10:
            raise MemoryError
        return real(codec, ids, body)

    monkeypatch.setattr(SlotCodec, "chunks_content", fail)
    with pytest.raises(MemoryError):
        book.backup(SourceDisk(noise(400 * CHUNK)))


def test_a_closed_writer_writes_nothing() -> None:
    book = Book()
    with book.writer() as writer:
        writer.finish()
        with pytest.raises(ValueError, match="closed"):
            writer.write_bytes(b"x")


def test_leaves_wait_for_few_slots_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # One new chunk far before many unchanged leaves: its slot is closed although it is not full.
    monkeypatch.setattr(sys.modules["stillframe.repository.disk_write"], "WAITING_LEAVES", 5)
    book = Book()
    disk = SourceDisk(noise(400 * CHUNK))
    book.backup(disk)
    for chunk in (1, 100, 101, 300):
        disk.content[chunk * CHUNK] ^= 1
    assert book.backup(disk).new_chunks == 4
    book.check()


def test_a_sparse_tebibyte_takes_no_time_and_no_memory() -> None:
    import tracemalloc

    class Sparse(SourceDisk):
        """Data in three places only."""

        def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
            assert offset_bytes in {0, 512 * GIB, TIB - MIB}
            buffer[:] = noise(len(buffer), offset_bytes)

    book = Book(parameters=Parameters(id=new_sid(), created_at=""))
    disk = Sparse(b"")
    disk.size_bytes = TIB
    disk.holes = [(MIB, 512 * GIB - MIB, Kind.HOLE), (512 * GIB + MIB, 512 * GIB - 2 * MIB, Kind.ZERO)]
    tracemalloc.start()
    try:
        with book.writer() as writer:
            written = writer.write(disk)
            writer.finish()
        assert tracemalloc.get_traced_memory()[1] < 160 * MIB
    finally:
        tracemalloc.stop()
    assert (written.read_bytes, written.new_chunks) == (3 * MIB, 48)
    with book.view(content_of(written)) as view:
        pieces = list(view.pieces())
        assert [(piece.offset_bytes, piece.length_bytes) for piece in pieces] == [
            (0, MIB), (512 * GIB, MIB), (TIB - MIB, MIB)]
        assert bytes(pieces[1].content or b"") == noise(MIB, 512 * GIB)


def test_units_cover_what_is_data() -> None:
    chance = random.Random(5)
    for _ in range(200):
        size = chance.randrange(1, 60 * CHUNK)
        holes = [(at, chance.randrange(1, 5 * CHUNK), Kind.HOLE) for at in range(0, size, 7 * CHUNK)]
        disk = SourceDisk(bytes(size), [(at, min(length, size - at), kind) for at, length, kind in holes])
        wanted = {number for extent in disk.extents() if extent.kind is Kind.DATA
                  for number in range(extent.offset_bytes // CHUNK, -(-extent.end_bytes // CHUNK))}
        found = [number for unit in units(data_runs(disk.extents(), size, CHUNK), SMALL.chunks(size), 4)
                 for first, end in unit.runs for number in range(first, end)
                 if unit.first <= number < unit.first + unit.count <= SMALL.chunks(size)]
        assert found == sorted(wanted)
