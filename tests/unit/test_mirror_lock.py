"""The lock of a mirror on a server, between runs that meet at the worst moment. See mirror/lock.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

import pytest

from stillframe import process
from stillframe.errors import DestinationBusy
from stillframe.mirror.layout import LOCK_HELD
from stillframe.mirror.lock import far_lock
from stillframe.storage.files import FileServer

_ADDRESS = "sftp://host/mirrors"


class Files:
    """As much of a FileServer as a lock asks for. *after_publish* is another run, at that moment."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.after_publish: Callable[[str], None] = lambda _path: None

    def read(self, path: str, offset_bytes: int, length_bytes: int) -> tuple[bytes, int]:
        if path not in self.content:
            raise FileNotFoundError(path)
        content = self.content[path]
        return content[offset_bytes:offset_bytes + length_bytes], len(content)

    def write(self, path: str, content: memoryview) -> None:
        self.content[path] = bytes(content)

    def publish(self, temporary: str, path: str) -> None:
        if path in self.content:
            raise FileExistsError(path)
        if temporary not in self.content:
            raise FileNotFoundError(temporary)
        self.content[path] = self.content.pop(temporary)
        self.after_publish(path)

    def remove(self, path: str) -> None:
        if path not in self.content:
            raise FileNotFoundError(path)
        del self.content[path]


def held(files: Files, holder: str) -> None:
    """Try to take the lock and to let it go again."""
    with far_lock(cast("FileServer", files), _ADDRESS, holder, lambda: False):
        pass


def dead_text(files: Files) -> str:
    """Return the lock of a process that could be seen from here, and is gone."""
    with far_lock(cast("FileServer", files), _ADDRESS, "gone", lambda: False):
        return files.content[LOCK_HELD].decode().replace(f"pid {os.getpid()}", "pid 4194303")


def test_a_lock_of_the_same_host_name_elsewhere_is_not_taken_over() -> None:
    files = Files()
    dead = dead_text(files)
    lines = dead.splitlines(keepends=True)  # in another space of process numbers, or of an older stillframe
    old = "".join(line for line in lines if not line.startswith("space "))
    for text in (dead.replace("space ", "space other-boot-"), old):
        files.content = {LOCK_HELD: text.encode()}
        with pytest.raises(DestinationBusy, match="gone, process 4194303"):
            held(files, "second")
        assert files.content == {LOCK_HELD: text.encode()}
    files.content = {LOCK_HELD: dead.encode()}
    held(files, "second")
    assert files.content == {}


def test_a_lock_of_an_earlier_boot_is_taken_over_on_the_same_machine_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = Files()
    monkeypatch.setattr(process, "machine_id", lambda: "1f2e")
    earlier = dead_text(files).replace(process.boot_id(), "an-earlier-boot").encode()
    for other in ("2f2e", ""):
        files.content = {LOCK_HELD: earlier}
        with monkeypatch.context() as patch:
            patch.setattr(process, "machine_id", lambda mine=other: mine)
            with pytest.raises(DestinationBusy):
                held(files, "second")
    held(files, "second")
    assert files.content == {}


def test_a_third_run_that_takes_the_name_meanwhile_is_told_of() -> None:
    """The second has taken the lock over between this run's look and its hand; then comes a third."""
    files = Files()
    files.content[LOCK_HELD] = dead_text(files).encode()

    def meanwhile(path: str) -> None:
        if path.endswith(".dead"):
            files.content[path] = b"holder second\n"
            files.content[LOCK_HELD] = b"holder third\n"

    files.after_publish = meanwhile
    with pytest.raises(DestinationBusy, match="third"):
        held(files, "first")
    assert files.content == {LOCK_HELD: b"holder third\n"}


def test_a_lock_that_is_anothers_by_now_stays() -> None:
    files = Files()
    with far_lock(cast("FileServer", files), _ADDRESS, "first", lambda: False):
        files.content[LOCK_HELD] = b"holder second\n"
    assert files.content == {LOCK_HELD: b"holder second\n"}
