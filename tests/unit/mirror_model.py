"""A mirror folder in memory that crashes on demand and forgets what was not fsynced; and disks."""

# ruff: noqa: ARG002 -- a model need not look at every argument

from __future__ import annotations

import contextlib
import copy
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stillframe.block.reader import Connection, OneByOne
from stillframe.errors import CopyFailed
from stillframe.extent import Extent, Kind, merged
from stillframe.mirror.folder import MirrorFolder
from stillframe.mirror.place import LocalPlace
from stillframe.mirror.record import CaptureFacts
from stillframe.mirror.update import CopyResult, Update
from stillframe.storage.open_files import FileFacts

BLOCK = 32
UNIT = 4 * BLOCK
GRAIN = 8


class Crashed(Exception):
    """The process that used the folder is dead."""


@dataclass
class Inode:
    number: int
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[Callable[[bytearray], None]] = field(default_factory=list)
    mtime_ns: int = 0
    durable_mtime_ns: int = 0

    def change(self, step: Callable[[bytearray], None]) -> None:
        step(self.content)
        self.pending.append(step)

    def settle(self) -> None:
        self.durable, self.pending = bytes(self.content), []
        self.durable_mtime_ns = self.mtime_ns


class ModelFiles:
    """See Files. `crash_at` is the number of the call (writes count) that does not happen any more."""

    def __init__(self) -> None:
        self.current: dict[str, Inode] = {}
        self.durable_names: dict[str, Inode] = {}
        self.pending_names: list[Callable[[dict[str, Inode]], None]] = []
        self.crash_at = 0
        self.fail: dict[int, int] = {}
        self.writes = 0
        self.log: list[str] = []
        self._open: dict[int, Inode] = {}
        self._clock = 0
        self._numbers = 0
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, object]) -> ModelFiles:
        return self.after_crash(None)

    def after_crash(self, chance: random.Random | None) -> ModelFiles:
        """Return the folder as the next process finds it.

        Without *chance* only the process died: all is there. With it the power went: of the
        changes to names since the last fsync_folder, and of the writes to a file since its last
        fsync, any may be missing, whatever came after them; and a file may be cut short.
        """
        new = ModelFiles()
        new._clock, new._numbers = self._clock, self._numbers
        names = dict(self.current)
        if chance is not None:
            names = dict(self.durable_names)
            share = chance.choice([0.1, 0.5, 0.9])
            for step in self.pending_names:
                if chance.random() < share:
                    step(names)
        copies: dict[int, Inode] = {}
        for name, inode in names.items():
            if inode.number not in copies:
                copies[inode.number] = _after_crash(inode, chance)
            new.current[name] = copies[inode.number]
        new.durable_names = dict(new.current)
        return new

    def text(self, name: str) -> bytes | None:
        inode = self.current.get(name)
        return bytes(inode.content) if inode is not None else None

    def put(self, name: str, content: bytes) -> None:
        """Write a file from outside: durable, and with a new time of change."""
        self._numbers += 1
        inode = self.current.get(name) or Inode(self._numbers)
        inode.content[:] = content
        inode.mtime_ns = self._now()
        inode.settle()
        self.current[name] = self.durable_names[name] = inode

    def names(self) -> list[str]:
        with self._lock:
            self._alive()
            return sorted(self.current)

    def facts(self, name: str) -> FileFacts | None:
        with self._lock:
            self._alive()
            inode = self.current.get(name)
            return FileFacts(inode.number, len(inode.content), inode.mtime_ns) if inode else None

    def open(self, name: str, *, write: bool = False, create: bool = False) -> int:
        with self._lock:
            if create:
                self._step(f"create {name}")
                inode = self.current.get(name)
                if inode is None:
                    self._numbers += 1
                    inode = Inode(self._numbers, mtime_ns=self._now())
                    self._name(lambda names: names.__setitem__(name, inode))
                inode.change(bytearray.clear)
            self._alive()
            if name not in self.current:
                raise FileNotFoundError(errno.ENOENT, "No such file", name)
            fd = len(self._open) + 100
            self._open[fd] = self.current[name]
            return fd

    def close(self, fd: int) -> None:
        """Closing is not modelled."""

    def size_bytes(self, fd: int) -> int:
        self._alive()
        return len(self._open[fd].content)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        with self._lock:
            self._alive()
            found = self._open[fd].content[offset : offset + len(buffer)]
            buffer[: len(found)] = found
            return len(found)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> None:
        kept = bytes(data)
        self._change(fd, f"pwrite {len(kept)} at {offset}", lambda content: _write(content, kept, offset))

    def truncate(self, fd: int, size_bytes: int) -> None:
        self._change(fd, f"truncate {size_bytes}", lambda content: _truncate(content, size_bytes))

    def reserve(self, fd: int, offset: int, length: int) -> None:
        self._change(fd, "reserve", lambda _: None)

    def zero(self, fd: int, offset: int, length: int) -> None:
        self._change(fd, f"zero {length} at {offset}", lambda content: _zero(content, offset, length))

    def data_ranges(self, fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
        content = bytes(self._open[fd].content)
        for start in range(offset - offset % GRAIN, end, GRAIN):
            if any(content[start : start + GRAIN]):
                yield max(start, offset), min(start + GRAIN, end)

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        self._alive()

    def fsync(self, fd: int) -> None:
        with self._lock:
            self._step("fsync")
            self._open[fd].settle()

    def set_mtime(self, name: str, mtime_ns: int) -> None:
        with self._lock:
            self._step(f"set_mtime {name}")
            self.current[name].mtime_ns = mtime_ns

    def rename(self, old: str, new: str) -> None:
        with self._lock:
            self._step(f"rename {old} {new}")
            self._name(lambda names: names.__setitem__(new, names.pop(old)) if old in names else None)

    def unlink(self, name: str) -> None:
        with self._lock:
            self._step(f"unlink {name}")
            if name in self.current:
                self._name(lambda names: names.pop(name, None))

    def fsync_folder(self) -> None:
        with self._lock:
            self._step("fsync_folder")
            self.durable_names, self.pending_names = dict(self.current), []

    def free_bytes(self) -> int:
        return 1 << 40

    def _name(self, step: Callable[[dict[str, Inode]], object]) -> None:
        step(self.current)
        self.pending_names.append(lambda names: (step(names), None)[1])

    def _change(self, fd: int, what: str, step: Callable[[bytearray], None]) -> None:
        with self._lock:
            self._step(what)
            inode = self._open[fd]
            inode.change(step)
            inode.mtime_ns = self._now()

    def _step(self, what: str) -> None:
        self._alive()
        self.writes += 1
        self.log.append(what)
        if self.writes == self.crash_at:
            raise Crashed(f"in call {self.writes}: {what}")
        if self.writes in self.fail:
            number = self.fail[self.writes]
            raise OSError(number, os.strerror(number))

    def _alive(self) -> None:
        if self.crash_at and self.writes >= self.crash_at:
            raise Crashed

    def _now(self) -> int:
        self._clock += 1
        return self._clock


def _after_crash(inode: Inode, chance: random.Random | None) -> Inode:
    content = bytearray(inode.content)
    mtime_ns = inode.mtime_ns
    if chance is not None:
        content = bytearray(inode.durable)
        for step in inode.pending:
            if chance.random() < 0.6:
                step(content)
        if inode.pending and content and chance.random() < 0.3:
            # A torn last write: the file's end never got there.
            del content[max(chance.randrange(len(content)), len(inode.durable)) :]
        mtime_ns = chance.choice([inode.mtime_ns, inode.durable_mtime_ns])
    new = Inode(inode.number, content, mtime_ns=mtime_ns)
    new.settle()
    return new


def _write(content: bytearray, data: bytes, offset: int) -> None:
    if len(content) < offset + len(data):
        _truncate(content, offset + len(data))
    content[offset : offset + len(data)] = data


def _truncate(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def _zero(content: bytearray, offset: int, length: int) -> None:
    end = min(offset + length, len(content))
    if offset < end:
        content[offset:end] = bytes(end - offset)


class MemoryDisk(OneByOne):
    """A DiskReader over bytes; zero stretches are told as such or not, as *chance* has it."""

    def __init__(self, content: bytes, chance: random.Random | None = None) -> None:
        self.content = content
        self.size_bytes = len(content)
        self.fail_at: int | None = None
        self._seed = chance.random() if chance is not None else 0.0

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        assert offset_bytes == 0
        assert length_bytes is None
        return merged(self._pieces())

    def changed(self) -> Iterator[Extent] | None:
        return None

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        yield self

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        if self.fail_at is not None and offset_bytes <= self.fail_at < offset_bytes + len(buffer):
            raise CopyFailed("reading failed", "look")
        buffer[:] = self.content[offset_bytes : offset_bytes + len(buffer)]

    def _pieces(self) -> Iterator[Extent]:
        chance = random.Random(self._seed)
        for start in range(0, self.size_bytes, GRAIN):
            piece = self.content[start : start + GRAIN]
            kind = Kind.DATA if any(piece) else chance.choice([Kind.DATA, Kind.ZERO, Kind.HOLE, Kind.HOLE])
            yield Extent(start, len(piece), kind)


class ModelClock:
    """Time that stands still unless somebody waits."""

    patience_s = 2.0

    def __init__(self) -> None:
        self._s = 0.0
        self._moment = datetime(2025, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        self._moment += timedelta(seconds=7)
        return self._moment

    def monotonic_s(self) -> float:
        return self._s

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        if event.wait(min(timeout_s, self.patience_s)):
            return True
        self._s += timeout_s
        return False

    def pause(self, seconds: float) -> None:
        self._s += seconds


Disks = dict[str, bytes]


def folder_of(files: ModelFiles) -> MirrorFolder:
    if ".stillframe.lock" not in files.current:
        files.put(".stillframe.lock", b"")
    return MirrorFolder(LocalPlace(Path("/model/guest"), files), clock=ModelClock())


def begin(files: ModelFiles) -> Update:
    folder = folder_of(files)
    folder.recover()
    update = folder.begin("guest", "uuid-1")
    update.block_size_bytes, update.data_unit_bytes, update.threads = BLOCK, UNIT, 1
    return update


def stage(
    update: Update, disks: Disks, chance: random.Random, *, verify: bool = False
) -> dict[str, CopyResult]:
    return {
        target: update.copy_disk(
            target, MemoryDisk(content, chance), source="memory", verify_destination=verify)
        for target, content in disks.items()
    }


def run(
    files: ModelFiles, disks: Disks, label: str, chance: random.Random, *, verify: bool = False
) -> dict[str, CopyResult]:
    """Mirror *disks* from beginning to end, as mirror/run.py does."""
    update = begin(files)
    results = stage(update, disks, chance, verify=verify)
    update.publish(CaptureFacts(label, "crash", f"<domain>{label}</domain>"))
    update.finish()
    return results


def held(files: ModelFiles) -> Disks:
    """Return the images in the folder."""
    return {
        name.removesuffix(".img"): bytes(inode.content)
        for name, inode in files.current.items() if name.endswith(".img")
    }


def clone(files: ModelFiles) -> ModelFiles:
    return copy.deepcopy(files)
