"""A listing in order of keys, made of folders that each give their names in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from stillframe.storage.model import Listed, is_part


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder."""

    name: str
    is_folder: bool
    size_bytes: int


def listed(scan: Callable[[str], Iterable[Entry]], prefix: str) -> Iterator[Listed]:
    """Yield the objects whose key begins with *prefix*, sorted by key.

    *scan* gives what is in a folder ("" or with a slash at its end); of one that is gone, nothing. The names
    of one folder at a time, and of those above it, are held in memory.
    """
    return _in_folder(scan, prefix[:prefix.rfind("/") + 1], prefix)


def _in_folder(scan: Callable[[str], Iterable[Entry]], folder: str, prefix: str) -> Iterator[Listed]:
    # With its slash, a folder stands where its objects' keys belong: "a-b" < "a/b" < "a0".
    found = {f"{folder}{entry.name}{'/' if entry.is_folder else ''}": entry
             for entry in scan(folder) if is_part(entry.name)}
    for key in sorted(found):
        if not key.startswith(prefix):
            continue
        if key.endswith("/"):
            yield from _in_folder(scan, key, prefix)
        else:
            yield Listed(key, found[key].size_bytes)
