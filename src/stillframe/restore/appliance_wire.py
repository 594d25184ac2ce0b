"""What is said between `files` and its worker, and how: frames on a socket, with JSON or bytes in them.

The worker talks to an appliance that a hostile disk may have taken over. So nothing it says is
believed beyond these types and limits.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator, Sequence

import msgspec

from stillframe.errors import ApplianceFailed
from stillframe.units import MIB

FRAME_LIMIT_BYTES = 4 * MIB
_HEAD = struct.Struct(">cI")
_MESSAGE, _DATA = b"M", b"D"


class Drive(msgspec.Struct, frozen=True):
    """A disk of the snapshot, and the socket it is served at."""

    target: str
    socket: str


class Setup(msgspec.Struct, frozen=True, tag=True):
    """What the worker is told first. *folder* is its own; *can_ask*: there is somebody who knows keys."""

    drives: tuple[Drive, ...]
    folder: str
    can_ask: bool


class Task(msgspec.Struct, frozen=True, tag=True):
    """What the worker is to do next: *verb* is filesystems, list, cat or get. *keys* open what is encrypted.

    *filesystem*: the device to mount alone; "" for what inspection finds.
    """

    verb: str
    paths: tuple[str, ...] = ()
    filesystem: str = ""
    keys: tuple[str, ...] = ()
    recursive: bool = False


class Key(msgspec.Struct, frozen=True, tag=True):
    """The answer to Locked: a key, None if there is no more."""

    text: str | None


class Launched(msgspec.Struct, frozen=True, tag=True):
    """The appliance runs."""


class Mounted(msgspec.Struct, frozen=True, tag=True):
    """What the paths are of is mounted."""


class Locked(msgspec.Struct, frozen=True, tag=True):
    """A key is asked for. *wrong*: the last one did not open it."""

    device: str
    wrong: bool


class Warned(msgspec.Struct, frozen=True, tag=True):
    """Something that a person should know."""

    text: str


class FileSystem(msgspec.Struct, frozen=True):
    """A file system, or what there is in its place. *mounted_at*: where the guest's own system has it."""

    device: str
    disk: str
    type: str
    label: str
    size_bytes: int
    mounted_at: str


class Found(msgspec.Struct, frozen=True, tag=True):
    """All file systems; *systems* are the names of the operating systems on them."""

    filesystems: tuple[FileSystem, ...]
    systems: tuple[str, ...]


class Entry(msgspec.Struct, frozen=True):
    """A file. *mode* has its kind, too; *links_to* is a symbolic link's target. No facts: *mode* is 0."""

    path: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size_bytes: int = 0
    modified_ns: int = 0
    links_to: str = ""


class Listed(msgspec.Struct, frozen=True, tag=True):
    """Some of the entries of a folder, or of a path that is no folder (*folder* "")."""

    folder: str
    entries: tuple[Entry, ...]


class Begun(msgspec.Struct, frozen=True, tag=True):
    """Data follows: of the file itself for `cat`, else a tar archive whose root is *path*."""

    path: str
    size_bytes: int | None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The end of a task, or of the worker before it had one, by an error of the tree."""

    code: str
    message: str
    next_command: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """The end of a task."""


Message = (Setup | Task | Key | Launched | Mounted | Locked | Warned | Found | Listed | Begun | Failed | Done)
_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


class Wire:
    """One end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def say(self, message: Message) -> None:
        """Send a message."""
        self._send(_MESSAGE, msgspec.json.encode(message))

    def send(self, data: bytes | memoryview) -> None:
        """Send a piece of data; none is its end."""
        self._send(_DATA, data)

    def is_ready(self, wait_s: float) -> bool:
        """Return whether something came within *wait_s*."""
        return bool(select.select([self._connection], [], [], wait_s)[0])

    def receive(self) -> Message | bytes:
        """Return what comes next. Raises ApplianceFailed for what is no frame, EOFError at the end."""
        kind, length = _HEAD.unpack(self._exactly(_HEAD.size))
        if length > FRAME_LIMIT_BYTES:
            raise _improper()
        content = self._exactly(length)
        if kind == _DATA:
            return content
        try:
            return _decoder.decode(content)
        except msgspec.DecodeError as error:
            raise _improper() from error

    def hear(self) -> Message:
        """Return the message that comes next. Raises as receive, ApplianceFailed for data."""
        heard = self.receive()
        if isinstance(heard, bytes):
            raise _improper()
        return heard

    def _send(self, kind: bytes, content: bytes | memoryview) -> None:
        self._connection.sendall(_HEAD.pack(kind, len(content)))
        self._connection.sendall(content)

    def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = self._connection.recv(min(MIB, length - len(parts)))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


def batches(entries: Sequence[Entry], most: int = 500) -> Iterator[tuple[Entry, ...]]:
    """Yield the entries in parts that fit into a frame."""
    for first in range(0, len(entries), most):
        yield tuple(entries[first : first + most])


def _improper() -> ApplianceFailed:
    return ApplianceFailed("The worker that talks to the appliance said what can't be understood.",
                           "run the same command again; if it happens again, report it")
