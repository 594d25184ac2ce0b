"""Restoring one disk: pieces of the snapshot go to the target in order, and what is zero stays a hole.

Whatever is written was opened with the key and named by the tree. What can't be read ends the
restore, or is left out and named if that was asked for; it is never made up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from stillframe.clock import Clock
from stillframe.errors import StillframeError
from stillframe.repository.manifest import DiskEntry
from stillframe.repository.places import Places
from stillframe.repository.reader import DiskView
from stillframe.restore.qcow2 import open_qcow2_target
from stillframe.restore.target import Target, Wishes, open_file_target, refuse_hidden_qcow2
from stillframe.units import KIB, MIB

#: What is compared with --delta, and written where it differs.
_BLOCK_BYTES = 64 * KIB
_STEP_BYTES = 64 * MIB
_BUFFER_BYTES = MIB


@dataclass(frozen=True, slots=True)
class Lost:
    """A stretch of the disk that can't be read any more."""

    offset_bytes: int
    length_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class RestoreProgress:
    """How far it is: *done_bytes* of *size_bytes*, zeroes included."""

    done_bytes: int
    size_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done. *written_bytes* counts data; *lost* is not empty only if lost stretches were skipped."""

    path: str
    size_bytes: int
    data_bytes: int
    written_bytes: int
    lost: tuple[Lost, ...]


def restore_disk(
    places: Places, disk: DiskEntry, wishes: Wishes, *, clock: Clock, skip_bad: bool = False,
    stop: Callable[[], StillframeError | None] = lambda: None,
    report: Callable[[RestoreProgress], None] = lambda _: None,
) -> Restored:
    """Restore *disk* to where *wishes* says.

    A stretch that is lost raises SlotDamaged; with *skip_bad* it reads as zeroes in a new file, stays as it
    is in an existing target, and is named in the answer. *stop* is asked for each mebibyte. When an
    error is raised, a new file is not there, and the message says if an existing target was touched.
    Raises TargetExists, TargetSmall, TargetInUse, NotPermitted, DestinationUnwritable (nothing was
    touched), DestinationLost, DestinationFull, RepositoryDamaged, StorageError.
    """
    refuse_hidden_qcow2(wishes)
    # The name that was typed says the format, not the one that a link leads to.
    wishes = replace(wishes, path=os.path.realpath(wishes.path),
                     format="qcow2" if wishes.is_qcow2 else "raw")
    with (
        DiskView(places, disk) as view,
        _target(wishes, disk, clock) as target,
    ):
        run = _Run(view, target, wishes, stop, report)
        try:
            lost = run.copy(skip_bad)
            target.publish()
        except StillframeError as error:
            if target.left_behind:
                error.message = f"{error.message} {target.left_behind}"
                error.args = (error.message,)
            raise
    return Restored(wishes.path, disk.size_bytes, run.data_bytes, run.written_bytes, tuple(lost))


def _target(wishes: Wishes, disk: DiskEntry, clock: Clock) -> contextlib.AbstractContextManager[Target]:
    if wishes.is_qcow2:
        return open_qcow2_target(wishes, disk.size_bytes, disk.data_bytes, clock)
    return open_file_target(wishes, disk.size_bytes, disk.data_bytes)


class _Run:
    def __init__(
        self, view: DiskView, target: Target, wishes: Wishes, stop: Callable[[], StillframeError | None],
        report: Callable[[RestoreProgress], None],
    ) -> None:
        self._view = view
        self._target = target
        self._delta = wishes.delta and not target.is_blank
        self._stop = stop
        self._report = report
        self._buffer = bytearray(_BUFFER_BYTES)
        self._zeroes = bytes(_BUFFER_BYTES)
        self.data_bytes = 0
        self.written_bytes = 0

    def copy(self, skip_bad: bool) -> list[Lost]:
        lost: list[Lost] = []
        done = 0
        for piece in self._view.pieces():
            self._zero(done, piece.offset_bytes)
            done = piece.offset_bytes + piece.length_bytes
            if piece.content is not None:
                self.data_bytes += piece.length_bytes
                self._write(piece.content, piece.offset_bytes)
            elif piece.damage is not None:
                if not skip_bad:
                    raise piece.damage
                lost.append(Lost(piece.offset_bytes, piece.length_bytes, piece.damage.why))
            self._tick(done)
        self._zero(done, self._view.size_bytes)
        self._tick(self._view.size_bytes)
        return lost

    def _write(self, content: memoryview, offset: int) -> None:
        for begin, end in self._differing(content, offset) if self._delta else ((0, len(content)),):
            self._target.write(content[begin:end], offset + begin)
            self.written_bytes += end - begin

    def _differing(self, content: memoryview, offset: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of runs of blocks of *content* that are not at *offset* of the target yet."""
        for step in range(0, len(content), _BUFFER_BYTES):
            part = content[step : step + _BUFFER_BYTES]
            with memoryview(self._buffer) as view:
                self._target.read_into(view[: len(part)], offset + step)
            # startswith compares memory; comparing memoryviews goes byte by byte in Python 3.11.
            if self._buffer.startswith(part):
                continue
            begin = -1
            for at in range(0, len(part), _BLOCK_BYTES):
                if self._buffer.startswith(part[at : at + _BLOCK_BYTES], at):
                    if begin >= 0:
                        yield step + begin, step + at
                    begin = -1
                elif begin < 0:
                    begin = at
            if begin >= 0:
                yield step + begin, step + len(part)

    def _zero(self, begin: int, end: int) -> None:
        """Make a stretch of the target zero, where it is not."""
        if self._target.is_blank or begin >= end:
            return
        for at in range(begin, end, _STEP_BYTES):
            until = min(at + _STEP_BYTES, end)
            if self._delta:
                for start, stop in self._target.data_ranges(at, until):
                    self._zero_what_differs(start, stop)
            else:
                self._target.zero(at, until - at)
            self._tick(until)

    def _zero_what_differs(self, begin: int, end: int) -> None:
        for at in range(begin, end, _BUFFER_BYTES):
            length = min(_BUFFER_BYTES, end - at)
            with memoryview(self._buffer) as view:
                self._target.read_into(view[:length], at)
            if not self._buffer.startswith(self._zeroes[:length]):
                self._target.zero(at, length)

    def _tick(self, done: int) -> None:
        reason = self._stop()
        if reason is not None:
            raise reason
        self._report(RestoreProgress(done, self._view.size_bytes, self.written_bytes))
