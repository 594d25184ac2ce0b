"""A qcow2 image as a target: written by QEMU itself, through a private qemu-nbd.

qemu-nbd writes whatever a qcow2 can be, many requests of a mebibyte are in flight, and what is not
written takes no room. (qemu-img convert would need the disk as a whole raw file first, or a
server of ours to read it from.) Until a new image has its name nothing of it needs to be durable: QEMU is
told not to wait for the disk, and one fsync comes at the end.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from typing import Any

from stillframe import process
from stillframe.block.image import ImagePlace, file_place
from stillframe.clock import Clock, Deadline
from stillframe.errors import (
    DestinationFull,
    DestinationLost,
    DestinationUnwritable,
    GuestState,
    ProgramMissing,
    TargetExists,
)
from stillframe.restore.target import (
    Naming,
    Target,
    Wishes,
    check_room,
    in_use,
    kept_away,
    look,
    small,
    unwritable,
    write_errors,
)
from stillframe.units import GIB, MIB, size_text

_ALLOCATION = "base:allocation"
_STATE_ZERO = 2
_REQUEST_BYTES = 4 * MIB
_IN_FLIGHT = 16
_START_TIMEOUT_S = 30.0
_CREATE_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 600.0
_POLL_S = 0.01
_SECTOR_BYTES = 512
# glibc gives buffers of this size back after each request: keeping them doubles the speed (FACTS 11).
_KEEP_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "2147483648",
                 "MALLOC_TOP_PAD_": "67108864"}
# docs/interop/qcow2.txt of QEMU: magic, version, backing file offset and size, cluster bits, size,
# encryption method; the incompatible features stand at 72 since version 3.
_HEADER = struct.Struct(">4sIQIIQI")
_FEATURES = struct.Struct(">Q")
_FEATURES_AT = 72
_EXTERNAL_DATA = 1 << 2


@contextlib.contextmanager
def open_qcow2_target(wishes: Wishes, size_bytes: int, data_bytes: int, clock: Clock) -> Iterator[Target]:
    """Open a qcow2 image for a disk of *size_bytes*, *data_bytes* of which are not zero.

    Raises TargetExists, TargetSmall, TargetInUse, NotPermitted, DestinationUnwritable, ProgramMissing.
    """
    facts = look(wishes)
    if facts is not None and stat.S_ISBLK(facts.st_mode):
        # A new image would take the place of the device's node, on the file system of /dev.
        raise _unfit(wishes.path, "a block device holds a raw disk", "--format raw")
    if facts is not None and wishes.delta:
        _check_existing(wishes.path, size_bytes)
        with open_image_target(file_place(wishes.path, "qcow2"), clock) as target:
            yield target
        return
    with kept_away(wishes.path, facts), Naming(wishes.path, replace=facts is not None) as naming:
        check_room(wishes.path, data_bytes)
        with write_errors(wishes.path, DestinationUnwritable):
            os.close(os.open(naming.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        rounded = -(-size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES
        process.run(["qemu-img", "create", "-q", "-f", "qcow2", naming.temporary, str(rounded)],
                    timeout_s=_CREATE_TIMEOUT_S)
        with _served(file_place(naming.temporary, "qcow2"), wishes.path, "unsafe", clock) as server:
            yield Qcow2Target(server, naming.temporary, wishes.path, naming, clock)


@contextlib.contextmanager
def open_image_target(place: ImagePlace, clock: Clock) -> Iterator[Target]:
    """Open an image that is there, whatever QEMU reaches it by: what is written goes into the topmost image.

    Its persistent bitmaps mark what is written, so that a checkpoint stays true.
    Raises TargetInUse, DestinationUnwritable, ProgramMissing.
    """
    with _served(place, place.text(), "writeback", clock) as server:
        yield Qcow2Target(server, place.path, place.text(), None, clock)


class Qcow2Target:
    """See Target. *image* is the file that is written ("" if it is none), *path* what it is for."""

    def __init__(self, server: _Server, image: str, path: str, naming: Naming | None, clock: Clock) -> None:
        self._server = server
        self._image = image
        self._path = path
        self._naming = naming
        self._clock = clock
        self._touched = False
        self.is_blank = naming is not None

    @property
    def left_behind(self) -> str:
        """See Target."""
        return f"{self._path} is incomplete: it is not to be used." if self._touched else ""

    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """See Target."""
        for at in range(0, len(buffer), _REQUEST_BYTES):
            self._server.read(buffer[at : at + _REQUEST_BYTES], offset_bytes + at)

    def data_ranges(self, offset_bytes: int, end_bytes: int) -> Iterator[tuple[int, int]]:
        """See Target."""
        at = offset_bytes
        while at < end_bytes:
            for length, flags in self._server.status(at, min(end_bytes - at, GIB)):
                until = min(at + length, end_bytes)
                if not flags & _STATE_ZERO and until > at:
                    yield at, until
                at = until

    def write(self, content: memoryview, offset_bytes: int) -> None:
        """See Target."""
        self._touched = self._naming is None
        for at in range(0, len(content), _REQUEST_BYTES):
            self._server.write(content[at : at + _REQUEST_BYTES], offset_bytes + at)

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """See Target."""
        self._touched = self._naming is None
        for at in range(offset_bytes, offset_bytes + length_bytes, GIB):
            self._server.zero(at, min(GIB, offset_bytes + length_bytes - at))

    def flush(self) -> None:
        """See Target."""
        self._server.flush()

    def publish(self) -> None:
        """See Target."""
        self._server.finish(self._clock)
        if not self._image:
            return
        with write_errors(self._path):
            fd = os.open(self._image, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            if self._naming is not None:
                self._naming.publish()


class _Server:
    """A qemu-nbd that serves one image for writing, and the one connection to it."""

    def __init__(self, helper: process.Helper, handle: Any, path: str) -> None:
        import nbd

        self._nbd: Any = nbd
        self._helper = helper
        self._handle = handle
        self._path = path
        #: Writes that are under way, and what must stay as it is until they are done.
        self._writes: dict[int, tuple[Any, memoryview]] = {}

    def read(self, buffer: memoryview, offset: int) -> None:
        with self._errors("reading"):
            cookie = self._handle.aio_pread(self._nbd.Buffer.from_buffer(buffer), offset)
            while not self._handle.aio_command_completed(cookie):
                self._handle.poll(-1)

    def write(self, content: memoryview, offset: int) -> None:
        with self._errors("writing"):
            self._wait(_IN_FLIGHT - 1)
            shared = self._nbd.Buffer.from_buffer(content)
            self._writes[self._handle.aio_pwrite(shared, offset)] = shared, content

    def zero(self, offset: int, length: int) -> None:
        with self._errors("writing"):
            self._handle.zero(length, offset)

    def status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return (length, flags) pairs that begin at *offset*, at least one."""
        pairs: list[tuple[int, int]] = []

        def take(_context: str, _offset: int, entries: list[int], _error: Any) -> int:
            pairs.extend(zip(entries[::2], entries[1::2], strict=True))
            return 0

        with self._errors("asking what is allocated"):
            self._handle.block_status(length, offset, take)
        return pairs or [(length, 0)]

    def flush(self) -> None:
        """Have all written, durably."""
        with self._errors("writing"):
            self._wait(0)
            self._handle.flush()

    def finish(self, clock: Clock) -> None:
        """Have all written, and wait until qemu-nbd has closed the image."""
        self.flush()
        with self._errors("writing"):
            self._handle.shutdown()
        deadline = Deadline(clock, _END_TIMEOUT_S)
        while self._helper.poll() is None:
            if deadline.passed():
                raise self._failed(f"qemu-nbd did not end within {_END_TIMEOUT_S:.0f} s")
            clock.pause(_POLL_S)
        if self._helper.returncode != 0:
            raise self._failed(f"qemu-nbd ended with {self._helper.returncode}: {_said(self._helper)}")

    def _wait(self, most: int) -> None:
        """Wait until no more than *most* writes are under way."""
        for cookie in list(self._writes):
            if self._handle.aio_command_completed(cookie):
                del self._writes[cookie]
        while len(self._writes) > most:
            self._handle.poll(-1)
            for cookie in list(self._writes):
                if self._handle.aio_command_completed(cookie):
                    del self._writes[cookie]

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except self._nbd.Error as error:
            if "ENOSPC" in str(error.errno):
                raise DestinationFull(f"{self._path} ran out of space.",
                                      f"df -h {os.path.dirname(self._path)}", GuestState.UNTOUCHED) from error
            raise self._failed(f"{doing}: {error.string}") from error

    def _failed(self, why: str) -> DestinationLost:
        return DestinationLost(f"Writing {self._path} failed: {why}.", f"qemu-img check {self._path}",
                               GuestState.UNTOUCHED)


