"""One flipped bit in each kind of bytes of a repository: it is found, and wrong bytes are never given out."""

from __future__ import annotations

import dataclasses
import random

import pytest

from stillframe.errors import KeyNeeded, KeyWrong, RepositoryDamaged, RepositoryNewer, StillframeError
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.layout import SnapshotName, pack_name
from stillframe.repository.opened import Repository, Secret, open_repository
from stillframe.repository.pack import HEAD_BYTES, footer_of
from stillframe.repository.verify import Level, verify
from stillframe.storage.memory import MemoryStorage
from tests.format.make_golden import PASSPHRASE, golden_world
from tests.unit.repository_snapshots import World, read_snapshot

_FLIPS = 6
_CLASSES = ("pack head", "pack body", "pack footer", "pack end", "tree body", "tree footer", "manifest",
            "key slot", "generation", "heal", "repo.json")


@pytest.fixture(scope="module")
def world() -> World:
    """Make a repository with everything in it once; each flip is made in a copy."""
    return golden_world()


def _targets(storage: MemoryStorage, kind: str) -> list[tuple[str, range]]:
    """Return (key, range of bytes) of every stretch of a kind."""
    found: list[tuple[str, range]] = []
    prefixes = {"manifest": "main/m/", "key slot": "main/keys/", "generation": "main/g/",
                "heal": "main/v/heal/", "repo.json": "repo.json"}
    if kind in prefixes:
        return [(key, range(len(content))) for key, content in storage.contents().items()
                if key.startswith(prefixes[kind]) and len(content) != 64]
    prefix = "main/t/" if kind.startswith("tree") else "main/p/"
    for key, content in storage.contents().items():
        if key.startswith(prefix):
            rows = footer_of(pack_name(key), content)
            end = rows[-1].offset_bytes + rows[-1].stored_bytes
            found.append((key, {"head": range(HEAD_BYTES), "body": range(HEAD_BYTES, end),
                                "footer": range(end, len(content) - 40),
                                "end": range(len(content) - 40, len(content))}[kind.split()[1]]))
    return found


def _read_all(repository: Repository, world: World) -> tuple[int, int]:
    """Read every snapshot; return how many came equal and how many were refused. Never one that differs."""
    equal = refused = 0
    for name in list_snapshots(repository.storage):
        try:
            assert read_snapshot(repository, name) == world.expected[name], "wrong bytes without an error"
            equal += 1
        except (RepositoryDamaged, RepositoryNewer, KeyError):
            refused += 1
    return equal, refused


def _found(storage: MemoryStorage, world: World) -> bool:
    """Return whether opening or verifying tells that something is wrong."""
    try:
        repository = open_repository(storage, Secret(SlotKind.PASSPHRASE, PASSPHRASE.encode()))
        _read_all(repository, world)
        seen = verify(repository, world.clock, Level.FULL)
    except (RepositoryDamaged, RepositoryNewer, KeyWrong, KeyNeeded, StillframeError):
        return True
    return not seen.is_sound or bool(seen.findings) or bool(seen.unreadable)


@pytest.mark.parametrize("kind", _CLASSES)
def test_a_flipped_bit_is_found_and_never_read(world: World, kind: str) -> None:
    assert isinstance(world.repository.storage, MemoryStorage)
    draw = random.Random(kind)
    targets = _targets(world.repository.storage, kind)
    assert targets, f"the repository has no {kind}"
    newest = max(key for key, _ in targets)
    for _ in range(_FLIPS):
        # An old generation that nobody reads any more may rot.
        key, places = draw.choice([each for each in targets if kind != "generation" or each[0] == newest])
        storage = world.repository.storage.copy()
        content = bytearray(storage.get(key))
        at = draw.choice(places)
        content[at] ^= 1 << draw.randrange(8)
        storage.replace(key, content)
        assert _found(storage, world), f"{kind}: {key} at {at}"


@pytest.mark.parametrize("kind", ["pack body", "tree body", "manifest"])
def test_an_object_that_is_gone_or_cut_short_is_found(world: World, kind: str) -> None:
    assert isinstance(world.repository.storage, MemoryStorage)
    for key, _ in _targets(world.repository.storage, kind)[:4]:
        for cut in (None, 1, 50):
            storage = world.repository.storage.copy()
            content = storage.get(key)
            storage.delete([key])
            if cut is not None:
                storage.create(key, content[: -cut])
            if kind == "manifest" and cut is None:
                assert len(list_snapshots(storage)) == len(world.expected) - 1
            else:
                assert _found(storage, world), f"{kind}: {key} cut by {cut}"


def test_what_damage_leaves_can_still_be_read(world: World) -> None:
    assert isinstance(world.repository.storage, MemoryStorage)
    storage = world.repository.storage.copy()
    (key, _), *_ = _targets(storage, "manifest")
    storage.replace(key, storage.get(key)[:-1])
    repository = dataclasses.replace(world.repository, storage=storage)
    equal, refused = _read_all(repository, world)
    assert (equal, refused) == (len(world.expected) - 1, 1)
    assert isinstance(list_snapshots(storage)[0], SnapshotName)
