"""`stillframe copy`: the snapshots of one repository into another."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass

from stillframe.cli.session import Session
from stillframe.cli.snapshots import name_body, name_words, short_id
from stillframe.config import RepositorySettings
from stillframe.errors import (
    EXIT_OK,
    EXIT_PARTIAL,
    ConfigInvalid,
    ObjectExists,
    ObjectMissing,
    RepositoryDamaged,
    RepositoryRefused,
    SnapshotUnknown,
)
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.copy import Copied, Copier, copy_drill, missing, missing_drills, no_copies
from stillframe.repository.hints import ChunkHints
from stillframe.repository.layout import SnapshotName
from stillframe.repository.opened import read_parameters
from stillframe.units import size_text


@dataclass(frozen=True)
class Way:
    """From where to where, as options say it."""

    source: RepositorySettings
    target: RepositorySettings

    def sessions(self, session: Session) -> tuple[Session, Session]:
        """Return sessions on the two repositories. Raises ConfigInvalid if one is not said.

        Without a source, it is the configured repository; what *session*'s file says of copies is the target.
        """
        if self.source.repository is not None:
            return session.beside(self.source.over(self.target)), session.beside(self.target)
        target = self.target.over(session.settings.copy)
        if target.repository is None:
            raise ConfigInvalid(
                "Where to copy to is not said.",
                'add --to REPO, or write [copy] and below it repository = "REPO" into the configuration file')
        return session.beside(self.source), session.beside(target)


def copy(session: Session, way: Way, guest: str | None, *, dry_run: bool) -> int:
    """Copy what a repository lacks of another's; return the exit code."""
    source, target = way.sessions(session)
    with target.completing():
        return _copy(target, source, guest, dry_run=dry_run)


def _copy(session: Session, source: Session, guest: str | None, *, dry_run: bool) -> int:
    with source.completing():
        source_id, originals = read_parameters(source.storage).id, list_snapshots(source.storage)
    if source_id == read_parameters(session.storage).id:
        raise RepositoryRefused(f"{source.address} and {session.address} are one repository.",
                                "name another one with --to")
    originals = [name for name in originals if guest in (None, name.guest)]
    left, unreadable = _left(session, originals)
    if dry_run:
        for name in left:
            session.screen.result(f"would copy  {name_words(name)}")
        drills = len(missing_drills(source.storage, session.storage, guest))
        session.screen.json(
            {"dry_run": True, "missing": [name_body(name) for name in left], "unreadable": unreadable,
             "drills": drills})
        return EXIT_OK
    session.kept = "What was copied is whole; the snapshot that was under way is not listed."
    copied, failed = _copied(session, source, left)
    drills = _copied_drills(session, source, guest, failed)
    if drills:
        session.screen.result(f"{drills} drill{'s' * (drills != 1)} copied")
    if not left and not drills:
        session.screen.say("nothing to copy")
    session.screen.json({"dry_run": False, "copied": copied, "failed": failed, "unreadable": unreadable,
                         "drills": drills})
    return EXIT_PARTIAL if failed else EXIT_OK


def _left(
    session: Session, originals: list[SnapshotName],
) -> tuple[list[SnapshotName], list[dict[str, object]]]:
    """Return which of *originals* are to be copied, and what is in the place of a copy and can't be read."""
    copies = list_snapshots(session.storage)
    # What was whole once is not fetched again: whether it is now, is for `verify`.
    unreadable = no_copies(originals, copies, session.near_repository) if copies else []
    for name in unreadable:
        session.screen.warn(
            f"{name_words(name)} can't be read at {session.address}, so it is no copy. To be rid of it: "
            f"stillframe forget {name.sid} --repo {shlex.quote(session.address)}")
    return missing(originals, set(copies).difference(unreadable)), [name_body(name) for name in unreadable]


def _copied(
    session: Session, source: Session, left: list[SnapshotName],
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Copy *left*; return what was copied, and what could not be, damaged in the source as it is."""
    copied: list[dict[str, object]] = []
    failed: list[dict[str, object]] = []
    repository = session.repository
    with source.completing():
        original = source.repository
    with (
        contextlib.closing(ChunkHints(repository.parameters.id, session.hints_folder)) as hints,
        session.signals_as_stop("the snapshot that is under way is given up"),
    ):
        copier = Copier(original, repository, hints, session.clock, session.host)
        for name in left:
            try:
                done = copier.copy(
                    name, stop=session.stop,
                    report=lambda target, progress, name=name: session.screen.bar(  # type: ignore[misc]
                        f"{short_id(name.sid)} {target}: copy", progress.done_bytes, progress.size_bytes))
            except SnapshotUnknown:
                session.screen.say(f"{name_words(name)}: forgotten meanwhile")
                continue
            except RepositoryDamaged as error:
                source.complete(error)
                session.screen.error(error, name_words(name))
                failed.append({**name_body(name), "error": error.message})
                continue
            copied.append(_shown(session, name, done))
    return copied, failed


def _copied_drills(
    session: Session, source: Session, guest: str | None, failed: list[dict[str, object]],
) -> int:
    """Copy the drills of what is copied by now; return how many. Damaged ones are added to *failed*."""
    count = 0
    for name, sid in missing_drills(source.storage, session.storage, guest):
        try:
            copy_drill(source.repository, session.repository, name, sid)
            count += 1
        except (ObjectExists, ObjectMissing):  # another copy was first, or it was dropped meanwhile
            continue
        except RepositoryDamaged as error:
            source.complete(error)
            session.screen.error(error, f"a drill of {name.guest}")
            failed.append({"drill": name.key, "error": error.message})
    return count


def _shown(session: Session, original: SnapshotName, done: Copied) -> dict[str, object]:
    how = f"{size_text(done.stored_bytes)} moved as stored" if done.moved else (
        f"{size_text(done.read_bytes)} read, {size_text(done.stored_bytes)} stored")
    session.screen.result(f"{name_words(original)}: copied as {short_id(done.name.sid)}; {how}")
    return {**name_body(done.name), "origin": original.sid, "read_bytes": done.read_bytes,
            "stored_bytes": done.stored_bytes, "moved": done.moved}
