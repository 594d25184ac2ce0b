"""Restoring a whole guest: its disks, its firmware's variables, its TPM, and at last its definition.

The guest is defined only when all that it needs is durable: whatever ends the restore before, nothing of it
is defined or runs. An error removes what was made. A kill leaves it, with a claim that says what is
whole; the same command goes on from there, and another restore to that name removes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from stillframe.block.image import file_identity
from stillframe.capture.let_go_on import fsync_definition
from stillframe.clock import Clock
from stillframe.errors import (
    ConnectionLost,
    GuestState,
    GuestUnknown,
    HypervisorError,
    SlotDamaged,
    StillframeError,
)
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import Domain
from stillframe.repository.places import Places
from stillframe.repository.reader import read_whole
from stillframe.restore.claim import Claim, Claims
from stillframe.restore.guest_plan import GuestPlan, PlannedDisk, refuse_guest
from stillframe.restore.machine_files import MachineTarget, make_folder, write_machine_file
from stillframe.restore.run import Restored, RestoreProgress, restore_disk


@dataclass(frozen=True, slots=True)
class GuestTools:
    """What a restore of a guest works with. *reached* is told of each step that is over (for fault tests)."""

    places: Places
    connection: Connection
    claims: Claims
    clock: Clock
    stop: Callable[[], StillframeError | None] = lambda: None
    report: Callable[[str, RestoreProgress], None] = lambda _target, _progress: None
    reached: Callable[[str], None] = lambda _step: None


@dataclass(slots=True)
class RestoredGuest:
    """What was done. *kept* are targets that an earlier run had finished, *lost_files* what was skipped."""

    disks: dict[str, Restored] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    lost_files: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was lost."""
        return not self.lost_files and not any(disk.lost for disk in self.disks.values())


def restore_guest(plan: GuestPlan, tools: GuestTools, *, skip_bad: bool = False) -> RestoredGuest:
    """Make what *plan* says, which was checked, and define the guest. Who calls holds the claim.

    Raises what restore_disk does, GuestExists, HypervisorError: then nothing is left of it but what was
    written to block devices.
    """
    work = _Work(plan, tools, skip_bad)
    try:
        work.make()
        work.define()
    except BaseException as error:
        work.undo(error)
        raise
    tools.claims.remove(plan.claim.name)
    tools.reached("over")
    return work.result


def start_guest(plan: GuestPlan, connection: Connection) -> None:
    """Start the restored guest. Raises HypervisorError, which says that the guest is defined."""
    name = plan.claim.name
    try:
        connection.act(lambda connect: connect.lookupByUUIDString(plan.claim.uuid).create())
    except HypervisorError as error:
        error.message = f"{name} was restored and is defined, but it did not start. {error.message}"
        error.args = (error.message,)
        error.guest = GuestState.UNTOUCHED
        error.next_command = f"virsh --connect {connection.uri} start {name}"
        raise


class _Work:
    def __init__(self, plan: GuestPlan, tools: GuestTools, skip_bad: bool) -> None:
        self._plan = plan
        self._tools = tools
        self._skip_bad = skip_bad
        self._claim = plan.claim
        self._may_be_defined = False
        self.result = RestoredGuest()

    def make(self) -> None:
        """Make all but the definition."""
        self._take_over()
        self._note()
        self._tools.reached("claimed")
        for folder in self._claim.folders:
            make_folder(folder)
        for disk in self._plan.disks:
            if disk.is_done:
                self.result.kept.append(disk.entry.target)
            else:
                self._restore(disk)
            self._tools.reached(disk.entry.target)
        for target in self._plan.files:
            self._write(target)
        self._tools.reached("files")

    def define(self) -> None:
        """Define the guest, durably."""
        claim, tools = self._claim, self._tools
        refuse_guest(tools.connection, claim.name, claim.uuid)  # it may have come meanwhile
        self._may_be_defined = True
        try:
            tools.connection.act(lambda connect: connect.defineXML(self._plan.definition))
        except ConnectionLost:
            if not self._is_defined():
                self._may_be_defined = False
                raise
        except HypervisorError:
            self._may_be_defined = False
            raise
        with contextlib.suppress(OSError):
            fsync_definition(Domain(tools.connection, claim.uuid, claim.name))
        tools.reached("defined")

    def undo(self, error: BaseException) -> None:
        """Remove what was made, unless the guest may be defined upon it."""
        if self._may_be_defined:
            return
        left = self._claim.remove_made()
        self._tools.claims.remove(self._claim.name)
        hurt = [disk.wishes.path for disk in self._plan.disks
                if disk.is_device and disk.entry.target in self.result.disks]
        for words in (f"{path} was written to already." for path in hurt):
            _add(error, words)
        for path in left:
            _add(error, f"{path} was made and changed since: it stays.")

    def _take_over(self) -> None:
        """Go on from what a killed run left if it is of use here, else remove it."""
        earlier = self._plan.earlier
        if earlier is None:
            return
        kept = [folder for folder in earlier.folders
                if any(path.startswith(f"{folder}/") for path in self._claim.places.values())]
        folders = tuple(dict.fromkeys((*kept, *self._claim.folders)))
        self._claim = msgspec.structs.replace(self._claim, folders=folders)
        if not earlier.same_work(self._claim):
            earlier.remove_made()
            return
        earlier.remove_unfinished()
        made = {path: identity for path, identity in earlier.made.items() if earlier.finished(path)}
        self._claim = msgspec.structs.replace(self._claim, made=made)

    def _restore(self, disk: PlannedDisk) -> None:
        target = disk.entry.target
        result = restore_disk(
            self._tools.places, disk.entry, disk.wishes, clock=self._tools.clock, skip_bad=self._skip_bad,
            stop=self._tools.stop, report=lambda progress: self._tools.report(target, progress))
        self.result.disks[target] = result
        if not disk.is_device:
            self._finished(disk.wishes.path)

    def _write(self, target: MachineTarget) -> None:
        if not self._claim.finished(target.path):
            try:
                content = read_whole(self._tools.places, target.entry)
            except SlotDamaged as damage:
                if not self._skip_bad:
                    raise
                # Half of it is worse than none: a guest starts with new variables.
                self.result.lost_files.append(f"{target.entry.path} ({damage.why})")
                return
            write_machine_file(target, content)
            self._finished(target.path)
        self.result.files.append(target.path)

    def _finished(self, path: str) -> None:
        self._claim = msgspec.structs.replace(
            self._claim, made={**self._claim.made, path: file_identity(path)})
        self._note()

    def _note(self) -> None:
        self._tools.claims.write(self._claim)

    def _is_defined(self) -> bool:
        try:
            self._tools.connection.look(lambda connect: connect.lookupByUUIDString(self._claim.uuid).name())
        except GuestUnknown:
            return False
        return True


def _add(error: BaseException, words: str) -> None:
    if isinstance(error, StillframeError):
        error.message = f"{error.message} {words}"
        error.args = (error.message,)


def forget_defined(claims: Claims, earlier: Claim | None, connection: Connection) -> Claim | None:
    """Return *earlier*, None if its guest is defined: then the restore was over, but for saying so."""
    if earlier is None:
        return None
    try:
        connection.look(lambda connect: connect.lookupByUUIDString(earlier.uuid).name())
    except GuestUnknown:
        return earlier
    claims.remove(earlier.name)
    return None
