"""What an export's server is made of, without the server: orders, the trace, the log, the served disk."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stillframe.clock import SystemClock
from stillframe.errors import SlotDamaged
from stillframe.repository.layout import Parameters, new_sid
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView
from stillframe.restore.export_disk import Log, ServedDisk
from stillframe.restore.export_order import Order, decode_order, order_for
from stillframe.restore.export_trace import Trace
from stillframe.storage.local import LocalStorage
from stillframe.storage.memory import MemoryStorage
from stillframe.units import KIB, MIB
from tests.unit.repository_disks import Book, SourceDisk, content_of, noise

SIZE = 8 * MIB
USUAL = Parameters(id=new_sid(), created_at="")


@pytest.fixture
def book() -> Book:
    book = Book(MemoryStorage(), USUAL)
    book.backup(SourceDisk(noise(SIZE)))
    return book


def view_of(book: Book, **sizes: int) -> DiskView:
    return DiskView(Places(book.repository), book.kept[-1][0], **sizes)


def read(view: DiskView | ServedDisk, at: int, length: int = KIB) -> bytes:
    buffer = bytearray(length)
    view.read_into(memoryview(buffer), at)
    return bytes(buffer)


def lose_data(book: Book) -> None:
    book.repository.storage.delete(book.objects("main/p/"))


def test_an_order_comes_through_as_it_was() -> None:
    book = Book(MemoryStorage())
    written = book.backup(SourceDisk(noise(100)))
    order = order_for(book.repository, "vda", content_of(written))
    assert decode_order(order.encode()) == order
    assert order.key == book.repository.key.secret


# --- the trace ------------------------------------------------------------------------------------


def test_what_a_trace_names_is_fetched_ahead(book: Book, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("6\nnonsense\n2\n999999999\n", encoding="ascii")
    with view_of(book, kept_bytes=64 * MIB) as view:
        trace = Trace(str(path), view, 64 * MIB)
        trace.start()
        trace._thread.join()
        lose_data(book)
        content = book.kept[-1][1]
        for at in (6 * MIB, 7 * MIB - KIB, 2 * MIB):
            assert read(view, at) == content[at : at + KIB]
        with pytest.raises(SlotDamaged):
            read(view, 4 * MIB)
        trace.close()


def test_no_more_is_fetched_than_half_of_the_cache_until_it_is_read(book: Book, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("0\n1\n2\n3\n4\n5\n", encoding="ascii")
    with view_of(book, kept_bytes=8 * MIB) as view:
        trace = Trace(str(path), view, 4 * MIB)
        waits = threading.Event()
        wait = trace._changed.wait

        def tell(timeout: float | None = None) -> bool:
            waits.set()
            return wait(timeout)

        trace._changed.wait = tell  # type: ignore[method-assign]
        trace.start()
        assert waits.wait(60)
        assert trace._ahead == {0, 1}
        waits.clear()
        trace.touch(0, KIB)
        assert waits.wait(60)
        assert trace._ahead == {1, 2}
        trace.close()
        assert not trace._thread.is_alive()


def test_a_trace_is_written_once_for_each_mebibyte_and_bounded(
    book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace"
    path.write_text("3\n", encoding="ascii")
    monkeypatch.setattr("stillframe.restore.export_trace._RANGES", 4)
    with view_of(book) as view:
        trace = Trace(str(path), view, MIB)
        for at in (3, 5, 5, 1, 6, 7):
            trace.touch(at * MIB + 17, KIB)
        trace.touch(2 * MIB - 1, 2)
        trace.close()
    assert path.read_text(encoding="ascii").split() == ["3", "5", "1"]


def test_a_trace_that_can_not_be_kept_does_no_harm(book: Book, tmp_path: Path) -> None:
    with view_of(book) as view:
        trace = Trace(str(tmp_path / "no" / "trace"), view, MIB)
        trace.start()
        trace.touch(0, KIB)
        trace.close()


# --- fetching ahead -------------------------------------------------------------------------------


def test_fetch_has_a_stretch_there_but_no_more_than_half_of_what_is_kept(book: Book) -> None:
    with view_of(book, kept_bytes=8 * MIB) as view:
        view.fetch(0, SIZE, wait=True)
        lose_data(book)
        assert read(view, 4 * MIB - KIB) == book.kept[-1][1][4 * MIB - KIB : 4 * MIB]
        with pytest.raises(SlotDamaged):
            read(view, 4 * MIB)


def test_two_that_read_onward_at_a_time_are_both_fetched_ahead_for(book: Book) -> None:
    with view_of(book, kept_bytes=64 * MIB) as view:
        chunk, starts = 64 * KIB, (0, 4 * MIB)
        for step in range(2):
            for start in starts:
                read(view, start + step * chunk, chunk)
        for coming in list(view._fetcher._kept.values()):
            coming.result()
        lose_data(book)
        for start in starts:
            assert read(view, start + 2 * MIB) == book.kept[-1][1][start + 2 * MIB : start + 2 * MIB + KIB]


# --- the served disk ------------------------------------------------------------------------------


class Standing(SystemClock):
    """A clock whose time does not pass for the log."""

    def now(self) -> datetime:
        return datetime(2026, 11, 28, tzinfo=UTC)


def served(tmp_path: Path, **options: float) -> tuple[ServedDisk, Path, bytes]:
    book = Book(LocalStorage(tmp_path / "repository", make=True), USUAL)
    book.backup(SourceDisk(noise(SIZE)))
    plain = order_for(book.repository, "vda", book.kept[-1][0])
    order = Order(address=plain.address, key=plain.key, name="vda", content=plain.content, **options)  # type: ignore[arg-type]
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    return ServedDisk(order, Log(log, Standing()), SystemClock()), tmp_path / "log", book.kept[-1][1]


def test_each_message_is_logged_once_until_things_are_well_again(tmp_path: Path) -> None:
    disk, log, content = served(tmp_path, patience_s=0.0)
    repository, away = tmp_path / "repository", tmp_path / "away"
    for _ in range(2):
        repository.rename(away)
        for _ in range(3):
            with pytest.raises(OSError, match="nothing in"):
                read(disk, 0)
            with pytest.raises(OSError, match="nothing in"):
                disk.extents(0, SIZE)
        away.rename(repository)
        assert read(disk, 0) == content[:KIB]
        disk.fetch(0, SIZE)
        disk._view.close()
        disk._view = DiskView(Places(disk._order.open()), disk._order.content)
    words = [line.split(" ", 1)[1] for line in log.read_text(encoding="utf-8").splitlines()]
    assert [word.partition(":")[2].strip().partition(" read")[0] for word in words] == [
        "the repository can't be", "the repository can be"] * 2
    disk.close()


def test_a_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillframe.restore.export_disk._LOG_BYTES", 200)
    log = Log(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), Standing())
    for number in range(100):
        log.say(f"message {number}")
    lines = (tmp_path / "log").read_text(encoding="ascii").splitlines()
    assert len(lines) < 8
    assert "full" in lines[-1]
    assert "message 0" in lines[0]
