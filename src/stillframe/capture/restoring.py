"""What an unfinished restore in place has written down: whose disks, from which snapshot, and how far.

`in-place/UUID.json` in the state folder, from before the first image is touched until the guest may start
again. It is replaced as a whole and durably. A capture refuses such a guest; `recover`, `status` and `doctor`
name it. What keeps the guest from starting meanwhile is in restore/protect.py.
"""

from __future__ import annotations

import enum
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from stillframe.block.image import FileIdentity, ImageKind, ImagePlace
from stillframe.durable import fsync, write_record
from stillframe.errors import GuestState, NeedsAttention, StateFolderUnusable
from stillframe.hypervisor.model import Source

#: What an image is called while it is restored: its own name, then this.
MARK = ".stillframe-restoring"


class RestorePhase(enum.Enum):
    """How far a restore in place is. Each is durable before what it names begins."""

    PROTECTING = "being protected"
    WRITING = "being written"
    WRITTEN = "written"

    @property
    def is_torn(self) -> bool:
        """Whether the disks may be neither what they were nor what they are to be."""
        return self is RestorePhase.WRITING


class RestoringDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that is restored: its image as it is called at other times, and as libvirt names it.

    *done_bytes*: from the beginning to there it is equal to the snapshot's, durably.
    """

    target: str
    place: ImagePlace
    source_xml: str
    source_kind: str
    source_format: str
    identity: FileIdentity | None
    done_bytes: int = 0

    @property
    def is_file(self) -> bool:
        """Whether the image is a file, which can have another name meanwhile."""
        return self.place.kind is ImageKind.FILE

    @property
    def marked_path(self) -> str:
        """What the image, a file, is called meanwhile."""
        return self.place.path + MARK

    @property
    def meanwhile(self) -> ImagePlace:
        """Where the image is meanwhile."""
        return replace(self.place, path=self.marked_path) if self.is_file else self.place

    def source(self) -> Source:
        """Return the image as libvirt names it, for the domain's definition."""
        return Source(self.source_kind, self.source_format, "", xml=self.source_xml)


class Restoring(msgspec.Struct, frozen=True, kw_only=True):
    """A restore in place that has begun and is not over.

    *whole*: all disks of the snapshot are restored, and the files of the machine. *before* is the snapshot of
    the state before, "" if none was made. *definition* is what is to be defined in the end, "" to leave that
    as it is.
    """

    uuid: str
    name: str
    sid: str
    snapshot: str
    repository: str
    began_at: str
    phase: RestorePhase
    disks: tuple[RestoringDisk, ...]
    whole: bool
    before: str = ""
    definition: str = ""

    def again(self) -> str:
        """Return the commands that end it."""
        one = "" if self.whole else f":{self.disks[0].target}"
        command = (f"stillframe restore {self.sid[:12]}{one} --in-place --guest {shlex.quote(self.name)} "
                   f"--repo {shlex.quote(self.repository)}")
        if not self.before or self.before == self.sid:
            return command
        return f"{command}   # or the state before, with {self.before[:12]}{one} in its place"

    def words(self) -> str:
        """Return what to say of it."""
        return f"the restore in place of {self.name} from {self.snapshot} is unfinished ({self.phase.value})"


class RestoringStore:
    """The restores in place of one state folder. Raises StateFolderUnusable.

    *hook* is called after each durable write: the fault tests stop there.
    """

    def __init__(self, state_folder: Path, hook: Callable[[str], None] = lambda _step: None) -> None:
        self._folder = state_folder / "in-place"
        self.hook = hook

    def read(self, uuid: str) -> Restoring | None:
        """Return the unfinished restore in place of that guest, None if there is none."""
        path = self._path(uuid)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Restoring)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise StateFolderUnusable(
                f"{path}, the record of a restore in place, can't be read: {error}",
                f"ls -l {path}   # the guest's images may be only partly restored", GuestState.UNKNOWN,
            ) from error

    def all(self) -> list[Restoring]:
        """Return all that are unfinished, in order of their guests' names."""
        found = [self.read(path.stem) for path in self._folder.glob("*.json")]
        return sorted((each for each in found if each is not None), key=lambda each: each.name)

    def write(self, restoring: Restoring) -> None:
        """Write it down, durably."""
        path = self._path(restoring.uuid)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_record(path, restoring)
            fsync(self._folder.parent)
        except OSError as error:
            raise _unwritable(path, error) from error
        self.hook(restoring.phase.name.lower())

    def remove(self, uuid: str) -> None:
        """Forget it, durably: it is over."""
        path = self._path(uuid)
        try:
            path.unlink(missing_ok=True)
            fsync(self._folder)
        except OSError as error:
            raise _unwritable(path, error) from error
        self.hook("removed")

    def _path(self, uuid: str) -> Path:
        return self._folder / f"{uuid}.json"


def refuse_restoring(state_folder: Path, uuid: str) -> None:
    """Raise NeedsAttention if a restore in place of the guest is unfinished."""
    found = RestoringStore(state_folder).read(uuid)
    if found is not None:
        raise attention(found)


def attention(found: Restoring) -> NeedsAttention:
    """Return the error for a guest whose restore in place is unfinished."""
    words = found.words()
    if not found.phase.is_torn:
        return NeedsAttention(f"{words[0].upper()}{words[1:]}.", f"stillframe recover {found.name}",
                              GuestState.RESTORING)
    return NeedsAttention(f"{words[0].upper()}{words[1:]}.", found.again(), GuestState.RESTORING)


def _unwritable(path: Path, error: OSError) -> StateFolderUnusable:
    return StateFolderUnusable(
        f"{path}, the record of a restore in place, can't be written: {error.strerror}.",
        f"df -h {path.parent}", GuestState.RESTORING)
