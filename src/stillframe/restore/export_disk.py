"""The disk that an export serves: reads that outlast a storage that comes back, and say what is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from socket import gethostname
from typing import TypeVar

from stillframe.clock import Clock, Deadline, utc_text
from stillframe.errors import RepositoryDamaged, StillframeError, StorageError
from stillframe.extent import Extent
from stillframe.repository.generation import readable_generation
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView
from stillframe.repository.session import open_session
from stillframe.restore.export_order import Order
from stillframe.restore.export_trace import Trace
from stillframe.storage.wrappers import TimeLimited
from stillframe.units import GIB, MIB

T = TypeVar("T")

_RETRY_PAUSE_S = 0.25
#: A storage that gives no answer at all for so long, or for the patience if that is longer, counts as lost.
_SHORTEST_ANSWER_S = 5.0
#: How many leaves are kept: of 16 GiB with the usual sizes, some 40 MiB.
_KEPT_LEAVES = 4096
_LOG_BYTES = MIB
_LAST_MESSAGES = 64
#: What one question for extents is answered with, however much was asked for.
_EXTENTS = 4096
_EXTENTS_OF_BYTES = GIB


class Log:
    """Messages of a server, into an open file; bounded. For several threads."""

    def __init__(self, fd: int, clock: Clock) -> None:
        self._fd = fd
        self._clock = clock
        self._left_bytes = _LOG_BYTES
        self._said: dict[str, None] = {}
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Write a line, unless it was said lately."""
        with self._lock:
            if text in self._said or self._left_bytes < 0:
                return
            self._said[text] = None
            if len(self._said) > _LAST_MESSAGES:
                self._said.pop(next(iter(self._said)))
            line = f"{utc_text(self._clock.now())} {text}\n".encode()
            self._left_bytes -= len(line)
            if self._left_bytes < 0:
                line = b"the log is full: nothing more is written down\n"
            os.write(self._fd, line)

    def forget(self) -> None:
        """Let what was said be said again: things changed in between."""
        with self._lock:
            self._said.clear()


class ServedDisk:
    """One disk of an order, open. For several threads. Close it."""

    def __init__(self, order: Order, log: Log, clock: Clock) -> None:
        self._order = order
        self._log = log
        self._clock = clock
        opened = order.open()
        # Nothing is asked by threads before `start` (export_plugin.py says why): the limit comes afterwards.
        generation = readable_generation(opened.storage, opened.key)
        limited = TimeLimited(opened.storage, max(order.patience_s, _SHORTEST_ANSWER_S))
        self._repository = replace(opened, storage=limited)
        self._view = DiskView(Places(self._repository, generation), order.content,
                              kept_bytes=order.cache_bytes, kept_leaves=_KEPT_LEAVES)
        self._session = contextlib.ExitStack()
        self._trace = Trace(order.trace, self._view, order.cache_bytes) if order.trace else None
        self._storage_is_lost = False

    @property
    def size_bytes(self) -> int:
        """The size of the disk."""
        return self._view.size_bytes

    @property
    def name(self) -> str:
        """The export's name."""
        return self._order.name

    def start(self) -> None:
        """Begin to fetch ahead what was read first the last time, and keep collectors from what is served.

        A server that outlives who started it may be read from for days. Meanwhile its snapshot can be
        forgotten, and a session is what makes a collector wait.
        """
        if self._order.outlives:
            try:
                self._session.enter_context(open_session(
                    self._repository.storage, self._repository.key, self._clock, gethostname(), lambda _: ""))
            except StillframeError as error:
                self._log.say(f"{self.name}: no session could be registered, so a prune may delete what is "
                              f"served once its snapshot is forgotten: {error.message}")
        if self._trace is not None:
            self._trace.start()

    def close(self) -> None:
        """End the threads and the session."""
        self._session.close()
        if self._trace is not None:
            self._trace.close()
        self._view.close()

    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """Fill the whole *buffer*. Raises OSError (EIO); the log says why."""
        if self._trace is not None:
            self._trace.touch(offset_bytes, len(buffer))
        try:
            self._view.read_into(buffer, offset_bytes)
        except StillframeError:
            self._patiently(offset_bytes, len(buffer), lambda: self._view.read_into(buffer, offset_bytes))
        if self._storage_is_lost:
            self._is_back()

    def extents(self, offset_bytes: int, length_bytes: int, most: int = _EXTENTS) -> list[Extent]:
        """Return extents from *offset_bytes* on, at least one, not always to the end. Raises OSError: EIO."""
        length = min(length_bytes, _EXTENTS_OF_BYTES)
        return self._patiently(
            offset_bytes, length, lambda: list(islice(self._view.extents(offset_bytes, length), most)))

    def fetch(self, offset_bytes: int, length_bytes: int) -> None:
        """Begin to fetch a stretch, as much of it as is kept; what is wrong with it, a read will tell."""
        with contextlib.suppress(StillframeError):
            self._view.fetch(offset_bytes, length_bytes)

    def _patiently(self, offset: int, length: int, call: Callable[[], T]) -> T:
        """Return what *call* returns, tried again while the storage fails. Raises OSError (EIO)."""
        deadline = Deadline(self._clock, self._order.patience_s)
        while True:
            try:
                return call()
            except RepositoryDamaged as damage:
                self._log.say(f"{self.name}: data is lost within the {length} bytes at {offset}: "
                              f"{damage.message}")
                raise OSError(errno.EIO, damage.message) from None
            except StorageError as error:
                self._storage_is_lost = True
                self._log.say(f"{self.name}: the repository can't be read: {error.message}")
                if deadline.passed():
                    raise OSError(errno.EIO, error.message) from None
                self._clock.pause(_RETRY_PAUSE_S)

    def _is_back(self) -> None:
        self._storage_is_lost = False
        self._log.forget()
        self._log.say(f"{self.name}: the repository can be read again")
        self._log.forget()
