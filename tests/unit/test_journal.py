"""The journal: what it was told is there, whatever dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from stillframe.capture import journal as journal_module
from stillframe.capture.journal import Journal, RunRecord, Step, age_s, new_run_id
from stillframe.capture.states import DiskPhase, State
from stillframe.clock import SystemClock
from stillframe.errors import StateFolderUnusable
from tests.unit.capture_records import disk_record, run_record

_ROOT = Path(__file__).parents[2]


class StoppedClock(SystemClock):
    def __init__(self, now: datetime) -> None:
        self.at = now

    def now(self) -> datetime:
        return self.at


def open_journal(folder: Path) -> Journal:
    return Journal(folder, SystemClock())


def planned(number: int = 0, **changes: object) -> RunRecord:
    return msgspec.structs.replace(run_record(State.PLANNED), id=f"run-{number:04}", **changes)


def test_each_write_is_durable_when_it_returns(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    assert journal._database.execute("pragma journal_mode").fetchone() == ("wal",)
    assert journal._database.execute("pragma synchronous").fetchone() == (2,), "2 is FULL"


def test_only_its_owner_can_look_into_the_folder(tmp_path: Path) -> None:
    open_journal(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = planned(disks=(disk_record("vda"), disk_record("vdb", DiskPhase.PLANNED, overlay_identity=None)))
    journal = open_journal(tmp_path)
    journal.begin(record)
    journal.close()
    assert open_journal(tmp_path).open_runs() == [record]


def test_a_run_is_open_until_it_is_done(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    record = journal.begin(planned())
    other = journal.begin(planned(1, uuid="another"))
    record = journal.enter(record, State.RELEASED, given_up="it was enough")
    assert [run.id for run in journal.open_runs()] == [record.id, other.id]
    assert journal.open_runs(record.uuid) == [record]
    record = journal.enter(record, State.DONE, ended_at="now")
    assert journal.open_runs() == [other]
    assert journal.open_runs(record.uuid) == []
    assert journal.last_runs(1) == [other]
    assert journal.last_runs(5) == [other, record]


def test_intent_comes_before_outcome_in_the_history(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    record = journal.begin(planned())
    record = journal.enter(record, State.OVERLAYS, "two files")
    record = journal.done(record, "made", consistency="crash")
    record = journal.note(record, "seen", captured_at="then")
    journal.remark(record.id, "said the guard")
    steps = journal.history(record.id)
    assert [(step.state, step.phase, step.detail) for step in steps] == [
        ("planned", "intent", ""), ("overlays", "intent", "two files"), ("overlays", "done", "made"),
        ("overlays", "note", "seen"), ("overlays", "note", "said the guard"),
    ]
    assert [step.at for step in steps] == sorted(step.at for step in steps)
    assert journal.current(record) == record
    assert (record.consistency, record.captured_at) == ("crash", "then")


def test_the_journal_knows_more_than_an_old_record(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    old = journal.begin(planned())
    new = journal.enter(old, State.OVERLAYS)
    assert journal.current(old) == new
    assert journal.current(planned(7)) == planned(7), "a run it does not know"


@pytest.mark.parametrize(("state", "following"), [
    (State.PLANNED, State.COMMITTING), (State.COPYING, State.COMMITTING), (State.COPYING, State.DONE),
    (State.RELEASED, State.COPYING), (State.DONE, State.RELEASED),
])
def test_a_step_that_is_not_in_the_table_is_refused(tmp_path: Path, state: State, following: State) -> None:
    journal = open_journal(tmp_path)
    record = journal.begin(planned(state=state))
    with pytest.raises(AssertionError, match="no way"):
        journal.enter(record, following)
    assert journal.current(record).state is state
    assert len(journal.history(record.id)) == 1


def test_a_remark_for_a_run_that_is_not_there_is_dropped(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.remark("nobody", "hello")
    assert journal.history("nobody") == []


def test_the_hook_is_called_behind_each_durable_write(tmp_path: Path) -> None:
    seen: list[tuple[State, str, list[Step]]] = []

    def hook(state: State, phase: str) -> None:
        seen.append((state, phase, open_journal(tmp_path).history("run-0000")))

    journal = Journal(tmp_path, SystemClock(), hook)
    journal.done(journal.enter(journal.begin(planned()), State.OVERLAYS))
    assert [(state, phase, len(steps)) for state, phase, steps in seen] == [
        (State.PLANNED, "intent", 1), (State.OVERLAYS, "intent", 2), (State.OVERLAYS, "done", 3)]


def test_old_runs_that_are_done_are_forgotten_and_open_ones_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_KEPT_RUNS", 3)
    journal = open_journal(tmp_path)
    left = journal.begin(planned(0))
    for number in range(1, 8):
        journal.enter(journal.enter(journal.begin(planned(number)), State.RELEASED), State.DONE)
    newest = journal.begin(planned(8))
    assert [run.id for run in journal.last_runs(100)] == ["run-0008", "run-0007", "run-0006", "run-0005",
                                                          left.id]
    assert journal.history("run-0001") == []
    assert len(journal.history(left.id)) == 1
    assert journal.open_runs() == [left, newest]


def test_a_journal_of_another_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    open_journal(tmp_path).close()
    with sqlite3.connect(tmp_path / "journal.db") as database:
        database.execute("pragma user_version=99")
    with pytest.raises(StateFolderUnusable, match="format 99"):
        open_journal(tmp_path)
    with sqlite3.connect(tmp_path / "journal.db") as database:
        assert database.execute("pragma user_version").fetchone() == (99,)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database, but long enough to look like a file" * 100)
    with pytest.raises(StateFolderUnusable, match=str(tmp_path)):
        open_journal(tmp_path)


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/stillframe"])
def test_a_folder_that_cant_be_used_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateFolderUnusable, match=folder):
        open_journal(tmp_path / folder)


def test_a_journal_that_cant_be_written_any_more_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_BUSY_TIMEOUT_S", 0.1)
    journal = open_journal(tmp_path)
    record = journal.begin(planned())
    holder = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
    holder.execute("begin immediate")
    with pytest.raises(StateFolderUnusable, match="can't be written"):
        journal.enter(record, State.OVERLAYS)
    holder.execute("rollback")
    assert journal.enter(record, State.OVERLAYS).state is State.OVERLAYS, "it works again afterwards"


# --- Several processes ------------------------------------------------------------------------


def write_many(folder: str, writer: int, steps: int) -> None:
    journal = Journal(Path(folder), SystemClock())
    record = journal.begin(planned(writer))
    for number in range(steps):
        record = journal.note(record, str(number))
        journal.remark("run-0000", f"{writer} {number}")


def test_processes_write_at_the_same_time_and_nothing_is_lost(tmp_path: Path) -> None:
    writers, steps = 4, 25
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=write_many, args=(str(tmp_path), writer, steps)) for writer in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * writers
    journal = open_journal(tmp_path)
    assert [run.id for run in journal.open_runs()] == [f"run-{writer:04}" for writer in range(writers)]
    for writer in range(1, writers):
        details = [step.detail for step in journal.history(f"run-{writer:04}")]
        assert details == ["", *map(str, range(steps))]


_WRITER = """
import sys
from pathlib import Path
from stillframe.capture.journal import Journal
from stillframe.clock import SystemClock

