"""A storage and a disk whose every call tells a Watch, so that one that hangs can be told from a slow one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime

from stillframe.block.reader import Connection, DiskReader, Pieces
from stillframe.capture.watched import Watch
from stillframe.extent import Extent
from stillframe.storage.model import Content, Listed, Stat, Storage
from stillframe.storage.wrappers import Wrapper


class WatchedStorage(Wrapper):
    """A storage that is not called any more once its work is no longer wanted: Cancelled is raised."""

    def __init__(self, inner: Storage, watch: Watch) -> None:
        super().__init__(inner)
        self._watch = watch

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        self._watch.tick()
        content = super().get(key, offset_bytes, length_bytes)
        self._watch.tick()
        return content

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        self._watch.tick()
        super().create(key, content)
        self._watch.moves += 1  # it is there: no reason to say otherwise

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        self._watch.tick()
        super().replace(key, content)
        self._watch.moves += 1

    def list(self, prefix: str) -> Iterator[Listed]:
        """See Storage."""
        self._watch.tick()
        for listed in super().list(prefix):
            self._watch.tick()
            yield listed

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage."""
        self._watch.tick()
        super().delete(keys)
        self._watch.moves += 1

    def stat(self, key: str) -> Stat:
        """See Storage."""
        self._watch.tick()
        return super().stat(key)

    def now(self) -> datetime:
        """See Storage."""
        self._watch.tick()
        return super().now()


class WatchedReader:
    """A DiskReader that says when it waits for the guest's disk."""

    def __init__(self, inner: DiskReader, watch: Watch) -> None:
        self._inner = inner
        self._watch = watch

    @property
    def size_bytes(self) -> int:
        """See DiskReader."""
        return self._inner.size_bytes

    def extents(self, offset_bytes: int = 0, length_bytes: int | None = None) -> Iterator[Extent]:
        """See DiskReader."""
        return self._watched(self._inner.extents(offset_bytes, length_bytes))

    def changed(self) -> Iterator[Extent] | None:
        """See DiskReader."""
        changed = self._inner.changed()
        return None if changed is None else self._watched(changed)

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        """See DiskReader."""
        with self._inner.connect() as connection:
            yield _WatchedConnection(connection, self._watch)

    def _watched(self, extents: Iterator[Extent]) -> Iterator[Extent]:
        while True:
            with self._watch.reads_source():
                extent = next(extents, None)
            if extent is None:
                return
            self._watch.tick()
            yield extent


class _WatchedConnection:
    """See Connection."""

    def __init__(self, inner: Connection, watch: Watch) -> None:
        self._inner = inner
        self._watch = watch

    def pread_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """See Connection."""
        with self._watch.reads_source():
            self._inner.pread_into(buffer, offset_bytes)
        self._watch.tick()

    def pread_pieces(self, pieces: Pieces) -> None:
        """See Connection."""
        with self._watch.reads_source():
            self._inner.pread_pieces(pieces)
        self._watch.tick()
