"""What is kept of guests that run from a snapshot: one record for each, written before each step.

`booted/UUID/record.json` in the state folder, JSON. It is replaced as a whole (new file, fsync, rename,
fsync of the folder), so that what a reader finds is one state or the next. Beside it are the folders of the
guest's servers, one for each disk. The record goes once the guest is an ordinary one, or is gone.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from stillframe.block.image import FileIdentity, file_identity
from stillframe.durable import fsync, write_record
from stillframe.errors import GuestExists, GuestState, GuestUnknown, StateFolderUnusable
from stillframe.repository.manifest import Content

#: A read waits so long for a repository that vanished, before the guest is paused or gets an error.
PATIENCE_S = 60.0
_RECORD = "record.json"
_VERSION = 1


class BootState(enum.Enum):
    """Which step of a booted guest's way was begun last."""

    PLANNED = "planned"  # nothing was made yet
    MAKING = "making"  # overlays and the machine's files are being made
    SERVING = "serving"  # servers of the disks are being started
    DEFINING = "defining"  # the guest is being defined in libvirt
    STARTING = "starting"  # the guest is being started
    BOOTED = "booted"  # the guest is there, and reads from the snapshot what it did not write itself
    LANDING = "landing"  # what is in the snapshot only is being pulled into the overlays, or disks are copied
    SWITCHING = "switching"  # the guest stands still while a disk is switched over to its copy
    LANDED = "landed"  # its images hold everything, durably: servers and record are of no use any more
    UNDOING = "undoing"  # what was made for a guest that never ran is being removed
    DISCARDING = "discarding"  # the guest is being thrown away, as asked


_S = BootState
#: What may follow what. Where the record is removed there is no next state.
TRANSITIONS: dict[BootState, frozenset[BootState]] = {
    _S.PLANNED: frozenset({_S.MAKING, _S.UNDOING}),
    _S.MAKING: frozenset({_S.SERVING, _S.UNDOING}),
    _S.SERVING: frozenset({_S.DEFINING, _S.UNDOING}),
    _S.DEFINING: frozenset({_S.STARTING, _S.BOOTED, _S.UNDOING}),
    _S.STARTING: frozenset({_S.BOOTED, _S.UNDOING}),
    _S.BOOTED: frozenset({_S.LANDING, _S.LANDED, _S.DISCARDING}),
    _S.LANDING: frozenset({_S.LANDING, _S.SWITCHING, _S.LANDED, _S.DISCARDING}),
    _S.SWITCHING: frozenset({_S.LANDING, _S.DISCARDING}),
    _S.LANDED: frozenset(),
    _S.UNDOING: frozenset({_S.BOOTED}),
    _S.DISCARDING: frozenset(),
}
#: In these the guest may never have run.
BEFORE_BOOT = frozenset({_S.PLANNED, _S.MAKING, _S.SERVING, _S.DEFINING, _S.STARTING, _S.UNDOING})


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """Another image that a disk is to end in. *identity* is known before the file gets its name."""

    path: str
    format: str
    identity: FileIdentity | None = None

    def is_ours(self) -> bool:
        """Return whether the file that was made is there, whatever was written to it since."""
        return _is_same(self.path, self.identity)


