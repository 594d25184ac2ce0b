"""The file system and database on a database guest's disk, looked at from the host.

Cheaper than a guest that looks (`dbguest.boot_and_check`: seconds of a whole core, emulated), and with
the same two judges: the kernel's ext4 replays the journal, SQLite checks the database.
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.images import run, to_raw

_COUNTS = "SELECT count(*), coalesce(min(n), 0), coalesce(max(n), 0) FROM rows"
_NOTHING = 0, 0, 0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What somebody who mounted an image found in its database."""

    integrity: str
    rows: int
    first: int
    last: int

    @property
    def whole(self) -> bool:
        """Return whether the database is sound and no row between the first and the last is absent."""
        contiguous = self.rows == self.last and self.first == min(1, self.rows)
        return self.integrity == "ok" and contiguous


def make_file_system(raw: Path, size_bytes: int) -> None:
    """Make an empty ext4 file system in a raw image."""
    with raw.open("wb") as file:
        file.truncate(size_bytes)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", raw)


def needs_recovery(raw: Path) -> bool:
    """Return whether the ext4 file system in a raw image would have to replay its journal.

    It would not when it was unmounted, or frozen at the moment the image was taken.
    """
    return "needs_recovery" in run("dumpe2fs", "-h", raw)


def check_image(image: Path | str, image_format: str) -> CheckResult:
    """Look whether the database in *image* (a path or an NBD address) is whole.

    A copy is mounted: the image itself is not written to.
    """
    with tempfile.TemporaryDirectory(prefix="stillframe-check.", dir="/var/tmp") as place:
        copy, data = to_raw(image, image_format, Path(place) / "copy.raw"), Path(place) / "data"
        data.mkdir()
        mount: list[str | Path] = ["mount", "-t", "ext4", "-o", "loop", copy, data]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            return CheckResult("not-mountable", *_NOTHING)
        try:
            return _check_database(data / "rows.db")
        finally:
            run("umount", data)


def _check_database(path: Path) -> CheckResult:
    if not path.exists():
        return CheckResult("no-database", *_NOTHING)
    with contextlib.closing(sqlite3.connect(path)) as database:
        try:
            said = "; ".join(row[0] for row in database.execute("PRAGMA integrity_check"))
            counts = database.execute(_COUNTS).fetchone()
        except sqlite3.DatabaseError as error:
            return CheckResult(str(error), *_NOTHING)
    return CheckResult(said, *counts)
