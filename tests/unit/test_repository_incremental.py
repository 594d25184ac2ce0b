"""Writing by what changed: the same snapshot as by reading all, for the price of the changes."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillframe.clock import SystemClock
from stillframe.errors import Interrupted
from stillframe.extent import Extent, Kind
from stillframe.repository import incremental
from stillframe.repository.beneath import Beneath, look_beneath
from stillframe.repository.changes import Changes
from stillframe.repository.generation import Generation, create_generation, latest_number
from stillframe.repository.heal import record_bad
from stillframe.repository.known import KnownChunks
from stillframe.repository.layout import PackName, Parameters, new_sid
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.pack import SlotRef
from stillframe.repository.places import Places
from stillframe.repository.tree import Tree
from stillframe.repository.writer import Audit, Since, Written
from stillframe.storage.memory import MemoryStorage
from stillframe.units import GIB, KIB, MIB, TIB
from tests.unit.changed_disks import ChangedDisk, scribble
from tests.unit.repository_disks import CHUNK, Book, SourceDisk, content_of, noise, whole

TINY = Parameters(id=new_sid(), created_at="", chunk_bytes=CHUNK, slot_chunks=2, leaf_chunks=4, inner_nodes=4,
                  pack_bytes=8 * CHUNK)
NO_AUDIT = Audit(least_chunks=0)


def since(written: Written) -> Since:
    """Nothing is condemned in these repositories unless a test does it: all may be reused unseen."""
    return Since("", None, written.data_bytes)


def all_audited(seed: int = 0) -> Audit:
    return Audit(share=1.0, least_chunks=400, limit_s=600.0, chance=random.Random(seed))


def data_bytes(content: bytes) -> int:
    chunks = (content[at : at + CHUNK] for at in range(0, len(content), CHUNK))
    return sum(len(chunk) for chunk in chunks if any(chunk))


def changed_bytes(old: bytes, new: bytes) -> int:
    return sum(len(new[at : at + CHUNK]) for at in range(0, len(new), CHUNK)
               if old[at : at + CHUNK] != new[at : at + CHUNK])


def tree_of(book: Book, number: int = -1) -> Tree:
    content = book.kept[number][0]
    return Tree(Places(book.repository), content.size_bytes, content.place)


def nodes_of(tree: Tree) -> list[tuple[int, int, SlotRef]]:
    """(level, index, place) of each node that is stored."""
    found = []
    for level in range(tree.height + 1):
        for index in range(-(-tree.leaf_count // tree.span(level))):
            place = tree.node_at(level, index)
            if place is not None:
                found.append((level, index, place))
    return found


def damage(book: Book, place: SlotRef) -> None:
    storage = book.repository.storage
    content = bytearray(storage.get(place.pack.key))
    content[place.offset_bytes + 3] ^= 1
    storage.replace(place.pack.key, content)


def condemn(book: Book, *packs: PackName) -> None:
    """As if a collector had seen that nobody needs them."""
    number = latest_number(book.repository.storage) + 1
    assert create_generation(book.repository.storage, Generation(number, dict.fromkeys(packs, number)),
                             book.repository.key)


def check_newest(book: Book) -> None:
    content, expected = book.kept[-1]
    with book.view(content) as view:
        assert whole(view) == expected


def entries(tree: Tree) -> Iterator[tuple[int, ChunkRef]]:
    for index, place in tree.places_of_leaves():
        for chunk, entry in enumerate(tree.leaf(place).entries, index * tree.parameters.leaf_chunks):
            if entry is not None:
                yield chunk, entry


# --- which chunks --------------------------------------------------------------------------------


@given(st.integers(1, 40 * CHUNK), st.randoms(use_true_random=False))
def test_changed_chunks_are_read_or_known_to_be_zero(size_bytes: int, chance: random.Random) -> None:
    cuts = sorted({chance.randrange(size_bytes + 1) for _ in range(chance.randrange(12))})
    extents = [Extent(begin, end - begin, chance.choice(list(Kind)))
               for begin, end in itertools.pairwise(cuts) if chance.random() < 0.7]
    if extents and chance.random() < 0.3:  # more than there is
        last = extents[-1]
        extents[-1] = Extent(last.offset_bytes, last.length_bytes + 10 * CHUNK, last.kind)
    changes = Changes.of(extents, size_bytes, TINY)
    touched, zero = set[int](), set[int]()
    for chunk in range(-(-size_bytes // CHUNK)):
        begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, size_bytes)
        within = [each for each in extents if each.offset_bytes < end and each.end_bytes > begin]
        covered = sum(min(each.end_bytes, end) - max(each.offset_bytes, begin) for each in within)
        if within:
            touched.add(chunk)
        if covered == end - begin and all(each.kind.reads_as_zero for each in within):
            zero.add(chunk)
    runs = list(changes.runs())
    assert all(first < end for first, end, _ in runs)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(runs))
    assert {at for first, end, _ in runs for at in range(first, end)} == touched
    assert {at for first, end, is_zero in runs if is_zero for at in range(first, end)} == zero
    assert changes.count == len(touched)
    for chunk in range(-(-size_bytes // CHUNK)):
        assert (chunk in changes) == (chunk in touched)
        end = chance.randrange(chunk, chunk + 9)
        assert changes.covers(chunk, end) == (set(range(chunk, min(end, changes.chunks))) <= touched)

    more = [(first, first + chance.randrange(1, 6))
            for first in (chance.randrange(changes.chunks) for _ in range(chance.randrange(5)))]
    both = changes.and_read(more)
    extra = {at for first, end in more for at in range(first, min(end, changes.chunks))}
    assert {at for first, end, _ in both.runs() for at in range(first, end)} == touched | extra
    assert {at for first, end, is_zero in both.runs() if is_zero for at in range(first, end)} == zero
    _check_units(both, touched | extra, zero)


def _check_units(changes: Changes, touched: set[int], zero: set[int]) -> None:
    for unit_chunks in (1, 2, 4):
        at, done, cleared = 0, set[int](), set[int]()
        for each in changes.units(unit_chunks):
            if isinstance(each, range):
                chunks = set(range(each.start * 4, min(each.stop * 4, changes.chunks)))
                cleared |= chunks
                begin, end = each.start * 4, each.stop * 4
            else:
                cleared_here = {chunk for first, until in each.cleared for chunk in range(first, until)}
                chunks = set(each.read()) | cleared_here
                cleared |= cleared_here
                begin, end = each.first, each.first + each.count
                assert begin % unit_chunks == 0
                assert chunks
                assert chunks <= set(range(begin, end))
                assert each.count <= unit_chunks
            assert begin >= at
            assert not done & chunks
            at, done = end, done | chunks
        assert (done, cleared) == (touched, zero)


def test_changes_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="in order"):
        Changes.of([Extent(10, 10, Kind.DATA), Extent(5, 20, Kind.ZERO)], 100, TINY)


def test_a_tebibyte_of_changes_is_a_few_numbers() -> None:
    changes = Changes.of([Extent(5, TIB - 5, Kind.HOLE)], TIB, Parameters(id=new_sid(), created_at=""))
    assert len(list(changes.runs())) == 2
    assert sum(1 for _ in changes.units(16)) < 300


# --- the same as reading all ---------------------------------------------------------------------


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 70 * CHUNK), st.integers(0, 1 << 30), st.booleans(), st.booleans())
def test_it_is_the_same_as_reading_all(size_bytes: int, seed: int, odd: bool, audits: bool) -> None:
    """A chain of snapshots; all of them read back, with the numbers that reading all would give."""
    chance = random.Random(seed)
    size_bytes = size_bytes if odd else -(-size_bytes // CHUNK) * CHUNK
    book, disk = Book(parameters=TINY), ChangedDisk(noise(size_bytes, seed))
    for _ in range(chance.randrange(4)):
        disk.write(chance.randrange(size_bytes), bytes(chance.randrange(30) * CHUNK))
    written = book.backup(disk)
    disk.settle()
    for _ in range(4):
        for _ in range(chance.randrange(5)):
            scribble(disk, chance, CHUNK)
        disk.reads.clear()
        before, old = bytes(book.kept[-1][1]), written
        written = book.backup(disk, since=since(old), audit=all_audited(seed) if audits else NO_AUDIT)
        assert not written.whole
        assert written.mismatch_offset_bytes is None
        assert written.data_bytes == data_bytes(bytes(disk.content))
        assert written.changed_bytes == changed_bytes(before, bytes(disk.content))
        if not audits:
            assert sum(length for _, length in disk.reads) == written.read_bytes
        if not disk.changes:
            assert (written.read_bytes, written.stored_bytes, written.root) == (0, 0, old.root)
        disk.settle()
    book.check()


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 70 * CHUNK), st.integers(0, 1 << 30), st.booleans())
def test_what_is_damaged_or_bad_is_never_inherited(size_bytes: int, seed: int, audits: bool) -> None:
    chance = random.Random(seed)
    book, disk = Book(parameters=TINY), ChangedDisk(noise(size_bytes, seed))
    written = book.backup(disk)
    disk.settle()
    for _ in range(3):
        for _ in range(chance.randrange(4)):
            scribble(disk, chance, CHUNK)
        _spoil(book, chance)
        written = book.backup(disk, since=since(written), audit=all_audited(seed) if audits else NO_AUDIT)
        disk.settle()
        if written.whole:
            assert written.why_whole
        assert written.mismatch_offset_bytes is None
        # What a damaged node said is not known, so what changed may seem more; what is there does not.
        assert written.data_bytes == data_bytes(bytes(disk.content))
        check_newest(book)


def _spoil(book: Book, chance: random.Random) -> None:
    """Damage nodes, mark slots of data or nodes bad, condemn packs: of the newest snapshot."""
    tree = tree_of(book)
    nodes = nodes_of(tree)
    if not nodes:
        return
    level, _, place = chance.choice(nodes)
    kind = chance.randrange(5)
    storage, now = book.repository.storage, SystemClock().now()
    held = [entry.place for _, entry in entries(tree)]
    if kind == 0:
        record_bad(storage, place.pack, 1 << place.slot, "a test", now)
    elif kind == 1:
        bad = chance.choice(held)
        record_bad(storage, bad.pack, 1 << bad.slot, "a test", now)
        damage(book, bad)
    elif kind == 2:
        condemn(book, chance.choice([chance.choice(held).pack, place.pack]))
    elif kind == 3:
        # Unseen, what is beneath other nodes would stay as it is: that nobody knows of damage is not new.
        for each in {each for each in nodes if chance.random() < 0.3 or each[0] == level}:
            damage(book, each[2])
        record_bad(storage, place.pack, 1 << place.slot, "verified", now)


def test_a_damaged_node_above_a_change_makes_it_look_at_all(tmp_path: Path) -> None:
    for level in range(3):
        book, disk = Book(parameters=TINY, hints=tmp_path / str(level)), ChangedDisk(noise(60 * CHUNK))
        (tmp_path / str(level)).mkdir()
        written = book.backup(disk)
        tree = tree_of(book)
        place = tree.node_at(level, 0)
        assert place is not None
        damage(book, place)
        disk.settle()
        disk.write(2 * CHUNK, noise(100, 9))
        disk.reads.clear()
        written = book.backup(disk, since=since(written), audit=NO_AUDIT)
        # What is beneath the node is read, and no more.
        assert {at // CHUNK for at, _ in disk.reads} <= set(range(4 ** (level + 1)))
        assert not written.whole
        assert written.new_chunks == 1
        assert written.data_bytes == 60 * CHUNK
        check_newest(book)


def test_a_damaged_node_elsewhere_is_found_by_the_audit() -> None:
    """Unseen reuse would hand it on; where the audit comes across it, it is read from the disk."""
    book, disk = Book(parameters=TINY), ChangedDisk(noise(60 * CHUNK))
    written = book.backup(disk)
    place = tree_of(book).node_at(0, 9)
    assert place is not None
    damage(book, place)
    disk.settle()
    disk.write(2 * CHUNK, noise(100, 9))
    written = book.backup(disk, since=since(written), audit=all_audited())
    assert not written.whole
    assert tree_of(book).node_at(0, 9) != place
    check_newest(book)


def test_a_node_that_can_be_read_no_more_is_not_taken_for_zeroes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was readable when all was looked at: then nothing of it is among what is read."""
    book, disk = Book(parameters=TINY), ChangedDisk(noise(60 * CHUNK))
    written = book.backup(disk)
    place = tree_of(book).node_at(0, 0)
    assert place is not None

    def look(*args: Any) -> Beneath:
        found = look_beneath(*args)
        damage(book, place)
        return found

    monkeypatch.setattr(incremental, "look_beneath", look)
    record_bad(book.repository.storage, PackName("p", bytes(16), 0), 1, "a test", SystemClock().now())
    disk.settle()
    disk.write(2 * CHUNK, noise(100, 9))
    written = book.backup(disk, since=since(written), audit=NO_AUDIT)
    assert written.whole
    assert "can't be read" in written.why_whole
    check_newest(book)


