"""A repository that is open: its storage, parameters and key; making and opening one."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from stillframe.clock import Clock, utc_text
from stillframe.errors import (
    KeyNeeded,
    KeyWrong,
    ObjectExists,
    ObjectMissing,
    RepositoryDamaged,
    RepositoryExists,
    RepositoryNewer,
    RepositoryRefused,
    RepositoryUnknown,
    StorageError,
)
from stillframe.repository.crypto import DomainKey
from stillframe.repository.keyslots import (
    DamagedSlot,
    Kdf,
    KeySlot,
    SlotKind,
    decode_slot,
    recovery_secret,
    unwrap,
    wrap,
)
from stillframe.repository.layout import (
    INIT_CLAIM,
    KEY_SLOTS,
    MANIFESTS,
    REPOSITORY_KEY,
    SID_BYTES,
    PackKind,
    Parameters,
    decode_parameters,
    pack_name,
    packs_prefix,
)
from stillframe.repository.manifest import is_tombstone
from stillframe.repository.pack import footer_of, stored_digest
from stillframe.repository.slots import SlotCodec
from stillframe.storage.access import NOBODY, Access
from stillframe.storage.cache import Cached
from stillframe.storage.model import Content, Storage
from stillframe.storage.own import create_own
from stillframe.storage.probe import PROBES, probe_create_if_absent
from stillframe.storage.wrappers import Retried


@dataclass(frozen=True, slots=True)
class Secret:
    """What opens a key slot. A passphrase is also tried as a recovery key that somebody typed."""

    kind: SlotKind
    value: bytes = field(repr=False)

    def for_slot(self, kind: SlotKind) -> bytes | None:
        """Return the bytes to open a slot of that kind with, None if this can't be its secret."""
        if kind is SlotKind.RECOVERY and self.kind is not SlotKind.KEY_FILE:
            return recovery_secret(self.value.decode(errors="replace"))
        return self.value if kind is self.kind else None


@dataclass(frozen=True, slots=True)
class Repository:
    """An open repository. For several threads. *access* is who we are to its server."""

    storage: Storage
    parameters: Parameters
    key: DomainKey
    codec: SlotCodec
    access: Access = NOBODY

    @property
    def address(self) -> str:
        """Where it is, for people."""
        return self.storage.address

    def stores_like(self, other: Repository) -> bool:
        """Return whether what is stored in *other* could be stored here as it is: same key, same sizes."""
        mine, theirs = (msgspec.structs.replace(each.parameters, id="", created_at="", digest="")
                        for each in (self, other))
        return self.key.secret == other.key.secret and mine == theirs


def retried(storage: Storage, clock: Clock, **options: Any) -> Retried:
    """Return *storage* with what failed tried again, but for a commit: that is sent once.

    The commit's outcome is settled by `Session.commit`, which a second request would spoil. A tombstone is no
    commit: it refers to nothing, so one that takes effect late does no harm. *options* are those of Retried.
    """
    return Retried(storage, clock, sent_once=_is_commit, **options)


def _is_commit(key: str, content: Content) -> bool:
    return key.startswith(MANIFESTS) and not is_tombstone(memoryview(content).nbytes)


#: Created once and never changed, and needed again by the next backup of this host. Generations are not among
#: them: a number comes again, with other content, after a server was rolled back.
_KEPT_NEAR = (packs_prefix(PackKind.TREE), MANIFESTS)


def with_cache(repository: Repository, caches: Path) -> Repository:
    """Return *repository* with its trees and manifests kept in a folder of its own in *caches*.

    For who finds by a listing what it reads: a backup, a restore, a list. Not for who must see what is
    missing or damaged in the storage (`verify`), or decides what to delete by it (`prune`).
    """
    storage = Cached(repository.storage, caches / repository.parameters.id, _KEPT_NEAR,
                     listed=packs_prefix(PackKind.TREE), is_whole=partial(_is_whole, repository.key))
    return replace(repository, storage=storage)


def _is_whole(key: DomainKey, name: str, content: bytes) -> bool:
    """Return whether an object that is kept near is what was stored under its *name*."""
    try:
        if name.startswith(packs_prefix(PackKind.TREE)):
            view = memoryview(content)
            return all(
                stored_digest(view[row.offset_bytes : row.offset_bytes + row.stored_bytes]) == row.digest
                for row in footer_of(pack_name(name), view))
        key.open_object(name, content)
    except (RepositoryDamaged, RepositoryNewer, ValueError):
        return False
    return True


def init_repository(
    storage: Storage, secret: Secret, label: str, clock: Clock, *, costs: Kdf | None = None,
    parameters: Parameters | None = None,
) -> Repository:
    """Make a repository with a new key, and one slot that *secret* opens.

    *parameters* sets other sizes than the usual ones. Raises RepositoryExists, RepositoryUnsafe,
    StorageError.
    """
    key = DomainKey.new()
    now = utc_text(clock.now())
    slot = wrap(key, secret.value, secret.kind, label, now, costs)
    made = Parameters(id=_new_id(), created_at=now) if parameters is None else parameters
    return _made(storage, key, [slot], made)


