"""Any byte of any file may be wrong: the next run still ends equal to the source, and says so."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.errors import ApplyFailed, DestinationForeign
from stillframe.mirror.folder import MirrorFolder
from stillframe.mirror.layout import APPLYING, NEXT
from stillframe.mirror.place import LocalPlace
from stillframe.mirror.record import CaptureFacts, FolderState
from tests.unit.mirror_model import (
    BLOCK,
    Crashed,
    Disks,
    ModelClock,
    ModelFiles,
    begin,
    clone,
    folder_of,
    held,
    run,
    stage,
)

OLD: Disks = {"vda": b"a" * BLOCK * 6 + bytes(BLOCK * 6), "vdb": b"c" * 50}
NEW: Disks = {"vda": b"a" * BLOCK * 3 + b"b" * BLOCK * 2 + bytes(BLOCK) + b"d" * BLOCK * 6, "vdb": b"e" * 70}
quick = settings(deadline=None, max_examples=60)


def _mirror() -> ModelFiles:
    files = ModelFiles()
    run(files, OLD, "old", random.Random(0))
    return files


def _flip(files: ModelFiles, name: str, place: float, bit: int) -> None:
    """Change one bit of a file as a failing disk does: without a new time of change."""
    content = files.current[name].content
    content[int(place * len(content))] ^= 1 << bit
    files.current[name].settle()


flips = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7))


@quick
@given(flips, st.sampled_from(["vda.map", "vdb.map", "mirror.json"]))
def test_a_damaged_map_or_record_makes_a_full_compare(flip: tuple[float, int], name: str) -> None:
    files = _mirror()
    _flip(files, name, *flip)
    found = folder_of(files).inspect()
    assert found.state is (FolderState.UNREADABLE if name == "mirror.json" else FolderState.WHOLE)
    results = run(files, NEW, "new", random.Random(1))
    assert held(files) == NEW
    damaged = ["vda", "vdb"] if name == "mirror.json" else [name.removesuffix(".map")]
    assert [target for target, result in results.items() if result.fell_back] == damaged
    assert folder_of(files).inspect().state is FolderState.WHOLE


@pytest.mark.parametrize("name", ["vda.map", "mirror.json", "vda.img"])
def test_a_missing_file_is_noticed(name: str) -> None:
    files = _mirror()
    files.unlink(name)
    results = run(files, NEW, "new", random.Random(1))
    assert held(files) == NEW
    assert results["vda"].fell_back


def test_an_image_that_somebody_else_wrote_to_is_compared_in_full() -> None:
    files = _mirror()
    files.put("vda.img", b"z" * BLOCK * 12)
    results = run(files, OLD, "new", random.Random(1))
    assert held(files) == OLD
    assert "changed by something else" in results["vda"].fell_back
    assert results["vdb"].fell_back == ""


@quick
@given(flips)
def test_verifying_heals_an_image_that_rotted_unseen(flip: tuple[float, int]) -> None:
    files = _mirror()
    _flip(files, "vda.img", *flip)
    results = run(files, OLD, "new", random.Random(1), verify=True)
    assert held(files) == OLD
    assert results["vda"].healed_blocks == 1
    assert results["vda"].destination_read_bytes > 0


@quick
@given(flips, st.sampled_from(["vda.redo", "vdb.redo", NEXT]))
def test_a_damaged_redo_is_dropped_before_the_images_change(flip: tuple[float, int], name: str) -> None:
    files = _mirror()
    update = begin(files)
    stage(update, NEW, random.Random(1))
    update.publish(CaptureFacts("new", "crash", "<domain/>"))
    _flip(files, name, *flip)
    assert folder_of(files).recover().dropped
    assert held(files) == OLD
    assert folder_of(files).inspect().state is FolderState.WHOLE
    results = run(files, NEW, "next", random.Random(2))
    assert held(files) == NEW
    assert all(result.fell_back == "" for result in results.values())


@quick
@given(flips, st.sampled_from(["vda.redo", "vdb.redo", APPLYING]), st.integers(1, 6),
       st.none() | st.integers(0, 2**32))
def test_a_redo_damaged_in_mid_apply_is_told_loudly(
    flip: tuple[float, int], name: str, steps: int, power_cut: int | None
) -> None:
    files = _mirror()
    update = begin(files)
    stage(update, NEW, random.Random(1))
    update.publish(CaptureFacts("new", "crash", "<domain/>"))
    # The rename to the second marker and its fsync are the first two calls.
    files.crash_at = files.writes + 2 + steps
    with pytest.raises(Crashed):
        update.finish()
    left = files.after_crash(None if power_cut is None else random.Random(power_cut))
    assert APPLYING in left.current
    _flip(left, name, *flip)
    recovered = folder_of(left).recover()
    assert recovered.damaged
    assert "DAMAGED" in recovered.words
    assert folder_of(left).inspect().state is FolderState.DAMAGED
    results = run(left, NEW, "next", random.Random(2))
    assert held(left) == NEW
    assert all(result.fell_back for result in results.values())
    assert folder_of(left).inspect().state is FolderState.WHOLE


def test_an_image_changed_between_publishing_and_applying_loses_its_map() -> None:
    files = _mirror()
    update = begin(files)
    stage(update, NEW, random.Random(1))
    update.publish(CaptureFacts("new", "crash", "<domain/>"))
    files.put("vda.img", b"z" * BLOCK * 12)
    update.finish()
    results = run(files, NEW, "next", random.Random(2))
    assert held(files) == NEW
    assert results["vda"].fell_back
    assert results["vdb"].fell_back == ""


def test_an_image_lost_before_applying_drops_the_update() -> None:
    files = _mirror()
    update = begin(files)
    stage(update, NEW, random.Random(1))
    update.publish(CaptureFacts("new", "crash", "<domain/>"))
    files.unlink("vda.img")
    with pytest.raises(ApplyFailed, match=r"vda\.img is missing"):
        update.finish()
    assert folder_of(files).recover().dropped
    run(files, NEW, "next", random.Random(2))
    assert held(files) == NEW


def test_a_disk_that_left_the_guest_keeps_its_image_under_another_name() -> None:
    files = _mirror()
    run(files, {"vda": OLD["vda"]}, "new", random.Random(1))
    assert held(files) == {"vda": OLD["vda"]}
    kept = [name for name in files.current if name.startswith("vdb.img.removed-")]
    assert [files.text(name) for name in kept] == [OLD["vdb"]]
    assert "vdb.map" not in files.current
    run(files, NEW, "back", random.Random(1))
    assert held(files) == NEW


def test_a_mirror_of_another_guest_is_refused() -> None:
    files = _mirror()
    with pytest.raises(DestinationForeign, match="uuid-1"):
        folder_of(files).begin("guest", "uuid-2")


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        (["notes.txt"], "notes.txt"),
        (["vda.img"], "vda.img"),
        (["vda.img.new"], "vda.img.new"),
        (["domain.xml"], "domain.xml"),
        (["lost+found"], ""),
        ([".stillframe.lock"], ""),
        ([".stillframe.lock", "vda.img.new", "vda.redo"], ""),
        ([".stillframe.lock", "vda.img"], "vda.img"),
        (["mirror.json", "notes.txt"], ""),
    ],
)
def test_what_counts_as_foreign(names: list[str], foreign: str) -> None:
    files = ModelFiles()
    for name in names:
        files.put(name, b"text")
    found = MirrorFolder(LocalPlace(Path("/model/guest"), files), clock=ModelClock()).inspect()
    assert (found.state is FolderState.FOREIGN) == bool(foreign)
    assert found.detail.startswith(foreign)


def test_inspecting_changes_nothing() -> None:
    files = _mirror()
    again = clone(files)
    folder_of(again).inspect()
    assert again.writes == 0
