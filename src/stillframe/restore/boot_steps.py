"""Taking the steps that `decide_boot` names, one after the other, each after a new look."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from stillframe.block.tools import stand_on
from stillframe.capture.let_go_on import fsync_definition
from stillframe.capture.neighbours import other_users
from stillframe.capture.watched import Watched
from stillframe.clock import Clock, Deadline
from stillframe.durable import fsync
from stillframe.errors import (
    GuestState,
    HypervisorError,
    ImageShared,
    LandFailed,
    NeedsAttention,
    StillframeError,
)
from stillframe.hypervisor import monitor
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import Domain
from stillframe.hypervisor.model import DomainView, Power
from stillframe.repository.opened import Repository, read_parameters
from stillframe.restore.boot_decide import BootDecision, BootSight, BootStep, Stand, decide_boot
from stillframe.restore.boot_record import BootDisk, BootRecord, BootState, BootStore
from stillframe.restore.boot_server import Owner, end_servers, log_of, serve, served_place
from stillframe.restore.boot_sight import left_of, look_at_boot, running_names
from stillframe.restore.boot_xml import kept_on_snapshot, on_image_alone, stand_of
from stillframe.storage.address import open_storage

#: More steps than any way has: a guest that changes under our hands must not keep us for ever.
_MOST_STEPS = 50
_STORAGE_TIMEOUT_S = 15.0
_RESUME_TRIES = 5
_RECONNECTS = 4
_JOB_END_S = 30.0
#: A guest that reads again from what failed is paused again within this.
_RESUMED_S = 2.0
_PAUSE_S = 0.05


@dataclass(frozen=True)
class BootTools:
    """What booted guests are handled with. *opened* opens a repository; only a server's start needs that."""

    store: BootStore
    connection: Connection
    clock: Clock
    opened: Callable[[str], Repository]
    say: Callable[[str], None] = lambda _text: None

    def domain(self, record: BootRecord) -> Domain:
        """Return the guest of a record, whether libvirt has it or not."""
        return Domain(self.connection, record.uuid, record.name)

    def owner(self) -> Owner | None:
        """Return whom QEMU runs as, None if libvirt does not say."""
        found = self.connection.qemu_owner()
        return None if found is None else Owner(*found)


