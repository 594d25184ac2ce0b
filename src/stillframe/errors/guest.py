"""Errors of whatever concerns a guest, a mirror, or the programs that are called."""

from __future__ import annotations

from stillframe.errors.base import GuestState, StillframeError


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