journal = Journal(Path(sys.argv[1]), SystemClock())
record = journal.open_runs()[0]
number = int(sys.argv[2])
while True:
    number += 1
    record = journal.note(record, str(number), given_up=str(number))
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_a_writer_that_is_killed_leaves_every_step_it_was_sure_of(tmp_path: Path) -> None:
    open_journal(tmp_path).begin(planned())
    sure = 0
    for round_number in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(sure)], stdout=subprocess.PIPE,
            cwd=_ROOT, env={**os.environ, "PYTHONPATH": str(_ROOT / "src")}, text=True,
        ) as writer:
            assert writer.stdout is not None
            for _ in range(3 + 7 * round_number):
                sure = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            # What was in the pipe by then was acknowledged, too.
            acknowledged = [int(line) for line in writer.stdout.read().split()]
            sure = acknowledged[-1] if acknowledged else sure
        journal = open_journal(tmp_path)
        assert journal._database.execute("pragma integrity_check").fetchone() == ("ok",)
        numbers = [int(step.detail) for step in journal.history("run-0000") if step.detail]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) in (sure, sure + 1)
        assert journal.open_runs()[0].given_up == str(numbers[-1])
        sure = numbers[-1]
        journal.close()


# --- Time -------------------------------------------------------------------------------------


def test_run_ids_sort_by_time() -> None:
    moment = datetime(2026, 11, 23, 1, 2, 3, 4, tzinfo=UTC)
    clocks = [StoppedClock(moment + timedelta(microseconds=step)) for step in range(3)]
    ids = [new_run_id(clock, "8b2e3b8e-0d2d") for clock in clocks]
    assert ids == sorted(ids)
    assert ids[0] == "20261123T010203000004-8b2e3b8e"


def test_age_is_wall_time_and_never_negative() -> None:
    clock = StoppedClock(datetime(2026, 11, 23, 1, 2, 13, tzinfo=UTC))
    assert age_s(clock, "2026-11-23T01:02:03.000000Z") == 10
    assert age_s(clock, "2026-11-23T02:00:00.000000Z") == 0


def test_a_standing_run_is_not_open_and_gives_way_to_the_next_in_one_moment(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    old = journal.begin(planned(state=State.COPYING))
    assert journal.standing(old.uuid) is None
    old = journal.enter(old, State.STANDING)
    assert journal.open_runs() == []
    assert journal.standing(old.uuid) == old
    new = journal.enter(journal.begin(planned(1, state=State.COPYING, follows=old.id)), State.LOWERING)
    assert journal.open_runs() == [new]
    assert journal.standing(old.uuid) == old
    new = journal.take_over(new, "it stands", captured_at="then")
    assert (new.state, new.captured_at) == (State.STANDING, "then")
    assert journal.standing_runs() == [new]
    assert journal.current(old).state is State.DONE
    assert journal.current(old).ended_at
    with pytest.raises(AssertionError, match="no way"):
        journal.take_over(journal.current(old), "again")
