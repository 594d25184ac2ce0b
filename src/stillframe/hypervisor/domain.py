"""One libvirt domain: looking at it, and the single steps that change it.

Every method looks the domain up anew, so that none is bound to a connection that may be
gone. Looks are repeated after a reconnect; steps are made once (see Connection).
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import libvirt

from stillframe.errors import ConnectionLost, GuestUnknown, HypervisorError
from stillframe.hypervisor import monitor
from stillframe.hypervisor.advice import Advice, advice_for
from stillframe.hypervisor.backup_xml import (
    checkpoint_xml,
    job_socket,
    machine_of,
    pull_xml,
    redefinition,
    tells_backup,
)
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain_xml import copy_xml, read_domain_xml, snapshot_xml
from stillframe.hypervisor.model import BlockJob, DomainView, DomainXml, Ending, Mirror, Power, PullJob

T = TypeVar("T")

_XML_FLAGS_INACTIVE = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
_SNAPSHOT_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)
_COMMIT_FLAGS = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
#: That the job ends with the guest's QEMU is what libvirt wants to hear for a guest that is defined.
_COPY_FLAGS = libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
_UNDEFINE_FLAGS = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)
_PID_FOLDER = Path("/run/libvirt/qemu")
_DEFINITIONS = Path("/etc/libvirt/qemu")
_ENDINGS = {
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: Ending.SHUTDOWN, libvirt.VIR_DOMAIN_SHUTOFF_SAVED: Ending.SAVED,
    libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN: Ending.UNKNOWN, libvirt.VIR_DOMAIN_SHUTOFF_DAEMON: Ending.UNKNOWN,
}
#: QEMU's user owns the folders in here, its confinement lets it write there, and libvirt removes them.
_RUN_FOLDERS = Path("/var/lib/libvirt/qemu")


class Domain:
    """A domain by its UUID. *name* is what it was called when it was found."""

    def __init__(self, connection: Connection, uuid: str, name: str) -> None:
        self.connection = connection
        self.uuid = uuid
        self.name = name

    @property
    def advice(self) -> Advice:
        """What people type to look at it or to help it."""
        return advice_for(self.connection.uri, self.name)

    def view(self) -> DomainView:
        """Return everything one look gives; power GONE when the domain is not defined.

        Raises HypervisorError, NoHypervisor.
        """
        try:
            return self._look(self._view)
        except GuestUnknown:
            hidden = qemu_pid(self.name) is not None
            return DomainView(self.name, self.uuid, Power.HIDDEN if hidden else Power.GONE)

    def power(self) -> Power:
        """Return whether the domain runs."""
        try:
            return self._look(lambda domain: _power(domain, self.name))
        except GuestUnknown:
            return Power.GONE

    def ending(self) -> Ending:
        """Return how the domain came to be off. libvirt forgets it when it is restarted."""

        def ask(domain: libvirt.virDomain) -> Ending:
            state, reason = domain.state()
            if domain.hasManagedSaveImage():
                return Ending.SAVED
            return _ENDINGS.get(reason, Ending.CUT) if state == libvirt.VIR_DOMAIN_SHUTOFF else Ending.CUT

        return self._look(ask)

    def starts(self) -> tuple[int, int]:
        """Return what is another value once the domain was started, or its start may have been missed."""
        return self.connection.starts(self.uuid)

    def descriptions(self) -> list[DomainXml]:
        """Return the domain's XMLs: live (if it runs) and inactive (if it is persistent)."""

        def read(domain: libvirt.virDomain) -> list[DomainXml]:
            flags = [0] if domain.isActive() else []
            flags += [_XML_FLAGS_INACTIVE] if domain.isPersistent() else []
            return [read_domain_xml(domain.XMLDesc(flag)) for flag in flags]

        try:
            return self._look(read)
        except GuestUnknown:
            return []

    def neighbours(self) -> Sequence[Domain]:
        """Return the other domains that libvirt knows."""
        return [each for each in all_domains(self.connection) if each.uuid != self.uuid]

    def qemu_pid(self) -> int | None:
        """Return the process ID of its QEMU, None if none is to be seen."""
        return qemu_pid(self.name)

    def definition_files(self) -> tuple[Path, ...]:
        """Return the definition's file and its folder: libvirt renames without an fsync of the folder."""
        if not _DEFINITIONS.is_dir():
            return ()
        return (*_DEFINITIONS.glob(f"{glob.escape(self.name)}.xml"), _DEFINITIONS)

    def capacity_bytes(self, target: str) -> int:
        """Return the virtual size of disk *target*."""
        return int(self._look(lambda domain: domain.blockInfo(target, 0)[0]))

    def backup_problem(self) -> str:
        """Return why there can be no backup job with bitmaps for the guest, "" if there can."""

        def ask(domain: libvirt.virDomain) -> bool:
            machine = machine_of(domain.XMLDesc(0))
            return tells_backup(domain.connect().getDomainCapabilities(*machine, 0))

        try:
            has_jobs = self._look(ask)
        except HypervisorError:
            has_jobs = False  # a libvirt that can't answer has none
        return self.qmp(monitor.nbd_problem) if has_jobs else "its libvirt has no backup jobs with bitmaps"

    def tell_when_written_to(self, target: str, offset_bytes: int) -> None:
        """Have libvirt send one event when the image of disk *target* is written to at this offset or beyond.

        It forgets that when the event was sent, and when the guest or the image changes.
        """
        self._act(lambda domain: domain.setBlockThreshold(target, offset_bytes))

    def snapshot_holders(self) -> tuple[str, ...]:
        """Return the names of libvirt snapshots that keep a disk on an external overlay."""
        return self._look(_external_snapshots)

    def put_overlays_on(self, overlays: Mapping[str, str], others: tuple[str, ...]) -> None:
        """Put the pre-created *overlays* (target → path) on, all in one QEMU transaction.

        Every other disk must be in *others*. No snapshot metadata is made.
        Raises HypervisorError, ConnectionLost.
        """
        text = snapshot_xml(overlays, others)
        self._act(lambda domain: domain.snapshotCreateXML(text, _SNAPSHOT_FLAGS))

    def start_commit(self, target: str, base_index: int, top_index: int) -> None:
        """Start the active commit of exactly top into base, both named by libvirt's indexes."""
        base, top = f"{target}[{base_index}]", f"{target}[{top_index}]"
        self._act(lambda domain: domain.blockCommit(target, base, top, 0, _COMMIT_FLAGS))

    def start_lowering(self, target: str, base_index: int, top_index: int) -> None:
        """Start committing top, an image *below* the one in use, into base; the image in use stays so."""
        base, top = f"{target}[{base_index}]", f"{target}[{top_index}]"
        self._act(lambda domain: domain.blockCommit(target, base, top, 0, 0))

    def pivot(self, target: str) -> None:
        """End the commit or the copy of *target* by making the base, or the copy, its image."""
        self._act(lambda domain: domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT))

    def abort_block_job(self, target: str) -> None:
        """End the block job on *target*; the guest stays on its overlay, and nothing is lost."""
        self._act(lambda domain: domain.blockJobAbort(target, 0))

    def pull_of(self, target: str) -> BlockJob | None:
        """Return the block job on *target*, None if there is none. Asks QEMU for nothing else."""
        return self._look(lambda domain: _block_job(domain, target))

    def start_pull(self, target: str) -> None:
        """Start pulling all that is below the image of *target* into it."""
        self._act(lambda domain: domain.blockPull(target, 0, 0))

    def start_copy(self, target: str, path: str, image_format: str) -> None:
        """Start copying all of disk *target* into the image that is at *path*, and keep the two the same."""
        text = copy_xml(path, image_format)
        self._act(lambda domain: domain.blockCopy(target, text, {}, _COPY_FLAGS))

    def mirror_of(self, target: str) -> Mirror | None:
        """Return what disk *target* is mirrored to by a block job, None if no such job runs."""
        def read(domain: libvirt.virDomain) -> Mirror | None:
            disk = read_domain_xml(domain.XMLDesc(0)).disks.get(target)
            return None if disk is None else disk.mirror

        return self._look(read)

    def suspend(self) -> None:
        """Stop the guest's CPUs."""
        self._act(lambda domain: domain.suspend())

    def resume(self) -> None:
        """Let the guest's CPUs go on."""
        self._act(lambda domain: domain.resume())

    def start(self) -> None:
        """Start the domain."""
        self._act(lambda domain: domain.create())

    def destroy(self) -> None:
        """End the domain's QEMU, as if its power was cut."""
        self._act(lambda domain: domain.destroy())

    def undefine(self) -> None:
        """Remove the definition, and what libvirt keeps with it: NVRAM, TPM state, saved memory."""
        self._act(lambda domain: domain.undefineFlags(_UNDEFINE_FLAGS))

    def ask_to_shut_down(self, agent_timeout_s: int) -> None:
        """Ask the guest to shut down, by its agent if it answers in time, else by ACPI."""
        # libvirt waits a minute for a silent agent here, whatever response time was set.
        by_agent = self.agent_answers(agent_timeout_s)
        how = libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT if by_agent else libvirt.VIR_DOMAIN_SHUTDOWN_DEFAULT
        self._act(lambda domain: domain.shutdownFlags(how))

    # --- checkpoints and backup jobs -------------------------------------------------------------

    def glance_at_power(self) -> Power | None:
        """Return whether the domain runs; None, without waiting, while libvirt is not there."""
        try:
            return self._act(lambda domain: _power(domain, self.name))
        except GuestUnknown:
            return Power.GONE
        except ConnectionLost:
            self.connection.try_again()
        except HypervisorError:
            pass
        return None

    def has_job(self) -> bool:
        """Return whether libvirt shows a job (a backup, a migration, a save) on the domain."""
        return self._look(lambda domain: bool(domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE))

    def backup_runs(self, socket: str) -> bool:
        """Return whether the backup job that serves on *socket* runs."""
        return job_socket(self._look(_backup_xml)) == socket

    def begin_backup(self, job: PullJob) -> None:
        """Begin a backup job and make its checkpoint at one and the same moment.

        Raises HypervisorError; ConnectionLost if it may or may not have begun.
        """
        backup = pull_xml(job.socket, job.disks, job.others)
        unkept = tuple(disk.target for disk in job.disks if not disk.keeps)
        checkpoint = checkpoint_xml(
            job.checkpoint, job.kept, (*unkept, *job.others), job.about) if job.kept else None
        self._act(lambda domain: domain.backupBegin(backup, checkpoint, 0))

    def close_backup(self, socket: str, nodes: tuple[str, ...]) -> None:
        """Close in QEMU what is left of a backup job that libvirt has lost."""
        self.qmp(lambda qmp: monitor.close_exports(qmp, nodes, server=os.path.exists(socket)))

    def abort_job(self) -> None:
        """Ask for the end of whatever job runs on the domain; it is over somewhat later."""
        self._act(lambda domain: domain.abortJob())

    def checkpoints(self) -> frozenset[str]:
        """Return the names of all checkpoints that libvirt knows of the domain."""
        return self._look(lambda domain: frozenset(each.getName() for each in domain.listAllCheckpoints()))

    def checkpoint_text(self, job: PullJob) -> str:
        """Return libvirt's XML of the checkpoint that *job* made, which can define it again."""
        return self._look(lambda domain: str(domain.checkpointLookupByName(job.checkpoint).getXMLDesc(0)))

    def redefine_checkpoint(self, text: str, counted: Sequence[str]) -> None:
        """Tell libvirt of a checkpoint whose bitmaps are in the images; libvirt checks that they are."""
        flags = (libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
                 | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE)
        again = redefinition(text, counted, self.checkpoints())
        self._act(lambda domain: domain.checkpointCreateXML(again, flags))

    def delete_checkpoint(self, name: str, *, bitmaps: bool) -> None:
        """Delete the checkpoint, with its *bitmaps* or without."""
        flags = 0 if bitmaps else libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
        self._act(lambda domain: domain.checkpointLookupByName(name).delete(flags))

    def run_folder(self) -> Path | None:
        """Return the folder that libvirt made for this run of the guest alone; None if it is not known."""
        number = self._look(lambda domain: domain.ID())
        found = list(_RUN_FOLDERS.glob(f"domain-{number}-*")) if number >= 0 else []
        return found[0] if len(found) == 1 else None

    def define(self, text: str) -> None:
        """Make *text* the domain's inactive XML."""
        self.connection.act(lambda connect: connect.defineXML(text))

    def qmp(self, action: Callable[[monitor.Qmp], T]) -> T:
        """Return what *action* makes of QEMU's own monitor.

        Raises HypervisorError, also for what QEMU refuses.
        """
        return self._act(lambda domain: action(monitor.passthrough(domain)))

    def freeze(self, timeout_s: int) -> int:
        """Freeze the guest's file systems; return how many.

        After any error the freeze may still happen later: thaw until it is verified.
        """

        def ask(domain: libvirt.virDomain) -> int:
            domain.agentSetResponseTimeout(timeout_s, 0)
            return int(domain.fsFreeze())

        return self._act(ask)

    def thaw(self, timeout_s: int) -> int:
        """Thaw the guest's file systems; return how many."""

        def ask(domain: libvirt.virDomain) -> int:
            domain.agentSetResponseTimeout(timeout_s, 0)
            return int(domain.fsThaw())

        return self._act(ask)

    def restore_agent_timeout(self) -> None:
        """Put libvirt's own default for the agent's response time back: it is kept for all clients."""
        default = libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK
        self._act(lambda domain: domain.agentSetResponseTimeout(default, 0))

    def is_frozen(self, timeout_s: int) -> bool:
        """Return whether the guest agent says that file systems are frozen.

        Raises HypervisorError when it does not answer.
        """
        return monitor.fsfreeze_status(self._look, timeout_s) != "thawed"

    def agent_answers(self, timeout_s: int) -> bool:
        """Return whether the guest agent answers a ping."""
        try:
            return monitor.agent_ping(self._look, timeout_s)
        except HypervisorError:
            return False

    def _look(self, question: Callable[[libvirt.virDomain], T]) -> T:
        return self.connection.look(lambda connect: question(connect.lookupByUUIDString(self.uuid)))

    def _act(self, step: Callable[[libvirt.virDomain], T]) -> T:
        return self.connection.act(lambda connect: step(connect.lookupByUUIDString(self.uuid)))

    def _view(self, domain: libvirt.virDomain) -> DomainView:
        power = _power(domain, self.name)
        persistent = bool(domain.isPersistent())
        inactive = read_domain_xml(domain.XMLDesc(_XML_FLAGS_INACTIVE)) if persistent else None
        if not power.has_qemu:
            saved = bool(domain.hasManagedSaveImage())
            return DomainView(
                domain.name(), self.uuid, power, persistent, None, inactive, managed_save=saved
            )
        try:
            return self._view_running(domain, persistent)
        except (libvirt.libvirtError, HypervisorError):
            # Either the guest just ended, or libvirt's monitor refuses; only the former is a view.
            if not _power(domain, self.name).has_qemu:
                return DomainView(domain.name(), self.uuid, Power.OFF, persistent, None, inactive)
            raise

    def _view_running(self, domain: libvirt.virDomain, persistent: bool) -> DomainView:
        before = read_domain_xml(domain.XMLDesc(0))
        jobs = _block_jobs(domain, before)
        if any(job.kind == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL for job in jobs.values()):
            # QEMU 7.2 ends with a segmentation fault when it is asked for its nodes while a pull
            # comes to its end: the filter of the job is a node without an image then.
            inactive = read_domain_xml(domain.XMLDesc(_XML_FLAGS_INACTIVE)) if persistent else None
            return DomainView(
                domain.name(), self.uuid, _power(domain, self.name), persistent, before, inactive, jobs)
        # The monitor waits for whatever libvirt is doing with the domain, XMLDesc does not:
        # asked for afterwards, the XMLs are no older than what QEMU said.
        qemu = monitor.read_view(
            monitor.passthrough(domain), {disk.target: disk.alias for disk in before.disks.values()}
        )
        jobs = _block_jobs(domain, before)
        busy = domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE
        return DomainView(
            domain.name(), self.uuid, _power(domain, self.name), persistent,
            read_domain_xml(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)),
            read_domain_xml(domain.XMLDesc(_XML_FLAGS_INACTIVE)) if persistent else None,
            jobs, busy, False, qemu,
        )


