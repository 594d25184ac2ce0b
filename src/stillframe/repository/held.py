"""Reading a snapshot while others forget and prune.

Compacting moves what a reader needs, and the generation says where to (places.py). A snapshot that is
forgotten, and pruned, is gone; who reads it for long registers a session, so that it stays until then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from stillframe.clock import Clock
from stillframe.errors import SlotDamaged, StillframeError
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import Manifest
from stillframe.repository.opened import Repository
from stillframe.repository.session import open_session
from stillframe.repository.snapshots import forgotten, read_snapshot, still_there


@contextlib.contextmanager
def held_snapshot(
    repository: Repository, name: SnapshotName, clock: Clock, host: str,
) -> Iterator[Manifest]:
    """Give a snapshot's manifest; what it needs stays for the length of the block, even if it is forgotten.

    Who may not write to the repository can't keep a prune waiting, and reads all the same.
    Raises SnapshotUnknown, RepositoryDamaged, StorageError.
    """
    with contextlib.ExitStack() as session:
        with contextlib.suppress(StillframeError):
            session.enter_context(
                open_session(repository.storage, repository.key, clock, host, lambda _: ""))
        # The manifest may come from a cache. Only what is listed now is whole, and stays so.
        if not still_there(repository, name):
            raise forgotten(name)
        with unless_forgotten(repository, name):
            yield read_snapshot(repository, name)


@contextlib.contextmanager
def unless_forgotten(repository: Repository, *names: SnapshotName) -> Iterator[None]:
    """Within the block, what can't be read is no damage if one of these snapshots was forgotten meanwhile.

    Raises SnapshotUnknown then.
    """
    try:
        yield
    except SlotDamaged as damage:
        for name in names:
            if not still_there(repository, name):
                raise forgotten(name) from damage
        raise
