"""Booting a snapshot at once: a new guest on overlays of its own, over disks that are served."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import msgspec

from stillframe.block.image import file_identity
from stillframe.block.tools import create_overlay
from stillframe.capture.let_go_on import fsync_definition
from stillframe.capture.lock import domain_lock
from stillframe.errors import (
    BootFailed,
    ConnectionLost,
    GuestState,
    HypervisorError,
    ProgramFailed,
    StillframeError,
    TargetExists,
)
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.repository.reader import read_whole
from stillframe.restore.boot_record import BootDisk, BootRecord, BootState, give_name
from stillframe.restore.boot_server import serve, served_place
from stillframe.restore.boot_steps import BootTools, BootWay
from stillframe.restore.machine_files import MachineTarget, make_folder, write_machine_file


@dataclass(frozen=True, slots=True)
class BootPlan:
    """A boot that may begin: the record as it is to be, and the new guest's definition.

    *folders* are to be made, *files* are the machine's (NVRAM, TPM); *free_bytes* are left where the
    overlays go.
    """

    record: BootRecord
    definition: str
    repository: Repository
    folders: tuple[str, ...] = ()
    files: tuple[MachineTarget, ...] = ()
    free_bytes: int = 0
    warnings: tuple[str, ...] = ()


Stop = Callable[[], StillframeError | None]


def boot_guest(plan: BootPlan, tools: BootTools, stop: Stop) -> BootRecord:
    """Boot the guest; return its record. If it fails, nothing is left of it, or recover removes it.

    Raises BootFailed, TargetExists, ExportFailed and whatever else a step raises.
    """
    planned = plan.record
    with domain_lock(tools.store.state_folder, planned.uuid, planned.name, "boot", tools.clock):
        begun = tools.store.begin(planned)
        try:
            return _Boot(plan, tools, stop).run(begun)
        except BaseException as error:
            _undo(begun, tools, error)
            raise


class _Boot:
    def __init__(self, plan: BootPlan, tools: BootTools, stop: Stop) -> None:
        self._plan = plan
        self._tools = tools
        self._stop = stop

    def run(self, record: BootRecord) -> BootRecord:
        store, domain = self._tools.store, self._tools.domain(record)
        record = self._enter(record, BootState.MAKING)
        for folder in self._plan.folders:
            make_folder(folder)
        places = Places(self._plan.repository)
        for target in self._plan.files:
            record = self._write(record, target, places)
        for disk in record.disks:
            record = self._make(record, disk)
        record = self._enter(store.note(record), BootState.SERVING)
        owner = self._tools.owner()
        for disk in record.disks:
            serve(store, record, disk, self._plan.repository, owner, self._tools.clock)
        record = self._enter(store.note(record), BootState.DEFINING, define_begun=True)
        domain.define(self._plan.definition)
        fsync_definition(domain)
        record = self._enter(store.note(record), BootState.STARTING)
        self._start(record)
        return store.enter(store.note(record), BootState.BOOTED)

    def _enter(self, record: BootRecord, state: BootState, *, define_begun: bool = False) -> BootRecord:
        stopped = self._stop()
        if stopped is not None:
            raise stopped
        self._tools.say(f"{record.name}: {state.value}")
        return self._tools.store.enter(record, state, define_begun=define_begun or record.define_begun)

    def _write(self, record: BootRecord, target: MachineTarget, places: Places) -> BootRecord:
        """Write a file of the machine. It is known by its identity before it gets its name."""
        making = record.making_path(target.path)
        write_machine_file(replace(target, path=making), read_whole(places, target.entry))
        with _making(target.path):
            made = {**record.made, target.path: file_identity(making)}
            record = self._tools.store.note(record, made=made)
            give_name(making, target.path)
        return record

    def _make(self, record: BootRecord, disk: BootDisk) -> BootRecord:
        """Make a disk's overlay. It is known by its identity before it gets its name."""
        with _making(disk.overlay_path):
            making = disk.making_path(disk.overlay_path)
            create_overlay(making, served_place(disk), disk.content.size_bytes)
            changed = msgspec.structs.replace(disk, overlay_identity=file_identity(making))
            record = self._tools.store.note(record, disks=record.with_disk(changed))
            give_name(making, disk.overlay_path)
        return record

    def _start(self, record: BootRecord) -> None:
        domain = self._tools.domain(record)
        try:
            domain.start()
        except ConnectionLost:
            if not domain.power().has_qemu:
                raise
        except HypervisorError as error:
            raise BootFailed(
                f"{record.name} could not be started: {error.message}",
                f"tail /var/log/libvirt/qemu/{record.name}.log") from error


@contextlib.contextmanager
def _making(path: str) -> Iterator[None]:
    """Raise what goes wrong within the block as TargetExists or BootFailed."""
    try:
        yield
    except FileExistsError as error:
        raise TargetExists(f"{path} exists.", "choose another name with --as, or --pool") from error
    except (OSError, ProgramFailed) as error:
        raise BootFailed(f"{path} can't be made: {error}.", f"df {os.path.dirname(path)}") from error


def _undo(record: BootRecord, tools: BootTools, error: BaseException) -> None:
    """Remove what a failed boot made, by the same way as recover does; a guest that ran stays."""
    name, way = record.name, BootWay(tools.store.current(record), tools)
    try:
        way.settle()
        power = None if way.is_over() else tools.domain(record).power()
    except StillframeError as trouble:
        _tell(error, GuestState.UNKNOWN, f" What was made is still there: {trouble.message}",
              f"stillframe recover {name}")
    else:
        if power is None:
            _tell(error, GuestState.UNTOUCHED)
        else:
            _tell(error, GuestState.OVERLAID, f" {name} ran all the same, and is there: it is {power.value}.",
                  f"stillframe discard {name}   # or bring it home: stillframe land {name}")


def _tell(error: BaseException, guest: GuestState, words: str = "", next_command: str = "") -> None:
    """Have an error of ours say what became of the guest."""
    if isinstance(error, StillframeError):
        error.message += words
        error.next_command = next_command or error.next_command
        error.guest = guest