@dataclass
class BootWay:
    """One guest's way on, by the guest's lock. *did* says in words what was done.

    *record* is None once the guest is an ordinary one, or is gone.
    """

    record: BootRecord | None
    tools: BootTools
    did: list[str] = field(default_factory=list)

    def decide(self) -> BootDecision:
        """Return what would be done next. Raises HypervisorError, NoHypervisor."""
        return decide_boot(self.known, self.look())

    def look(self) -> BootSight:
        """Return what is to be seen of the guest now."""
        return look_at_boot(self.tools.store, self.known, self._domain)

    def settle(self) -> None:
        """Take steps until nothing is to be done. Raises NeedsAttention where only a person can decide."""
        self._go_while(lambda: not self.is_over())

    def end_switch(self) -> None:
        """Take steps until no switch is under way: then the guest goes on. Raises NeedsAttention, too."""
        self._go_while(lambda: not self.is_over() and self.known.state is BootState.SWITCHING)

    def _go_while(self, is_on_its_way: Callable[[], bool]) -> None:
        for _ in range(_MOST_STEPS):
            if not is_on_its_way():
                return
            decision = self.decide()
            if decision.step is BootStep.NOTHING:
                return
            self.take(decision)
        name = self.known.name
        raise NeedsAttention(f"{name} changes all the while.", f"stillframe recover {name}")

    def take(self, decision: BootDecision) -> None:
        """Take one step."""
        if decision.step is BootStep.ASK:
            raise attention(self.known, decision)
        step = decision.step
        self.tools.say(f"{self.known.name}: {step.value}, because {decision.reason}")
        self._take(decision)
        if step in _WORDS:
            about = f" ({', '.join(decision.targets)})" if decision.targets else ""
            self.did.append(_WORDS[step] + about)

    def is_over(self) -> bool:
        """Whether the guest is an ordinary one now, or is gone."""
        return self.record is None

    @property
    def known(self) -> BootRecord:
        """The record of a guest whose way is not over."""
        assert self.record is not None
        return self.record

    @property
    def _domain(self) -> Domain:
        return self.tools.domain(self.known)

    def _take(self, decision: BootDecision) -> None:
        step, targets = decision.step, decision.targets
        if step in _ENTERED:
            self.record = self.tools.store.enter(self.known, _ENTERED[step], decision.reason)
        elif step is BootStep.SERVE:
            self._serve(targets)
        elif step is BootStep.RESUME:
            self._resume()
        elif step is BootStep.FLUSH:
            self._flush(targets[0])
        elif step is BootStep.STAND:
            for target in targets:
                disk = self.known.disk(target)
                stand_on(disk.overlay_path, served_place(disk))
        elif step is BootStep.KEEP:
            self.keep(targets)
        elif step is BootStep.REDEFINE:
            self._define_alone(targets)
        elif not self._take_copied(step, targets):
            self._take_away(step)

    def _take_copied(self, step: BootStep, targets: tuple[str, ...]) -> bool:
        """Take a step of a disk that is copied elsewhere; return whether it was one."""
        if step is BootStep.MOVE:
            self._move(targets[0])
        elif step is BootStep.END_COPY:
            for target in targets:
                self.end_job(target)
        elif step is BootStep.RELEASE:
            self._release()
        elif step is BootStep.CLEAR:
            overlays = [self.known.disk(target).overlay_path for target in targets]
            refuse_shared(self._domain, overlays)
            _remove(overlays)
        else:
            return False
        return True

    def _take_away(self, step: BootStep) -> None:
        record, store = self.known, self.tools.store
        if step is BootStep.DESTROY:
            self._domain.destroy()
        elif step is BootStep.UNDEFINE:
            self._domain.undefine()
        elif step is BootStep.END_SERVERS:
            end_servers(store, record, self.tools.clock)
        elif step is BootStep.REMOVE:
            _remove(left_of(record))
        elif step is BootStep.FORGET:
            end_servers(store, record, self.tools.clock)  # what is left of their sockets, too
            store.remove(record)
            self.record = None

    def keep(self, targets: tuple[str, ...]) -> None:
        """Make the definition go on naming the snapshot, whatever is pulled (see `kept_on_snapshot`)."""
        view = self._domain.view()
        disks = [self.known.disk(target) for target in targets]
        self._define(lambda text: kept_on_snapshot(text, disks, running_names(view)))

    def end_job(self, target: str) -> None:
        """End the block job on a disk, if there is one; it is over on return, whatever came of it."""
        domain = self._domain
        with contextlib.suppress(HypervisorError):  # it may be over, or about to end
            domain.abort_block_job(target)
        deadline = Deadline(self.tools.clock, _JOB_END_S)
        self.tools.clock.pause(_PAUSE_S)  # QEMU may know of one that libvirt does not, until that is over
        while domain.pull_of(target) is not None:
            if deadline.passed():
                raise NeedsAttention(
                    f"The block job on {target} of {self.known.name} does not end.",
                    f"virsh blockjob {self.known.name} {target} --info", GuestState.OVERLAID)
            self.tools.clock.pause(_PAUSE_S)

    def _define_alone(self, targets: tuple[str, ...]) -> None:
        disks = [self.known.disk(target) for target in targets]
        self._define(lambda text: on_image_alone(text, disks))

    def _define(self, changed: Callable[[str], str]) -> None:
        inactive = self._domain.view().inactive
        if inactive is not None:
            self._domain.define(changed(inactive.text))
            with self._making_durable("its definition"):
                fsync_definition(self._domain)

    def _serve(self, targets: tuple[str, ...]) -> None:
        record, tools = self.known, self.tools
        repository = tools.opened(record.address)
        owner = tools.owner()
        for target in targets:
            serve(tools.store, record, record.disk(target), repository, owner, tools.clock)
        self._reconnect(targets)

    def _reconnect(self, targets: tuple[str, ...]) -> None:
        """Have a QEMU that runs find its servers now, so that the guest does not notice.

        It makes a new connection only upon a request, and that request still fails.
        """
        sockets = [self.known.disk(target).socket for target in targets]
        qemu = self._domain.view().qemu
        nodes = [node.name for node in (qemu.nodes if qemu is not None else ())
                 if node.driver == "nbd" and any(socket in node.file for socket in sockets)]
        for _ in range(_RECONNECTS if nodes else 0):
            for node in nodes:
                self._domain.qmp(partial(monitor.poke_node, node=node))
            self.tools.clock.pause(_PAUSE_S)

    def _flush(self, target: str) -> None:
        """See to it that QEMU has written down what it pulled, and note that the disk has landed."""
        disk = self.known.disk(target)
        node = _node_of(self._domain.view(), target)
        if node is None:
            return  # it ended just now: the next look decides
        self.record = self.tools.store.enter(self.known, BootState.LANDING, f"{target} is pulled")
        self._write_down(node, disk.overlay_path)
        if disk.copy is not None:  # somebody pulled what was to be copied
            drop_copy(disk)
        self.note(msgspec.structs.replace(disk, copy=None, landed=True))

    def _move(self, target: str) -> None:
        """Make a disk's copy, which is in use, the one that counts.

        The definition names it only when all of it is written down: until then, a guest that died is
        started on overlay and snapshot, which hold the same.
        """
        disk, view = self.known.disk(target), self._domain.view()
        node = _node_of(view, target)
        off = None if view.power.has_qemu or view.inactive is None else view.inactive.disks.get(target)
        if node is not None:
            self._write_down(node, disk.image_path)
            self._define_alone((target,))
        elif stand_of(off, disk) is not Stand.COPY:
            return  # it changed just now: the next look decides
        self.note(msgspec.structs.replace(disk, landed=True))

    def _write_down(self, node: str, path: str) -> None:
        self._domain.qmp(lambda qmp: monitor.flush_node(qmp, node))
        with self._making_durable(path):
            fsync(Path(path))

    @contextlib.contextmanager
    def _making_durable(self, what: str) -> Iterator[None]:
        """Raise what the host's storage says within the block as LandFailed: the step can be taken again."""
        try:
            yield
        except OSError as error:
            name = self.known.name
            raise LandFailed(
                f"{name} has not landed: {what} could not be made durable ({error}).",
                f"stillframe recover {name}   # goes on with it, once the host's storage works",
                GuestState.STOPPED if self.known.held else GuestState.OVERLAID) from error

    def note(self, disk: BootDisk) -> None:
        """Write down what is now known of one disk."""
        self.record = self.tools.store.note(self.known, disks=self.known.with_disk(disk))

    def _release(self) -> None:
        """Let the guest go on. It is noted afterwards: whoever dies in between only does it again."""
        if self.known.held and self._domain.power() is Power.PAUSED:
            self._domain.resume()
        self.record = self.tools.store.enter(self.known, BootState.LANDING, held=False)

    def _resume(self) -> None:
        record, tools = self.known, self.tools
        self._await_repository()
        # Where a server died, QEMU makes a new connection only for a request that fails: several may.
        for _ in range(_RESUME_TRIES):
            self._domain.resume()
            deadline = Deadline(tools.clock, _RESUMED_S)
            while self._domain.power() is Power.RUNNING:
                if deadline.passed():
                    return
                tools.clock.pause(_PAUSE_S)
        said = [f"\n  {line}" for disk in record.disks for line in log_of(tools.store, record, disk)[-2:]]
        raise NeedsAttention(
            f"{record.name} was paused again by an I/O error each time that it was resumed.{''.join(said)}",
            f"df {os.path.dirname(record.disks[0].overlay_path)}; virsh domblkerror {record.name}",
            GuestState.STOPPED)

    def _await_repository(self) -> None:
        """Raise what is wrong with the repository, if anything is: the guest would be paused again."""
        record = self.known
        back = f"once {record.address} can be read again"
        try:
            Watched(lambda _: read_parameters(open_storage(record.address)), self.tools.clock, "look").result(
                lambda: None, stall_timeout_s=_STORAGE_TIMEOUT_S, grace_s=0)
        except StillframeError as error:
            error.guest = GuestState.STOPPED
            error.next_command = f"stillframe recover {record.name}   # {back}"
            raise