class BootDisk(msgspec.Struct, frozen=True, kw_only=True):
    """One disk: its overlay, which is the guest's image from then on, and what is served below it.

    *overlay_identity* is that of the empty overlay, known before the file gets its name. *copy* is where the
    disk lands, if not in its overlay. *policies* are the original's error policies, which the landed
    guest gets back. *landed*: QEMU was seen to use nothing but the copy, or else the overlay, and to
    have written all of it down.
    """

    target: str
    overlay_path: str
    socket: str
    content: Content
    data_bytes: int
    policies: dict[str, str] = {}
    overlay_identity: FileIdentity | None = None
    copy: Copy | None = None
    landed: bool = False

    @property
    def image_path(self) -> str:
        """Where the disk is, or will be, once it has landed."""
        return self.overlay_path if self.copy is None else self.copy.path

    @property
    def image_format(self) -> str:
        """The format of that image."""
        return "qcow2" if self.copy is None else self.copy.format

    @property
    def is_left_behind(self) -> bool:
        """Whether the overlay is of no use any more: the disk is in its copy."""
        return self.landed and self.copy is not None

    def making_path(self, path: str) -> str:
        """Return what an image is called while it is made."""
        return _making_path(path, os.path.basename(os.path.dirname(self.socket)))

    def overlay_is_ours(self) -> bool:
        """Return whether the overlay that was made is there, whatever was written to it since."""
        return _is_same(self.overlay_path, self.overlay_identity)


def give_name(making_path: str, path: str) -> None:
    """Give a file, whose identity is written down by now, its name. Raises OSError, FileExistsError."""
    os.link(making_path, path)
    os.unlink(making_path)
    fsync(Path(path).parent)


def _making_path(path: str, uuid: str) -> str:
    """Return what a file is called while it is made for a guest: nobody else makes one of this name."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{uuid}")


def _is_same(path: str, identity: FileIdentity | None) -> bool:
    with contextlib.suppress(OSError):
        return identity is not None and file_identity(path).same_file(identity)
    return False


class BootRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One guest that was booted from a snapshot. Times are RFC 3339 in UTC.

    *snapshot* is for people, *sid* names it; *origin* is the UUID of the guest that it is of. *pauses*: the
    guest is paused where the repository can't be read for *patience_s*; else it gets I/O errors. *files*
    are the machine's files (NVRAM) that it needs, *folders* such folders (a TPM's state); *made* has those
    files that were made, by path, each known before the file gets its name.
    *define_begun*: what libvirt has of that UUID may be this guest. *held*: it was stopped for the switch
    that is under way, and goes on after it.
    """

    uuid: str
    name: str
    uri: str
    address: str
    snapshot: str
    sid: str
    origin: str
    state: BootState
    began_at: str
    pauses: bool
    patience_s: float = PATIENCE_S
    disks: tuple[BootDisk, ...]
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    made: Mapping[str, FileIdentity] = {}
    define_begun: bool = False
    held: bool = False
    detail: str = ""
    version: int = _VERSION

    def disk(self, target: str) -> BootDisk:
        """Return the disk called *target*; raises KeyError."""
        for disk in self.disks:
            if disk.target == target:
                return disk
        raise KeyError(target)

    def with_disk(self, changed: BootDisk) -> tuple[BootDisk, ...]:
        """Return the disks, one of them changed."""
        return tuple(changed if disk.target == changed.target else disk for disk in self.disks)

    def making_path(self, path: str) -> str:
        """Return what one of the *files* is called while it is made."""
        return _making_path(path, self.uuid)

    def file_is_ours(self, path: str) -> bool:
        """Return whether one of the *files* is there as it was made, whatever was written to it since."""
        return _is_same(path, self.made.get(path))


#: Called after each durable write with (state, "intent" or "done"): the fault tests stop here.
BootHook = Callable[[BootState, str], None]


