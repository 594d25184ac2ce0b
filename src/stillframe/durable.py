"""Making durable what was written to a local disk: files, names in folders, and small records in JSON."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_record(path: Path, record: msgspec.Struct) -> None:
    """Put *record* in the place of what is at *path*, as a whole or not at all, durably. Raises OSError.

    Its folder must be there. A name beside it, which ends in ``.new``, is used meanwhile.
    """
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(record), indent=1))
        file.flush()
        os.fsync(descriptor)
    new.replace(path)
    fsync(path.parent)
