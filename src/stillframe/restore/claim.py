"""What a restore of a whole guest has made so far, so that one that was killed can go on.

`restores/NAME.json` in the state folder, JSON, from before the first byte is written until the guest is
defined. It is replaced as a whole and durably. A file that it names is used again, or deleted, only while it
is exactly the file that was written down: an image that somebody touched since is left alone.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from stillframe.block.image import FileIdentity, file_identity
from stillframe.capture.lock import domain_lock, lock_holder
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

    def again(self) -> str:
        """Return the command that goes on with it."""
        words = ["stillframe", "restore", self.sid[:12], "--as", self.name]
        places = {target: self.places[target] for target in self.formats}
        for target, path in places.items():
            if path.startswith("/dev/"):
                words += ["--disk", f"{target}={path}"]
        files = [path for path in places.values() if not path.startswith("/dev/")]
        words += ["--pool", os.path.dirname(files[0])] if files else []
        return f"{shlex.join(words)} --repo REPO   # and the other options that it had"

    def words(self) -> str:
        """Return what to say of it."""
        return f"the restore of {self.name} from {self.sid[:12]} was not finished"

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
        with domain_lock(self._state_folder, _lock_of(name), name, "restore", self._clock):
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

    def all(self) -> list[Claim]:
        """Return all claims, in order of their guests' names."""
        found = [self.read(unquote(path.stem)) for path in self._folder.glob("*.json")]
        return sorted((each for each in found if each is not None), key=lambda each: each.name)

    def holder(self, name: str) -> str:
        """Return who restores to that name now, "" if nobody does."""
        return lock_holder(self._state_folder, _lock_of(name))

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


def _lock_of(name: str) -> str:
    return f"restore-{quote(name, safe='')}"
