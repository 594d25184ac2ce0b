"""`stillframe diff`: what changed from one snapshot to another, by their trees alone."""

from __future__ import annotations

from stillframe.cli.session import Session
from stillframe.cli.snapshots import find, name_body
from stillframe.errors import EXIT_OK, RepositoryRefused
from stillframe.extent import Extent, Kind
from stillframe.repository.catalog import display_name
from stillframe.repository.difference import changed_extents
from stillframe.repository.held import unless_forgotten
from stillframe.repository.manifest import DiskEntry
from stillframe.repository.places import Places
from stillframe.repository.snapshots import read_snapshot
from stillframe.repository.tree import Tree
from stillframe.units import size_text


def diff(session: Session, old: str, new: str, *, extents: bool) -> int:
    """Print the changed extents and bytes of each disk from *old* to *new*; return the exit code."""
    names = find(session, old), find(session, new)
    before, after = (
        {disk.target: disk for disk in read_snapshot(session.near_repository, name).disks} for name in names)
    if not before.keys() & after.keys():
        raise RepositoryRefused(
            f"{display_name(names[0])} and {display_name(names[1])} have no disk in common.",
            f"stillframe show {names[0].sid[:12]} --repo REPO")
    places = Places(session.near_repository)
    bodies = []
    for target in sorted(before.keys() | after.keys()):
        with unless_forgotten(session.near_repository, *names):
            body = _disk(places, target, before.get(target), after.get(target))
        bodies.append(body)
        session.screen.result(_words(body))
        for each in body["extents"] if extents and isinstance(body["extents"], list) else ():
            session.screen.result(f"  {each['offset']} +{each['length']} {each['kind']}")
    session.screen.json({"old": name_body(names[0]), "new": name_body(names[1]), "disks": bodies})
    return EXIT_OK


def _disk(places: Places, target: str, old: DiskEntry | None, new: DiskEntry | None) -> dict[str, object]:
    found: list[Extent] = []
    if old is not None and new is not None:
        found = list(changed_extents(_tree(places, old), _tree(places, new)))
    return {
        "target": target, "change": "added" if old is None else "removed" if new is None else "compared",
        "old_size_bytes": old.size_bytes if old else 0, "new_size_bytes": new.size_bytes if new else 0,
        "changed_bytes": sum(each.length_bytes for each in found),
        "cleared_bytes": sum(each.length_bytes for each in found if each.kind is Kind.ZERO),
        "extents": [
            {"offset": each.offset_bytes, "length": each.length_bytes, "kind": each.kind.value}
            for each in found],
    }


def _tree(places: Places, disk: DiskEntry) -> Tree:
    return Tree(places, disk.size_bytes, disk.place)


def _words(body: dict[str, object]) -> str:
    if body["change"] != "compared":
        return f"{body['target']}: {body['change']}"
    changed, cleared, old, new = (
        int(str(body[name]))
        for name in ("changed_bytes", "cleared_bytes", "old_size_bytes", "new_size_bytes"))
    count = len(body["extents"]) if isinstance(body["extents"], list) else 0
    resized = f"; resized from {size_text(old)} to {size_text(new)}" if old != new else ""
    zeroed = f", {size_text(cleared)} of it to zero" if cleared else ""
    return f"{body['target']}: {size_text(changed)} changed in {count} extents{zeroed}{resized}"
