"""From what a person writes as DEST, or the journal as a mirror's folder, to where it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from stillframe.cli.session import Session
from stillframe.config import access_to, rate_of
from stillframe.errors import DestinationUnwritable
from stillframe.mirror.place import (
    Destination,
    FarDestination,
    FarPlace,
    LocalDestination,
    LocalPlace,
    MirrorPlace,
)
from stillframe.storage.address import FILE_SERVERS, local_folder, scheme_of


def destination_of(session: Session, text: str) -> Destination:
    """Return the destination that *text* names.

    Raises ConfigInvalid, DestinationUnwritable, RepositoryRefused.
    """
    if scheme_of(text) in FILE_SERVERS:
        return FarDestination(text, partial(place_of, session))
    return LocalDestination(_folder(text))


def place_of(session: Session, text: str) -> MirrorPlace:
    """Return the place of one guest's mirror. See destination_of."""
    if scheme_of(text) in FILE_SERVERS:
        settings = session.repository_settings
        return FarPlace(text, access_to(settings, text), session.clock, rate_of(settings))
    return LocalPlace(_folder(text))


def _folder(text: str) -> Path:
    kind = scheme_of(text)
    if kind == "s3":
        raise DestinationUnwritable(
            f"A mirror can't be kept in {text}: objects can't be changed in place.",
            "name a folder, sftp://USER@HOST/FOLDER or smb://USER@HOST/SHARE/FOLDER; or make a backup")
    return local_folder(text) if text.startswith("file:") else Path(text)
