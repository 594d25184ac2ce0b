"""What a persistent bitmap of an image says: which stretches were written to since it was made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from stillframe.errors import CopyFailed
from stillframe.extent import Extent, merged
from stillframe.units import GIB

if TYPE_CHECKING:
    from stillframe.block.reader import Connection, DiskReader

_CONTEXT = "qemu:dirty-bitmap:"
_DIRTY = 1
_WINDOW_BYTES = GIB


class DirtyBitmap:
    """The bitmap of an NBD export, asked for over a connection of its own. For one thread at a time."""

    def __init__(self, socket: str, name: str, bitmap: str) -> None:
        import nbd

        self._nbd: Any = nbd
        self._name = name
        self._context = _CONTEXT + bitmap
        self._handle: Any = nbd.NBD()
        self._handle.add_meta_context(self._context)
        try:
            self._handle.connect_unix(socket)
            if not self._handle.can_meta_context(self._context):
                raise self._failed("the server does not have it")
        except nbd.Error as error:
            raise self._failed(str(error.string)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(self._nbd.Error):
            self._handle.shutdown()
        self._handle = None  # this binding closes a handle when nothing refers to it any more

    def stretches(self, size_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what is marked, in order. Raises CopyFailed."""
        offset = 0
        while offset < size_bytes:
            for length, flags in self._ask(offset, min(_WINDOW_BYTES, size_bytes - offset)):
                length = min(length, size_bytes - offset)  # noqa: PLW2901 -- a server may say more than was asked
                if length and flags & _DIRTY:
                    yield offset, length
                offset += length

    def _ask(self, offset: int, length: int) -> list[tuple[int, int]]:
        pairs: list[tuple[int, int]] = []

        def take(context: str, _offset: int, entries: list[int], _error: Any) -> int:
            if context == self._context:
                pairs.extend(zip(entries[::2], entries[1::2], strict=True))
            return 0

        try:
            self._handle.block_status(length, offset, take)
        except self._nbd.Error as error:
            raise self._failed(f"asking at {offset}: {error.string}") from error
        if not pairs or pairs[0][0] == 0:
            raise self._failed(f"asking at {offset}: the server gave no answer")
        return pairs

    def _failed(self, why: str) -> CopyFailed:
        return CopyFailed(
            f"Reading the bitmap of {self._name} failed: {why}.",
            "check the storage of the image (dmesg, qemu-img check), then run the command again")


class CountingReader:
    """A DiskReader that counts by a bitmap; all else is the reader's that it is made of."""

    def __init__(self, reader: DiskReader, dirty: DirtyBitmap) -> None:
        self._reader = reader
        self._dirty = dirty
        self.size_bytes = reader.size_bytes

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """See DiskReader."""
        return self._reader.extents(offset_bytes, length_bytes)

    def changed(self) -> Iterator[Extent] | None:
        """See DiskReader. One walk at a time, and none together with extents()."""
        return merged(self._changed())

    def connect(self) -> contextlib.AbstractContextManager[Connection]:
        """See DiskReader."""
        return self._reader.connect()

    def _changed(self) -> Iterator[Extent]:
        for offset, length in self._dirty.stretches(self.size_bytes):
            # What is marked and reads as zero is a change, too: what was there before must go.
            yield from self._reader.extents(offset, length)
