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
from collections.abc import Callable, Iterator
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
#: Which image of the chain holds a stretch: 0 none, 1 the topmost, more those below it.
_DEPTH = "qemu:allocation-depth"
_DEPTH_TOP = 1
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


class Connection(Protocol):
    """One stream of reads; for one thread at a time."""

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """Fill the whole *buffer* (at most 32 MiB) from *offset_bytes*. Raises CopyFailed."""
        ...


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
    place: ImagePlace, *, clock: Clock, connections: int = 4, timeout_s: float = 30.0,
    top_changed: bool = False,
) -> Iterator[DiskReader]:
    """Open the image and its whole backing chain for reading, for the length of the block.

    *top_changed*: what changed, for the reader, is what the topmost image itself holds.

    At most *connections* connections can be open at a time, plus one for extents. Raises
    CopyFailed when QEMU refuses (the message says why: locked by a writer, missing, no rights)
    or when the server is not ready after *timeout_s*. The kernel ends the server with the
    *thread* that came here, so the block must be left by the same thread.
    """
    with tempfile.TemporaryDirectory(prefix="stillframe-nbd-") as folder:
        socket = os.path.join(folder, "socket")
        command = [
            "qemu-nbd", "--read-only", "--persistent", "--shared", str(connections + 1),
            "--aio=threads", "--socket", socket, *(["--allocation-depth"] if top_changed else []),
            _locked_name(place),
        ]
        before = _identity(place)
        with process.running(command, environment=_KEEP_BUFFERS) as server:
            _wait_until_ready(server, socket, place, Deadline(clock, timeout_s), clock)
            first = _Handle(socket, place.text(), _DEPTH if top_changed else "")
            with contextlib.closing(first), _raw_file(place, before) as fd:
                yield (TopReader if top_changed else NbdReader)(socket, place.text(), first, fd)


class NbdReader:
    """A DiskReader over an NBD server's unix socket; content comes from the descriptor, if there is one."""

    def __init__(self, socket: str, name: str, first: _Handle, fd: int | None = None) -> None:
        self._socket = socket
        self._name = name
        self._first = first
        self._fd = fd
        self.size_bytes = first.size_bytes()

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """See DiskReader. For one thread at a time (the whole reader has one such stream)."""
        end = self.size_bytes if length_bytes is None else min(offset_bytes + length_bytes, self.size_bytes)
        return merged(self._raw_extents(offset_bytes, end))

    def changed(self) -> Iterator[Extent] | None:
        """See DiskReader."""
        return None

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        """See DiskReader."""
        if self._fd is not None:
            yield _RawFile(self._fd, self._name)
            return
        with contextlib.closing(_Handle(self._socket, self._name)) as handle:
            yield handle

    def _raw_extents(self, offset: int, end: int) -> Iterator[Extent]:
        while offset < end:
            # A server may answer for less than was asked, or for more; both are allowed to it.
            for length, flags in self._first.block_status(offset, min(end - offset, _STATUS_WINDOW_BYTES)):
                length = min(length, end - offset)  # noqa: PLW2901 -- clip the last one
                if length == 0:
                    break
                yield Extent(offset, length, _kind(flags))
                offset += length


class TopReader(NbdReader):
    """A reader of a chain that tells what its topmost image holds itself: that is what changed.

    A cluster that was zeroed or discarded is held there, too, as a cluster that reads as zero.
    """

    def changed(self) -> Iterator[Extent] | None:
        """See DiskReader. One walk at a time, and none together with extents()."""
        return merged(self._raw_changed())

    def _raw_changed(self) -> Iterator[Extent]:
        offset = 0
        while offset < self.size_bytes:
            window = min(self.size_bytes - offset, _STATUS_WINDOW_BYTES)
            for length, flags, depth in self._first.block_statuses(offset, window):
                length = min(length, self.size_bytes - offset)  # noqa: PLW2901 -- clip the last one
                if length and depth == _DEPTH_TOP:
                    yield Extent(offset, length, _kind(flags))
                offset += length


class _Handle:
    """One libnbd handle. Every error of the library comes out as CopyFailed."""

    def __init__(self, socket: str, name: str, also: str = "") -> None:
        import nbd

        self._nbd: Any = nbd
        self._name = name
        self._also = also
        handle = nbd.NBD()
        handle.add_meta_context(_ALLOCATION)
        if also:
            handle.add_meta_context(also)
        handle.set_pread_initialize(False)  # a failed read is an error here, its buffer never used
        self._handle: Any = handle
        self._try("connecting", lambda: handle.connect_unix(socket))

    def size_bytes(self) -> int:
        return int(self._try("asking for the size", self._handle.get_size))

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        assert len(buffer) <= _REQUEST_LIMIT_BYTES
        self._try(f"reading {len(buffer)} bytes at {offset_bytes}", lambda: self._pread(buffer, offset_bytes))

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return (length, flags) pairs that begin at *offset*: at least one, of any total length."""
        return self._status(_ALLOCATION, offset, length) or [(length, 0)]

    def block_statuses(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return (length, flags, what the other context says), as block_status does. Raises CopyFailed."""
        if not self._handle.can_meta_context(self._also):
            raise self._failed(f"asking for {self._also}", "the server does not offer it")
        also = self._status(self._also, offset, length)
        return list(zipped(self.block_status(offset, length), also))

    def _status(self, wanted: str, offset: int, length: int) -> list[tuple[int, int]]:
        if not self._handle.can_meta_context(wanted):
            return []
        pairs: list[tuple[int, int]] = []

        def take(context: str, _offset: int, entries: list[int], _error: Any) -> int:
            if context == wanted:
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

    def _pread(self, buffer: memoryview, offset: int) -> None:
        # The synchronous call would allocate its own buffer; this one fills ours in place.
        cookie = self._handle.aio_pread(self._nbd.Buffer.from_buffer(buffer), offset)
        while not self._handle.aio_command_completed(cookie):
            self._handle.poll(-1)

    def _try(self, doing: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self._nbd.Error as error:
            raise self._failed(doing, str(error.string)) from error

    def _failed(self, doing: str, why: str) -> CopyFailed:
        return _read_failed(self._name, doing, why)


def zipped(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield (length, value of *first*, value of *second*) for two lists of (length, value) from one offset.

    It ends where the shorter of the two does.
    """
    left, right = iter(first), iter(second)
    one, two = next(left, None), next(right, None)
    while one is not None and two is not None:
        length = min(one[0], two[0])
        if length:
            yield length, one[1], two[1]
        one = (one[0] - length, one[1]) if one[0] > length else next(left, None)
        two = (two[0] - length, two[1]) if two[0] > length else next(right, None)


class _RawFile:
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
