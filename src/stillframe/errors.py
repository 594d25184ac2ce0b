"""The one error tree.

    StillframeError
    ├── Refused                      nothing was changed
    │   ├── GuestUnknown, GuestHasNoDisks, GuestShutOff, GuestPaused, GuestUnfit
    │   ├── GuestBusy (block job, domain job), ForeignSnapshot, ImageShared
    │   ├── RunInProgress (another stillframe holds the guest)
    │   ├── AgentSilent, ShutdownImpossible
    │   ├── OverlayTaken, OverlayFolderNeeded, OverlaySpace
    │   ├── DestinationUnwritable, DestinationForeign, DestinationInsideGuest, DestinationSpace,
    │   │   DestinationBusy
    │   ├── NoHypervisor, MonitorBusy, NotPermitted, ConfigInvalid, StateFolderUnusable
    │   ├── ProgramMissing
    │   └── RepositoryRefused        a repository command did not begin
    │       ├── RepositoryUnknown, RepositoryExists, RepositoryNewer, RepositoryUnsafe
    │       ├── KeyWrong, KeyNeeded
    │       ├── SnapshotUnknown, SnapshotAmbiguous, SnapshotPinned
    │       ├── TargetExists, TargetSmall, TargetInUse
    │       ├── ExportExposed, ExportFailed, DrillExposed
    │       ├── LibguestfsMissing, ApplianceFailed, FilesystemUnknown, FilesystemLocked, PathUnknown,
    │       │   ArchiveRefused
    │       └── GuestExists, HostLacks, DefinitionMissing
    ├── RunFailed                    the run was given up; the guest is back on its own images
    │   ├── CopyFailed, DestinationLost, DestinationFull
    │   ├── OverlayFull              the watermark was reached
    │   ├── FreezeFailed, ShutdownTimedOut, SnapshotFailed
    │   ├── Interrupted
    │   ├── ApplyFailed              the new mirror is durable as image + redo file
    │   ├── BootFailed               nothing is left of the guest that was to be booted
    │   ├── LandFailed               the guest runs on from its snapshot
    │   └── SessionFenced            a collector took this run for dead
    ├── RepositoryDamaged            something kept is missing or not what was stored
    │   └── SlotDamaged              one slot of a pack
    ├── StorageError                 the storage below a repository said no
    │   ├── ObjectMissing, ObjectExists, ObjectTruncated
    │   └── StorageFull, StorageLost, StorageRefused
    ├── DrillFailed                  a snapshot did not boot, or a check in it failed
    ├── NeedsAttention               the guest runs, but something is left that only a person may decide
    ├── ProgramFailed, ProgramTimedOut
    └── HypervisorError              libvirt said no; carries its code
        └── ConnectionLost           the outcome of the call is unknown: look again

Each class says in `code` what an entry of docs/ERRORS.md is named, in `exit_code` what the
process ends with, in `guest` what state the guest is in, and in `retry` whether the same
command may simply be run again. `next_command` is filled in by who raises it.
"""

from __future__ import annotations

import enum
from typing import Any


class GuestState(enum.Enum):
    """What an error says about the guest."""

    UNTOUCHED = "The guest was not touched."
    SAFE = "The guest is safe: it runs on its own images and no overlay is left."
    OVERLAID = "The guest is safe but still uses an overlay that must not be deleted."
    STOPPED = "Nothing is lost, but the guest's CPUs are stopped."
    RESTORING = "The guest is off, and is kept from starting until a restore in place is finished."
    UNKNOWN = "The state of the guest was not established."


