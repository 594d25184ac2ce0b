"""A guest that QEMU runs without libvirt: the same looks and steps as domain.py, by QMP.

There is no definition, so a guest whose QEMU has ended is GONE: nobody here can start it, and what its next
QEMU opens is up to whoever starts that. Each time that it was connected anew it is asked who it is, since
another guest may listen at the same path by then.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

from stillframe.clock import Deadline
from stillframe.errors import ConnectionLost, GuestUnknown, HypervisorError, MonitorBusy
from stillframe.hypervisor import bare_pull, qemu_commit
from stillframe.hypervisor.advice import Advice, advice_for
from stillframe.hypervisor.bare_view import (
    OURS,
    Device,
    commits,
    description,
    guest_devices,
    jobs_at_work,
    name_of,
    power_of,
    uuid_of,
)
from stillframe.hypervisor.checkpoint import checkpoint_note
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import (
    OWN_COMMIT,
    Checkpoint,
    DomainView,
    DomainXml,
    Ending,
    Power,
    PullJob,
    QemuDisk,
    QemuView,
)
from stillframe.hypervisor.monitor import (
    Qmp,
    block_jobs,
    block_nodes,
    delete_bitmap,
    drop_nodes,
    job_of,
    nbd_problem,
    qemu_major,
    read_disk,
)
from stillframe.hypervisor.qmp import QmpLink
from stillframe.process import owner_of

T = TypeVar("T")

_PIVOT_S = 10.0
_PAUSE_S = 0.01
_HASH_LETTERS = 10
#: From here on QEMU has exports with bitmaps and scratch images as they are used here.
_MAJOR_WITH_BACKUP = 6
_MIGRATING = ("setup", "active", "pre-switchover", "device", "postcopy-active")


class BareGuest:
    """A guest by its QMP socket. *name* and *uuid* are those that it had when it was found."""

    def __init__(
        self, link: QmpLink, uuid: str, name: str, neighbours: Callable[[], Sequence[Guest]] = tuple
    ) -> None:
        self.connection = link
        self.uuid = uuid
        self.name = name
        self._neighbours = neighbours
        self._known_at = 0

    @property
    def advice(self) -> Advice:
        """What people type to look at it or to help it."""
        return advice_for(self.connection.uri, self.name)

    # --- looks --------------------------------------------------------------------------------

    def view(self) -> DomainView:
        """See Guest. Raises HypervisorError, MonitorBusy, NotPermitted."""
        try:
            return self._look(self._view)
        except GuestUnknown:
            return DomainView(self.name, self.uuid, Power.GONE)

    def power(self) -> Power:
        """See Guest."""
        try:
            return self._look(lambda qmp: power_of(qmp("query-status", {})["status"]))
        except GuestUnknown:
            return Power.GONE

    def glance_at_power(self) -> Power | None:
        """See Guest."""
        with contextlib.suppress(HypervisorError, MonitorBusy):
            return self.power()
        return None

    def ending(self) -> Ending:
        """See Guest."""
        return Ending.UNKNOWN

    def starts(self) -> tuple[int, int]:
        """See Guest."""
        return self.connection.opened, 0

    def descriptions(self) -> list[DomainXml]:
        """See Guest."""
        live = self.view().live
        return [] if live is None else [live]

    def neighbours(self) -> Sequence[Guest]:
        """See Guest: libvirt's domains. QEMU's locks on images keep off other QEMUs."""
        return self._neighbours()

    def capacity_bytes(self, target: str) -> int:
        """See Guest."""
        return bare_pull.of_disk(self._sizes(), target)

    def snapshot_holders(self) -> tuple[str, ...]:
        """See Guest. QEMU knows of images, not of who made them or why."""
        return ()

    def qemu_pid(self) -> int | None:
        """See Guest."""
        with contextlib.suppress(HypervisorError, GuestUnknown, MonitorBusy):
            self._look(lambda qmp: qmp("query-status", {}))
            return self.connection.pid or None
        return None

    def run_folder(self) -> Path | None:
        """See Guest."""
        return None

    def definition_files(self) -> tuple[Path, ...]:
        """See Guest."""
        return ()

    # --- the disks ----------------------------------------------------------------------------

    def put_overlays_on(self, overlays: Mapping[str, str], others: tuple[str, ...]) -> None:  # noqa: ARG002
        """See Guest."""
        try:
            self._act(lambda qmp: self._put_on(qmp, overlays))
        except OSError as error:
            raise HypervisorError(f"An overlay can't be given to QEMU: {error}", 0) from error

    def start_commit(self, target: str, base_index: int, top_index: int) -> None:
        """See Guest."""
        files = self._qemu_disk(target).files
        self._act(partial(
            qemu_commit.start, target=target, overlay_file=files[top_index], base_file=files[base_index]))

    def start_lowering(self, target: str, base_index: int, top_index: int) -> None:  # noqa: ARG002
        """See Guest."""
        self._no("keep overlays on the guest")

    def pivot(self, target: str) -> None:
        """See Guest. Returns when QEMU is on the base and has closed the overlay."""
        overlay = self._qemu_disk(target).files[0]
        if self._look(lambda qmp: job_of(qmp, OWN_COMMIT.format(target))) is None:
            raise HypervisorError(f"No commit of stillframe runs on {target}.", 0)
        self._until_over(target, partial(qemu_commit.finish, target=target, overlay_file=overlay))

    def abort_block_job(self, target: str) -> None:
        """See Guest."""
        name = OWN_COMMIT.format(target)

        def step(qmp: Qmp) -> bool:
            qemu_commit.cancel(qmp, name)
            return not any(job["id"] == name for job in qmp("query-jobs", {}))

        self._until_over(target, step)

    def qmp(self, action: Callable[[Qmp], T]) -> T:
        """See Guest."""
        return self._act(action)

    # --- the machine --------------------------------------------------------------------------

    def suspend(self) -> None:
        """See Guest."""
        self._act(lambda qmp: qmp("stop", {}))

    def resume(self) -> None:
        """See Guest."""
        self._act(lambda qmp: qmp("cont", {}))

    def start(self) -> None:
        """See Guest."""
        self._no("start the guest")

    def ask_to_shut_down(self, agent_timeout_s: int) -> None:  # noqa: ARG002
        """See Guest."""
        self._no("start the guest again")

    def define(self, text: str) -> None:  # noqa: ARG002
        """See Guest."""
        self._no("define the guest")

    # --- the agent: it is on a socket of its own, which QMP does not tell --------------------------

    def freeze(self, timeout_s: int) -> int:  # noqa: ARG002
        """See Guest."""
        self._no("ask the guest agent")

    def thaw(self, timeout_s: int) -> int:  # noqa: ARG002
        """See Guest."""
        self._no("ask the guest agent")

    def restore_agent_timeout(self) -> None:
        """See Guest."""

    def is_frozen(self, timeout_s: int) -> bool:  # noqa: ARG002
        """See Guest."""
        self._no("ask the guest agent")

    def agent_answers(self, timeout_s: int) -> bool:  # noqa: ARG002
        """See Guest."""
        return False

    # --- backup jobs and checkpoints: a checkpoint is its bitmaps, and nothing else --------------------

    def backup_problem(self) -> str:
        """See Guest."""
        if self._look(qemu_major) < _MAJOR_WITH_BACKUP:
            return f"its QEMU is older than {_MAJOR_WITH_BACKUP}.0"
        return self._look(nbd_problem)

    def has_job(self) -> bool:
        """See Guest."""
        return self._look(_has_job)

    def begin_backup(self, job: PullJob) -> None:
        """See Guest."""
        def step(qmp: Qmp) -> None:
            bare_pull.begin(
                qmp, job, _graph(qmp).disks, self._sizes(), self._make_file, self.connection.clock)

        try:
            self._act(step)
        except OSError as error:
            raise HypervisorError(f"A scratch file could not be made: {error}", 0) from error

    def backup_runs(self, socket: str) -> bool:
        """See Guest."""
        return self._look(partial(bare_pull.runs, socket=socket))

    def abort_job(self) -> None:
        """See Guest."""
        self._act(partial(bare_pull.end, clock=self.connection.clock))

    def close_backup(self, socket: str, nodes: tuple[str, ...]) -> None:  # noqa: ARG002
        """See Guest."""
        self._act(partial(bare_pull.end, clock=self.connection.clock, socket=socket))

    def checkpoints(self) -> frozenset[str]:
        """See Guest."""
        try:
            graph = self._look(_graph)
        except GuestUnknown:
            return frozenset()
        files = [disk.files[0] for disk in graph.disks.values() if disk.files]
        return frozenset(name for file in files for name in graph.bitmaps(file))

    def checkpoint_text(self, job: PullJob) -> str:
        """See Guest."""
        live = self.view().live
        disks = live.disks if live is not None else {}
        places = {target: disks[target].top.key for target in job.kept if target in disks}
        return checkpoint_note(Checkpoint(job.checkpoint, tuple(places), places, job.about))

    def redefine_checkpoint(self, text: str, counted: Sequence[str]) -> None:  # noqa: ARG002
        """See Guest."""
        self._no("know of a checkpoint whose bitmaps are lost")

    def delete_checkpoint(self, name: str, *, bitmaps: bool) -> None:
        """See Guest."""
        if bitmaps:
            files = {file for disk in self._look(_graph).disks.values() for file in disk.files[:1]}
            self._act(lambda qmp: delete_bitmap(qmp, files, name))

    # --- inside -------------------------------------------------------------------------------

    def _look(self, question: Callable[[Qmp], T]) -> T:
        try:
            return self._act(question)
        except ConnectionLost:
            return self._act(question)

    def _act(self, step: Callable[[Qmp], T]) -> T:
        """Return what *step* makes of the monitor. Raises GuestUnknown if another guest is there now."""
        link = self.connection
        link.ensure_open()
        if link.opened != self._known_at:
            uuid, name = identity(link)
            if uuid != self.uuid:
                raise GuestUnknown(f"{self.name} is not at {link.path} any more, but {name} is.",
                                   self.advice.guests)
            self._known_at = link.opened
        return step(link.execute)

    def _view(self, qmp: Qmp) -> DomainView:
        power = power_of(qmp("query-status", {})["status"])
        devices, graph = _devices(qmp), _graph(qmp)
        live = description(self.name, self.uuid, devices, graph.jobs, self._folder())
        return DomainView(
            self.name, self.uuid, power, persistent=False, live=live, jobs=commits(devices, graph.jobs),
            domain_job=_migrates(qmp), qemu=graph)

    def _folder(self) -> str:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{self.connection.pid}/cwd")
        return ""

    def _qemu_disk(self, target: str) -> QemuDisk:
        return bare_pull.of_disk(self._look(_graph).disks, target)

    def _sizes(self) -> dict[str, int]:
        return {
            target: int(device["inserted"]["image"]["virtual-size"])
            for target, device in self._look(_devices).items() if "inserted" in device}

    def _put_on(self, qmp: Qmp, overlays: Mapping[str, str]) -> None:
        images = {target: device["inserted"] for target, device in _devices(qmp).items()
                  if "inserted" in device}
        made: list[str] = []
        actions = []
        try:
            for target, path in overlays.items():
                inserted = bare_pull.of_disk(images, target)
                self._give_to_qemu(path)
                for node in _overlay_nodes(path, inserted):
                    qmp("blockdev-add", node)
                    made.append(str(node["node-name"]))
                actions.append({"type": "blockdev-snapshot",
                                "data": {"node": inserted["node-name"], "overlay": made[-1]}})
            qmp("transaction", {"actions": actions})
        except ConnectionLost:
            raise
        except (HypervisorError, OSError):
            drop_nodes(qmp, tuple(reversed(made)))
            raise

    def _make_file(self, path: str) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            self._give_to_qemu(path)
        except OSError:
            os.unlink(path)
            raise

    def _give_to_qemu(self, path: str) -> None:
        owner = owner_of(self.connection.pid)
        if owner is not None and os.geteuid() == 0:
            os.chown(path, *owner)

    def _until_over(self, target: str, step: Callable[[Qmp], bool]) -> None:
        clock = self.connection.clock
        deadline = Deadline(clock, _PIVOT_S)
        while not self._act(step):
            if deadline.passed():
                raise HypervisorError(f"QEMU's commit of {target} does not end.", 0)
            clock.pause(_PAUSE_S)

    def _no(self, what: str) -> NoReturn:
        raise HypervisorError(
            f"Without libvirt nobody can {what}: {self.name} is known by its QMP socket alone.", 0)


def find_bare(link: QmpLink, neighbours: Callable[[], Sequence[Guest]] = tuple) -> BareGuest:
    """Return the guest behind *link*. Raises GuestUnknown, MonitorBusy, NotPermitted, HypervisorError."""
    link.ensure_open()
    return BareGuest(link, *identity(link), neighbours)


def identity(link: QmpLink) -> tuple[str, str]:
    """Return UUID and name of the guest behind *link*."""
    name = name_of(str(link.execute("query-name").get("name", "")), link.path)
    return uuid_of(str(link.execute("query-uuid")["UUID"]), name, link.execute("query-block")), name


def _devices(qmp: Qmp) -> dict[str, Device]:
    return guest_devices(qmp("query-block", {}), block_nodes(qmp))


def _graph(qmp: Qmp) -> QemuView:
    nodes = block_nodes(qmp)
    disks = {
        target: read_disk(device["inserted"])
        for target, device in guest_devices(qmp("query-block", {}), nodes).items() if "inserted" in device}
    return QemuView(disks, nodes, jobs_at_work(block_jobs(qmp)))


def _has_job(qmp: Qmp) -> bool:
    return bare_pull.foreign_jobs(qmp) or _migrates(qmp)


def _migrates(qmp: Qmp) -> bool:
    return qmp("query-migrate", {}).get("status") in _MIGRATING


def _overlay_nodes(path: str, inserted: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Return what to add for an overlay, storage before format, cached as the image that it is put on."""
    name = f"{OURS}{hashlib.sha256(path.encode()).hexdigest()[:_HASH_LETTERS]}"
    cache = inserted.get("cache")
    given = {key: cache[key] for key in ("direct", "no-flush")} if isinstance(cache, dict) else {}
    common: dict[str, object] = {"cache": given, "discard": "unmap"}
    detect = inserted.get("detect_zeroes", "off")
    return (
        {"driver": "file", "node-name": f"{name}-f", "filename": path, **common},
        {"driver": "qcow2", "node-name": name, "file": f"{name}-f", "backing": None, "detect-zeroes": detect,
         **common},
    )
