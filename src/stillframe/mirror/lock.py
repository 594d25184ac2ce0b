"""One writer at a time for a mirror folder, on whatever file system it lies.

flock on a file in the folder, which the kernel lets go when the process dies. Some
network shares don't know it: there a file is created that must not exist yet, with the
holder's host, process and start in it. It is taken over only from a process that is gone for certain.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from stillframe import process
from stillframe.errors import DestinationBusy, StorageError
from stillframe.mirror.layout import LOCK, LOCK_HELD
from stillframe.storage.files import FileServer

_NO_FLOCK = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
_TEXT_LIMIT_BYTES = 4096


@contextlib.contextmanager
def folder_lock(folder: Path, holder: str, keep: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock of *folder* for the length of the block. Raises DestinationBusy, OSError.

    If *keep* says so at the end, the lock is held until the process ends: a thread of it still
    hangs in that folder.
    """
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    text = _me(holder)
    try:
        by_file = not _flocked(fd, folder)
        if by_file:
            _take_file(folder / LOCK_HELD, text)
        else:
            # Only for people, and for the one that finds the lock taken.
            os.ftruncate(fd, 0)
            os.pwrite(fd, text.encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    try:
        yield
    finally:
        if not keep():
            if by_file and _text(folder / LOCK_HELD) == text:
                os.unlink(folder / LOCK_HELD)
            os.close(fd)


@contextlib.contextmanager
def far_lock(server: FileServer, address: str, holder: str, keep: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock of a folder on a server, where there is no flock: see folder_lock.

    Raises DestinationBusy, StorageError.
    """
    text = _me(holder)
    _take_far_file(server, address, text)
    try:
        yield
    finally:
        if not keep():
            # What can't be removed now is taken over by the next run: this process is dead then.
            with contextlib.suppress(StorageError, FileNotFoundError):
                if _far_text(server, LOCK_HELD) == text:  # else it was removed by hand, and another has it
                    server.remove(LOCK_HELD)


def _take_far_file(server: FileServer, address: str, text: str) -> None:
    mine = f"{LOCK_HELD}.{os.urandom(8).hex()}"
    for _ in range(2):
        server.write(mine, memoryview(text.encode()))
        try:
            server.publish(mine, LOCK_HELD)  # with all its text, or not at all
        except FileExistsError:
            server.remove(mine)
        else:
            return
        found = _far_text(server, LOCK_HELD)
        if not _is_dead(found):
            raise _busy(address, found, f"{LOCK_HELD} there")
        _take_away(server, address, found, f"{mine}.dead")
    raise _busy(address, "", f"{LOCK_HELD} there")


def _take_away(server: FileServer, address: str, dead: str, aside: str) -> None:
    """Remove the lock of a holder that is dead, unless another run did so and has it by now.

    Raises DestinationBusy if a third one took it while this one gave the other's back.
    """
    with contextlib.suppress(FileNotFoundError):
        server.publish(LOCK_HELD, aside)
        if _far_text(server, aside) == dead:
            server.remove(aside)
            return
        try:
            server.publish(aside, LOCK_HELD)
        except FileExistsError:
            server.remove(aside)
            raise _busy(address, _far_text(server, LOCK_HELD), f"{LOCK_HELD} there") from None


def _far_text(server: FileServer, path: str) -> str:
    try:
        content, _ = server.read(path, 0, _TEXT_LIMIT_BYTES)
    except FileNotFoundError:
        return ""
    return content.decode(errors="replace")


def _flocked(fd: int, folder: Path) -> bool:
    """Return whether flock works here and was taken. Raises DestinationBusy."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(folder, os.pread(fd, _TEXT_LIMIT_BYTES, 0).decode(errors="replace")) from error
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


def _take_file(path: Path, text: str) -> None:
    for _ in range(2):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            found = _text(path)
            if not _is_dead(found):
                raise _busy(path.parent, found, path) from None
            path.unlink(missing_ok=True)
            continue
        try:
            os.write(fd, text.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        return
    raise _busy(path.parent, "", path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _is_dead(text: str) -> bool:
    """Return whether the holder that *text* names is gone for certain.

    It is with a process that could be seen from here, and with an earlier boot of this machine. A host's name
    alone does not tell it from a clone or a container.
    """
    fields = _fields(text)
    if fields.get("host") != socket.gethostname() or not fields.get("pid", "").isdigit():
        return False
    if fields.get("space") == process.process_space():
        return not process.is_alive(int(fields["pid"]), fields.get("started", ""))
    machine = process.machine_id()
    return machine != "" and fields.get("machine") == machine and fields.get("boot") != process.boot_id()


def _fields(text: str) -> dict[str, str]:
    return dict(line.partition(" ")[::2] for line in text.splitlines())


def _me(holder: str) -> str:
    pid = os.getpid()
    return (f"holder {holder}\nhost {socket.gethostname()}\npid {pid}\nstarted {process.start_mark(pid)}\n"
            f"space {process.process_space()}\nmachine {process.machine_id()}\nboot {process.boot_id()}\n")


def _busy(folder: Path | str, text: str, path: Path | str | None = None) -> DestinationBusy:
    fields = _fields(text)
    named = (f"{fields['holder']}, process {fields.get('pid', '?')} on {fields.get('host', '?')}"
             if "holder" in fields else "another run")
    advice = "wait until that run is done, then run the command again"
    if path is not None:
        advice += f"; if you are sure that it is dead: rm {path}"
    return DestinationBusy(f"{folder} is being written to by {named}.", advice)
