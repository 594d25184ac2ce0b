"""`stillframe init` and `stillframe key`: what opens a repository."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path

from stillframe.cli.secret import make_key_file, read_secret
from stillframe.cli.session import Session
from stillframe.clock import utc_text
from stillframe.config import RepositorySettings, storage_of
from stillframe.errors import EXIT_OK, RepositoryExists, RepositoryRefused
from stillframe.repository.keyslots import (
    DamagedSlot,
    KeySlot,
    SlotKind,
    new_recovery_key,
    recovery_secret,
    wrap,
)
from stillframe.repository.opened import (
    Repository,
    Secret,
    init_repository,
    init_with_keys_of,
    key_slots,
    last_slot,
    read_parameters,
    remove_slot,
)
from stillframe.storage.address import folder_of
from stillframe.storage.local import UNFINISHED
from stillframe.storage.model import Storage
from stillframe.storage.own import create_own

_DAMAGED = "damaged"
_MAY_BE_THERE = (UNFINISHED, "lost+found")


def init(session: Session, new_key_file: Path | None, label: str) -> int:
    """Make a repository that one secret opens; return the exit code."""
    _refuse_full(folder_of(session.address))
    secret = _new_secret(session, new_key_file)
    made = init_repository(_new_storage(session), secret, label, session.clock)
    _tell_made(session, made, f"{_WAYS[secret.kind]} opens it. Without it nothing in there can ever be read "
                              f"again.")
    session.screen.say(f"make a recovery key, for paper: stillframe key export --repo {made.address}")
    return EXIT_OK


def init_like(session: Session, first: Session) -> int:
    """Make a repository that all opens that opens *first*'s; return the exit code."""
    _refuse_full(folder_of(session.address))
    with first.completing():
        other = first.repository
        for slot in key_slots(other.storage):
            if isinstance(slot, DamagedSlot):
                session.screen.warn(f"{slot.why} It is left out.")
    made = init_with_keys_of(other, _new_storage(session), session.clock)
    _tell_made(session, made, f"Whatever opens {other.address} now opens it. Copies between the two move as "
                              f"they are stored.")
    return EXIT_OK


def add(session: Session, label: str, passphrase_file: Path | None, new_key_file: Path | None) -> int:
    """Add a key slot for a new passphrase or a new key file; return the exit code."""
    repository = session.repository
    if passphrase_file is not None:
        named = RepositorySettings(passphrase_file=str(passphrase_file))
        secret = read_secret(named, session.screen)
    elif new_key_file is not None:
        secret = make_key_file(new_key_file)
    else:
        secret = read_secret(RepositorySettings(), session.screen, new=True)
    slot = wrap(repository.key, secret.value, secret.kind, label, utc_text(session.clock.now()))
    create_own(repository.storage, slot.key, slot.encode())
    session.screen.result(f"added the key slot {slot.id} ({slot.kind.value})")
    if new_key_file is not None:
        session.screen.result(f"{new_key_file} opens {repository.address} now; keep a copy of it elsewhere")
    session.screen.json({"key_slot": _slot_body(slot)})
    return EXIT_OK


def list_all(session: Session) -> int:
    """List the key slots; return the exit code."""
    read_parameters(session.storage)
    slots = list(key_slots(session.storage))
    for slot in slots:
        if isinstance(slot, DamagedSlot):
            session.screen.result(f"{slot.id}  {_DAMAGED}")
            session.screen.warn(f"{slot.why} To be rid of it: stillframe key remove {shlex.quote(slot.id)} "
                                f"--repo {shlex.quote(session.address)}")
            continue
        label = f"  {slot.label}" if slot.label else ""
        session.screen.result(f"{slot.id}  {slot.kind.value:<10}  {slot.created_at[:19]}Z{label}")
    session.screen.json({"key_slots": [_slot_body(slot) for slot in slots]})
    return EXIT_OK


