"""Whose is it: from a node or slot to the snapshots that contain it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stillframe.errors import ObjectMissing, SlotDamaged
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import Content, DiskEntry, FileEntry, Manifest, decode_manifest
from stillframe.repository.opened import Repository
from stillframe.repository.pack import SlotRef
from stillframe.repository.places import Places
from stillframe.repository.tree import Tree
from stillframe.repository.walk import At


@dataclass(frozen=True, slots=True)
class Trunk:
    """One tree of a snapshot. *disk* is the target of a disk or the path of a file."""

    snapshot: SnapshotName
    disk: str
    size_bytes: int
    root: SlotRef

    def tree(self, places: Places) -> Tree:
        """Return it for reading."""
        return Tree(places, self.size_bytes, self.root)


def read_manifest(repository: Repository, name: SnapshotName) -> Manifest | None:
    """Return a snapshot's manifest, None if it was forgotten. Raises RepositoryDamaged, RepositoryNewer."""
    try:
        content = repository.storage.get(name.key)
    except ObjectMissing:
        return None
    return decode_manifest(content, name.key, repository.key)


def trunks(name: SnapshotName, manifest: Manifest) -> Iterator[Trunk]:
    """Yield the trees of a snapshot that are not all zero: disks and files."""
    every: tuple[Content, ...] = (*manifest.disks, *manifest.files)
    for content in every:
        place = content.place
        if place is not None:
            yield Trunk(name, _called(content), content.size_bytes, place)


def with_node(places: Places, among: Iterable[Trunk], at: At, place: SlotRef) -> Iterator[Trunk]:
    """Yield the trees that have the node *place*, which is always *at* the same place of a tree.

    One that can't be followed so far down is left out: it is hurt further up. Raises StorageError.
    """
    for trunk in among:
        try:
            found = trunk.tree(places).node_at(at.level, at.index)
        except SlotDamaged:
            continue
        if found is not None and (found.pack, found.slot) == (place.pack, place.slot):
            yield trunk


def _called(content: Content) -> str:
    if isinstance(content, DiskEntry):
        return content.target
    return content.path if isinstance(content, FileEntry) else ""
