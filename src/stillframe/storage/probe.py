"""Finding out what a storage really does, before a repository trusts it.

Some servers take "create only if absent" and overwrite all the same. With them a collector
and a late writer could both believe to have won a key, and data would be lost. So `init` tries it.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

from stillframe.errors import ObjectExists, RepositoryUnsafe, StorageError
from stillframe.storage.model import Storage

PROBES = "probe/"
_RACERS = 8
_RACES = 3


def probe_create_if_absent(storage: Storage) -> None:
    """Raise RepositoryUnsafe unless create refuses a key that is taken, also when many come at once.

    Writes a few small objects under `probe/` and removes them again. Raises StorageError.
    """
    if not storage.capabilities.create_if_absent:
        raise _unsafe(storage, "it does not know how to create an object only where there is none")
    name = f"{PROBES}{os.urandom(16).hex()}"
    keys = [f"{name}/{race}" for race in range(_RACES + 1)]
    try:
        _probe_taken(storage, keys[0])
        for key in keys[1:]:
            _probe_race(storage, key)
    finally:
        with contextlib.suppress(StorageError):  # what went wrong before counts
            storage.delete(keys)


def _probe_taken(storage: Storage, key: str) -> None:
    first, second = b"first " + os.urandom(16), b"second " + os.urandom(16)
    storage.create(key, first)
    if _wins(storage, key, second):
        raise _unsafe(storage, "it accepted a second object under a key that was taken")
    if storage.get(key) != first:
        raise _unsafe(storage, "it refused a second object under a key, and stored it all the same")


def _probe_race(storage: Storage, key: str) -> None:
    contents = [b"racer " + os.urandom(16) for _ in range(_RACERS)]
    with ThreadPoolExecutor(_RACERS) as pool:
        won = list(pool.map(lambda content: _wins(storage, key, content), contents))
    winners = [content for content, has_won in zip(contents, won, strict=True) if has_won]
    if len(winners) != 1:
        raise _unsafe(storage, f"of {_RACERS} that created one key at once, {len(winners)} won")
    if storage.get(key) != winners[0]:
        raise _unsafe(storage, "many created one key at once, and it kept another than the one it told so")


def _wins(storage: Storage, key: str, content: bytes) -> bool:
    try:
        storage.create(key, content)
    except ObjectExists:
        return False
    return True


def _unsafe(storage: Storage, why: str) -> RepositoryUnsafe:
    return RepositoryUnsafe(
        f"A repository in {storage.address} would not be safe: {why}. Two runs could overwrite each other.",
        "choose another storage, or a newer version of its server, then run init again")
