"""Drills: what came of booting a snapshot to see that it boots. One sealed object for each.

    main/d/<host>/<guest>/<utc>-<sid>-<verdict>      verdict: passed | failed

The key says when which snapshot of which guest was drilled and what came of it, so that listing needs no
secret; the object (canonical JSON, sealed as a manifest is, its key authenticated) says the rest. Nothing
refers to a drill, and a drill refers to no chunk: the collector never looks at one. A prune drops those
whose snapshot is gone, but for the newest of each guest that has a snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import unquote

import msgspec

from stillframe.errors import RepositoryDamaged
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.crypto import DomainKey
from stillframe.repository.layout import DRILLS, FORMAT_VERSION, SnapshotName, check_version, safe
from stillframe.repository.opened import Repository
from stillframe.storage.model import Storage
from stillframe.storage.own import create_own

_UTC = "%Y%m%dT%H%M%S.%f"
_KEY = re.compile(rf"{DRILLS}([^/]+)/([^/]+)/(\d{{8}}T\d{{6}}\.\d{{6}})Z-([0-9a-f]{{32}})-(passed|failed)")


class CheckResult(msgspec.Struct, frozen=True):
    """A check that ran inside the guest, or a script beside it. *exit_code* is None if it came to no end."""

    command: str
    exit_code: int | None
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether it ended with 0."""
        return self.exit_code == 0


class Drill(msgspec.Struct, frozen=True, kw_only=True):
    """What one drill found. Times are RFC 3339 in UTC.

    *host* is the one the snapshot is filed under, *drilled_on* the one that booted it. *waited_for* is
    what was to tell that the guest is up ("agent", "console", "script"), *boot_s* how long that took, None if
    it did not come. *reason* says why it failed, "" if it passed. *console* is the end of what the
    guest printed, *screenshot* a PNG, empty if there is none: *screenshot_note* says why.
    """

    version: int = FORMAT_VERSION
    sid: str
    guest: str
    host: str
    uuid: str
    captured_at: str
    drilled_on: str
    began_at: str
    ended_at: str
    passed: bool
    reason: str
    waited_for: tuple[str, ...]
    boot_s: float | None
    checks: tuple[CheckResult, ...]
    warnings: tuple[str, ...]
    console: str
    screenshot: bytes
    screenshot_note: str
    stillframe: str


@dataclass(frozen=True, slots=True, order=True)
class DrillName:
    """A drill's name: all that a listing needs."""

    host: str
    guest: str
    utc: datetime
    sid: str
    passed: bool

    @property
    def key(self) -> str:
        """The object's name."""
        verdict = "passed" if self.passed else "failed"
        return f"{DRILLS}{safe(self.host)}/{safe(self.guest)}/{self.utc.strftime(_UTC)}Z-{self.sid}-{verdict}"


class _Version(msgspec.Struct):
    version: int = 0


def drill_name(key: str) -> DrillName:
    """Return what a drill's key says. Raises ValueError."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"not a drill's key: {key!r}")
    moment = datetime.strptime(match[3], _UTC).replace(tzinfo=UTC)
    return DrillName(unquote(match[1]), unquote(match[2]), moment, match[4], match[5] == "passed")


def record_drill(repository: Repository, moment: datetime, drill: Drill) -> DrillName:
    """Write a drill down. Raises StorageError."""
    name = DrillName(drill.host, drill.guest, moment, drill.sid, drill.passed)
    content = msgspec.json.encode(drill, order="sorted")
    create_own(repository.storage, name.key, repository.key.seal_object(name.key, content))
    return name


def read_drill(storage: Storage, name: DrillName, domain_key: DomainKey) -> Drill:
    """Return a drill. Raises RepositoryDamaged, RepositoryNewer, StorageError."""
    plain = domain_key.open_object(name.key, storage.get(name.key))
    try:
        check_version(msgspec.json.decode(plain, type=_Version).version, f"{name.key} is a drill")
        return msgspec.json.decode(plain, type=Drill)
    except msgspec.DecodeError as error:
        raise RepositoryDamaged(f"The drill {name.key} is not valid: {error}.",
                                "stillframe drill SNAPSHOT --repo REPO   # drill it anew") from error


def list_drills(storage: Storage) -> list[DrillName]:
    """Return all drills, the newest last; nothing is opened. Raises StorageError."""
    return sorted(_listed(storage), key=lambda each: (each.utc, each.sid))


def last_drills(drills: Iterable[DrillName]) -> dict[tuple[str, str], DrillName]:
    """Return the newest drill of each guest, by (host, guest)."""
    last: dict[tuple[str, str], DrillName] = {}
    for each in drills:
        known = last.get((each.host, each.guest))
        if known is None or known.utc < each.utc:
            last[each.host, each.guest] = each
    return last


def drop_drills(storage: Storage, *, dry_run: bool) -> int:
    """Delete the drills that are kept no longer; return how many there are. Raises StorageError."""
    # In this order: a snapshot that comes meanwhile may have drills, but none of those listed.
    drills = list_drills(storage)
    old = outdated(drills, list_snapshots(storage))
    if old and not dry_run:
        storage.delete([each.key for each in old])
    return len(old)


def outdated(drills: Iterable[DrillName], snapshots: Iterable[SnapshotName]) -> list[DrillName]:
    """Return the drills of snapshots that are gone, but for the newest of each guest with a snapshot."""
    drills, snapshots = list(drills), list(snapshots)
    there, guests = {each.sid for each in snapshots}, {(each.host, each.guest) for each in snapshots}
    newest = {each for guest, each in last_drills(drills).items() if guest in guests}
    return [each for each in drills if each.sid not in there and each not in newest]


def _listed(storage: Storage) -> Iterator[DrillName]:
    for listed in storage.list(DRILLS):
        try:
            yield drill_name(listed.key)
        except ValueError:
            continue  # not ours