def drop_copy(disk: BootDisk) -> None:
    """Remove what was copied of a disk, whole or not, and nothing else."""
    if disk.copy is not None:
        Path(disk.making_path(disk.copy.path)).unlink(missing_ok=True)
        if disk.copy.is_ours():
            Path(disk.copy.path).unlink()


def refuse_shared(domain: Domain, paths: Iterable[str]) -> None:
    """Raise ImageShared if another guest uses one of the images."""
    for path, user in other_users(domain, set(paths)).items():
        raise ImageShared(f"{path} is also an image of {user}.", f"virsh domblklist {user}")


def _node_of(view: DomainView, target: str) -> str | None:
    """Return QEMU's node for a disk, None if there is none now."""
    seen = None if view.qemu is None else view.qemu.disks.get(target)
    return None if seen is None else seen.node


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        if not os.path.lexists(path):
            continue  # it went with the folder that it was in
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            Path(path).unlink(missing_ok=True)
        fsync(Path(path).parent)


def attention(record: BootRecord, decision: BootDecision) -> NeedsAttention:
    """Return the error that asks a person."""
    paths = [disk.overlay_path for disk in record.disks if disk.target in decision.targets]
    about = f" {', '.join(paths)}." if paths else ""
    return NeedsAttention(
        f"{record.name}, which was booted from {record.snapshot}: {decision.reason}.{about}",
        f"{decision.advice or f'virsh dumpxml {record.name}'}; "
        f"or, to throw it away: stillframe discard {record.name}",
        GuestState.OVERLAID)


_ENTERED = {
    BootStep.ADOPT: BootState.BOOTED, BootStep.UNDO: BootState.UNDOING, BootStep.CLOSE: BootState.LANDED}
_WORDS = {
    BootStep.ADOPT: "wrote down that it was booted",
    BootStep.DESTROY: "ended it",
    BootStep.UNDEFINE: "removed its definition",
    BootStep.END_SERVERS: "ended its servers",
    BootStep.REMOVE: "removed the files that were made for it",
    BootStep.STAND: "put the snapshot back below its overlay",
    BootStep.KEEP: "made its definition name the snapshot again",
    BootStep.SERVE: "started its servers again",
    BootStep.RESUME: "resumed it",
    BootStep.FLUSH: "had QEMU write down what was pulled",
    BootStep.REDEFINE: "made its definition name its own images alone",
    BootStep.MOVE: "made the copy its image",
    BootStep.END_COPY: "ended the job that copied",
    BootStep.CLEAR: "removed the overlays that were copied",
    BootStep.CLOSE: "it has landed",
}