@contextlib.contextmanager
def _served(place: ImagePlace, path: str, cache: str, clock: Clock) -> Iterator[_Server]:
    """Serve the image for the length of the block; qemu-nbd takes QEMU's lock on it."""
    with tempfile.TemporaryDirectory(prefix="stillframe-nbd-") as folder:
        socket = os.path.join(folder, "socket")
        command = ["qemu-nbd", f"--cache={cache}", "--discard=unmap", "--aio=threads", "--socket", socket,
                   place.json_name()]
        with process.running(command, environment=_KEEP_BUFFERS) as helper:
            handle = _connected(helper, socket, path, clock)
            try:
                yield _Server(helper, handle, path)
            finally:
                del handle  # the binding closes it


def _connected(helper: process.Helper, socket: str, path: str, clock: Clock) -> Any:
    import nbd

    deadline = Deadline(clock, _START_TIMEOUT_S)
    while True:
        if helper.poll() is not None:
            said = _said(helper)
            if said.startswith("setpriv:"):
                raise ProgramMissing("qemu-nbd")
            if "lock" in said:
                raise in_use(path, "A guest or another program of QEMU has it open.")
            raise DestinationUnwritable(f"QEMU can't open {path}: {said}", f"qemu-img check {path}")
        if os.path.exists(socket):
            # The server ends with its first client: a connection that only looks would end it.
            handle = nbd.NBD()
            handle.add_meta_context(_ALLOCATION)
            handle.set_pread_initialize(False)
            with contextlib.suppress(nbd.Error):
                handle.connect_unix(socket)
                return handle
        if deadline.passed():
            raise DestinationUnwritable(f"qemu-nbd did not open {path} within {_START_TIMEOUT_S:.0f} s.",
                                        f"qemu-img check {path}")
        clock.pause(_POLL_S)


