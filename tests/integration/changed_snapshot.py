"""A snapshot as it would be from another host: the same disks, another definition."""

from __future__ import annotations

import msgspec

from stillframe.repository.catalog import list_snapshots, resolve
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.layout import new_sid
from stillframe.repository.manifest import encode_manifest
from stillframe.repository.opened import Secret, open_repository
from stillframe.repository.snapshots import read_snapshot
from stillframe.storage.local import LocalStorage
from tests.fault.driver import PASSPHRASE
from tests.integration.repositories import Repo


def changed(repo: Repo, snapshot: str, old: str, new: str) -> str:
    """Store *snapshot* once more, with *new* for *old* in its definitions; return the new one's ID."""
    repository = open_repository(LocalStorage(repo.path), Secret(SlotKind.PASSPHRASE, PASSPHRASE))
    name = resolve(list_snapshots(repository.storage), snapshot)
    manifest = read_snapshot(repository, name)
    assert old in manifest.inactive_xml
    sid = new_sid()
    manifest = msgspec.structs.replace(manifest, sid=sid, live_xml=manifest.live_xml.replace(old, new),
                                       inactive_xml=manifest.inactive_xml.replace(old, new))
    key = name.key.replace(name.sid, sid)
    repository.storage.create(key, encode_manifest(manifest, key, repository.key))
    return sid
