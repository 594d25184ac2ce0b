"""Exports: one disk of a snapshot served by a private nbdkit, which reads the repository itself.

nbdkit speaks the protocol (several connections, TLS, copy-on-write) and calls our reader by its Python
plugin. An export that is `exported` dies with this process, killed or not; one that is started with
`start_export` outlives it, until `end_export`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Protocol
from urllib.parse import quote, urlencode

import msgspec

import stillframe
from stillframe import process
from stillframe.clock import Clock, Deadline
from stillframe.errors import ExportFailed, ProgramMissing
from stillframe.restore.export_order import Order

#: What nbdkit loads.
PLUGIN = Path(__file__).with_name("export_plugin.py")
_START_TIMEOUT_S = 60.0
_LEAVE_TIMEOUT_S = 1.0
_END_TIMEOUT_S = 5.0
_POLL_S = 0.01
_PREFIX = "stillframe-export-"
_LOG_SHOWN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Tcp:
    """A port to listen at. Without TLS *address* is to be a loopback one; "" is all addresses."""

    port: int
    address: str = ""
    certificates: str = ""
    psk: str = ""

    @property
    def is_encrypted(self) -> bool:
        """Whether a client must speak TLS."""
        return bool(self.certificates or self.psk)

    def options(self) -> list[str]:
        """Return nbdkit's options for it."""
        chosen = [f"--port={self.port}"]
        if self.address:
            chosen.append(f"--ipaddr={self.address}")
        if self.is_encrypted:
            chosen.append("--tls=require")
        if self.certificates:
            # Else anybody who speaks TLS could read the disk.
            chosen += [f"--tls-certificates={self.certificates}", "--tls-verify-peer"]
        if self.psk:
            chosen.append(f"--tls-psk={self.psk}")
        return chosen


@dataclass(frozen=True, slots=True)
class Serving:
    """How an order is served: at a socket of the export's folder, at another, or at a TCP port.

    *writable*: clients may write; what they write is kept apart, for as long as the server runs.
    """

    writable: bool = False
    socket: str = ""
    tcp: Tcp | None = None


