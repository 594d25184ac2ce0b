"""Errors of repositories, of the storage below them, and of the ways back from them."""

from __future__ import annotations

from typing import Any

from stillframe.errors.base import GuestState, StillframeError
from stillframe.errors.guest import Refused, RunFailed


class RepositoryRefused(Refused):
    """A command on a repository did not begin; nothing was changed."""

    code = "repository-refused"
    exit_code = 80


class RepositoryUnknown(RepositoryRefused):
    """There is no repository at the address."""

    code = "repository-unknown"
    exit_code = 81


class RepositoryExists(RepositoryRefused):
    """There is something at the address already."""

    code = "repository-exists"
    exit_code = 82


class RepositoryNewer(RepositoryRefused):
    """A later version of stillframe wrote this."""

    code = "repository-newer"
    exit_code = 83


class RepositoryUnsafe(RepositoryRefused):
    """The storage can't do what makes a repository safe with many writers."""

    code = "repository-unsafe"
    exit_code = 84


class KeyWrong(RepositoryRefused):
    """The secret opens none of the repository's key slots."""

    code = "key-wrong"
    exit_code = 85


class KeyNeeded(RepositoryRefused):
    """No secret was given, or it could not be read."""

    code = "key-needed"
    exit_code = 86


class SnapshotUnknown(RepositoryRefused):
    """No snapshot has that name."""

    code = "snapshot-unknown"
    exit_code = 87


class SnapshotAmbiguous(RepositoryRefused):
    """Several snapshots have that name."""

    code = "snapshot-ambiguous"
    exit_code = 88


class SnapshotPinned(RepositoryRefused):
    """The snapshot is pinned, and was to be dropped."""

    code = "snapshot-pinned"
    exit_code = 121


class TargetExists(RepositoryRefused):
    """What would be restored to exists and was not asked to be overwritten."""

    code = "target-exists"
    exit_code = 89


class TargetSmall(RepositoryRefused):
    """The target is smaller than the disk, or its file system has too little room."""

    code = "target-small"
    exit_code = 90


class TargetInUse(RepositoryRefused):
    """A guest, a mount or another program uses the target."""

    code = "target-in-use"
    exit_code = 91


class ExportExposed(RepositoryRefused):
    """A disk would be served to whoever reaches the port."""

    code = "export-exposed"
    exit_code = 100


class ExportFailed(RepositoryRefused):
    """The server for a disk did not start, or ended by itself."""

    code = "export-failed"
    exit_code = 101


class DrillExposed(RepositoryRefused):
    """A drilled guest would reach more than its own network."""

    code = "drill-exposed"
    exit_code = 105


class GuestExists(RepositoryRefused):
    """A guest of that name or UUID is there already."""

    code = "guest-exists"
    exit_code = 102


class HostLacks(RepositoryRefused):
    """The host has not got what the guest's definition names."""

    code = "host-lacks"
    exit_code = 103


class DefinitionMissing(RepositoryRefused):
    """The snapshot has no definition of its guest."""

    code = "definition-missing"
    exit_code = 104


class LibguestfsMissing(RepositoryRefused):
    """libguestfs, which looks into file systems, is not installed."""

    code = "libguestfs-missing"
    exit_code = 110

    def __init__(self) -> None:
        super().__init__("libguestfs is not installed, or its module for this Python is not.",
                         "apt-get install python3-guestfs (Debian), then run the command again")


class ApplianceFailed(RepositoryRefused):
    """The small machine that looks into file systems did not start, died or went silent."""

    code = "appliance-failed"
    exit_code = 111
    retry = True


class FilesystemUnknown(RepositoryRefused):
    """There is no file system to look into, there are several, or it can't be mounted."""

    code = "filesystem-unknown"
    exit_code = 112


class FilesystemLocked(RepositoryRefused):
    """What is encrypted was not opened: no key was given, or no key opens it."""

    code = "filesystem-locked"
    exit_code = 113


class PathUnknown(RepositoryRefused):
    """There is no such path in the guest, or it is of another kind than the command needs."""

    code = "path-unknown"
    exit_code = 114


class ArchiveRefused(RepositoryRefused):
    """A file of the guest can't be read to its end, or an archive is not as it should be."""

    code = "archive-refused"
    exit_code = 115


class SessionFenced(RunFailed):
    """A collector took this run for dead and closed the place of its manifest: no snapshot was made."""

    code = "session-fenced"
    exit_code = 50


class BootFailed(RunFailed):
    """A guest could not be booted from a snapshot; what was made was removed, unless it says that it ran."""

    code = "boot-failed"
    exit_code = 51
    guest = GuestState.UNTOUCHED


class LandFailed(RunFailed):
    """A booted guest still reads from its snapshot: not everything could be pulled, or made durable."""

    code = "land-failed"
    exit_code = 52
    guest = GuestState.OVERLAID


class RepositoryDamaged(StillframeError):
    """Something in the repository is missing, or is not what was stored there."""

    code = "repository-damaged"
    exit_code = 92
    guest = GuestState.UNTOUCHED


class SlotDamaged(RepositoryDamaged):
    """A slot of a pack that is missing or is not what was stored; *place* (a SlotRef) refers to it."""

    code = "slot-damaged"
    exit_code = 99

    def __init__(self, place: Any, why: str) -> None:
        super().__init__(f"Slot {place.slot} of the pack {place.pack.text} can't be read: {why}.",
                         "stillframe verify --repo REPO   # names what is hurt; "
                         "restore --skip-bad gives what is left")
        self.place = place
        self.why = why
        #: The leaves that are lost with it, if it is an inner node.
        self.leaves = range(0)


class StorageError(StillframeError):
    """The storage that holds a repository refused or failed."""

    code = "storage"
    exit_code = 93
    guest = GuestState.UNTOUCHED


class ObjectMissing(StorageError):
    """There is no object of that name."""

    code = "object-missing"
    exit_code = 94


class ObjectExists(StorageError):
    """There is an object of that name already."""

    code = "object-exists"
    exit_code = 95


class ObjectTruncated(StorageError):
    """An object is shorter than what is to be read of it."""

    code = "object-truncated"
    exit_code = 96


class StorageFull(StorageError):
    """The storage has no room left."""

    code = "storage-full"
    exit_code = 97
    retry = True


class StorageLost(StorageError):
    """The storage failed or can't be reached."""

    code = "storage-lost"
    exit_code = 98
    retry = True


class StorageRefused(StorageError):
    """The storage says no (credentials, bucket, host key), or what this host needs to ask it is missing."""

    code = "storage-refused"
    exit_code = 120


class DrillFailed(StillframeError):
    """A snapshot was booted and did not come up, or a check failed; what was booted is gone."""

    code = "drill-failed"
    exit_code = 106
    guest = GuestState.UNTOUCHED
