"""A drill: a snapshot is booted, apart from everything, to see that it boots; then all of it is thrown away.

The guest is a new one that is never defined. Its disks are read from the repository, through servers that die
with this process and throw away what was written; libvirt ends it when this process's connection ends. So
nothing of a killed drill goes on, and the original guest has no part in it.

What speaks against the host (it lacks the machine type, has no memory left) is an error, and nothing is
written down. What is found of the snapshot is: passed or failed.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
import msgspec

from stillframe import __version__
from stillframe.clock import Clock, utc_text
from stillframe.errors import (
    ConfigInvalid,
    DrillExposed,
    DrillFailed,
    GuestUnknown,
    HostLacks,
    HypervisorError,
    NotPermitted,
    SlotDamaged,
    StillframeError,
)
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.transient import TransientGuest
from stillframe.repository.catalog import display_name
from stillframe.repository.drills import Drill
from stillframe.repository.layout import SnapshotName
from stillframe.repository.manifest import TPM_FOLDER, Manifest
from stillframe.repository.opened import Repository
from stillframe.repository.places import Places
from stillframe.repository.reader import read_whole
from stillframe.restore.boot_record import PATIENCE_S, BootDisk, BootStore
from stillframe.restore.boot_server import Owner, boot_order, hand_over
from stillframe.restore.drill_place import DrillPlace, Made, drill_place
from stillframe.restore.drill_screen import as_png
from stillframe.restore.drill_watch import AGENT, Proof, Watch
from stillframe.restore.drill_xml import has_agent, isolated, reaches_beyond
from stillframe.restore.export import Export, Serving, exported
from stillframe.restore.guest_plan import KEEPS_ARGUMENTS, GuestPlan, GuestWish, plan_guest
from stillframe.restore.machine_files import make_folder, write_machine_file

#: Where nbdkit keeps what a drilled guest writes, in files without names (unless TMPDIR says otherwise).
WRITTEN_FOLDER = "/var/tmp"  # noqa: S108 -- nbdkit's choice
_NAME_PREFIX = "drill-"
_ID_SHOWN = 8
_CONSOLE_KEPT = 16 * 1024


@dataclass(frozen=True, slots=True)
class DrillWish:
    """What a user asked for. *network* is an isolated one, "" for none; *nearest*: see GuestWish."""

    proof: Proof
    network: str = ""
    nearest: bool = False


@dataclass(frozen=True)
class DrillTools:
    """What a drill works with. *host* is this host's name, *stop* gives the error to end with, if any."""

    repository: Repository
    connection: Connection
    state_folder: Path
    clock: Clock
    host: str
    stop: Callable[[], StillframeError | None]
    say: Callable[[str], None] = lambda _text: None


@dataclass(frozen=True)
class DrillPlan:
    """A drill that may begin."""

    snapshot: SnapshotName
    manifest: Manifest
    guest: GuestPlan
    definition: str
    disks: tuple[BootDisk, ...]
    place: DrillPlace
    warnings: tuple[str, ...]

    @property
    def made(self) -> Made:
        """What is to be removed in the end."""
        return Made(self.place.uuid, self.guest.claim.name, "", tuple(each.path for each in self.guest.files))


def plan_drill(
    snapshot: SnapshotName, manifest: Manifest, wish: DrillWish, tools: DrillTools,
) -> DrillPlan:
    """Return the plan. Changes nothing.

    Raises NotPermitted, DefinitionMissing, HostLacks, DrillExposed, ConfigInvalid, HypervisorError.
    """
    if os.geteuid() != 0:
        raise NotPermitted("Only root can hand the sockets of a drill over to QEMU's user.",
                           "run stillframe as root")
    chance = random.SystemRandom()
    name = f"{_NAME_PREFIX}{manifest.guest}-{chance.getrandbits(4 * _ID_SHOWN):0{_ID_SHOWN}x}"
    if wish.network:
        _check_network(wish.network, tools.connection)
    # Its disks are served: the folder stands for where images would be, and nobody makes it.
    guest = plan_guest(
        manifest, GuestWish(name, f"/run/{name}", network=wish.network, nearest=wish.nearest),
        tools.connection, None, chance)
    guest.check(room=False)
    if AGENT in wish.proof.waits_for and not has_agent(guest.definition):
        raise ConfigInvalid(
            f"{manifest.guest} has no channel for a guest agent, so nothing would tell that it is up.",
            f"stillframe drill {snapshot.sid[:12]} --expect REGEX --repo REPO   # or --script PROGRAM")
    place = DrillPlace.of(tools.state_folder, guest.claim.uuid)
    disks = tuple(
        BootDisk(target=disk.entry.target, overlay_path="", socket=place.socket_of(disk.entry.target),
                 content=disk.entry, data_bytes=disk.entry.data_bytes) for disk in guest.disks)
    definition, left_out = isolated(guest.definition, disks, str(place.console), wish.network)
    kept = [each for each in guest.warnings if each != KEEPS_ARGUMENTS]
    warnings = (*kept, *(each.text for each in guest.findings), *left_out)
    return DrillPlan(snapshot, manifest, guest, definition, disks, place, warnings)


