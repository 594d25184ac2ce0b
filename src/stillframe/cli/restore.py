"""`stillframe restore`: a snapshot's disks back into files, or a disk onto a block device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillframe.cli.session import Session
from stillframe.errors import RepositoryRefused


@dataclass(frozen=True)
class Wish:
    """What is to be restored, where to, and how. *name* is SNAPSHOT or SNAPSHOT:DISK."""

    name: str
    to: Path
    format: str
    delta: bool
    force: bool
    skip_bad: bool


def restore(session: Session, wish: Wish) -> int:
    """Restore; return the exit code."""
    raise RepositoryRefused(f"{wish.name}: not built yet: {session.address}")
