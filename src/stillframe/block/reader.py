"""Reading an image through QEMU's own code: a private qemu-nbd and libnbd.

The server is started read-only and without force-share, so that QEMU's image lock
says no when somebody writes to the image. It listens on a socket in a private
temporary folder and dies with stillframe. Whatever the format and the chain below
it, what is read is what the guest would read.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from stillframe import process
from stillframe.block.image import FileIdentity, ImagePlace, file_identity
from stillframe.clock import Clock, Deadline
from stillframe.errors import CopyFailed, ProgramMissing
from stillframe.extent import Extent, Kind, merged
from stillframe.units import GIB, MIB

#: One block-status question covers at most this much: NBD counts to 2^32 - 1.
_STATUS_WINDOW_BYTES = GIB
_REQUEST_LIMIT_BYTES = 32 * MIB
_POLL_S = 0.01
_ALLOCATION = "base:allocation"
# What changed is asked for in another context: a dirty bitmap (1 is dirty), or which image of the chain holds
# a stretch (0 none, 1 the topmost, more those below it). One is what changed, in both.
_DIRTY = "qemu:dirty-bitmap:"
_DEPTH = "qemu:allocation-depth"
_CHANGED = 1
#: A read is split into pieces of at least this much, which are on their way together.
_PIECE_BYTES = MIB // 4
_IN_FLIGHT = 16
# Bits of base:allocation. A hole that does not read as zeroes is data: only ZERO counts.
_STATE_HOLE = 1
_STATE_ZERO = 2
# glibc gives buffers of this size back to the kernel after each request and faults them in
# again for the next: keeping them doubles qemu-nbd's throughput (FACTS.md 11).
_KEEP_BUFFERS = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "67108864",
}


#: Buffers, and the offsets from which they are filled.
Pieces = Sequence[tuple[memoryview, int]]


class Connection(Protocol):
    """One stream of reads; for one thread at a time."""

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """Fill the whole *buffer* (at most 32 MiB) from *offset_bytes*. Raises CopyFailed."""
        ...

    def pread_pieces(self, pieces: Pieces) -> None:
        """Fill many buffers, each from its offset, all on their way together. Raises CopyFailed."""
        ...


class OneByOne:
    """The part of a Connection that has no better way to read many pieces than one after the other."""

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """See Connection."""
        raise NotImplementedError

    def pread_pieces(self, pieces: Pieces) -> None:
        """See Connection."""
        for buffer, offset_bytes in pieces:
            self.pread_into(buffer, offset_bytes)


class DiskReader(Protocol):
    """A disk that stands still, readable from several threads."""

    @property
    def size_bytes(self) -> int:
        """The virtual size of the disk."""
        ...

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """Yield the extents of a stretch (to the end if no length), in order, without gaps.

        Neighbours differ in kind. Raises CopyFailed.
        """
        ...

    def changed(self) -> Iterator[Extent] | None:
        """Yield the extents that may differ from the moment which this reader counts from, in order.

        None if it counts from none: all of the disk may differ then. What is between the extents is as it
        was. A kind that reads as zero means that it is zero now, whatever it was. Raises CopyFailed.
        """
        ...

    def connect(self) -> contextlib.AbstractContextManager[Connection]:
        """Open one more connection. Raises CopyFailed."""
        ...


@contextlib.contextmanager
def open_reader(
    place: ImagePlace, *, clock: Clock, connections: int = 4, timeout_s: float = 30.0, bitmap: str = "",
    top_changed: bool = False,
) -> Iterator[DiskReader]:
    """Open the image and its whole backing chain for reading, for the length of the block.

    What changed, for the reader, is what *bitmap* marks, a persistent bitmap of the (qcow2) image, or with
    *top_changed* what the topmost image itself holds. At most *connections* connections can be open at a
    time, plus those for extents. Raises
    CopyFailed when QEMU refuses (the message says why: locked by a writer, missing, no rights)
    or when the server is not ready after *timeout_s*. The kernel ends the server with the
    *thread* that came here, so the block must be left by the same thread.
    """
    context = _DIRTY + bitmap if bitmap else _DEPTH if top_changed else ""
    with tempfile.TemporaryDirectory(prefix="stillframe-nbd-") as folder:
        socket = os.path.join(folder, "socket")
        command = [
            "qemu-nbd", "--read-only", "--persistent", "--shared", str(connections + 2),
            "--aio=threads", "--socket", socket, *(["--bitmap", bitmap] if bitmap else []),
            *(["--allocation-depth"] if top_changed else []), _locked_name(place),
        ]
        before = _identity(place)
        with process.running(command, environment=_KEEP_BUFFERS) as server, contextlib.ExitStack() as stack:
            _wait_until_ready(server, socket, place, Deadline(clock, timeout_s), clock)
            first = stack.enter_context(contextlib.closing(_Handle(socket, place.text())))
            counts = _counting(stack, socket, place.text(), "", context)
            fd = stack.enter_context(_raw_file(place, before))
            yield NbdReader(socket, place.text(), first, counts, fd=fd)


@contextlib.contextmanager
def open_export(socket: str, export: str, name: str, *, bitmap: str = "") -> Iterator[DiskReader]:
    """Open an export of a QEMU that runs: a disk as it was when a backup job began.

    *name* is for people. With *bitmap*, the export's dirty bitmap of that name says what changed since the
    moment that it counts from. Raises CopyFailed.
    """
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.closing(_Handle(socket, name, export)))
        counts = _counting(stack, socket, name, export, _DIRTY + bitmap if bitmap else "")
        yield ExportReader(socket, name, first, counts, export=export)


def _counting(
    stack: contextlib.ExitStack, socket: str, name: str, export: str, context: str
) -> _Handle | None:
    """Connect for the context that says what changed, if there is one."""
    return stack.enter_context(
        contextlib.closing(_Handle(socket, name, export, context))) if context else None


class NbdReader:
    """A DiskReader over an NBD server's unix socket; content comes from the descriptor, if there is one.

    *counts* is a connection whose context says what changed.
    """

    def __init__(
        self, socket: str, name: str, first: _Handle, counts: _Handle | None = None, *, fd: int | None = None,
        export: str = "",
    ) -> None:
        self._socket = socket
        self._name = name
        self._first = first
        self._counts = counts
        self._fd = fd
        self._export = export
        self.size_bytes = first.size_bytes()

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """See DiskReader. For one thread at a time (the whole reader has one such stream)."""
        end = self.size_bytes if length_bytes is None else min(offset_bytes + length_bytes, self.size_bytes)
        return merged(self._raw_extents(offset_bytes, end))

    def changed(self) -> Iterator[Extent] | None:
        """See DiskReader. For one thread at a time, and not together with extents().

        What is said not to have changed, but is zero to the end of the disk, is given, too (see _tail_bytes).
        """
        return None if self._counts is None else merged(self._changed_extents(self._counts))

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        """See DiskReader."""
        if self._fd is not None:
            yield _RawFile(self._fd, self._name)
            return
        with contextlib.closing(_Handle(self._socket, self._name, self._export)) as handle:
            yield handle

    def _raw_extents(self, offset: int, end: int) -> Iterator[Extent]:
        for at, length, flags in _status(self._first, offset, end):
            yield Extent(at, length, _kind(flags))

    def _changed_extents(self, counts: _Handle) -> Iterator[Extent]:
        tail = self._tail_bytes(counts)
        for offset, length, value in _status(counts, 0, self.size_bytes, needed=True):
            begin = offset if value == _CHANGED else max(offset, tail)
            if begin < offset + length:
                # What changed and reads as zero is a change, too: what was there before must go.
                yield from self._raw_extents(begin, offset + length)

    def _tail_bytes(self, counts: _Handle) -> int:
        """Return the offset behind which all that did not change reads as zero.

        A disk that was cut and made as large as before has zeroes at its end where data may have been, and
        QEMU's bitmap calls them clean (seen with 7.2). So zeroes at the end always count as changed. Clean
        data proves that the disk was not cut below it.
        """
        end = self.size_bytes
        while end > 0:
            begin = max(0, end - _STATUS_WINDOW_BYTES)
            for offset, length, value in reversed(list(_status(counts, begin, end, needed=True))):
                if value == _CHANGED:
                    continue
                for extent in reversed(list(self._raw_extents(offset, offset + length))):
                    if not extent.kind.reads_as_zero:
                        return extent.end_bytes
            end = begin
        return 0


class ExportReader(NbdReader):
    """A DiskReader over an export of a backup job, whose guest writes on. Make it with open_export."""

    def _raw_extents(self, offset: int, end: int) -> Iterator[Extent]:
        """Yield extents, believing a zero only if it is said twice.

        QEMU keeps the guest's writes apart from reads of the export, but not from questions about it (seen
        in the source of 7.2). An answer may be made of the scratch file before, and of the disk after, a
        zero came to where data was. By the time of a second question the scratch file holds what was there.
        """
        while offset < end:
            stop = min(end, offset + _STATUS_WINDOW_BYTES)
            first = list(_status(self._first, offset, stop))
            for at, length, flags in first:
                if not flags & _STATE_ZERO:
                    yield Extent(at, length, Kind.DATA)
                    continue
                for again, part, said in _status(self._first, at, at + length):
                    yield Extent(again, part, _kind(flags & said))
            offset = stop


def _status(
    handle: _Handle, offset: int, end: int, *, needed: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Yield (offset, length, flags) of what the handle's context says, without gaps."""
    while offset < end:
        # A server may answer for less than was asked, or for more; both are allowed to it.
        window = min(end - offset, _STATUS_WINDOW_BYTES)
        for length, flags in handle.block_status(offset, window, needed=needed):
            length = min(length, end - offset)  # noqa: PLW2901 -- clip the last one
            if length == 0:
                break
            yield offset, length, flags
            offset += length


