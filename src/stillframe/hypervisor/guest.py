"""What a capture asks of a guest, whoever runs it: libvirt (domain.py) or QEMU alone (bare.py).

A *look* changes nothing and may be repeated; an *act* is made once. Any of them raises HypervisorError for
what was refused, ConnectionLost where nobody can say whether an act was carried out, and GuestUnknown where
the guest is gone. `tests/contract/test_guest.py` holds both adapters to the same list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from stillframe.hypervisor.advice import Advice
from stillframe.hypervisor.model import DomainView, DomainXml, Ending, Power, PullJob
from stillframe.hypervisor.monitor import Qmp

T = TypeVar("T")


class Link(Protocol):
    """The connection that a guest is reached by. It may break at any moment, and is made again."""

    @property
    def uri(self) -> str:
        """The address, by which a guest is found again (guests.py)."""
        ...

    def ensure(self) -> None:
        """Make the connection anew if it is broken."""
        ...

    def release(self) -> None:
        """Let others have it if it serves one at a time; it is made again when something is asked."""
        ...

    def wait_change(self, timeout_s: float) -> bool:
        """Return when something may have changed, at the latest after *timeout_s*; whether it told so."""
        ...

    def versions(self) -> tuple[str, str]:
        """Return libvirt's version ("" without it) and QEMU's."""
        ...


class Guest(Protocol):
    """A guest: looking at it, and the single steps that change it."""

    @property
    def uuid(self) -> str:
        """What tells the guest from any other, for ever."""
        ...

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def connection(self) -> Link:
        """What it is reached by."""
        ...

    @property
    def advice(self) -> Advice:
        """What people type to look at it or to help it."""
        ...

    # --- looks --------------------------------------------------------------------------------

    def view(self) -> DomainView:
        """Return everything one look gives; power GONE when there is no such guest."""
        ...

    def power(self) -> Power:
        """Return whether it runs."""
        ...

    def glance_at_power(self) -> Power | None:
        """Return whether it runs; None, without waiting, while that is not known."""
        ...

    def ending(self) -> Ending:
        """Return how a guest that is off came to be off."""
        ...

    def starts(self) -> tuple[int, int]:
        """Return what is another value once the guest was started, or its start may have been missed."""
        ...

    def descriptions(self) -> list[DomainXml]:
        """Return what describes the guest: live (if it runs) and inactive (if it has a definition)."""
        ...

    def neighbours(self) -> Sequence[Guest]:
        """Return the other guests of this host, as far as they can be known."""
        ...

    def capacity_bytes(self, target: str) -> int:
        """Return the virtual size of disk *target*."""
        ...

    def snapshot_holders(self) -> tuple[str, ...]:
        """Return the names of snapshots, not made by stillframe, that keep a disk on an overlay."""
        ...

    def qemu_pid(self) -> int | None:
        """Return the process ID of its QEMU, None if none is to be seen."""
        ...

    def run_folder(self) -> Path | None:
        """Return a folder for this run of the guest alone, which QEMU may write to; None if there is none."""
        ...

    def definition_files(self) -> tuple[Path, ...]:
        """Return the files (and their folder) that keep its definition, for making them durable."""
        ...

    # --- the disks ----------------------------------------------------------------------------

    def put_overlays_on(self, overlays: Mapping[str, str], others: tuple[str, ...]) -> None:
        """Put the pre-created *overlays* (target → path) on, all at one moment; *others* get none."""
        ...

    def start_commit(self, target: str, base_index: int, top_index: int) -> None:
        """Start the active commit of exactly top into base, by the indexes of the live view's chain."""
        ...

    def start_lowering(self, target: str, base_index: int, top_index: int) -> None:
        """Start committing top, an image *below* the one in use, into base; the image in use stays so."""
        ...

    def pivot(self, target: str) -> None:
        """End the commit of *target* by making the base its image again."""
        ...

    def abort_block_job(self, target: str) -> None:
        """End the commit of *target*; the guest stays on its overlay, and nothing is lost."""
        ...

    def qmp(self, action: Callable[[Qmp], T]) -> T:
        """Return what *action* makes of QEMU's own monitor."""
        ...

    # --- the machine --------------------------------------------------------------------------

    def suspend(self) -> None:
        """Stop the guest's CPUs."""
        ...

    def resume(self) -> None:
        """Let the guest's CPUs go on."""
        ...

    def start(self) -> None:
        """Start the guest."""
        ...

    def ask_to_shut_down(self, agent_timeout_s: int) -> None:
        """Ask the guest to shut down."""
        ...

    def define(self, text: str) -> None:
        """Make *text* the guest's inactive definition."""
        ...

    # --- the agent ----------------------------------------------------------------------------

    def freeze(self, timeout_s: int) -> int:
        """Freeze the guest's file systems; return how many. After an error it may still happen later."""
        ...

    def thaw(self, timeout_s: int) -> int:
        """Thaw the guest's file systems; return how many."""
        ...

    def restore_agent_timeout(self) -> None:
        """Put back what freeze and thaw changed for other users of the agent."""
        ...

    def is_frozen(self, timeout_s: int) -> bool:
        """Return whether the agent says that file systems are frozen."""
        ...

    def agent_answers(self, timeout_s: int) -> bool:
        """Return whether the agent answers a ping."""
        ...

    # --- backup jobs and checkpoints ----------------------------------------------------------

    def backup_problem(self) -> str:
        """Return why there can be no backup job with bitmaps for the guest, "" if there can."""
        ...

    def has_job(self) -> bool:
        """Return whether a job (a backup, a migration, a save) runs on the guest."""
        ...

    def begin_backup(self, job: PullJob) -> None:
        """Begin a backup job and make its checkpoint at one and the same moment."""
        ...

    def backup_runs(self, socket: str) -> bool:
        """Return whether the backup job that serves on *socket* runs, all disks of it."""
        ...

    def abort_job(self) -> None:
        """Ask for the end of the backup job; it is over somewhat later."""
        ...

    def close_backup(self, socket: str, nodes: tuple[str, ...]) -> None:
        """Close in QEMU what is left of a backup job that was lost; *nodes* are those over its scratch files.

        Can be repeated where something does not end at once.
        """
        ...

    def checkpoints(self) -> frozenset[str]:
        """Return the names of all checkpoints of the guest."""
        ...

    def checkpoint_text(self, job: PullJob) -> str:
        """Return what can tell of (read_checkpoint) and define again the checkpoint that *job* made."""
        ...

    def redefine_checkpoint(self, text: str, counted: Sequence[str]) -> None:
        """Make a checkpoint known again whose bitmaps are in the images, for the disks *counted* alone."""
        ...

    def delete_checkpoint(self, name: str, *, bitmaps: bool) -> None:
        """Delete the checkpoint, with its *bitmaps* or without."""
        ...
