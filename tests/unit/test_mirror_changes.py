"""Updates that read only what is said to have changed: right to the last byte, and never fooled for long."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest

from stillframe.block.anchor import Anchor
from stillframe.extent import Extent, Kind, merged
from stillframe.mirror.audit import Ranges
from stillframe.mirror.layout import read_record
from stillframe.mirror.record import CaptureFacts
from stillframe.mirror.stage import CopyResult
from stillframe.mirror.units import Unit, changed_units
from tests.unit.mirror_model import (
    BLOCK,
    GRAIN,
    Crashed,
    MemoryDisk,
    ModelFiles,
    begin,
    clone,
    held,
)


class CountingDisk(MemoryDisk):
    """A disk that says what differs from *old*, and more than that, as *chance* has it; but not *hidden*."""

    def __init__(
        self, content: bytes, old: bytes, chance: random.Random, hidden: tuple[int, ...] = ()
    ) -> None:
        super().__init__(content, chance)
        self._old = old
        self._hidden = hidden
        self._more = chance.random() < 0.5
        self.read_bytes = 0

    def changed(self) -> Iterator[Extent] | None:
        return merged(self._changed())

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        self.read_bytes += len(buffer)
        super().pread_into(buffer, offset_bytes)

    def _changed(self) -> Iterator[Extent]:
        chance = random.Random(self._seed)
        for extent in self._pieces():
            start, end = extent.offset_bytes, extent.end_bytes
            differs = self.content[start:end] != self._old[start:end]
            if start not in self._hidden and (differs or (self._more and chance.random() < 0.05)):
                yield extent


def write(content: bytes, chance: random.Random) -> bytes:
    new = bytearray(content)
    for _ in range(chance.randrange(4)):
        start = chance.randrange(len(new))
        end = min(start + chance.randrange(1, 3 * BLOCK), len(new))
        new[start:end] = bytes(end - start) if chance.random() < 0.4 else chance.randbytes(end - start)
    return bytes(new)


def update(
    files: ModelFiles, moments: dict[str, bytes], label: str, chance: random.Random,
    hidden: tuple[int, ...] = (), *, verify: bool = False, full_read_every_s: float = 1e9, note: str = "",
) -> CopyResult:
    """Mirror the disk as of moment *label*, counting from the moment that the mirror's anchor names."""
    new = begin(files)
    content = moments[label]
    disk = MemoryDisk(content, chance)
    if new.anchor is not None and not note:
        disk = CountingDisk(content, moments[new.anchor.capture], chance, hidden)
    result = new.copy_disk("vda", disk, source="memory", verify_destination=verify, note=note,
                           fell_back=bool(note), full_read_every_s=full_read_every_s)
    anchor = Anchor(capture=label, sizes={"vda": len(content)})
    new.publish(CaptureFacts(label, "crash", "<domain/>", anchor))
    new.finish()
    return result


@pytest.mark.parametrize("sizes", [None, {"vdb": 64 * BLOCK}])
def test_changes_count_for_nothing_without_an_anchor_of_that_disk(sizes: dict[str, int] | None) -> None:
    """A reader that tells them all the same counts from nobody knows when."""
    chance = random.Random(5)
    old, new = bytes(64 * BLOCK), chance.randbytes(2 * BLOCK) + bytes(62 * BLOCK)
    files = ModelFiles()
    for content, told_from in ((old, old), (new, new)):  # that nothing has changed
        run = begin(files)
        result = run.copy_disk("vda", CountingDisk(content, told_from, chance), source="memory")
        anchor = None if sizes is None else Anchor(capture="0", sizes=sizes)
        run.publish(CaptureFacts("0", "crash", "<domain/>", anchor))
        run.finish()
        assert held(files) == {"vda": content}
        assert result.unchanged_bytes == 0


