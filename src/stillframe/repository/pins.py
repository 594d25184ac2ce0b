"""Pins: snapshots that no rule drops and no `forget` takes, until they are unpinned.

A pin is an object ``main/pins/<sid>``, JSON with *at* (RFC 3339, UTC) and *why*. It says nothing to the
collector: what keeps the data is the manifest, and that stays because `forget` looks here first.
"""

from __future__ import annotations

import contextlib

import msgspec

from stillframe.clock import Clock, utc_text
from stillframe.errors import ObjectExists
from stillframe.repository.layout import PINS, SnapshotName
from stillframe.storage.model import Storage


class Pin(msgspec.Struct, frozen=True):
    """When a snapshot was pinned, and what for."""

    at: str
    why: str = ""


def pin(storage: Storage, snapshot: SnapshotName, why: str, clock: Clock) -> bool:
    """Pin a snapshot; return False if it was pinned already (and why stays). Raises StorageError."""
    try:
        storage.create(f"{PINS}{snapshot.sid}", msgspec.json.encode(Pin(utc_text(clock.now()), why)))
    except ObjectExists:
        return False
    return True


def unpin(storage: Storage, snapshot: SnapshotName) -> bool:
    """Take a pin out; return whether there was one. Raises StorageError."""
    was = snapshot.sid in pinned(storage)
    storage.delete([f"{PINS}{snapshot.sid}"])
    return was


def pinned(storage: Storage) -> frozenset[str]:
    """Return the session IDs of all pinned snapshots. Raises StorageError."""
    return frozenset(listed.key.removeprefix(PINS) for listed in storage.list(PINS))


def read_pin(storage: Storage, sid: str) -> Pin:
    """Return a pin, an empty one if what is there is no pin. Raises ObjectMissing, StorageError."""
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(storage.get(f"{PINS}{sid}"), type=Pin)
    return Pin("")
