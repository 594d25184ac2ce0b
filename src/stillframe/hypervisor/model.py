"""What is known of a domain, as plain data without any libvirt object in it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: What an overlay's file name ends in.
OVERLAY_SUFFIX = ".stillframe-overlay.qcow2"
#: Where the sockets are that guests read snapshots from which they were booted from: UUID/TARGET below it.
BOOT_SOCKETS = Path("/run/stillframe")
#: The name of a commit that stillframe itself starts in QEMU, by target.
OWN_COMMIT = "stillframe-commit-{}"
#: What libvirt calls such a job in a disk's <mirror>.
ACTIVE_COMMIT = "active-commit"


class Power(enum.Enum):
    """Whether a domain runs, as far as libvirt and the process table tell."""

    RUNNING = "running"
    PAUSED = "paused"
    PAUSED_ON_IO_ERROR = "paused after an I/O error"
    OFF = "shut off"
    HIDDEN = "shut off for libvirt, but its QEMU still runs"
    GONE = "not defined"

    @property
    def has_qemu(self) -> bool:
        """Whether libvirt talks to a QEMU of the domain."""
        return self in (Power.RUNNING, Power.PAUSED, Power.PAUSED_ON_IO_ERROR)


class Ending(enum.Enum):
    """How a domain that is off came to be off, as far as libvirt knows."""

    SHUTDOWN = "it shut down"
    CUT = "it was destroyed or crashed"
    SAVED = "it was saved, with its memory"
    UNKNOWN = "libvirt does not know how it ended (it was restarted since, or the guest never ran)"


@dataclass(frozen=True, slots=True)
class Source:
    """One image of a disk's chain as libvirt names it.

    *kind* is libvirt's type attribute (file, block, network, volume, …), *place* a path
    or, for a network disk, the protocol's own address; *index* is libvirt's number in
    `vda[index]`, -1 where the XML gives none. *xml* is the <source> element as text. *hosts* are all servers
    that it names, by host and port (0 for the protocol's own), *user* is whom the server is to let in, and
    *conf* a file of settings for it (Ceph).
    """

    kind: str
    format: str
    place: str
    index: int = -1
    protocol: str = ""
    hosts: tuple[tuple[str, int], ...] = ()
    socket: str = ""
    export: str = ""
    xml: str = ""
    user: str = ""
    conf: str = ""

    @property
    def host(self) -> str:
        """The first server, "" if none is named."""
        return self.hosts[0][0] if self.hosts else ""

    @property
    def port(self) -> int:
        """The port of the first server, 0 if none is given."""
        return self.hosts[0][1] if self.hosts else 0

    @property
    def key(self) -> str:
        """A text that is equal for two sources exactly if they name the same image."""
        return f"{self.kind}:{self.place}"


@dataclass(frozen=True, slots=True)
class Mirror:
    """The <mirror> element of a disk: a block job that libvirt knows of. *place*: the file it writes to."""

    job: str
    ready: bool
    place: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk as one XML shows it: its chain from top to bottom, and a job if one runs.

    *ends*: the XML says that the chain ends there; else libvirt asks the last image's header what is below.
    """

    target: str
    alias: str
    chain: tuple[Source, ...]
    mirror: Mirror | None = None
    ends: bool = False

    @property
    def top(self) -> Source:
        """The image that the guest writes to."""
        return self.chain[0]


@dataclass(frozen=True, slots=True)
class ExcludedDisk:
    """A disk that is not captured, and why.

    *unsupported*: it has data of the guest's own, which nobody may believe to be backed up.
    """

    target: str
    reason: str
    unsupported: bool = False


@dataclass(frozen=True, slots=True)
class DomainXml:
    """One XML description (live or inactive), read.

    *bystanders* are the disks that are never captured but still name images (read-only ones,
    CD-ROMs and the like), under their targets.
    """

    text: str
    name: str
    uuid: str
    disks: Mapping[str, Disk]
    excluded: tuple[ExcludedDisk, ...]
    bystanders: Mapping[str, Disk]
    has_agent_channel: bool


@dataclass(frozen=True, slots=True)
class PulledDisk:
    """A disk in a backup job: where its scratch file goes, and which checkpoint it counts from, if any.

    *keeps*: the job's checkpoint has a bitmap on it.
    """

    target: str
    scratch: str
    since: str = ""
    keeps: bool = False


@dataclass(frozen=True, slots=True)
class PullJob:
    """A backup job in pull mode, served on a unix socket, and the checkpoint that is made with it.

    *others* are the disks that are left out. *checkpoint* is the name that its bitmaps share; it is made if
    any disk keeps one. *about* goes into it, a text for each target.
    """

    socket: str
    disks: tuple[PulledDisk, ...]
    others: tuple[str, ...]
    checkpoint: str
    about: Mapping[str, str]

    @property
    def kept(self) -> tuple[str, ...]:
        """The targets that the checkpoint has a bitmap on."""
        return tuple(disk.target for disk in self.disks if disk.keeps)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of a checkpoint: the disks with its bitmap, their images then, and what it is *about*."""

    name: str
    targets: tuple[str, ...]
    places: Mapping[str, str]
    about: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BlockJob:
    """A block job as blockJobInfo() shows it, in libvirt's units of progress (bytes for commit)."""

    kind: int
    cur: int
    end: int


@dataclass(frozen=True, slots=True)
class QemuDisk:
    """What QEMU itself says of a disk: file names from top to bottom, and the top's node name.

    *compat* is the version that a qcow2 top says of itself ("0.10" is version 2), "" for another format.
    """

    node: str
    files: tuple[str, ...]
    compat: str = ""


@dataclass(frozen=True, slots=True)
class QemuBitmap:
    """A dirty bitmap of a node. *usable*: it is persistent, it records, and what it holds is whole."""

    name: str
    usable: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class QemuNode:
    """One node of QEMU's block graph."""

    name: str
    driver: str
    file: str
    bitmaps: tuple[QemuBitmap, ...] = ()


@dataclass(frozen=True, slots=True)
class QemuJob:
    """One block job of QEMU. *done* and *total* are bytes for a commit."""

    name: str
    kind: str
    status: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class QemuView:
    """QEMU's own block graph and jobs, asked for over QMP: the truth about a running domain."""

    disks: Mapping[str, QemuDisk]
    nodes: tuple[QemuNode, ...]
    jobs: tuple[QemuJob, ...]

    def bitmaps(self, file: str) -> Mapping[str, QemuBitmap]:
        """Return the bitmaps of the image over *file* (as QEMU names it), by name."""
        return {
            bitmap.name: bitmap for node in self.nodes if node.file == file and node.driver == "qcow2"
            for bitmap in node.bitmaps
        }


@dataclass(frozen=True, slots=True)
class DomainView:
    """Everything that one look at a domain gives."""

    name: str
    uuid: str
    power: Power
    persistent: bool = False
    live: DomainXml | None = None
    inactive: DomainXml | None = None
    jobs: Mapping[str, BlockJob] | None = None
    domain_job: bool = False
    managed_save: bool = False
    qemu: QemuView | None = None
