"""Writing a disk in large pieces: gathered in aligned memory, with several on their way at a time."""

from __future__ import annotations

import contextlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from stillframe.direct import ALIGNED_BYTES, aligned_buffer, open_direct, write_at
from stillframe.repository.jobs import InOrder
from stillframe.restore.files import start_writeback
from stillframe.units import MIB

_BUFFER_BYTES = 2 * MIB
#: Buffers on their way, besides the one that is filled.
_WRITERS = 3

#: Where in the disk a part belongs, and where in the buffer it lies.
_Part = tuple[int, int, int]


class BulkWriter:
    """Writes to the file or device open as *fd*. For one thread; close it. An error may come late.

    What is written is not to be read, and not to be written again, before `finish`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct = open_direct(fd)
        self._pool = ThreadPoolExecutor(_WRITERS, "write")
        self._running: InOrder[mmap.mmap, None] = InOrder(self._pool, _WRITERS)
        self._free = [aligned_buffer(_BUFFER_BYTES) for _ in range(_WRITERS)]
        self._buffer = aligned_buffer(_BUFFER_BYTES)
        self._filled = 0
        self._parts: list[_Part] = []

    def write(self, content: memoryview, offset_bytes: int) -> None:
        """Take a copy of *content* and write it soon. Raises OSError."""
        while content:
            step = min(len(content), _BUFFER_BYTES - self._filled)
            begin, self._filled = self._filled, self._filled + step
            self._buffer[begin : self._filled] = content[:step]
            self._note(offset_bytes, begin)
            content, offset_bytes = content[step:], offset_bytes + step
            # Only the end of a disk can leave an odd place.
            if self._filled == _BUFFER_BYTES or self._filled % ALIGNED_BYTES:
                self._send()

    def finish(self) -> None:
        """Wait until all is written. Raises OSError."""
        self._send()
        while self._running:
            self._take()

    def close(self) -> None:
        """Give up what is not written."""
        self._running.drop()
        self._pool.shutdown()
        if self._direct is not None:
            with contextlib.suppress(OSError):
                os.close(self._direct)

    def _note(self, offset: int, begin: int) -> None:
        if self._parts:
            last_offset, last_begin, last_end = self._parts[-1]
            if last_offset + last_end - last_begin == offset:
                self._parts[-1] = last_offset, last_begin, self._filled
                return
        self._parts.append((offset, begin, self._filled))

    def _send(self) -> None:
        if not self._parts:
            return
        while self._running.full or self._running.ready:
            self._take()
        self._running.put(self._buffer, partial(self._written, self._buffer, tuple(self._parts)))
        self._buffer, self._filled = self._free.pop(), 0
        self._parts.clear()

    def _take(self) -> None:
        self._free.append(self._running.take()[0])

    def _written(self, buffer: mmap.mmap, parts: tuple[_Part, ...]) -> None:
        with memoryview(buffer) as view:
            for offset, begin, end in parts:
                write_at(self._fd, self._direct, view[begin:end], offset)
        if self._direct is None:
            for offset, begin, end in parts:
                start_writeback(self._fd, offset, end - begin)
