"""Which snapshots can't be read in full, by what verifying wrote down: for who decides which to keep.

No part of what is stored is checked for it but slots that are known to be bad. As long as none is, nothing
is read and no key is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from stillframe.errors import RepositoryDamaged
from stillframe.repository.heal import read_bad, read_heals
from stillframe.repository.layout import SnapshotName
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.repository.survey import HitSearch, hits_of, read_snapshots
from stillframe.storage.model import Storage


def damaged_snapshots(
    storage: Storage, opened: Callable[[], Repository], names: Iterable[SnapshotName],
) -> frozenset[str]:
    """Return the `sid` of those of *names* that are known to be damaged and were not healed since.

    *opened* opens the repository that *storage* holds; it is called only if anything is known to be bad.
    Raises RepositoryDamaged if so much is that nobody can tell, StorageError, and what *opened* raises.
    """
    suspects = read_bad(storage)
    if not suspects:
        return frozenset()
    repository = opened()
    every, unreadable = read_snapshots(repository, names)
    search = HitSearch(Places(repository), suspects, read_heals(repository))
    hits = [hit for hit in search.run(every) if not all(healed for _, _, healed in hit.stretches)]
    if not search.is_complete:
        raise RepositoryDamaged(
            "So much is damaged that no rule can choose: it is not known which snapshots are whole.",
            "stillframe verify --repo REPO")
    hurt = {trunk.snapshot.sid for trunk in every if hits_of(search.places, trunk, hits)}
    return frozenset(hurt | {name.sid for name in unreadable})