class BootStore:
    """The records of one state folder. Each change is durable when the call returns.

    Who changes a record holds the guest's lock (`capture/lock.py`). Raises StateFolderUnusable.
    """

    def __init__(self, state_folder: Path, hook: BootHook | None = None) -> None:
        self.state_folder = state_folder
        self._folder = state_folder / "booted"
        self._hook = hook

    def folder(self, uuid: str) -> Path:
        """Return where the record of a guest, and what its servers keep, is."""
        return self._folder / uuid

    def order_of_boot(self, origin: str, target: str) -> Path:
        """Return the file with what is read first when a guest boots, kept for its next boot."""
        return self.state_folder / "boot-order" / f"{origin}-{target}"

    def begin(self, record: BootRecord) -> BootRecord:
        """Write down a guest that is about to be booted, and return the record."""
        with self._trouble():
            self.folder(record.uuid).mkdir(mode=0o700, parents=True)
            self.order_of_boot(record.origin, "").parent.mkdir(mode=0o700, exist_ok=True)
            fsync(self._folder)
        return self._write(record, "intent")

    def enter(self, record: BootRecord, state: BootState, detail: str = "", **changes: object) -> BootRecord:
        """Make the intent to take step *state* durable, with *changes*; return the new record."""
        if state not in TRANSITIONS[record.state]:
            raise AssertionError(f"no way from {record.state} to {state}")  # a bug, not a user's error
        changed = msgspec.structs.replace(record, state=state, detail=detail, **changes)
        return self._write(changed, "intent")

    def note(self, record: BootRecord, **changes: object) -> BootRecord:
        """Write down what was found or done within the record's step; return the new record."""
        return self._write(msgspec.structs.replace(record, **changes), "done")

    def remove(self, record: BootRecord) -> None:
        """Forget the guest: nothing of it is stillframe's any more."""
        with self._trouble():
            folder = self.folder(record.uuid)
            (folder / _RECORD).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            fsync(self._folder)

    def all(self) -> list[BootRecord]:
        """Return the records of all booted guests, in order of name."""
        if not self._folder.is_dir():
            return []
        found = [self._read(path) for path in self._folder.glob(f"*/{_RECORD}")]
        return sorted((each for each in found if each is not None), key=lambda each: (each.name, each.uuid))

    def known(self) -> list[BootRecord]:
        """Return the records that can be read, for who can do without."""
        with contextlib.suppress(OSError, StateFolderUnusable):
            return self.all()
        return []

    def named(self, name_or_uuid: str) -> BootRecord | None:
        """Return the record of a guest, None if it was not booted from a snapshot."""
        return next((each for each in self.all() if name_or_uuid in (each.name, each.uuid)), None)

    def get(self, name_or_uuid: str) -> BootRecord:
        """Return the record of a guest. Raises GuestUnknown."""
        found = self.named(name_or_uuid)
        if found is None:
            raise GuestUnknown(
                f"{name_or_uuid} is no guest that was booted from a snapshot here, or it has landed.",
                "stillframe status")
        return found

    def refuse_known(self, name: str, uuid: str) -> None:
        """Raise GuestExists if there is a record of a guest of that name or UUID."""
        found = self.named(name) or self.named(uuid)
        if found is not None:
            raise GuestExists(
                f"The guest {found.name} (UUID {found.uuid}) was booted from a snapshot here, or a boot of "
                "it was broken off.",
                f"choose another name: --as NAME; or, where it is of no use: stillframe discard {found.name}")

    def current(self, record: BootRecord) -> BootRecord | None:
        """Return the record as it is now: after a failed step it may know more. None if it is gone."""
        return self._read(self.folder(record.uuid) / _RECORD)

    def _write(self, record: BootRecord, phase: str) -> BootRecord:
        with self._trouble():
            write_record(self.folder(record.uuid) / _RECORD, record)
        if self._hook is not None:
            self._hook(record.state, phase)
        return record

    def _read(self, path: Path) -> BootRecord | None:
        with self._trouble():
            try:
                return msgspec.json.decode(path.read_bytes(), type=BootRecord)
            except FileNotFoundError:
                return None
            except msgspec.DecodeError as error:
                raise StateFolderUnusable(
                    f"The record of a booted guest {path} can't be read: {error}.",
                    "install the version of stillframe that wrote it, or a newer one",
                    GuestState.UNKNOWN) from error

    @contextlib.contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateFolderUnusable(
                f"The record of a booted guest in {self._folder} can't be used: {error}.",
                f"ls -ld {self.state_folder}   # it must be a folder on a local disk, writable to you",
                GuestState.UNKNOWN) from error
