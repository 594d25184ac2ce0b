"""What nbdkit loads: an export of one disk, as told on standard input (export_order.py).

nbdkit calls these functions by their names, from many threads at a time. They run in the Python that
nbdkit's plugin was built for; who starts nbdkit says where to find this package (export.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import nbdkit

from stillframe.clock import SystemClock
from stillframe.errors import StillframeError
from stillframe.extent import Extent, Kind
from stillframe.restore.export_disk import Log, ServedDisk
from stillframe.restore.export_order import decode_order
from stillframe.units import KIB, MIB

API_VERSION = 2

_SMALLEST_BYTES = 1
_PREFERRED_BYTES = 64 * KIB
_LARGEST_BYTES = 32 * MIB
_STDERR = 2
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class _Served:
    """What there is one of in this process."""

    disk: ServedDisk
    log: Log
    outlives: bool


def thread_model() -> int:
    """Take as many requests at a time as come."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config_complete() -> None:
    """Open the disk."""
    clock = SystemClock()
    order = decode_order(sys.stdin.buffer.read())
    _Served.log = Log(os.dup(_STDERR), clock)
    _Served.outlives = order.outlives
    try:
        _Served.disk = ServedDisk(order, _Served.log, clock)
    except StillframeError as error:
        # nbdkit prints an exception with its traceback; what is printed first is what a person is shown.
        _Served.log.say(error.message)
        raise


def after_fork() -> None:
    """Have only our own log written from here on, which is bounded; see to what our parent's end means.

    Threads begin here and not before: nbdkit closes 0 and 1 and opens them anew just before, and ends, with
    "open: Resource temporarily unavailable" or whatever went wrong last, if a file of a thread has taken
    their place. Clients are not let in before this returns.
    """
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, _STDERR)
    os.close(silent)
    # nbdkit asks the kernel for SIGTERM when its parent dies (1.32 always does), and would then wait for its
    # clients to leave.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0 if _Served.outlives else signal.SIGKILL, 0, 0, 0)
    _Served.disk.start()


def cleanup() -> None:
    """End the threads."""
    _Served.disk.close()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:  # noqa: ARG001
    """Name the one export."""
    return [(_Served.disk.name, "")]


def default_export(readonly: bool, is_tls: bool) -> str:  # noqa: ARG001
    """Return the export that is meant by no name."""
    return _Served.disk.name


def open(readonly: bool) -> ServedDisk:  # noqa: A001, ARG001
    """Return what a connection works with."""
    wanted = nbdkit.export_name()
    if wanted not in ("", _Served.disk.name):
        nbdkit.set_error(errno.ENOENT)
        raise FileNotFoundError(f"there is no export {wanted!r}, but {_Served.disk.name}")
    return _Served.disk


def get_size(disk: ServedDisk) -> int:
    """Return the size of the disk."""
    return disk.size_bytes


def block_size(_: ServedDisk) -> tuple[int, int, int]:
    """Return the smallest request, the one that suits best (a chunk), and the largest."""
    return _SMALLEST_BYTES, _PREFERRED_BYTES, _LARGEST_BYTES


def can_multi_conn(_: ServedDisk) -> bool:
    """Allow several connections: all of them see the same."""
    return True


def can_extents(_: ServedDisk) -> bool:
    """Say what is a hole."""
    return True


def can_cache(_: ServedDisk) -> int:
    """Take hints of what will be read."""
    return int(nbdkit.CACHE_NATIVE)


def pread(disk: ServedDisk, buffer: Any, offset: int, flags: int) -> None:  # noqa: ARG001
    """Fill the buffer."""
    try:
        disk.read_into(buffer, offset)
    except Exception as error:  # noqa: BLE001 -- all are told to the client
        raise _told(error) from None


def cache(disk: ServedDisk, count: int, offset: int, flags: int) -> None:  # noqa: ARG001
    """Begin to fetch a stretch."""
    disk.fetch(offset, count)


def extents(disk: ServedDisk, count: int, offset: int, flags: int) -> Iterator[tuple[int, int, int]]:
    """Return what is data and what is a hole."""
    only_one = {"most": 1} if flags & nbdkit.FLAG_REQ_ONE else {}
    try:
        return map(_extent, disk.extents(offset, count, **only_one))
    except Exception as error:  # noqa: BLE001 -- all are told to the client
        raise _told(error) from None


def _told(error: Exception) -> Exception:
    """Have the client told of *error*; one that is not meant for it is a mistake of ours, and logged."""
    if isinstance(error, OSError) and error.errno:
        nbdkit.set_error(error.errno)
    else:
        _Served.log.say(f"{_Served.disk.name}: {type(error).__name__}: {error}")
        nbdkit.set_error(errno.EIO)
    return error


def _extent(extent: Extent) -> tuple[int, int, int]:
    zero = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    return extent.offset_bytes, extent.length_bytes, zero if extent.kind is Kind.HOLE else 0
