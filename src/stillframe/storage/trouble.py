"""What an OSError from a storage folder means to the user."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from stillframe.errors import StorageError, StorageFull, StorageLost

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def storage_errors(folder: str, what: str) -> Iterator[None]:
    """Turn every OSError in the block, which does *what*, into what it means for the storage in *folder*."""
    try:
        yield
    except OSError as error:
        raise _meaning(folder, what, error) from error


def absent(folder: str) -> StorageLost:
    """Return the error for a folder that is absent or empty, as a mount point is while nothing is mounted."""
    return StorageLost(
        f"There is nothing in {folder}: no repository was made there, or its file system is not mounted.",
        f"ls -la {folder}; findmnt -T {folder}   # mount it, then run again")


def _meaning(folder: str, what: str, error: OSError) -> StorageError:
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return StorageFull(
            f"The storage {folder} is full ({why}): {what}. What was stored before is whole.",
            f"df -h {folder}; df -i {folder}   # free some space, then run again")
    if error.errno in _FORBIDDEN:
        forbidden = StorageLost(
            f"The storage {folder} forbids it ({why}): {what}.",
            f"ls -ld {error.filename or folder}; findmnt -T {folder}")
        forbidden.retry = False  # it does not pass: who reads a read-only folder must not wait for it
        return forbidden
    return StorageLost(
        f"The storage {folder} failed ({why}): {what}. What was stored before is whole.",
        f"ls -ld {folder}; dmesg | tail   # then run again")
