"""Where chunks are that this host has stored before: a local index that may be lost at any time.

One SQLite file for each folder, one table for each repository. A row is keyed by the first eight
bytes of the chunk ID; its value is the whole ID, the place, and a checksum over both:

    chunk ID(32) ‖ sid(16) ‖ u32 pack ‖ u32 slot ‖ u32 offset ‖ u32 stored ‖ u8 position ‖ u32 CRC-32

It saves space and nothing else. What a row says is true for ever, since no pack is ever written
twice; whether that pack is still there and may be referred to is for the caller to find out. A row
that does not check is no row, a file that SQLite can't use is begun anew, and a file that
another process works with is left alone: then this run has an index for itself only.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from stillframe.repository.layout import PackKind, PackName
from stillframe.repository.nodes import ChunkRef
from stillframe.repository.pack import SlotRef
from stillframe.units import GIB

_ROW = struct.Struct("<32s16sIIIIB")
_CHECK = struct.Struct("<I")
_KEY = struct.Struct("<q")
#: So many new rows are held back and written at once, in the order of their keys.
_BATCH_ROWS = 2048
_CACHE_KIB = 16 * 1024
_KEPT_NAMES = 4096
#: A file that has grown beyond this is begun anew by the next run: about ten million chunks.
LIMIT_BYTES = GIB
_FILE = "hints.sqlite"


class ChunkHints:
    """The index for one repository, of the length of a run. For one thread at a time.

    Without *folder* it is a temporary file that goes with the run. What was added is found again as long as
    this object lives, unless its file fails (a full disk, damage): then the run goes on without one.
    """

    def __init__(
        self, repository_id: str, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        if not repository_id.isalnum():
            raise ValueError(f"not a repository's ID: {repository_id!r}")
        self._table = f"chunks_{repository_id}"
        self._fresh: dict[bytes, ChunkRef] = {}
        self._packs: dict[tuple[bytes, int], PackName] = {}
        #: How many rows or files were dropped because they were damaged.
        self.dropped = 0
        self._file = None if folder is None else self._kept(folder, limit_bytes)
        if self._file is None:
            with self._may_fail():
                self._file = self._opened("")

    def find(self, ids: Sequence[bytes]) -> dict[bytes, ChunkRef]:
        """Return where chunks are, as far as known. Places of packs that may be gone by now."""
        found: dict[bytes, ChunkRef] = {}
        asked = []
        for chunk_id in ids:
            if (fresh := self._fresh.get(chunk_id)) is not None:
                found[chunk_id] = fresh
            else:
                asked.append(chunk_id)
        if asked and self._file is not None:
            with self._may_fail():
                found.update((ref.id, ref) for ref in self._select(self._file, asked))
        return found

    def add(self, refs: Iterable[ChunkRef]) -> None:
        """Remember where chunks are."""
        self._fresh.update((ref.id, ref) for ref in refs)
        if len(self._fresh) >= _BATCH_ROWS:
            self._write()

    def close(self) -> None:
        """Write what is held back, if it can be written, and close the file."""
        self._write()
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        if self._file is not None:
            rows = sorted((_key(chunk_id), _row(ref)) for chunk_id, ref in self._fresh.items())
            with self._may_fail():
                self._file.executemany(f"INSERT OR REPLACE INTO {self._table} VALUES (?, ?)", rows)
                self._file.commit()
        self._fresh.clear()

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Go on without a file if SQLite can't use it any more."""
        try:
            yield
        except sqlite3.Error:
            self.dropped += 1
            if self._file is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._file.close()
            self._file = None

    def _select(self, file: sqlite3.Connection, ids: list[bytes]) -> Iterator[ChunkRef]:
        wanted = {_key(chunk_id): chunk_id for chunk_id in ids}
        marks = ",".join("?" * len(wanted))
        rows = file.execute(f"SELECT key, value FROM {self._table} WHERE key IN ({marks})", list(wanted))
        for key, value in rows:
            ref = self._ref(value)
            if ref is None:
                self.dropped += 1
            elif ref.id == wanted[key]:
                yield ref

    def _ref(self, value: object) -> ChunkRef | None:
        if not isinstance(value, bytes) or len(value) != _ROW.size + _CHECK.size:
            return None
        if zlib.crc32(value[:_ROW.size]) != _CHECK.unpack_from(value, _ROW.size)[0]:
            return None
        chunk_id, sid, number, slot, offset, stored, position = _ROW.unpack_from(value)
        pack = self._packs.get((sid, number))
        if pack is None:
            if len(self._packs) >= _KEPT_NAMES:
                self._packs.clear()
            pack = self._packs[sid, number] = PackName(PackKind.DATA.value, sid, number)
        return ChunkRef(chunk_id, SlotRef(pack, slot, offset, stored), position)

    def _kept(self, folder: Path, limit_bytes: int) -> sqlite3.Connection | None:
        """Return the folder's file, opened for this run alone; None if another process has it."""
        path = folder / _FILE
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            if path.stat().st_size > limit_bytes:
                _remove(path)
        for attempt in range(2):
            try:
                return self._opened(str(path))
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or attempt:
                    return None
                _remove(path)
            except sqlite3.DatabaseError:
                self.dropped += 1
                _remove(path)
        return None

    def _opened(self, path: str) -> sqlite3.Connection:
        file = sqlite3.connect(path, timeout=0, isolation_level="IMMEDIATE", check_same_thread=False)
        try:
            # Losing the file is allowed, waiting for a disk because of it is not.
            for pragma in ("locking_mode=EXCLUSIVE", "synchronous=OFF", "temp_store=FILE",
                           f"journal_mode={'MEMORY' if path else 'OFF'}", f"cache_size=-{_CACHE_KIB}"):
                file.execute(f"PRAGMA {pragma}")
            file.execute("BEGIN EXCLUSIVE")  # takes the lock, and is the first to see a damaged file
            file.execute(f"CREATE TABLE IF NOT EXISTS {self._table} (key INTEGER PRIMARY KEY, value BLOB)")
            file.execute(f"SELECT key, value FROM {self._table} LIMIT 1").fetchone()
            file.commit()
        except sqlite3.Error:
            file.close()
            raise
        return file


def _key(chunk_id: bytes) -> int:
    key: int = _KEY.unpack_from(chunk_id)[0]
    return key


def _row(ref: ChunkRef) -> bytes:
    place = ref.place
    row = _ROW.pack(ref.id, place.pack.sid, place.pack.number, place.slot, place.offset_bytes,
                    place.stored_bytes, ref.position)
    return row + _CHECK.pack(zlib.crc32(row))


def _remove(path: Path) -> None:
    for name in (path, path.with_name(f"{path.name}-journal")):
        with contextlib.suppress(OSError):
            os.unlink(name)