def init_with_keys_of(first: Repository, storage: Storage, clock: Clock) -> Repository:
    """Make a repository with key, key slots and sizes of *first*: what is stored there has the same bytes.

    So copies between the two need not be opened and sealed anew. Session IDs are random, so nothing is sealed
    twice with one key and nonce. Damaged slots are left out. Raises RepositoryExists, RepositoryUnsafe,
    RepositoryNewer, StorageError.
    """
    parameters = msgspec.structs.replace(first.parameters, id=_new_id(), created_at=utc_text(clock.now()))
    slots = [slot for slot in key_slots(first.storage) if isinstance(slot, KeySlot)]
    return _made(storage, first.key, slots, parameters)


def _new_id() -> str:
    return secrets.token_hex(SID_BYTES)


def _made(storage: Storage, key: DomainKey, slots: list[KeySlot], made: Parameters) -> Repository:
    _refuse_full(storage)
    probe_create_if_absent(storage)
    with _claimed(storage):
        # The keys come first: a repository that is there can always be opened.
        for slot in slots:
            create_own(storage, slot.key, slot.encode())
        create_own(storage, REPOSITORY_KEY, made.encode())
    return Repository(storage, made, key, SlotCodec(key, made))


@contextlib.contextmanager
def _claimed(storage: Storage) -> Iterator[None]:
    """Keep others from making a repository in the same place for the length of the block.

    Both would leave their key slots there, and one of them would open it with a key that is not its own.
    Raises RepositoryExists, StorageError.
    """
    try:
        create_own(storage, INIT_CLAIM, secrets.token_bytes(SID_BYTES))
    except ObjectExists as error:
        raise RepositoryExists(
            f"Somebody else makes a repository at {storage.address} just now, or died at it: "
            f"{INIT_CLAIM} is there.",
            f"choose an empty place, or: stillframe list --repo {storage.address}") from error
    try:
        _refuse_full(storage)
        yield
    finally:
        with contextlib.suppress(StorageError):  # what is there besides counts
            storage.delete([INIT_CLAIM])


def _refuse_full(storage: Storage) -> None:
    """Raise RepositoryExists if there is anything but the claim of who asks, and what others probe."""
    for listed in storage.list(""):
        if listed.key != INIT_CLAIM and not listed.key.startswith(PROBES):
            raise RepositoryExists(
                f"{storage.address} is not empty: it has {listed.key}.",
                f"choose an empty place, or: stillframe list --repo {storage.address}",
            )


def open_repository(storage: Storage, secret: Secret, access: Access = NOBODY) -> Repository:
    """Open a repository. *access* is who the storage was opened as.

    Raises RepositoryUnknown, RepositoryNewer, RepositoryDamaged, KeyWrong, KeyNeeded, StorageError.
    """
    parameters = read_parameters(storage)
    key = _unlocked(storage, secret)
    return Repository(storage, parameters, key, SlotCodec(key, parameters), access)


def read_parameters(storage: Storage) -> Parameters:
    """Return what `repo.json` says; no key is needed. Raises RepositoryUnknown, RepositoryNewer."""
    try:
        content = storage.get(REPOSITORY_KEY)
    except ObjectMissing as error:
        raise RepositoryUnknown(f"There is no repository at {storage.address}.",
                                f"ls -la {storage.address}   # is it the right folder?") from error
    return decode_parameters(content, storage.address)


def key_slots(storage: Storage) -> Iterator[KeySlot | DamagedSlot]:
    """Yield the key slots. Raises RepositoryNewer, StorageError."""
    for listed in storage.list(KEY_SLOTS):
        with contextlib.suppress(ObjectMissing):  # it was removed meanwhile
            content = storage.get(listed.key)
            try:
                yield decode_slot(listed.key, content)
            except RepositoryDamaged as error:
                yield DamagedSlot(listed.key, content, error.message)


def remove_slot(storage: Storage, slot: KeySlot | DamagedSlot) -> None:
    """Remove a key slot, unless others have removed all the others that are whole by now.

    Raises RepositoryRefused then, StorageError.
    """
    storage.delete([slot.key])
    # Two may remove the last two at once. Whoever was later finds none, and puts its own back.
    if not any(isinstance(each, KeySlot) for each in key_slots(storage)):
        create_own(storage, slot.key, slot.encode())
        raise last_slot(storage, slot)


def last_slot(storage: Storage, slot: KeySlot | DamagedSlot) -> RepositoryRefused:
    """Return the error that says that a key slot can't be removed."""
    return RepositoryRefused(
        f"{slot.id} is the last key slot of {storage.address}: nobody could open it any more.",
        f"stillframe key add --repo {storage.address}   # then remove this one")


def _unlocked(storage: Storage, secret: Secret) -> DomainKey:
    tried, damaged = [], []
    for listed in storage.list(KEY_SLOTS):
        try:
            slot = decode_slot(listed.key, storage.get(listed.key))
            value = secret.for_slot(slot.kind)
            if value is not None:
                tried.append(slot.id)
                return unwrap(slot, value)
        except (KeyWrong, ObjectMissing):  # it was removed meanwhile
            continue
        except RepositoryDamaged as error:
            damaged.append(error)
    if damaged:
        raise damaged[0]
    if not tried:
        raise KeyNeeded(
            f"{storage.address} has no key slot that a {secret.kind.value} opens.",
            f"stillframe key list --repo {storage.address}",
        )
    raise KeyWrong(
        f"The {secret.kind.value} opens none of the key slots of {storage.address} ({', '.join(tried)}).",
        f"stillframe key list --repo {storage.address}   # names the slots there are",
    )