@dataclass(frozen=True, slots=True)
class Export:
    """A server that runs. *mark* tells its process from any other (`process.start_mark`).

    *socket* is "" for one at a TCP port. *log* is the path of a file with what it says.
    """

    name: str
    uri: str
    socket: str
    pid: int
    mark: str
    log: str

    @property
    def is_running(self) -> bool:
        """Whether the server is there."""
        return process.is_alive(self.pid, self.mark)

    def said(self) -> str:
        """Return the end of its log."""
        return _end_of(self.log)

    def said_since(self, seen_bytes: int) -> tuple[list[str], int]:
        """Return the lines of its log behind the first *seen_bytes*, and where they end."""
        with contextlib.suppress(OSError), open(self.log, "rb") as file:
            file.seek(seen_bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
            return whole.decode(errors="replace").splitlines(), seen_bytes + len(whole) + len(newline)
        return [], seen_bytes


@contextlib.contextmanager
def exported(order: Order, clock: Clock, serving: Serving = Serving()) -> Iterator[Export]:
    """Serve a disk for the length of the block. The server dies with this process.

    Raises ProgramMissing, ExportFailed.
    """
    with (
        private_folder() as folder,
        _begun(order, folder, serving, process.running) as server,
    ):
        export = _ready(server, order, folder, serving, clock)
        try:
            yield export
        finally:
            server.kill()  # it keeps nothing, and would first wait for its clients to leave
            _remove_socket(folder, serving)  # not before it was ready: else it is another's


def start_export(order: Order, folder: Path, clock: Clock, serving: Serving = Serving()) -> Export:
    """Serve a disk from now on, whatever becomes of this process; its files are in *folder*, which exists.

    What an earlier server left in the folder is removed: make sure that it is gone (`end_export`).
    Raises ProgramMissing, ExportFailed: then none runs.
    """
    _remove_socket(folder, serving)
    order = msgspec.structs.replace(order, outlives=True)
    with _begun(order, folder, serving, _detached) as server:
        try:
            return _ready(server, order, folder, serving, clock)
        except BaseException:
            process.stop(server)
            raise


def end_export(export: Export, clock: Clock) -> None:
    """End a server that was started with `start_export`, if it is there; it is gone on return."""
    # With SIGTERM it ends its session, but not before its clients left.
    for number, wait_s in ((signal.SIGTERM, _LEAVE_TIMEOUT_S), (signal.SIGKILL, _END_TIMEOUT_S)):
        deadline = Deadline(clock, wait_s)
        if export.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(export.pid, number)
        while export.is_running and not deadline.passed():
            clock.pause(_POLL_S)
    if export.socket:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(export.socket)


class _Starter(Protocol):
    def __call__(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None, told: bytes | None,
        output: int,
    ) -> AbstractContextManager[process.Helper]: ...


@contextlib.contextmanager
def _detached(
    command: Sequence[str], *, environment: Mapping[str, str] | None, told: bytes | None, output: int,
) -> Iterator[process.Helper]:
    yield process.start_detached(command, environment=environment, told=told, output=output)


@contextlib.contextmanager
def _begun(order: Order, folder: Path, serving: Serving, start: _Starter) -> Iterator[process.Helper]:
    (folder / "pid").unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            server = stack.enter_context(start(
                _command(folder, serving), environment=python_environment(), told=order.encode(), output=log))
        finally:
            os.close(log)
        yield server


def _command(folder: Path, serving: Serving) -> list[str]:
    # In the foreground: nbdkit's fork would leave threads behind, and its number would be another.
    command = ["nbdkit", "--foreground", "--pidfile", str(folder / "pid")]
    command += serving.tcp.options() if serving.tcp else ["--unix", _socket(folder, serving)]
    command += ["--filter=cow"] if serving.writable else ["--readonly"]
    return [*command, "python", str(PLUGIN)]


def python_environment() -> dict[str, str]:
    """Return what leads another Python (a plugin's, a worker's) to what this one has."""
    own = str(Path(stillframe.__file__).parents[1])
    found = dict.fromkeys([own, *(entry for entry in sys.path if os.path.isabs(entry))])
    return {"PYTHONPATH": os.pathsep.join(found)}


def _ready(server: process.Helper, order: Order, folder: Path, serving: Serving, clock: Clock) -> Export:
    """Return the export once it takes clients. Raises ProgramMissing, ExportFailed."""
    deadline = Deadline(clock, _START_TIMEOUT_S)
    mark = process.start_mark(server.pid)
    log = str(folder / "log")
    # nbdkit writes this file when it is ready; a connection that only looks would count as a client.
    while not (folder / "pid").exists():
        if server.poll() is not None:
            raise _not_started(_end_of(log))
        if deadline.passed():
            raise _not_started(f"it was not ready within {_START_TIMEOUT_S:.0f} s. {_end_of(log)}")
        clock.pause(_POLL_S)
    return Export(order.name, _uri(order.name, folder, serving),
                  "" if serving.tcp else _socket(folder, serving), server.pid, mark, log)


def _not_started(said: str) -> ExportFailed | ProgramMissing:
    if said.startswith("setpriv:"):
        return ProgramMissing("nbdkit")
    why = next((line for line in said.splitlines() if line.strip()), "it said nothing")
    return ExportFailed(f"The server for the disk did not start: {why}",
                        "nbdkit --dump-plugin python   # is nbdkit with its Python plugin whole?")


def _socket(folder: Path, serving: Serving) -> str:
    return serving.socket or str(folder / "socket")


def _uri(name: str, folder: Path, serving: Serving) -> str:
    tcp = serving.tcp
    if tcp is None:
        return f"nbd+unix:///{quote(name)}?{urlencode({'socket': _socket(folder, serving)}, quote_via=quote)}"
    host = tcp.address or gethostname()
    where = f"[{host}]" if ":" in host else host
    return f"{'nbds' if tcp.is_encrypted else 'nbd'}://{where}:{tcp.port}/{quote(name)}"


def _remove_socket(folder: Path, serving: Serving) -> None:
    """Remove the socket, which nbdkit leaves behind."""
    if serving.tcp is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_socket(folder, serving))


def _end_of(log: str) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_SHOWN_BYTES))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Give a folder that nobody else can enter, for the block. What killed processes left is removed."""
    base = Path(tempfile.gettempdir())
    for old in base.glob(f"{_PREFIX}*"):
        _remove_if_left(old)
    folder, lock = _new_folder(base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new_folder(base: Path) -> tuple[Path, int]:
    """Return a new folder, and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else somebody took it for left behind before it was locked
            return folder, lock
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        # Who made it holds the lock as long as it lives.
        if os.fstat(lock).st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass
    finally:
        os.close(lock)