def find_domain(connection: Connection, name_or_uuid: str) -> Domain:
    """Return the domain of that name or UUID. Raises GuestUnknown."""

    def find(connect: libvirt.virConnect) -> Domain:
        with contextlib.suppress(libvirt.libvirtError):
            found = connect.lookupByName(name_or_uuid)
            return Domain(connection, found.UUIDString(), found.name())
        found = connect.lookupByUUIDString(name_or_uuid)
        return Domain(connection, found.UUIDString(), found.name())

    try:
        return connection.look(find)
    except (GuestUnknown, HypervisorError) as error:
        if isinstance(error, ConnectionLost):
            raise
        raise GuestUnknown(
            f"There is no guest called {name_or_uuid!r} at {connection.uri}.", "virsh list --all"
        ) from error


def all_domains(connection: Connection) -> list[Domain]:
    """Return every domain that libvirt knows, in order of name."""
    found = connection.look(
        lambda connect: [(each.name(), each.UUIDString()) for each in connect.listAllDomains()]
    )
    return [Domain(connection, uuid, name) for name, uuid in sorted(found)]


def qemu_pid(name: str) -> int | None:
    """Return the process ID of the QEMU that runs domain *name*, None if there is none.

    From libvirt's pid file and the process table, since libvirt itself can take a running
    domain for shut off after a crash.
    """
    try:
        pid = int((_PID_FOLDER / f"{name}.pid").read_text().strip())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if f"guest={name},".encode() in command else None


