"""What is read first from a disk, written down, and fetched ahead the next time.

A trace is a text file: a line for each mebibyte that was read, in the order of first reads, as its number.
A boot reads much the same each time, so a trace serves other snapshots of the guest, too. It is a
hint: whatever stands in it, nothing but time is lost.
"""

from __future__ import annotations

import contextlib
import os
import threading

from stillframe.errors import StillframeError
from stillframe.repository.reader import DiskView
from stillframe.units import MIB

_RANGE_BYTES = MIB
#: Ranges that a trace holds, and bytes that are looked at of one.
_RANGES = 8192
_FILE_BYTES = 16 * _RANGES
#: The share of the cache that may be taken by what was fetched ahead and not asked for yet.
_SHARE = 0.5


class Trace:
    """Records the first reads of a disk, and fetches ahead what the file named at the start.

    For several threads. It never raises for a file that can't be read or written. Close it.
    """

    def __init__(self, path: str, view: DiskView, cache_bytes: int) -> None:
        self._path = path
        self._view = view
        self._ahead_most = max(1, int(cache_bytes * _SHARE) // _RANGE_BYTES)
        self._touched: set[int] = set()
        self._ahead: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._known = _read(path)
        self._file = _opened(path)
        self._thread = threading.Thread(target=self._fetch_all, name="trace", daemon=True)

    def start(self) -> None:
        """Begin to fetch ahead."""
        if self._known:
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        if self._file is not None:
            os.close(self._file)

    def touch(self, offset_bytes: int, length_bytes: int) -> None:
        """Take note of a read."""
        first = offset_bytes // _RANGE_BYTES
        last = (offset_bytes + max(length_bytes, 1) - 1) // _RANGE_BYTES
        for number in range(first, last + 1):
            if number not in self._touched:
                self._note(number)

    def _note(self, number: int) -> None:
        with self._changed:
            if number in self._touched:
                return
            self._touched.add(number)
            if number in self._ahead:
                self._ahead.discard(number)
                self._changed.notify_all()
            if self._file is None or len(self._known) + len(self._touched) > _RANGES:
                return
            if number not in self._known:
                with contextlib.suppress(OSError):
                    os.write(self._file, b"%d\n" % number)

    def _fetch_all(self) -> None:
        """Fetch one range at a time: a thread of the fetcher stays free for who waits."""
        for number in self._known:
            with self._changed:
                while len(self._ahead) >= self._ahead_most and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                if number in self._touched:
                    continue
                self._ahead.add(number)
            with contextlib.suppress(StillframeError):  # whoever needs it will see what is wrong
                self._view.fetch(number * _RANGE_BYTES, _RANGE_BYTES, wait=True)


def _read(path: str) -> dict[int, None]:
    """Return the numbers in a trace, in their order."""
    try:
        with open(path, "rb") as file:
            lines = file.read(_FILE_BYTES).split(b"\n")
    except OSError:
        return {}
    return dict.fromkeys(int(line) for line in lines[:_RANGES] if line.isdigit() and len(line) < 16)


def _opened(path: str) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
