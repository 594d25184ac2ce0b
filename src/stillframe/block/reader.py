"""Reading an image through QEMU's own code: a private qemu-nbd and libnbd.

The server is started read-only and without force-share, so that QEMU's image lock
says no when somebody writes to the image. It listens on a socket in a private
temporary folder and dies with stillframe. Whatever the format and the chain below
it, what is read is what the guest would read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from stillframe.block.image import ImagePlace
from stillframe.clock import Clock
from stillframe.extent import Extent


class Connection(Protocol):
    """One stream of reads; for one thread at a time."""

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """Fill the whole *buffer* (at most 32 MiB) from *offset_bytes*. Raises CopyFailed."""
        ...


class DiskReader(Protocol):
    """A disk that stands still, readable from several threads."""

    @property
    def size_bytes(self) -> int:
        """The virtual size of the disk."""
        ...

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """Yield the extents of a stretch (to the end if no length), in order, without gaps.

        Neighbours differ in kind. Raises CopyFailed.
        """
        ...

    def connect(self) -> contextlib.AbstractContextManager[Connection]:
        """Open one more connection. Raises CopyFailed."""
        ...


@contextlib.contextmanager
def open_reader(
    place: ImagePlace, *, clock: Clock, connections: int = 4, timeout_s: float = 30.0
) -> Iterator[DiskReader]:
    """Open the image and its whole backing chain for reading, for the length of the block.

    At most *connections* connections can be open at a time, plus one for extents. Raises
    CopyFailed when QEMU refuses (the message says why: locked by a writer, missing, no rights)
    or when the server is not ready after *timeout_s*.
    """
    raise NotImplementedError
    yield
