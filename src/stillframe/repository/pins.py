"""Pins: snapshots that no rule drops and no `forget` takes, until they are unpinned.

A pin is an object ``main/pins/<sid>``, JSON with *at* (RFC 3339, UTC) and *why*. It says nothing to the
collector: what keeps the data is the manifest, and that stays because `forget` looks here first.
"""

from __future__ import annotations

import msgspec

from stillframe.clock import Clock, utc_text
from stillframe.errors import ObjectExists, ObjectMissing
from stillframe.repository.layout import PINS, SnapshotName
from stillframe.repository.snapshots import forgotten
from stillframe.storage.model import Storage


class Pin(msgspec.Struct, frozen=True):
    """When a snapshot was pinned, and what for."""

    at: str
    why: str = ""


def pin(storage: Storage, snapshot: SnapshotName, why: str, clock: Clock) -> bool:
    """Pin a snapshot; return False if it was pinned already (and why stays).

    Raises SnapshotUnknown if it was forgotten meanwhile, StorageError.
    """
    key, is_new = f"{PINS}{snapshot.sid}", True
    try:
        storage.create(key, msgspec.json.encode(Pin(utc_text(clock.now()), why)))
    except ObjectExists:
        is_new = False
    try:
        storage.stat(snapshot.key)
    except ObjectMissing as error:
        storage.delete([key])
        raise forgotten(snapshot) from error
    return is_new


def unpin(storage: Storage, snapshot: SnapshotName) -> bool:
    """Take a pin out; return whether there was one. Raises StorageError."""
    was = snapshot.sid in pinned(storage)
    storage.delete([f"{PINS}{snapshot.sid}"])
    return was


def pinned(storage: Storage) -> frozenset[str]:
    """Return the session IDs of all pinned snapshots. Raises StorageError."""
    return frozenset(listed.key.removeprefix(PINS) for listed in storage.list(PINS))


def read_pin(storage: Storage, sid: str) -> Pin | None:
    """Return a pin, None if there is none, an empty one if what is there is no pin. Raises StorageError."""
    try:
        return msgspec.json.decode(storage.get(f"{PINS}{sid}"), type=Pin)
    except ObjectMissing:
        return None
    except msgspec.DecodeError:
        return Pin("")
