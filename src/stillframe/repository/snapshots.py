"""Opening snapshots by their names, and finding the one that a backup builds upon."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from stillframe.errors import ObjectMissing, RepositoryDamaged, SnapshotUnknown
from stillframe.repository.catalog import display_name
from stillframe.repository.layout import MANIFESTS, SnapshotName, safe, snapshot_name
from stillframe.repository.manifest import Manifest, decode_manifest, is_tombstone
from stillframe.repository.opened import Repository


def read_snapshot(repository: Repository, name: SnapshotName) -> Manifest:
    """Return a snapshot's manifest. Raises SnapshotUnknown, RepositoryDamaged, StorageError."""
    try:
        content = repository.storage.get(name.key)
    except ObjectMissing as error:
        raise forgotten(name) from error
    if is_tombstone(len(content)):
        raise SnapshotUnknown(f"{display_name(name)} is no snapshot but a backup that was taken for dead.",
                              "stillframe list --repo REPO")
    return decode_manifest(content, name.key, repository.key)


def forgotten(name: SnapshotName) -> SnapshotUnknown:
    """Return the error that says that somebody forgot a snapshot while it was to be read."""
    return SnapshotUnknown(f"The snapshot {display_name(name)} was forgotten just now.",
                           "stillframe list --repo REPO")


def read_tags(repository: Repository, names: Iterable[SnapshotName]) -> dict[str, tuple[str, ...]]:
    """Return the tags of snapshots, by `sid`; those that can't be read are left out. Raises StorageError."""
    tags: dict[str, tuple[str, ...]] = {}
    for name in names:
        with contextlib.suppress(SnapshotUnknown, RepositoryDamaged):
            tags[name.sid] = read_snapshot(repository, name).tags
    return tags


def snapshots_of(repository: Repository, host: str, guest: str) -> Iterator[SnapshotName]:
    """Yield the names of all snapshots of a guest of a host, in no order. Raises StorageError."""
    return _listed(repository, f"{MANIFESTS}{safe(host)}/{safe(guest)}/")


def newest_of(
    repository: Repository, host: str, guest: str, uuid: str,
) -> tuple[tuple[SnapshotName, Manifest] | None, list[str]]:
    """Return the newest snapshot of a guest that can be read, and what stood in the way of newer ones.

    None if there is none of the guest with that UUID on that host. Raises StorageError.
    """
    problems: list[str] = []
    names = snapshots_of(repository, host, guest)
    for name in sorted(names, key=lambda each: (each.utc, each.sid), reverse=True):
        try:
            manifest = read_snapshot(repository, name)
        except SnapshotUnknown:
            continue
        except RepositoryDamaged as error:
            problems.append(error.message)
            continue
        if manifest.uuid == uuid:
            return (name, manifest), problems
    return None, problems


def still_there(repository: Repository, name: SnapshotName) -> bool:
    """Return whether a snapshot is still listed. Raises StorageError."""
    return any(found == name for found in _listed(repository, name.key))


def newest_of_each(names: Iterable[SnapshotName]) -> dict[tuple[str, str], SnapshotName]:
    """Return the newest of *names* for each (host, guest)."""
    newest: dict[tuple[str, str], SnapshotName] = {}
    for name in names:
        known = newest.get((name.host, name.guest))
        if known is None or (name.utc, name.sid) > (known.utc, known.sid):
            newest[(name.host, name.guest)] = name
    return newest


def _listed(repository: Repository, prefix: str) -> Iterator[SnapshotName]:
    for listed in repository.storage.list(prefix):
        if not is_tombstone(listed.size_bytes):
            try:
                yield snapshot_name(listed.key)
            except ValueError:
                continue