class StillframeError(Exception):
    """Anything that stillframe tells a user went wrong."""

    code = "internal"
    exit_code = 1
    guest = GuestState.UNKNOWN
    retry = False

    def __init__(self, message: str, next_command: str = "", guest: GuestState | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.next_command = next_command
        if guest is not None:
            self.guest = guest

    def text(self) -> str:
        """Return the whole message: what happened, whether the guest is safe, what to do next."""
        lines = [self.message, self.guest.value]
        if self.next_command:
            lines.append(f"Next: {self.next_command}")
        lines.append(f"(error {self.code}; see docs/ERRORS.md)")
        return "\n".join(lines)


class Refused(StillframeError):
    """The run did not begin; nothing was changed."""

    code = "refused"
    exit_code = 9
    guest = GuestState.UNTOUCHED


class GuestUnknown(Refused):
    """No domain has that name or UUID."""

    code = "guest-unknown"
    exit_code = 10


class GuestHasNoDisks(Refused):
    """The domain has no disk that can be captured."""

    code = "guest-has-no-disks"
    exit_code = 11


class GuestShutOff(Refused):
    """The domain does not run."""

    code = "guest-shut-off"
    exit_code = 12


class GuestPaused(Refused):
    """The domain is paused, and not by stillframe."""

    code = "guest-paused"
    exit_code = 13


class GuestUnfit(Refused):
    """A disk of the domain can't be captured with the method asked for."""

    code = "guest-unfit"
    exit_code = 14


class GuestBusy(Refused):
    """Another job runs on the domain or one of its disks."""

    code = "guest-busy"
    exit_code = 15
    retry = True


class ForeignSnapshot(Refused):
    """A disk stands on an external snapshot that stillframe did not make."""

    code = "foreign-snapshot"
    exit_code = 16


class ImageShared(Refused):
    """An image of the domain is also part of another domain's chain."""

    code = "image-shared"
    exit_code = 17


class RunInProgress(Refused):
    """Another stillframe run holds the domain."""

    code = "run-in-progress"
    exit_code = 18
    retry = True


class AgentSilent(Refused):
    """The guest agent was asked for but does not answer."""

    code = "agent-silent"
    exit_code = 19


class ShutdownImpossible(Refused):
    """The domain can't be shut down and started again (it is transient)."""

    code = "shutdown-impossible"
    exit_code = 20


class OverlayTaken(Refused):
    """A file with the overlay's name exists and is not a leftover of a known run."""

    code = "overlay-taken"
    exit_code = 21


class OverlayFolderNeeded(Refused):
    """A block device or network disk has no folder for its overlay."""

    code = "overlay-folder-needed"
    exit_code = 22


class OverlaySpace(Refused):
    """Too little room for the overlay to grow in while the copy lasts."""

    code = "overlay-space"
    exit_code = 23


class DestinationUnwritable(Refused):
    """The destination folder is missing or can't be written to."""

    code = "destination-unwritable"
    exit_code = 24


class DestinationForeign(Refused):
    """The destination holds files that stillframe did not write."""

    code = "destination-foreign"
    exit_code = 25


class DestinationInsideGuest(Refused):
    """The destination lies inside a folder that holds the guest's own images."""

    code = "destination-inside-guest"
    exit_code = 26


class DestinationSpace(Refused):
    """The destination has too little room for what must be written."""

    code = "destination-space"
    exit_code = 27


class DestinationBusy(Refused):
    """Another run writes to the same mirror."""

    code = "destination-busy"
    exit_code = 28
    retry = True


class NoHypervisor(Refused):
    """libvirt can't be reached."""

    code = "no-hypervisor"
    exit_code = 29
    retry = True


class MonitorBusy(Refused):
    """Another client holds the QMP monitor of a QEMU without libvirt."""

    code = "monitor-busy"
    exit_code = 34
    retry = True


class NotPermitted(Refused):
    """The user lacks a permission that the run needs."""

    code = "not-permitted"
    exit_code = 30


class ConfigInvalid(Refused):
    """The configuration file is not valid."""

    code = "config-invalid"
    exit_code = 31


class StateFolderUnusable(Refused):
    """The state folder or the journal in it can't be used."""

    code = "state-folder-unusable"
    exit_code = 32


class ProgramMissing(Refused):
    """A program that stillframe needs is not installed."""

    code = "program-missing"
    exit_code = 33

    def __init__(self, program: str) -> None:
        super().__init__(
            f"The program {program} is not installed.",
            "apt-get install qemu-utils util-linux (Debian), then run the command again",
        )


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


class RunFailed(StillframeError):
    """The run was given up after it had begun; the guest was brought back."""

    code = "run-failed"
    exit_code = 40
    guest = GuestState.SAFE
    retry = True


class CopyFailed(RunFailed):
    """Reading the disk failed."""

    code = "copy-failed"
    exit_code = 41


class DestinationLost(RunFailed):
    """The destination vanished or failed in mid-copy."""

    code = "destination-lost"
    exit_code = 42


class DestinationFull(RunFailed):
    """The destination ran out of space in mid-copy."""

    code = "destination-full"
    exit_code = 43


class OverlayFull(RunFailed):
    """The overlay reached its watermark before the copy was done."""

    code = "overlay-full"
    exit_code = 44


class FreezeFailed(RunFailed):
    """The guest agent did not freeze the file systems in time."""

    code = "freeze-failed"
    exit_code = 45


class ShutdownTimedOut(RunFailed):
    """The guest did not shut down in time."""

    code = "shutdown-timed-out"
    exit_code = 46


class SnapshotFailed(RunFailed):
    """libvirt refused the overlay."""

    code = "snapshot-failed"
    exit_code = 47


class Interrupted(RunFailed):
    """A signal ended the run."""

    code = "interrupted"
    exit_code = 48


class ApplyFailed(RunFailed):
    """The new state is durable in the redo file, but could not be written into the image."""

    code = "apply-failed"
    exit_code = 49


class SessionFenced(RunFailed):
    """A collector took this run for dead and closed the place of its manifest: no snapshot was made."""

    code = "session-fenced"
    exit_code = 50


class BootFailed(RunFailed):
    """A guest could not be booted from a snapshot; what was made for it was removed."""

    code = "boot-failed"
    exit_code = 51
    guest = GuestState.UNTOUCHED


class LandFailed(RunFailed):
    """A booted guest still reads from its snapshot: not everything could be pulled."""

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
    """The storage can be reached and says no: wrong credentials, no such bucket, an unknown host key."""

    code = "storage-refused"
    exit_code = 120


class DrillFailed(StillframeError):
    """A snapshot was booted and did not come up, or a check failed; what was booted is gone."""

    code = "drill-failed"
    exit_code = 106
    guest = GuestState.UNTOUCHED


class NeedsAttention(StillframeError):
    """No safe action exists; a person must choose. Nothing was changed by the refusal."""

    code = "needs-attention"
    exit_code = 60
    guest = GuestState.OVERLAID


class ProgramFailed(StillframeError):
    """A program ended with an unexpected exit code."""

    code = "program-failed"
    exit_code = 70

    def __init__(self, command: str, status: int, stderr: str) -> None:
        super().__init__(f"`{command}` ended with {status}: {stderr}")
        self.status = status
        self.stderr = stderr


class ProgramTimedOut(StillframeError):
    """A program did not end within its deadline and was killed."""

    code = "program-timed-out"
    exit_code = 71
    retry = True

    def __init__(self, command: str, timeout_s: float) -> None:
        super().__init__(f"`{command}` did not end within {timeout_s:.0f} s.")


class HypervisorError(StillframeError):
    """libvirt refused a call. `libvirt_code` is its VIR_ERR number, which is never localised."""

    code = "hypervisor"
    exit_code = 72

    def __init__(self, message: str, libvirt_code: int, next_command: str = "") -> None:
        super().__init__(message, next_command)
        self.libvirt_code = libvirt_code


class ConnectionLost(HypervisorError):
    """The connection broke during a call: it may or may not have been carried out. Look again."""

    code = "connection-lost"
    exit_code = 73
    retry = True


#: Exit codes of commands that did what was asked.
EXIT_OK = 0
EXIT_USAGE = 2
EXIT_CRASH_CONSISTENT = 3
EXIT_FELL_BACK = 4
EXIT_PARTIAL = 5
