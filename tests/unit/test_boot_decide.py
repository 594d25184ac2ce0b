"""What is done next for a booted guest: every combination of what can be seen, against what may never be."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from stillframe.hypervisor.model import Power
from stillframe.repository.manifest import Content
from stillframe.restore import boot_decide, boot_record
from stillframe.restore.boot_decide import BootSight, BootStep, DiskSight, Image, Stand, decide_boot
from stillframe.restore.boot_record import BEFORE_BOOT, TRANSITIONS, BootDisk, BootRecord, BootState, Copy

_PAGE = Path(__file__).parents[2] / "docs" / "BOOT.md"
_REMOVING = (BootStep.DESTROY, BootStep.UNDEFINE, BootStep.REMOVE)


def disk(target: str = "vda", *, landed: bool = False, copied: bool = False) -> BootDisk:
    copy = Copy(path=f"/other/b1-{target}.img", format="raw") if copied else None
    return BootDisk(target=target, overlay_path=f"/pool/b1-{target}.qcow2", socket=f"/run/x/u/{target}",
                    content=Content(size_bytes=1024, root=None), data_bytes=0, copy=copy, landed=landed)


def record(state: BootState, *, landed: bool = False, copied: bool = False) -> BootRecord:
    return BootRecord(
        uuid="u", name="b1", uri="qemu:///system", address="/repo", snapshot="web@now", sid="s", origin="o",
        state=state, began_at="2026-01-01T00:00:00Z", pauses=True,
        disks=(disk(landed=landed, copied=copied),))


def sight(
    power: Power = Power.RUNNING, image: Image = Image.WRITTEN, running: Stand = Stand.SNAPSHOT,
    defined: Stand = Stand.SNAPSHOT, *, busy: bool = False, served: bool = True, names: bool = True,
    left: bool = True, behind: bool = False,
) -> BootSight:
    return BootSight(power, (DiskSight("vda", image, running, defined, busy, served, names, behind),), left)


def everything() -> Iterator[tuple[BootRecord, BootSight, DiskSight]]:
    """Yield all records with all that can be seen of one disk."""
    flags = (False, True)
    records = [record(state, landed=landed, copied=copied)
               for state in BootState for landed in flags for copied in flags]
    for power, image, defined in itertools.product(Power, Image, Stand):
        for running in Stand if power.has_qemu else (Stand.NONE,):
            for busy, served, names, left, behind in itertools.product(flags, repeat=5):
                seen = sight(power, image, running, defined, busy=busy, served=served, names=names,
                             left=left, behind=behind)
                for each in records:
                    # What can't be seen: a copy where none is wanted, an overlay left behind without one.
                    only = each.disks[0]
                    if (only.copy or Stand.COPY not in (running, defined)) and (
                            only.is_left_behind or not behind):
                        yield each, seen, seen.disks[0]


def test_no_combination_leads_to_a_step_that_loses_something() -> None:
    count = 0
    for known, seen, one in everything():
        step, state = decide_boot(known, seen).step, known.state
        count += 1
        where = f"{state} {seen} -> {step}"
        somebody_removed_all = seen.power is Power.GONE and one.image in (Image.ABSENT, Image.OTHER)
        asked = state in (BootState.DISCARDING, BootState.UNDOING)
        if step in _REMOVING and not asked:
            assert somebody_removed_all, where
            assert step is not BootStep.DESTROY, where
        if step is BootStep.UNDO or (step in _REMOVING and state is BootState.UNDOING):
            assert not seen.power.has_qemu, where
            assert one.image is not Image.WRITTEN, where
        if step is BootStep.CLOSE:
            assert known.disks[0].landed, where
            assert one.running is not Stand.SNAPSHOT, where
            assert one.defined is not Stand.SNAPSHOT, where
        if step is BootStep.END_SERVERS:
            assert state is BootState.LANDED or not seen.power.has_qemu, where
        if step is BootStep.FLUSH:
            assert one.image not in (Image.ABSENT, Image.OTHER), where
            assert one.running is Stand.WHOLE, where
            assert not one.busy, where
        if step is BootStep.REDEFINE:
            assert known.disks[0].landed, where
        if step is BootStep.FORGET:
            assert not one.served, where
        if step is BootStep.STAND:
            assert not seen.power.has_qemu, where
            assert not known.disks[0].landed, where
        if seen.power is Power.HIDDEN:
            assert step is BootStep.ASK, where
    assert count > 50_000


def test_no_combination_takes_an_older_image_for_the_newer_one() -> None:
    old = Stand.SNAPSHOT, Stand.WHOLE
    for known, seen, one in everything():
        step, state = decide_boot(known, seen).step, known.state
        where = f"{state} {seen} -> {step}"
        if step is BootStep.MOVE:
            # The definition alone is believed only while there is no QEMU that could say otherwise.
            assert Stand.COPY is (one.running if seen.power.has_qemu else one.defined), where
        if step is BootStep.RELEASE:
            assert state is BootState.SWITCHING, where
            assert not (seen.power.has_qemu and one.busy), where
            assert one.running is not Stand.COPY or known.disks[0].landed, where
        if step is BootStep.CLEAR:
            assert state is BootState.LANDED, where
            assert one.running not in old, where
            assert one.defined not in old, where


@pytest.mark.parametrize(("state", "seen", "step"), [
    (BootState.MAKING, sight(Power.GONE, Image.FRESH, Stand.NONE, Stand.NONE, served=False), BootStep.UNDO),
    (BootState.STARTING, sight(Power.OFF, Image.FRESH, Stand.NONE), BootStep.UNDO),
    (BootState.STARTING, sight(Power.OFF, Image.WRITTEN, Stand.NONE), BootStep.ADOPT),
    (BootState.STARTING, sight(), BootStep.ADOPT),
    (BootState.UNDOING, sight(Power.OFF, Image.FRESH, Stand.NONE), BootStep.UNDEFINE),
    (BootState.UNDOING, sight(Power.GONE, Image.FRESH, Stand.NONE, Stand.NONE), BootStep.END_SERVERS),
    (BootState.UNDOING, sight(Power.GONE, Image.FRESH, Stand.NONE, Stand.NONE, served=False),
     BootStep.REMOVE),
    (BootState.UNDOING, sight(Power.GONE, Image.ABSENT, Stand.NONE, Stand.NONE, served=False, left=False),
     BootStep.FORGET),
    (BootState.BOOTED, sight(), BootStep.NOTHING),
    (BootState.BOOTED, sight(served=False), BootStep.SERVE),
    (BootState.BOOTED, sight(Power.PAUSED_ON_IO_ERROR), BootStep.RESUME),
    (BootState.BOOTED, sight(Power.PAUSED), BootStep.NOTHING),
    (BootState.BOOTED, sight(Power.OFF, Image.WRITTEN, Stand.NONE, served=False), BootStep.SERVE),
    (BootState.BOOTED, sight(Power.OFF, Image.OTHER, Stand.NONE), BootStep.ASK),
    (BootState.BOOTED, sight(Power.GONE, Image.WRITTEN, Stand.NONE, Stand.NONE), BootStep.ASK),
    (BootState.BOOTED, sight(running=Stand.OTHER), BootStep.ASK),
    (BootState.BOOTED, sight(image=Image.ABSENT), BootStep.ASK),
    (BootState.BOOTED, sight(image=Image.OTHER, served=False), BootStep.ASK),
    (BootState.LANDING, sight(image=Image.ABSENT, running=Stand.WHOLE), BootStep.ASK),
    (BootState.SWITCHING, sight(Power.PAUSED, image=Image.ABSENT), BootStep.RELEASE),
    (BootState.LANDING, sight(busy=True), BootStep.NOTHING),
    (BootState.LANDING, sight(running=Stand.WHOLE), BootStep.FLUSH),
    (BootState.LANDING, sight(Power.OFF, Image.WRITTEN, Stand.NONE, names=False), BootStep.STAND),
    (BootState.LANDING, sight(Power.OFF, Image.WRITTEN, Stand.NONE, Stand.WHOLE), BootStep.KEEP),
    (BootState.LANDED, sight(running=Stand.WHOLE, defined=Stand.WHOLE), BootStep.END_SERVERS),
    (BootState.DISCARDING, sight(), BootStep.DESTROY),
])
def test_the_step_for_what_is_seen(state: BootState, seen: BootSight, step: BootStep) -> None:
    assert decide_boot(record(state), seen).step is step


@pytest.mark.parametrize(("state", "landed", "seen", "step"), [
    (BootState.LANDING, False, sight(busy=True), BootStep.NOTHING),
    (BootState.SWITCHING, False, sight(Power.PAUSED, busy=True), BootStep.END_COPY),
    (BootState.SWITCHING, False, sight(Power.PAUSED), BootStep.RELEASE),
    (BootState.SWITCHING, False, sight(Power.PAUSED, running=Stand.COPY), BootStep.MOVE),
    (BootState.SWITCHING, False, sight(Power.PAUSED, running=Stand.COPY, busy=True), BootStep.MOVE),
    (BootState.SWITCHING, True, sight(Power.PAUSED, running=Stand.COPY, defined=Stand.COPY),
     BootStep.RELEASE),
    (BootState.SWITCHING, False, sight(Power.OFF, running=Stand.NONE), BootStep.RELEASE),
    (BootState.SWITCHING, False, sight(Power.OFF, running=Stand.NONE, defined=Stand.COPY), BootStep.MOVE),
    (BootState.LANDING, False, sight(running=Stand.COPY), BootStep.MOVE),
    (BootState.LANDING, True, sight(running=Stand.COPY, defined=Stand.COPY), BootStep.CLOSE),
    (BootState.LANDING, True, sight(Power.OFF, running=Stand.NONE, defined=Stand.COPY), BootStep.CLOSE),
    (BootState.LANDING, True, sight(running=Stand.COPY, defined=Stand.SNAPSHOT), BootStep.ASK),
    (BootState.LANDED, True, sight(running=Stand.COPY, defined=Stand.COPY, served=False, behind=True),
     BootStep.CLEAR),
    (BootState.LANDED, True, sight(running=Stand.COPY, defined=Stand.COPY, served=False), BootStep.FORGET),
    (BootState.LANDED, True, sight(running=Stand.WHOLE, served=False, behind=True), BootStep.ASK),
])
def test_the_step_for_a_disk_that_is_copied(
    state: BootState, landed: bool, seen: BootSight, step: BootStep,
) -> None:
    assert decide_boot(record(state, landed=landed, copied=True), seen).step is step


def test_a_disk_that_landed_is_defined_so_before_anything_else_can_stop_it() -> None:
    landed = record(BootState.LANDING, landed=True)
    assert decide_boot(landed, sight(running=Stand.WHOLE)).step is BootStep.REDEFINE
    assert decide_boot(landed, sight(running=Stand.WHOLE, defined=Stand.WHOLE)).step is BootStep.CLOSE
    # Started meanwhile on what it no longer needs: QEMU has the server open.
    assert decide_boot(landed, sight(served=False, defined=Stand.WHOLE)).step is BootStep.SERVE


def test_every_state_is_reached_and_has_an_end() -> None:
    reached = {BootState.PLANNED}
    while further := {each for state in reached for each in TRANSITIONS[state]} - reached:
        reached |= further
    assert reached | {BootState.DISCARDING} == set(BootState) == set(TRANSITIONS)
    assert set(BootState) > BEFORE_BOOT


def comments(module: object, name: str) -> dict[str, str]:
    body = Path(str(module.__file__)).read_text().split(f"class {name}(enum.Enum):")[1].split("\nclass ")[0]  # type: ignore[attr-defined]
    return dict(re.findall(r'^    [A-Z_]+ = "([a-z-]+)"  # (.+)$', body, re.MULTILINE))


def rows(heading: str) -> dict[str, list[str]]:
    text = _PAGE.read_text().split(heading, 1)[1].split("\n\n", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_page_shows_the_states() -> None:
    meant = comments(boot_record, "BootState")
    assert rows("| state | what it means | next states |") == {
        state.value: [meant[state.value], ", ".join(
            f"`{each.value}`" for each in BootState if each in TRANSITIONS[state]) or "none"]
        for state in BootState}


def test_the_page_shows_the_steps() -> None:
    meant = {**comments(boot_decide, "BootStep"), "nothing": "all is as it should be"}
    assert {name: cells[0] for name, cells in rows("| step | what it does | when |").items()} == meant


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = boot_record.BootStore(tmp_path)
    begun = store.begin(record(BootState.PLANNED))
    assert store.named("b1") == begun
    entered = store.enter(begun, BootState.MAKING, "why")
    assert boot_record.BootStore(tmp_path).all() == [entered]
    assert store.current(begun) == entered
    changed = store.note(entered, disks=(msgspec.structs.replace(entered.disks[0], landed=True),))
    assert store.get("u").disks[0].landed
    store.remove(changed)
    assert store.all() == []
    assert store.current(changed) is None


def test_only_what_may_follow_is_entered(tmp_path: Path) -> None:
    store = boot_record.BootStore(tmp_path)
    begun = store.begin(record(BootState.PLANNED))
    with pytest.raises(AssertionError):
        store.enter(begun, BootState.LANDED)
