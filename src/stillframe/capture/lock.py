"""One run at a time for each domain, by a file lock that ends with the process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stillframe.clock import Clock, Deadline
from stillframe.errors import RunInProgress, StateFolderUnusable

_PAUSE_S = 0.1


@contextlib.contextmanager
def domain_lock(
    state_folder: Path, uuid: str, name: str, purpose: str, clock: Clock, wait_s: float = 2.0
) -> Iterator[None]:
    """Hold the domain for the length of the block.

    A holder that is gone within *wait_s* is waited for: `status` and the guard hold it for an
    instant. Raises RunInProgress naming the other run.
    """
    folder = state_folder / "locks"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / uuid, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateFolderUnusable(
            f"The lock folder {folder} can't be used: {error}", f"ls -ld {folder}"
        ) from error
    try:
        deadline = Deadline(clock, wait_s)
        while not _taken(descriptor):
            if deadline.passed():
                raise RunInProgress(
                    f"Another stillframe works on {name}: {_holder(descriptor)}.",
                    "stillframe status   # wait until it is done, then run again",
                )
            clock.pause(_PAUSE_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{purpose}, process {os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_holder(state_folder: Path, uuid: str) -> str:
    """Return who holds the domain ("" if nobody does), without taking the lock."""
    try:
        descriptor = os.open(state_folder / "locks" / uuid, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    else:
        return ""
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 500, 0).decode(errors="replace") or "a run that just began"
