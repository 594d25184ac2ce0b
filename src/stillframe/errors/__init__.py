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

from stillframe.errors.base import *
from stillframe.errors.guest import *
from stillframe.errors.repository import *
