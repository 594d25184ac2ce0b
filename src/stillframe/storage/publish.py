"""How a finished temporary file gets its name, but only if nobody has that name yet.

A hard link does it on every file system made for Linux, and on NFS. FAT, exFAT and some
network shares have no hard links; they know rename without replacing. A file system that
has neither can't hold a repository: creating the file under its own name and filling it
there would show others a torn object.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

#: Names the finished file (first) as the second. Raises FileExistsError, and one of CANNOT
#: if the file system doesn't know how.
Way = Callable[[str, str], None]

#: EPERM is what Linux says for "no hard links here", and also for "you may not".
CANNOT = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_libc = ctypes.CDLL(None, use_errno=True)


def hard_link(temporary: str, target: str) -> None:
    """See Way. The temporary name stays."""
    os.link(temporary, target)


def rename_without_replacing(temporary: str, target: str) -> None:
    """See Way. The temporary name is gone afterwards."""
    result = _libc.renameat2(
        ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(os.fsencode(temporary)),
        ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(os.fsencode(target)), ctypes.c_uint(_RENAME_NOREPLACE))
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), temporary, None, target)


WAYS: tuple[Way, ...] = (hard_link, rename_without_replacing)
