"""No key ever seals two slots under one nonce, whatever crashes in between: counted where sealing is done."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest

from stillframe.errors import StorageLost
from stillframe.repository.crypto import DomainKey
from stillframe.repository.layout import PackName, session_key
from stillframe.storage.memory import MemoryStorage
from tests.unit.repository_disks import CHUNK, noise
from tests.unit.repository_snapshots import World

Sealed = Counter[tuple[PackName, int]]


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sealed]:
    """Count how often each (pack, slot), which is key and nonce, was sealed."""
    count: Sealed = Counter()
    real, real_into = DomainKey.seal_slot, DomainKey.seal_slot_into

    def seal_slot(self: DomainKey, birth: PackName, slot: int, content: bytes) -> bytes:
        count[birth, slot] += 1
        return real(self, birth, slot, content)

    def seal_slot_into(self: DomainKey, birth: PackName, slot: int, *rest: object) -> object:
        count[birth, slot] += 1
        return real_into(self, birth, slot, *rest)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(DomainKey, "seal_slot", seal_slot)
    monkeypatch.setattr(DomainKey, "seal_slot_into", seal_slot_into)
    yield count
    assert count, "nothing was sealed"
    assert max(count.values()) == 1, "a nonce was used twice under one key"


def _disk(seed: int) -> bytes:
    return noise(30 * CHUNK, 5) + noise(10 * CHUNK, seed)


def test_backups_prunes_and_compactions_never_reuse_a_nonce(sealed: Sealed) -> None:
    world = World()
    names = [world.backup(_disk(seed)) for seed in range(4)]
    world.forget(names[0], names[1])
    for _ in range(2):
        world.prune(max_unused=0.0, compact_below=0.99)
    world.backup(_disk(2))
    world.check()


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8])
def test_a_crash_at_any_write_and_another_try_never_reuse_one(sealed: Sealed, nth: int) -> None:
    world = World()
    storage = world.repository.storage
    assert isinstance(storage, MemoryStorage)
    sids = set()
    for attempt in range(4):
        writes = 0

        def crash(verb: str, key: str) -> None:
            nonlocal writes
            if verb in ("create", "replace"):
                writes += 1
                if key.startswith(session_key("")):
                    sids.add(key)
                if writes == nth:
                    raise StorageLost("crashed", "")

        storage.before = crash
        with contextlib.suppress(StorageLost):
            world.backup(_disk(attempt))
        storage.before = None
    world.backup(_disk(9))
    assert len(sids) == 4, "a try after a crash is another session"
