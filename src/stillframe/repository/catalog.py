"""Which snapshots there are, what people call them, and forgetting them. Names of objects are enough for it.

A snapshot is named by

    latest                      the newest of all
    3f9a                        the beginning of its session's ID, at least 4 digits
    GUEST  HOST/GUEST           the newest of a guest
    GUEST@latest                the same
    GUEST@2026-11-20            the newest of that day (UTC)
    GUEST@2026-11-20T15:14      the newest of that hour, minute or second
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stillframe.errors import SnapshotAmbiguous, SnapshotUnknown
from stillframe.repository.layout import MANIFESTS, SnapshotName, snapshot_name
from stillframe.repository.manifest import is_tombstone
from stillframe.storage.model import Listed, Storage

LATEST = "latest"
_SHORTEST_ID = 4
_NAMED_MOST = 8
_BATCH = 500
_ID = re.compile(r"[0-9a-f]+")
_TIME = re.compile(r"\d{4}-?\d{2}-?\d{2}([T ]?\d{2}(:?\d{2}(:?\d{2}(\.\d{1,6})?)?)?)?Z?")


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `forget` is going to remove: manifests alone. Space comes back with the next prune."""

    snapshots: tuple[SnapshotName, ...]


def list_snapshots(storage: Storage) -> list[SnapshotName]:
    """Return all snapshots, by host, guest and moment; nothing is opened. Raises StorageError."""
    return sorted(name for name, _ in listed_manifests(storage))


def listed_manifests(storage: Storage) -> Iterator[tuple[SnapshotName, Listed]]:
    """Yield every snapshot's name and its manifest as listed. Tombstones and foreign names are left out."""
    for listed in storage.list(MANIFESTS):
        if is_tombstone(listed.size_bytes):
            continue
        try:
            name = snapshot_name(listed.key)
        except ValueError:
            continue
        yield name, listed


def resolve(snapshots: Sequence[SnapshotName], text: str) -> SnapshotName:
    """Return the one snapshot that *text* names. Raises SnapshotUnknown, SnapshotAmbiguous."""
    if text == LATEST and snapshots:
        return max(snapshots, key=_age)
    by_id = _with_id(snapshots, text)
    if len(by_id) > 1:
        raise _ambiguous(text, by_id)
    by_name = [_newest(group) for group in _by_guest(_of_guest(snapshots, text))]
    found = {*by_id, *by_name}
    if not found:
        raise _unknown(snapshots, text)
    if len(found) > 1:
        raise _ambiguous(text, found)
    return found.pop()


def resolve_all(snapshots: Sequence[SnapshotName], texts: Iterable[str]) -> list[SnapshotName]:
    """Return the snapshots that *texts* name, each once. Raises SnapshotUnknown, SnapshotAmbiguous."""
    return list(dict.fromkeys(resolve(snapshots, text) for text in texts))


def plan_forget(snapshots: Iterable[SnapshotName]) -> Forgotten:
    """Return what forgetting *snapshots* removes; nothing is changed."""
    return Forgotten(tuple(sorted(set(snapshots))))


def forget(storage: Storage, plan: Forgotten) -> int:
    """Remove the manifests of the plan; return how many. Raises StorageError: then some may be gone."""
    keys = [snapshot.key for snapshot in plan.snapshots]
    for begin in range(0, len(keys), _BATCH):
        storage.delete(keys[begin : begin + _BATCH])
    return len(keys)


def display_name(snapshot: SnapshotName) -> str:
    """Return a name for people that `resolve` understands: ``guest@2026-11-24T15:14:00``."""
    return f"{snapshot.guest}@{snapshot.utc.strftime('%Y-%m-%dT%H:%M:%S')}"


def _with_id(snapshots: Sequence[SnapshotName], text: str) -> list[SnapshotName]:
    lower = text.lower()
    if len(text) < _SHORTEST_ID or _ID.fullmatch(lower) is None:
        return []
    return [snapshot for snapshot in snapshots if snapshot.sid.startswith(lower)]


def _of_guest(snapshots: Sequence[SnapshotName], text: str) -> list[SnapshotName]:
    """Return the snapshots among which *text* names the newest."""
    whole = [snapshot for snapshot in snapshots if _is_called(snapshot, text)]
    guest, at, time = text.rpartition("@")
    if not at:
        return whole
    of_guest = [snapshot for snapshot in snapshots if _is_called(snapshot, guest)]
    if time == LATEST:
        return whole + of_guest
    if _TIME.fullmatch(time) is None:
        return whole
    digits = re.sub(r"\D", "", time)
    return whole + [each for each in of_guest if each.utc.strftime("%Y%m%d%H%M%S%f").startswith(digits)]


def _is_called(snapshot: SnapshotName, text: str) -> bool:
    return text in (snapshot.guest, f"{snapshot.host}/{snapshot.guest}")


def _by_guest(snapshots: Iterable[SnapshotName]) -> list[list[SnapshotName]]:
    groups: dict[tuple[str, str], list[SnapshotName]] = {}
    for snapshot in snapshots:
        groups.setdefault((snapshot.host, snapshot.guest), []).append(snapshot)
    return list(groups.values())


def _newest(snapshots: Iterable[SnapshotName]) -> SnapshotName:
    return max(snapshots, key=_age)


def _age(snapshot: SnapshotName) -> tuple[str, str]:
    return snapshot.utc.isoformat(), snapshot.sid


def _unknown(snapshots: Sequence[SnapshotName], text: str) -> SnapshotUnknown:
    guests = sorted({snapshot.guest for snapshot in snapshots})
    if not guests:
        return SnapshotUnknown("There is no snapshot in the repository yet.",
                               "stillframe backup GUEST --repo REPO")
    there = ", ".join(guests[:_NAMED_MOST]) + (", …" if len(guests) > _NAMED_MOST else "")
    return SnapshotUnknown(
        f"No snapshot is called {text!r}. A name is the beginning of an ID (at least {_SHORTEST_ID} digits), "
        f"latest, GUEST, or GUEST@DAY; there are snapshots of: {there}.",
        "stillframe list --repo REPO",
    )


def _ambiguous(text: str, found: Iterable[SnapshotName]) -> SnapshotAmbiguous:
    every = sorted(found, key=_age, reverse=True)
    named = ", ".join(f"{each.sid[:12]} ({each.host}/{display_name(each)})" for each in every[:_NAMED_MOST])
    more = f" and {len(every) - _NAMED_MOST} more" if len(every) > _NAMED_MOST else ""
    return SnapshotAmbiguous(
        f"{text!r} could be several snapshots: {named}{more}.",
        "give more digits of the ID, or HOST/GUEST@TIME",
    )