def qemu_by_uuid(uuid: str) -> int | None:
    """Return the process ID of a QEMU that was started as domain *uuid*, None if there is none to be seen.

    From the process table alone: a pid file may be gone while QEMU runs.
    """
    for found in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = found.read_bytes().split(b"\0")
        except OSError:
            continue  # it ended just now
        if b"-uuid" in words and uuid.encode() in words:
            return int(found.parent.name)
    return None


def _power(domain: libvirt.virDomain, name: str) -> Power:
    state, reason = domain.state()
    if state in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_NOSTATE):
        return Power.HIDDEN if qemu_pid(name) is not None else Power.OFF
    if state == libvirt.VIR_DOMAIN_PAUSED:
        io_error = reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR
        return Power.PAUSED_ON_IO_ERROR if io_error else Power.PAUSED
    return Power.PAUSED if state == libvirt.VIR_DOMAIN_PMSUSPENDED else Power.RUNNING


def _block_jobs(domain: libvirt.virDomain, live: DomainXml) -> dict[str, BlockJob]:
    return {target: job for target in live.disks if (job := _block_job(domain, target))}


def _block_job(domain: libvirt.virDomain, target: str) -> BlockJob | None:
    info: dict[str, Any] = domain.blockJobInfo(target)
    return BlockJob(info["type"], info["cur"], info["end"]) if info else None


def _backup_xml(domain: libvirt.virDomain) -> str:
    try:
        return str(domain.backupGetXMLDesc(0))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
            return ""
        raise


def _external_snapshots(domain: libvirt.virDomain) -> tuple[str, ...]:
    return tuple(
        str(snapshot.getName()) for snapshot in domain.listAllSnapshots()
        if "snapshot='external'" in snapshot.getXMLDesc()
    )