def _said(helper: process.Helper) -> str:
    return helper.stdout.read().decode(errors="replace").strip() if helper.stdout else ""


def _check_existing(path: str, size_bytes: int) -> None:
    """Refuse an image that can't be made equal to a disk by writing to it alone."""
    try:
        with open(path, "rb") as file:
            head = file.read(_FEATURES_AT + _FEATURES.size)
    except OSError as error:
        raise unwritable(path, error) from error
    if len(head) < _HEADER.size or not head.startswith(b"QFI\xfb"):
        raise _unfit(path, "it is no qcow2 image; name its format with --format")
    _, version, backing, _, _, size, encryption = _HEADER.unpack_from(head)
    features = 0
    if version >= 3 and len(head) == _FEATURES_AT + _FEATURES.size:
        (features,) = _FEATURES.unpack_from(head, _FEATURES_AT)
    if backing or features & _EXTERNAL_DATA:
        raise _unfit(path, "it stands upon another image")
    if encryption:
        raise _unfit(path, "it is encrypted")
    if size < size_bytes:
        raise small(path, f"has {size_text(size)}", size_bytes)
    if size - size_bytes >= _SECTOR_BYTES:
        raise _unfit(path, f"it is larger ({size_text(size)}) than the disk")


def _unfit(path: str, why: str, option: str = "--force to replace it") -> TargetExists:
    return TargetExists(f"{path} exists, and can't be brought up to date: {why}.",
                        f"run the command again with {option}")