class _Handle:
    """One libnbd handle. Every error of the library comes out as CopyFailed."""

    def __init__(self, socket: str, name: str, export: str = "", context: str = _ALLOCATION) -> None:
        import nbd

        self._nbd: Any = nbd
        self._name = name
        self._context = context
        handle = nbd.NBD()
        handle.set_export_name(export)
        handle.add_meta_context(context)
        handle.set_pread_initialize(False)  # a failed read is an error here, its buffer never used
        self._handle: Any = handle
        self._try("connecting", lambda: handle.connect_unix(socket))

    def size_bytes(self) -> int:
        return int(self._try("asking for the size", self._handle.get_size))

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        assert len(buffer) <= _REQUEST_LIMIT_BYTES
        self.pread_pieces([(buffer, offset_bytes)])

    def pread_pieces(self, pieces: Pieces) -> None:
        first, length = pieces[0][1], sum(len(buffer) for buffer, _ in pieces)
        self._try(f"reading {length} bytes at {first}", lambda: self._pread(pieces))

    def block_status(self, offset: int, length: int, *, needed: bool = False) -> list[tuple[int, int]]:
        """Return (length, flags) pairs that begin at *offset*: at least one, of any total length.

        A server without the context gives no flags; where they are *needed*, that raises CopyFailed.
        """
        if not self._handle.can_meta_context(self._context):
            if needed:
                raise self._failed(f"asking for {self._context}", "the server does not have it")
            return [(length, 0)]
        pairs: list[tuple[int, int]] = []

        def take(context: str, _offset: int, entries: list[int], _error: Any) -> int:
            if context == self._context:
                pairs.extend(zip(entries[::2], entries[1::2], strict=True))
            return 0

        self._try(
            f"asking what is allocated at {offset}",
            lambda: self._handle.block_status(length, offset, take),
        )
        if not pairs or pairs[0][0] == 0:
            raise self._failed(f"asking what is allocated at {offset}", "the server gave no answer")
        return pairs

    def close(self) -> None:
        with contextlib.suppress(self._nbd.Error):
            self._handle.shutdown()
        self._handle = None  # this binding closes a handle when nothing refers to it any more

    def _pread(self, pieces: Pieces) -> None:
        # The synchronous call would allocate its own buffer; these fill ours in place, several at a time.
        waiting = []
        for buffer, offset in pieces:
            step = max(_PIECE_BYTES, len(buffer) // _IN_FLIGHT)
            waiting += [
                self._handle.aio_pread(self._nbd.Buffer.from_buffer(buffer[at : at + step]), offset + at)
                for at in range(0, len(buffer), step)
            ]
        failed = None
        while waiting:
            try:
                if self._handle.aio_command_completed(waiting[-1]):
                    waiting.pop()
                else:
                    self._handle.poll(-1)
            except self._nbd.Error as error:
                if self._handle.aio_is_dead() or self._handle.aio_is_closed():
                    raise
                # The others may still be writing into the buffer: their ends are waited for.
                failed = failed or error
                waiting.pop()
        if failed is not None:
            raise failed

    def _try(self, doing: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self._nbd.Error as error:
            raise self._failed(doing, str(error.string)) from error

    def _failed(self, doing: str, why: str) -> CopyFailed:
        return _read_failed(self._name, doing, why)


class _RawFile(OneByOne):
    """A raw image, read from its file. For several threads; the descriptor is not closed here."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset_bytes + done)
            except OSError as error:
                raise _read_failed(self._name, f"reading {len(buffer)} bytes at {offset_bytes}",
                                   os.strerror(error.errno or 0)) from error
            if count == 0:  # QEMU rounds the size of a file up to sectors, and reads zeroes there
                buffer[done:] = bytes(len(buffer) - done)
                return
            done += count


def _identity(place: ImagePlace) -> FileIdentity | None:
    """Return what tells whether QEMU opened the file that we did; None if it opens no raw file."""
    if not (place.kind.is_local and place.driver == "raw"):
        return None
    with contextlib.suppress(OSError):
        return place.identity()
    return None


@contextlib.contextmanager
def _raw_file(place: ImagePlace, before: FileIdentity | None) -> Iterator[int | None]:
    """Open the file of a raw image that QEMU has open since *before*; None if QEMU is to read it.

    The path led to the same file before QEMU opened it and does now: so QEMU has that file open.
    """
    fd = -1
    try:
        if before is not None:
            with contextlib.suppress(OSError):
                fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
                if not before.same_file(file_identity(f"/proc/self/fd/{fd}")):
                    os.close(fd)
                    fd = -1
        yield fd if fd >= 0 else None
    finally:
        if fd >= 0:
            os.close(fd)


def _read_failed(name: str, doing: str, why: str) -> CopyFailed:
    return CopyFailed(
        f"Reading {name} failed while {doing}: {why}.",
        "check the storage of the image (dmesg, qemu-img check), then run the command again",
    )


def _locked_name(place: ImagePlace) -> str:
    """Return the image's name so that QEMU opens it only when nobody else writes to it.

    A qcow2 is locked against writers by its own driver. An NBD export of a raw image shares it
    with writers (seen with QEMU 7.2: a running guest's disk opened without a word), so a
    filter that shares nothing goes between: blkdebug, with no rules, is the one QEMU has for it.
    """
    options = place.qemu_options()
    if place.kind.is_local and place.driver == "raw":
        options["file"] = {
            "driver": "blkdebug", "unshare-child-perms": ["write", "resize"], "image": options["file"]}
    return "json:" + json.dumps(options)


def _wait_until_ready(
    server: process.Helper, socket: str, place: ImagePlace, deadline: Deadline, clock: Clock
) -> None:
    while True:
        if server.poll() is not None:
            said = server.stdout.read().decode(errors="replace").strip() if server.stdout else ""
            if said.startswith("setpriv:"):
                raise ProgramMissing("qemu-nbd")
            raise CopyFailed(f"QEMU can't open {place.text()}: {_plain(said)}", _advice(said, place))
        if os.path.exists(socket):
            with contextlib.suppress(CopyFailed), contextlib.closing(_Handle(socket, place.text())):
                return
        if deadline.passed():
            raise CopyFailed(
                f"qemu-nbd did not open {place.text()} within {deadline.timeout_s:.0f} s.",
                f"qemu-img info -U '{place.json_name()}'",
            )
        clock.pause(_POLL_S)


def _plain(said: str) -> str:
    """Return qemu-nbd's message without its name and without the json: text of the image."""
    text = said.removeprefix("qemu-nbd: ")
    head, found, tail = text.partition("}': ")
    return tail if found and "json:" in head else text


def _advice(said: str, place: ImagePlace) -> str:
    if "lock" in said:
        return "find who writes to the image (lsof, virsh list); when it is done, run the command again"
    return f"qemu-img info -U '{place.json_name()}'"


def _kind(flags: int) -> Kind:
    if not flags & _STATE_ZERO:
        return Kind.DATA
    return Kind.HOLE if flags & _STATE_HOLE else Kind.ZERO