def remove(session: Session, name: str, *, dry_run: bool) -> int:
    """Remove the one key slot whose ID begins with *name*, a damaged one, too; return the exit code."""
    repository = session.repository
    slots = list(key_slots(repository.storage))
    slot = _the_slot(slots, name, repository.address)
    if [each for each in slots if isinstance(each, KeySlot)] == [slot]:
        raise last_slot(repository.storage, slot)
    if not dry_run:
        remove_slot(repository.storage, slot)
    did = "would remove" if dry_run else "removed"
    body = _slot_body(slot)
    session.screen.result(f"{did} the key slot {slot.id} ({body['kind']}), {len(slots) - 1} are left")
    if not dry_run:
        session.screen.say(
            "whoever read that slot and knows its secret has the repository's key all the same: for new "
            "data, make a new repository")
    session.screen.json({"dry_run": dry_run, "removed": body, "left": len(slots) - 1})
    return EXIT_OK


def export(session: Session, label: str) -> int:
    """Make a recovery key, print it once, and add its slot; return the exit code."""
    repository = session.repository
    key = new_recovery_key()
    slot = wrap(
        repository.key, recovery_secret(key), SlotKind.RECOVERY, label, utc_text(session.clock.now()))
    create_own(repository.storage, slot.key, slot.encode())
    say = session.screen.result
    say(f"recovery key of {repository.address} (slot {slot.id}), shown this once and stored nowhere:")
    say("")
    say(f"    {key}")
    say("")
    say("Write it down or print it, and keep it away from this host. It opens the repository when all")
    say("else is lost: type it where the passphrase is asked for. If others saw it: "
        f"stillframe key remove {slot.id} --repo {repository.address}")
    session.screen.json({"recovery_key": key, "key_slot": _slot_body(slot)})
    return EXIT_OK


_WAYS = {
    SlotKind.PASSPHRASE: "The passphrase", SlotKind.KEY_FILE: "The key file",
    SlotKind.RECOVERY: "The recovery key",
}


def _new_storage(session: Session) -> Storage:
    return storage_of(
        session.repository_settings, session.address, session.access, session.clock, make=True)


def _tell_made(session: Session, made: Repository, what_opens_it: str) -> None:
    slots = [_slot_body(slot) for slot in key_slots(made.storage)]
    session.screen.result(f"made the repository {made.address} ({made.parameters.id[:12]})")
    session.screen.result(what_opens_it)
    session.screen.json({"repository": made.address, "id": made.parameters.id, "key_slots": slots})


def _new_secret(session: Session, new_key_file: Path | None) -> Secret:
    if new_key_file is not None:
        return make_key_file(new_key_file)
    return read_secret(session.repository_settings, session.screen, new=True)


def _refuse_full(folder: Path | None) -> None:
    """Raise RepositoryExists before anything is made in a folder that holds something else."""
    if folder is None:
        return  # init_repository looks
    with contextlib.suppress(OSError):
        found = sorted(name for name in os.listdir(folder) if name not in _MAY_BE_THERE)
        if found:
            raise RepositoryExists(
                f"{folder} is not empty: it has {found[0]}.",
                f"choose an empty folder, or: stillframe list --repo {folder}")


def _the_slot(slots: list[KeySlot | DamagedSlot], name: str, address: str) -> KeySlot | DamagedSlot:
    found = [slot for slot in slots if name and slot.id.startswith(name)]
    if len(found) != 1:
        what = "Several key slots begin" if found else "No key slot begins"
        raise RepositoryRefused(f"{what} with {name!r}.", f"stillframe key list --repo {address}")
    return found[0]


def _slot_body(slot: KeySlot | DamagedSlot) -> dict[str, object]:
    if isinstance(slot, DamagedSlot):
        return {"id": slot.id, "kind": _DAMAGED, "label": "", "created_at": ""}
    return {"id": slot.id, "kind": slot.kind.value, "label": slot.label, "created_at": slot.created_at}
