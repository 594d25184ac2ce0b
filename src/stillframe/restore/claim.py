"""What a restore of a whole guest has made so far, so that one that was killed can go on.

`restores/NAME.json` in the state folder, JSON, from before the first byte is written until the guest is
defined. It is replaced as a whole and durably. A file that it names is used again, or deleted, only while it
is exactly the file that was written down: an image that somebody touched since is left alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import msgspec

from stillframe.block.image import FileIdentity, file_identity
from stillframe.capture.lock import domain_lock
from stillframe.clock import Clock
from stillframe.durable import write_record
from stillframe.errors import StateFolderUnusable
from stillframe.restore.target import unfinished


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A restore that has begun and is not over.

    *places* are what disks and files of the machine are written to (by target, or by the path that the
    snapshot has), *made* what is finished of that, by path. *folders* were made for it, outermost first.
    """

    name: str
    sid: str
    uuid: str
    macs: tuple[str, ...]
    places: Mapping[str, str]
    formats: Mapping[str, str]
    folders: tuple[str, ...] = ()
    made: Mapping[str, FileIdentity] = {}

    def finished(self, path: str) -> bool:
        """Return whether *path* is finished, and untouched since."""
        with contextlib.suppress(OSError):
            return path in self.made and file_identity(path) == self.made[path]
        return False

    def same_work(self, other: Claim) -> bool:
        """Return whether the *other* restore writes the same to the same places."""
        return (self.sid, self.uuid, self.places, self.formats) == (
            other.sid, other.uuid, other.places, other.formats)

    def remove_unfinished(self) -> None:
        """Remove what a killed run left under temporary names. Nobody may be at work on it."""
        for path in self.places.values():
            for found in unfinished(path):
                with contextlib.suppress(OSError):
                    os.unlink(found)

    def remove_made(self) -> tuple[str, ...]:
        """Remove all that was made; return the paths of what stays, because it was touched since."""
        self.remove_unfinished()
        left = []
        for path in self.made:
            if self.finished(path):
                os.unlink(path)
            elif os.path.lexists(path):
                left.append(path)
        for folder in reversed(self.folders):
            with contextlib.suppress(OSError):  # others have put something in
                os.rmdir(folder)
        return tuple(left)


class Claims:
    """The claims of one state folder, by the name of the guest. Raises StateFolderUnusable."""

    def __init__(self, state_folder: Path, clock: Clock) -> None:
        self._state_folder = state_folder
        self._clock = clock
        self._folder = state_folder / "restores"

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keep other restores to that name away for the length of the block. Raises RunInProgress."""
        with domain_lock(self._state_folder, f"restore-{quote(name, safe='')}", name, "restore", self._clock):
            yield

    def read(self, name: str) -> Claim | None:
        """Return the claim on *name*, None if there is none."""
        path = self._path(name)
        with self._trouble(path):
            try:
                return msgspec.json.decode(path.read_bytes(), type=Claim)
            except FileNotFoundError:
                return None
            except msgspec.DecodeError as error:
                raise OSError(f"it is not valid: {error}") from error

    def write(self, claim: Claim) -> None:
        """Write the claim down."""
        path = self._path(claim.name)
        with self._trouble(path):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_record(path, claim)

    def remove(self, name: str) -> None:
        """Forget the claim."""
        path = self._path(name)
        with self._trouble(path):
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{quote(name, safe='')}.json"

    @contextlib.contextmanager
    def _trouble(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateFolderUnusable(f"The record of a restore {path} can't be used: {error}.",
                                      f"ls -ld {self._folder}") from error
