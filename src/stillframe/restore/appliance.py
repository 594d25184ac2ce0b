"""Looking into a snapshot's disks: exports, and a worker with libguestfs, whose appliance mounts them.

The host mounts nothing and activates no volume: what parses the guest's disks is the appliance, a
small machine of QEMU's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillframe import process
from stillframe.clock import Clock, Deadline
from stillframe.errors import (
    ApplianceFailed,
    ArchiveRefused,
    FilesystemLocked,
    FilesystemUnknown,
    LibguestfsMissing,
    PathUnknown,
    StillframeError,
)
from stillframe.restore.appliance_wire import (
    Done,
    Drive,
    Failed,
    Key,
    Launched,
    Locked,
    Message,
    Mounted,
    Setup,
    Task,
    Warned,
    Wire,
)
from stillframe.restore.export import Export, exported, private_folder, python_environment
from stillframe.restore.export_order import Order

PATIENCE_S = 120.0
_POLL_S = 0.2
_END_TIMEOUT_S = 5.0
_END_POLL_S = 0.02
_LOG_SHOWN_BYTES = 2000
#: What supermin says, which makes the appliance.
_NO_KERNEL = re.compile(r"failed to find a suitable kernel|vmlinuz.*[Pp]ermission denied")
#: What a worker may end with.
_ERRORS = {cls.code: cls for cls in (
    ApplianceFailed, ArchiveRefused, FilesystemLocked, FilesystemUnknown, PathUnknown)}


@dataclass(frozen=True)
class Person:
    """Who is told how far it is, asked for keys (None: nobody can be), and who may want it to end.

    *ask* is given the device, and whether the last key was wrong.
    """

    say: Callable[[str], None]
    warn: Callable[[str], None]
    ask: Callable[[str, bool], str | None] | None
    stop: Callable[[], StillframeError | None]


class Appliance:
    """An appliance that is starting or runs, and what its worker says to tasks, one after the other.

    What is not for the command goes to the person. An answer must be heard to its end before the next task.
    """

    def __init__(self, wire: Wire, person: Person, clock: Clock, patience_s: float) -> None:
        self._wire = wire
        self._person = person
        self._clock = clock
        self._patience_s = patience_s

    def ask(self, task: Task) -> Iterator[Message]:
        """Yield what the worker says to a task. Raises what it failed with, ApplianceFailed."""
        self.tell(task)
        while not isinstance(message := self._next(), Done):
            if not isinstance(message, bytes) and not self._is_handled(message):
                yield message

    def tell(self, message: Message) -> None:
        """Say something to the worker. Raises ApplianceFailed if it died."""
        try:
            self._wire.say(message)
        except ConnectionError as error:
            raise _died() from error

    def data(self) -> io.BufferedReader:
        """Return a reader of the data that comes now (after Begun). It raises as `ask` does."""
        return io.BufferedReader(_Data(self._piece))

    def _piece(self) -> bytes:
        got = self._next()
        if not isinstance(got, bytes):
            raise ApplianceFailed("The worker broke off in mid-file.", "run the same command again")
        return got

    def _next(self) -> Message | bytes:
        """Return what comes next. Raises what *stop* returns, too."""
        deadline, is_ready = Deadline(self._clock, self._patience_s), False
        while not is_ready:
            # Also while one piece comes right after the other.
            if (end := self._person.stop()) is not None:
                raise end
            is_ready = self._wire.is_ready(_POLL_S)
            if not is_ready and deadline.passed():
                raise ApplianceFailed(
                    f"The appliance said nothing for {self._patience_s:.0f} s: it is slow, or hangs on "
                    "the disk.", "run the same command again with --timeout 10m")
        try:
            got = self._wire.receive()
        except (EOFError, ConnectionError) as error:
            raise _died() from error
        if isinstance(got, Failed):
            raise _ERRORS.get(got.code, ApplianceFailed)(got.message, got.next_command)
        return got

    def _is_handled(self, message: Message) -> bool:
        person = self._person
        if isinstance(message, Locked):
            self.tell(Key(person.ask(message.device, message.wrong) if person.ask else None))
        elif isinstance(message, Warned):
            person.warn(message.text)
        elif isinstance(message, Launched):
            person.say("the appliance runs; looking for file systems")
        elif not isinstance(message, Mounted):
            return False
        return True


class _Data(io.RawIOBase):
    """The data as a file. *piece* returns what comes next, b"" at the end."""

    def __init__(self, piece: Callable[[], bytes]) -> None:
        self._piece = piece
        self._left = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as there is data; 0 at the end."""
        if not self._left and not self._ended:
            self._left = memoryview(self._piece())
            self._ended = not self._left
        length = min(len(buffer), len(self._left))
        buffer[:length] = self._left[:length]
        self._left = self._left[length:]
        return length


@contextlib.contextmanager
def started(
    orders: Sequence[Order], person: Person, clock: Clock, patience_s: float = PATIENCE_S,
) -> Iterator[Appliance]:
    """Give an appliance with the disks of *orders*, which ends with the block.

    Raises LibguestfsMissing, ExportFailed, ApplianceFailed, ProgramMissing.
    """
    if importlib.util.find_spec("guestfs") is None:
        raise LibguestfsMissing
    with contextlib.ExitStack() as stack:
        exports = [stack.enter_context(exported(order, clock)) for order in orders]
        folder = stack.enter_context(private_folder())
        drives = tuple(Drive(export.name, export.socket) for export in exports)
        appliance = Appliance(stack.enter_context(_worker(folder, clock)), person, clock, patience_s)
        person.say("starting libguestfs's appliance (half a minute without KVM)")
        try:
            appliance.tell(Setup(drives, str(folder), person.ask is not None))
            yield appliance
        except StillframeError as error:
            _explain(error, exports, folder)
            raise


@contextlib.contextmanager
def _worker(folder: Path, clock: Clock) -> Iterator[Wire]:
    """Run a worker for the length of the block."""
    own, its = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(own)
        with its:
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                worker = stack.enter_context(process.running(
                    process.own_module("stillframe.restore.appliance_worker", str(its.fileno())),
                    environment=python_environment(), output=log, passing=(its.fileno(),)))
            finally:
                os.close(log)
        try:
            yield Wire(own)
        finally:
            # It ends QEMU and removes what libguestfs put elsewhere; if it hangs, QEMU ends soon after it.
            own.close()
            deadline = Deadline(clock, _END_TIMEOUT_S)
            while worker.poll() is None and not deadline.passed():
                clock.pause(_END_POLL_S)


def _died() -> ApplianceFailed:
    return ApplianceFailed("The worker that talks to the appliance died.", "run the same command again")


def _explain(error: StillframeError, exports: Sequence[Export], folder: Path) -> None:
    """Add to an error what the logs say that may be the cause."""
    said = _said(folder)
    if isinstance(error, ApplianceFailed) and _NO_KERNEL.search(said):
        error.message = "The appliance is made with a kernel of /boot, and there is none that can be read."
        error.next_command = (
            "apt-get install linux-image-amd64 (Debian)" if os.geteuid() == 0 else
            "sudo chmod 0644 /boot/vmlinuz-*   # Ubuntu lets root alone read them; or be root")
        return
    damage = [line for export in exports for line in export.said().splitlines()[-3:]]
    if isinstance(error, ApplianceFailed):
        damage.append(said)
    error.message = " ".join([error.message, *filter(None, damage)])


def _said(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / "log").read_text(errors="replace").strip()[-_LOG_SHOWN_BYTES:]
    return ""
