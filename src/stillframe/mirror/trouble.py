"""What an OSError from the destination means to the user."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from stillframe.errors import (
    DestinationFull,
    DestinationLost,
    DestinationUnwritable,
    StillframeError,
    StorageError,
    StorageFull,
)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class StorageTrouble(OSError):
    """What a server's storage raised, on its way through code that knows files; *meaning* is what it was."""

    def __init__(self, meaning: StorageError) -> None:
        number = errno.ENOSPC if isinstance(meaning, StorageFull) else errno.EIO
        super().__init__(number, meaning.message)
        self.meaning = meaning


@contextlib.contextmanager
def destination_errors(path: str, *, begun: bool = False) -> Iterator[None]:
    """Turn every OSError in the block into what it means for the destination *path*.

    Once the run has *begun* (the guest was touched), a destination that forbids writing is lost.
    """
    try:
        yield
    except OSError as error:
        raise _meaning(path, error, begun) from error


def _meaning(path: str, error: OSError, begun: bool) -> StillframeError:
    if isinstance(error, StorageTrouble):
        return error.meaning
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return DestinationFull(
            f"The destination {path} is full ({why}). The mirror before this run is whole.",
            f"df -h {path}   # free some space, then run again")
    if error.errno == errno.EFBIG:
        return DestinationFull(
            f"The file system of {path} does not take files this large ({why}).",
            "choose a destination with another file system (ext4, XFS, NTFS; not FAT)")
    if error.errno in _FORBIDDEN and not begun:
        return DestinationUnwritable(
            f"The destination {path} can't be written to ({why}).",
            f"ls -ld {path}; grep {os.path.dirname(path)} /proc/mounts")
    return DestinationLost(
        f"The destination {path} failed ({why}). What is published there is whole.",
        f"ls -l {path}; dmesg | tail   # then run again")