def run_drill(plan: DrillPlan, wish: DrillWish, tools: DrillTools) -> Drill:
    """Boot the snapshot, watch it, throw it away; return what was found.

    Raises HypervisorError where it could not even be started, ExportFailed, StorageError, Interrupted.
    """
    began_at = utc_text(tools.clock.now())
    made = msgspec.structs.replace(plan.made, uri=tools.connection.uri)
    guest = TransientGuest(tools.connection, made.uuid, made.name)
    watch: Watch | None = None
    reason = ""
    with drill_place(tools.state_folder, made, tools.connection) as place, contextlib.ExitStack() as stack:
        try:
            _write_machine(plan.guest, tools.repository)
            exports = [stack.enter_context(_served(disk, plan, tools)) for disk in plan.disks]
            tools.say(f"{made.name}: starting, from {display_name(plan.snapshot)}")
            guest.start(plan.definition)
            stack.callback(guest.end)  # before its disks go
            watch = Watch(guest, place.console, tools.clock, tools.stop,
                          lambda: [line for export in exports for line in export.said().splitlines()])
            watch.prove(wish.proof, place.script_log, _facts(plan, tools, place))
        except DrillFailed as failure:
            reason = failure.message
        except SlotDamaged as damage:
            reason = f"a file of the machine is lost: {damage.message}"
        return _found(plan, wish, tools, began_at, reason, watch)


@contextlib.contextmanager
def _served(disk: BootDisk, plan: DrillPlan, tools: DrillTools) -> Iterator[Export]:
    """Serve a disk to QEMU's user alone; what is written to it is kept in a file without a name."""
    store = BootStore(tools.state_folder)
    store.order_of_boot(plan.manifest.uuid, "").parent.mkdir(mode=0o700, exist_ok=True)
    order = boot_order(store, plan.manifest.uuid, tools.repository, disk, len(plan.disks), PATIENCE_S)
    with exported(order, tools.clock, Serving(writable=True, socket=disk.socket)) as export:
        owner = tools.connection.qemu_owner()
        hand_over(disk, None if owner is None else Owner(*owner))
        yield export


def _write_machine(guest: GuestPlan, repository: Repository) -> None:
    places = Places(repository)
    for folder in guest.claim.folders:
        if Path(folder).is_relative_to(TPM_FOLDER):
            make_folder(folder)
    for target in guest.files:
        write_machine_file(target, read_whole(places, target.entry))


def _facts(plan: DrillPlan, tools: DrillTools, place: DrillPlace) -> dict[str, str]:
    """Return what a user's script is told, as its environment."""
    return {f"STILLFRAME_DRILL_{name}": value for name, value in (
        ("DOMAIN", plan.guest.claim.name), ("UUID", place.uuid), ("URI", tools.connection.uri),
        ("GUEST", plan.manifest.guest), ("SNAPSHOT", plan.snapshot.sid), ("CONSOLE", str(place.console)))}


def _picture(guest: TransientGuest) -> tuple[bytes, str]:
    """Return the guest's screen, or why there is none. That it has none fails no drill."""
    try:
        return as_png(*guest.screenshot()), ""
    except (HypervisorError, GuestUnknown) as error:
        return b"", error.message
    except ValueError as error:
        return b"", str(error)


def _found(
    plan: DrillPlan, wish: DrillWish, tools: DrillTools, began_at: str, reason: str, watch: Watch | None,
) -> Drill:
    picture, note = (b"", "the guest was not started") if watch is None else _picture(watch.guest)
    return Drill(
        sid=plan.snapshot.sid, guest=plan.snapshot.guest, host=plan.snapshot.host, uuid=plan.manifest.uuid,
        captured_at=plan.manifest.captured_at, drilled_on=tools.host, began_at=began_at,
        ended_at=utc_text(tools.clock.now()), passed=not reason, reason=reason,
        waited_for=wish.proof.waits_for, boot_s=None if watch is None else watch.boot_s,
        checks=() if watch is None else tuple(watch.results), warnings=plan.warnings,
        console="" if watch is None else watch.printed()[-_CONSOLE_KEPT:],
        screenshot=picture, screenshot_note=note, stillframe=__version__)


def _check_network(name: str, connection: Connection) -> None:
    try:
        text = connection.look(lambda connect: str(connect.networkLookupByName(name).XMLDesc(0)))
    except HypervisorError as error:
        if error.libvirt_code != libvirt.VIR_ERR_NO_NETWORK:
            raise
        raise HostLacks(f"This host has no network {name}.", "virsh net-list --all") from error
    if reaches_beyond(text):
        raise DrillExposed(
            f"The network {name} leads out of this host: a copy of a guest could take the place of the "
            "original there, or do its work a second time.",
            "make one without <forward> for drills, or leave --network out")