def test_bad_slots_are_read_again_and_healed() -> None:
    book, disk = Book(parameters=TINY), ChangedDisk(noise(60 * CHUNK))
    written = book.backup(disk)
    hurt = dict(entries(tree_of(book)))[33]
    record_bad(book.repository.storage, hurt.place.pack, 1 << hurt.place.slot, "a test", SystemClock().now())
    disk.settle()
    disk.reads.clear()
    written = book.backup(disk, since=since(written), audit=NO_AUDIT)
    assert not written.whole
    assert {at // CHUNK for at, _ in disk.reads} <= {32, 33}
    assert hurt.id in book.healed
    assert dict(entries(tree_of(book)))[33].place != hurt.place
    assert (written.changed_bytes, written.data_bytes) == (0, 60 * CHUNK)
    book.check()


def test_a_wrong_word_about_reuse_costs_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first leaf is refused when the batch behind it, all of it new, has become a slot already."""
    book, disk = Book(parameters=TINY), ChangedDisk(noise(60 * CHUNK))
    written = book.backup(disk)
    condemn(book, *{entry.place.pack for _, entry in entries(tree_of(book))})
    monkeypatch.setattr(KnownChunks, "may_reuse_unseen", lambda *_: True)
    disk.settle()
    for leaf in range(2):
        disk.write(leaf * TINY.leaf_chunks * CHUNK, noise(CHUNK, seed=7 + leaf))
    written = book.backup(disk, since=since(written), audit=NO_AUDIT)
    assert not written.whole
    assert written.changed_bytes == 2 * CHUNK
    book.check()


def test_condemned_packs_are_not_referred_to() -> None:
    book, disk = Book(parameters=TINY), ChangedDisk(noise(60 * CHUNK))
    written = book.backup(disk)
    packs = {entry.place.pack for _, entry in entries(tree_of(book))}
    trees = {place.pack for _, _, place in nodes_of(tree_of(book))}
    one = min(packs)
    for condemned in ({one}, trees, packs | trees):
        condemn(book, *condemned)
        disk.settle()
        written = book.backup(disk, since=since(written), audit=NO_AUDIT)
        assert not written.whole
        assert not condemned & {entry.place.pack for _, entry in entries(tree_of(book))}
        assert not condemned & {place.pack for _, _, place in nodes_of(tree_of(book))}
        assert written.changed_bytes == 0
    book.check()


def test_a_snapshot_that_the_generation_vouches_for_is_not_looked_at() -> None:
    book, disk = Book(parameters=TINY), ChangedDisk(noise(60 * CHUNK))
    written = book.backup(disk)
    storage, key = book.repository.storage, book.repository.key
    nobody = PackName("p", bytes(16), 0)
    assert create_generation(storage, Generation(7, {nobody: 7}, marked=["aa" * 16]), key)
    for sid, generation, gets in (("aa" * 16, None, 0), ("bb" * 16, 7, 0), ("bb" * 16, 6, 3), ("", None, 3)):
        disk.settle()
        with counted_gets(book) as count:
            book.backup(disk, since=Since(sid, generation, written.data_bytes), audit=NO_AUDIT)
        assert len([each for each in count if "/t/" in each]) >= gets
        assert bool(gets) == any("/t/" in each for each in count)


@contextlib.contextmanager
def counted_gets(book: Book) -> Iterator[list[str]]:
    seen: list[str] = []
    storage = book.repository.storage
    assert isinstance(storage, MemoryStorage)
    storage.before = lambda verb, key: seen.append(key) if verb == "get" else None
    yield seen
    storage.before = None


# --- reasons to read all -------------------------------------------------------------------------


def test_without_a_parent_or_changes_all_is_read() -> None:
    book, disk = Book(), ChangedDisk(noise(60 * CHUNK))
    with book.writer() as writer:
        assert writer.write(disk, None, since=Since("", 0, 0)).whole
        writer.finish()
    book.backup(disk)
    disk.changes = None
    assert book.backup(disk, since=Since("", 0, 0)).read_bytes == disk.size_bytes
    disk.changes = []
    assert book.backup(disk).read_bytes == disk.size_bytes  # nobody says that they count from the parent


def test_another_size_is_read_whole() -> None:
    book = Book()
    written = book.backup(ChangedDisk(noise(60 * CHUNK)))
    for size in (61 * CHUNK, 60 * CHUNK - 1, 10 * CHUNK):
        disk = ChangedDisk(noise(size, 5))
        written = book.backup(disk, since=since(written))
        assert (written.whole, written.why_whole) == (True, "its size changed")
        check_newest(book)


def test_a_reason_to_stop_ends_it() -> None:
    book, disk = Book(), ChangedDisk(noise(600 * CHUNK))
    written = book.backup(disk)
    disk.write(0, noise(300 * CHUNK, 3))
    with pytest.raises(Interrupted):
        book.backup(disk, since=since(written), stop=lambda: Interrupted("Stopped.", "again"))


# --- the audit -----------------------------------------------------------------------------------


def test_what_nobody_told_of_is_found_and_all_is_read() -> None:
    for seed in range(5):
        book, disk = Book(parameters=TINY), ChangedDisk(noise(60 * CHUNK))
        written = book.backup(disk)
        disk.settle()
        disk.write(5 * CHUNK, noise(100, 8))
        disk.write(41 * CHUNK + 77, b"nobody noted this", said=False)
        written = book.backup(disk, since=since(written), audit=all_audited(seed))
        assert written.whole
        assert written.mismatch_offset_bytes == 41 * CHUNK
        assert str(41 * CHUNK) in written.why_whole
        assert written.changed_bytes == 2 * CHUNK
        assert 0 < written.audited_chunks <= 59
        assert written.read_bytes == disk.size_bytes
        book.check()


def test_what_is_changed_is_not_audited() -> None:
    book, disk = Book(parameters=TINY), ChangedDisk(noise(60 * CHUNK))
    written = book.backup(disk)
    disk.settle()
    disk.write(0, noise(59 * CHUNK, 3))
    disk.reads.clear()
    written = book.backup(disk, since=since(written), audit=all_audited())
    assert written.audited_chunks == 1
    assert (59 * CHUNK, CHUNK) in disk.reads
    assert written.read_bytes == 59 * CHUNK


def test_a_lie_about_half_of_the_disk_is_found_by_a_handful() -> None:
    book, disk = Book(), ChangedDisk(noise(400 * CHUNK))
    written = book.backup(disk)
    disk.write(0, noise(200 * CHUNK, 5), said=False)
    written = book.backup(disk, since=since(written), audit=Audit(chance=random.Random(1)))
    assert written.mismatch_offset_bytes is not None
    assert written.audited_chunks < 100
    book.check()


def test_the_audit_is_drawn_from_all_leaves_and_can_be_drawn_again() -> None:
    book, disk = Book(parameters=TINY), ChangedDisk(noise(60 * CHUNK))
    written = book.backup(disk)
    disk.settle()

    def drawn(seed: int) -> list[int]:
        disk.reads.clear()
        book.backup(disk, since=since(written),
                    audit=Audit(chance=random.Random(seed), limit_s=600.0, least_chunks=8))
        return sorted(at // CHUNK for at, _ in disk.reads)

    assert drawn(1) == drawn(1)
    assert {chunk for seed in range(200) for chunk in drawn(seed)} == set(range(60))


class SlowClock(SystemClock):
    """A second passes at each look."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def monotonic_s(self) -> float:
        self.at_s += 1.0
        return self.at_s


def test_an_audit_ends_in_time_but_looks_at_a_handful() -> None:
    book, disk = Book(), ChangedDisk(noise(900 * CHUNK))
    written = book.backup(disk)
    disk.settle()
    for limit_s, least, most in ((0.0, 16, 60), (20.0, 16, 200), (1e9, 900, 900)):
        audit = Audit(share=1.0, limit_s=limit_s, clock=SlowClock(), chance=random.Random(3))
        found = book.backup(disk, since=since(written), audit=audit)
        assert least * 0.8 <= found.audited_chunks <= most


# --- what it costs -------------------------------------------------------------------------------

BIG = Parameters(id=new_sid(), created_at="", chunk_bytes=64 * KIB)


class BigDisk(SourceDisk):
    """A sparse disk: a few mebibytes of data, here and there, in a tebibyte."""

    def __init__(self, size_bytes: int, parts: dict[int, bytes]) -> None:
        super().__init__(b"")
        self.size_bytes = size_bytes
        self.parts = dict(parts)

    def extents(self, *_: object) -> Iterator[Extent]:
        at = 0
        for offset, content in sorted(self.parts.items()):
            if offset > at:
                yield Extent(at, offset - at, Kind.HOLE)
            yield Extent(offset, len(content), Kind.DATA)
            at = offset + len(content)
        if at < self.size_bytes:
            yield Extent(at, self.size_bytes - at, Kind.HOLE)

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        self.reads.append((offset_bytes, len(buffer)))
        for offset, content in self.parts.items():
            begin, end = max(offset, offset_bytes), min(offset + len(content), offset_bytes + len(buffer))
            if begin < end:
                buffer[begin - offset_bytes : end - offset_bytes] = content[begin - offset : end - offset]


def test_it_costs_what_changed_however_large_the_disk_is() -> None:
    book = Book(parameters=BIG)
    disk = BigDisk(TIB, {number * 4 * GIB: noise(64 * KIB, number) for number in range(256)})
    written = book.backup(disk)
    assert len(list(leaves_of(book))) == 256
    disk.parts[8 * GIB] = noise(64 * KIB, 1000)
    disk.parts[8 * GIB + 64 * MIB] = noise(64 * KIB, 1001)
    disk.changes = [Extent(8 * GIB, 64 * KIB, Kind.DATA), Extent(8 * GIB + 64 * MIB, 64 * KIB, Kind.DATA)]
    disk.reads.clear()
    with counted_gets(book) as seen:
        written = book.backup(disk, since=since(written), audit=NO_AUDIT)
    # One path to the leaf that is there, which is also that to the one that was not; two threads may read it.
    assert len([each for each in seen if "/t/" in each]) <= 2 * (tree_of(book).height + 1)
    assert not [each for each in seen if "/p/" in each]
    assert sum(length for _, length in disk.reads) == 128 * KIB == written.read_bytes
    assert (written.new_chunks, written.changed_bytes) == (2, 128 * KIB)
    assert written.data_bytes == 257 * 64 * KIB
    with book.view(content_of(written)) as view:
        for offset, content in disk.parts.items():
            buffer = bytearray(len(content))
            view.read_into(memoryview(buffer), offset)
            assert buffer == content


def leaves_of(book: Book) -> Iterator[int]:
    return (index for index, _ in tree_of(book).places_of_leaves())


def test_clearing_costs_what_was_there() -> None:
    book = Book(parameters=BIG)
    disk = BigDisk(TIB, {number * 4 * GIB: noise(64 * KIB, number) for number in range(256)})
    written = book.backup(disk)
    disk.parts = {0: disk.parts[0]}
    disk.changes = [Extent(GIB, TIB - GIB, Kind.HOLE)]
    disk.reads.clear()
    written = book.backup(disk, since=since(written), audit=NO_AUDIT)
    assert disk.reads == []
    assert (written.data_bytes, written.changed_bytes) == (64 * KIB, 255 * 64 * KIB)
    assert list(leaves_of(book)) == [0]


def test_an_audit_costs_what_it_looks_at() -> None:
    book = Book(parameters=BIG)
    disk = BigDisk(TIB, {number * 4 * GIB: noise(64 * KIB, number) for number in range(256)})
    written = book.backup(disk)
    disk.changes = []
    disk.reads.clear()
    with counted_gets(book) as seen:
        written = book.backup(disk, since=since(written),
                              audit=Audit(chance=random.Random(1), least_chunks=8, limit_s=600.0))
    assert len(disk.reads) <= 8 + 6  # some are under way when there are enough
    assert len([each for each in seen if "/t/" in each]) <= (8 + 6) * 4
    assert written.audited_chunks >= 8
    assert written.read_bytes == 0


def test_runs_of_changes_are_read_in_large_pieces() -> None:
    book = Book(parameters=BIG)
    disk = ChangedDisk(noise(24 * MIB))
    written = book.backup(disk)
    disk.settle()
    disk.write(2 * MIB, noise(16 * MIB, 7))
    disk.reads.clear()
    written = book.backup(disk, since=since(written), audit=NO_AUDIT)
    assert {length for _, length in disk.reads} == {MIB}
    assert written.read_bytes == 16 * MIB
    book.check()