@pytest.mark.parametrize("seed", range(60))
def test_each_update_equals_the_disk(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([64 * BLOCK, 64 * BLOCK + 11, 5 * BLOCK])
    moments = {"0": write(bytes(size), chance)}
    files = ModelFiles()
    update(files, moments, "0", chance)
    for number in range(1, 8):
        moments[str(number)] = write(moments[str(number - 1)], chance)
        result = update(files, moments, str(number), chance)
        assert held(files)["vda"] == moments[str(number)]
        assert result.fell_back == ""
        assert result.note == ""
        assert result.data_bytes + result.zero_bytes + result.unchanged_bytes == size
        assert result.destination_read_bytes == 0
    last = update(files, moments, "7", chance, verify=True)  # the map is right, too
    assert (last.changed_bytes, last.healed_blocks, last.unchanged_bytes) == (0, 0, 0)


def test_only_what_changed_is_read() -> None:
    chance = random.Random(1)
    old = chance.randbytes(4096 * BLOCK)
    new = bytearray(old)
    new[100 * BLOCK : 101 * BLOCK] = bytes(BLOCK)
    new[200 * BLOCK + 3] ^= 1
    moments = {"0": old, "1": bytes(new)}
    files = ModelFiles()
    update(files, moments, "0", chance)
    chance = random.Random(2)
    result = update(files, moments, "1", chance)
    assert held(files)["vda"] == bytes(new)
    assert result.changed_bytes == 2 * BLOCK
    assert result.data_bytes < 1000 * BLOCK, "what is said beyond that, and no more"
    assert result.unchanged_bytes > 3000 * BLOCK
    assert 8 <= result.audited_blocks < 100


def test_the_map_forgets_what_was_in_a_block_that_became_zero() -> None:
    """Else the same content, coming back, would be taken for what the mirror has."""
    block = b"a" * BLOCK
    moments = {"0": block * 4, "1": bytes(BLOCK) + block * 3, "2": block * 4}
    for seed in range(20):
        chance, files = random.Random(seed), ModelFiles()
        for label, content in moments.items():
            update(files, moments, label, chance)
            assert held(files)["vda"] == content, (seed, label)


@pytest.mark.parametrize("zero", [False, True])
def test_a_change_that_is_not_said_is_found_and_the_disk_read_whole(zero: bool) -> None:
    """So few blocks that all of them are in the sample."""
    chance = random.Random(3)
    old = chance.randbytes(8 * BLOCK)
    new = bytearray(old)
    for block in (2, 5):
        new[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK) if zero else chance.randbytes(BLOCK)
    new[7 * BLOCK] ^= 1
    moments = {"0": old, "1": bytes(new)}
    files = ModelFiles()
    update(files, moments, "0", chance)
    hidden = tuple(at for block in (2, 5) for at in range(block * BLOCK, (block + 1) * BLOCK, GRAIN))
    result = update(files, moments, "1", chance, hidden)
    assert held(files)["vda"] == bytes(new)
    assert result.audit_differs_at_bytes == 2 * BLOCK, "the first of them all, whichever was looked at first"
    assert str(2 * BLOCK) in result.fell_back
    assert result.unchanged_bytes == 0
    assert update(files, moments, "1", chance).fell_back == ""


def test_what_is_zero_and_was_not_said_to_be_is_found_without_chance() -> None:
    chance = random.Random(4)
    old = chance.randbytes(3000 * BLOCK)
    new = bytearray(old)
    new[1234 * BLOCK : 1235 * BLOCK] = bytes(BLOCK)
    moments = {"0": old, "1": bytes(new)}
    files = ModelFiles()
    update(files, moments, "0", chance)

    new_update = begin(files)
    disk = CountingDisk(bytes(new), old, chance, tuple(range(1234 * BLOCK, 1235 * BLOCK, GRAIN)))
    disk._pieces = lambda: (  # type: ignore[method-assign]  # it says what is zero
        Extent(at, GRAIN, Kind.DATA if any(new[at : at + GRAIN]) else Kind.HOLE)
        for at in range(0, len(new), GRAIN))
    result = new_update.copy_disk("vda", disk, source="memory", full_read_every_s=1e9)
    assert result.audit_differs_at_bytes == 1234 * BLOCK
    new_update.publish(CaptureFacts("1", "crash", "<domain/>"))
    new_update.finish()
    assert held(files)["vda"] == bytes(new)


def test_no_changes_are_believed_for_ever() -> None:
    chance = random.Random(5)
    moments = {str(number): write(bytes(64 * BLOCK), chance) for number in range(4)}
    files = ModelFiles()
    update(files, moments, "0", chance)
    partly = update(files, moments, "1", chance)
    assert partly.unchanged_bytes > 0
    whole = update(files, moments, "2", chance, full_read_every_s=-1.0)
    assert whole.unchanged_bytes == 0
    assert "last read whole" in whole.note
    assert whole.fell_back == "", "it is no fault"
    record = read_record(files, "mirror.json")
    assert record is not None
    assert record.disks[0].read_whole_at
    assert held(files)["vda"] == moments["2"]


def test_a_disk_that_was_to_be_counted_and_was_not_fell_back() -> None:
    chance = random.Random(6)
    moments = {str(number): write(bytes(64 * BLOCK), chance) for number in range(2)}
    files = ModelFiles()
    update(files, moments, "0", chance)
    result = update(files, moments, "1", chance, note="the bitmap is gone")
    assert result.fell_back == result.note == "the bitmap is gone"
    assert held(files)["vda"] == moments["1"]


def test_where_the_map_is_not_believed_nothing_is_counted() -> None:
    chance = random.Random(7)
    moments = {str(number): write(bytes(64 * BLOCK), chance) for number in range(2)}
    files = ModelFiles()
    update(files, moments, "0", chance)
    image = bytearray(files.text("vda.img") or b"")
    image[3] ^= 1
    files.put("vda.img", bytes(image))
    result = update(files, moments, "1", chance)
    assert result.unchanged_bytes == 0
    assert "changed by something else" in result.fell_back
    assert held(files)["vda"] == moments["1"]


def test_the_anchor_advances_with_the_mirror_and_not_before() -> None:
    """Wherever the run dies: what the mirror's anchor names is what its image holds."""
    chance = random.Random(8)
    moments = {"0": write(bytes(16 * BLOCK), chance)}
    for number in range(1, 3):
        moments[str(number)] = write(write(moments[str(number - 1)], chance), chance)
    files = ModelFiles()
    update(files, moments, "0", chance)
    whole = clone(files)
    update(whole, moments, "1", random.Random(9))
    for crash_at in range(1, whole.writes + 1):
        for power_cut in (None, random.Random(crash_at)):
            crashing = clone(files)
            crashing.crash_at = crash_at
            with contextlib.suppress(Crashed):
                update(crashing, moments, "1", random.Random(9))
            after = crashing.after_crash(power_cut)
            result = update(after, moments, "2", random.Random(10))
            assert held(after)["vda"] == moments["2"], (crash_at, power_cut)
            assert result.audit_differs_at_bytes is None


@pytest.mark.parametrize("seed", range(200))
def test_changed_units_are_the_blocks_that_are_touched(seed: int) -> None:
    chance = random.Random(seed)
    size, block = chance.randrange(1, 2000), 32
    extents, at = [], 0
    while at < size:
        length = min(chance.randrange(1, 90), size - at)
        if chance.random() < 0.5:
            extents.append(Extent(at, length, chance.choice(list(Kind))))
        at += length
    units = list(changed_units(iter(extents), size, block, 4 * block))
    covered: dict[int, bool] = {}
    for unit in units:
        assert unit.offset_bytes % block == 0
        assert unit.is_zero or unit.length_bytes <= 4 * block
        for offset in range(unit.offset_bytes, unit.offset_bytes + unit.length_bytes, block):
            assert offset not in covered
            covered[offset] = unit.is_zero
    for offset in range(0, size, block):
        end = min(offset + block, size)
        touching = [each for each in extents if each.offset_bytes < end and each.end_bytes > offset]
        assert (offset in covered) is bool(touching)
        zero = sum(min(each.end_bytes, end) - max(each.offset_bytes, offset)
                   for each in touching if each.kind.reads_as_zero)
        assert not covered.get(offset, False) or zero == end - offset
        if len(touching) == 1 and zero == end - offset:  # a block of two zero extents may be read
            assert covered[offset]


@pytest.mark.parametrize("seed", range(50))
def test_ranges_say_what_is_in_and_what_is_not(seed: int) -> None:
    chance = random.Random(seed)
    inside = [chance.random() < 0.3 for _ in range(60)]
    ranges = Ranges(Unit(at * 10, 10, is_zero=False) for at, is_in in enumerate(inside) if is_in)
    assert [ranges.holds(at * 10 + 5) for at in range(60)] == inside
    start, end = sorted(chance.sample(range(61), 2))
    outside = {at for a, b in ranges.outside(start * 10, end * 10) for at in range(a // 10, b // 10)}
    assert outside == {at for at in range(start, end) if not inside[at]}
