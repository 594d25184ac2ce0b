"""What a run is going to do, decided before anything is changed.

`make_plan` looks at everything that could be in the way and raises the error that names it;
with the plan in hand, a run begins. `doctor` shows the same plan without running it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from stillframe.block.image import ImagePlace, block_place, file_place, nbd_place, rbd_place
from stillframe.block.tools import chain_info
from stillframe.capture.growth import Watermark, plan_watermarks
from stillframe.capture.journal import DiskRecord, RunRecord, age_s
from stillframe.capture.limits import Limits
from stillframe.capture.method import Method
from stillframe.capture.neighbours import other_users
from stillframe.capture.states import Quiesce
from stillframe.clock import Clock
from stillframe.errors import (
    AgentSilent,
    ForeignSnapshot,
    GuestBusy,
    GuestHasNoDisks,
    GuestPaused,
    GuestShutOff,
    GuestState,
    GuestUnfit,
    GuestUnknown,
    ImageShared,
    NeedsAttention,
    OverlayFolderNeeded,
    OverlayTaken,
    ProgramFailed,
    ProgramTimedOut,
    ShutdownImpossible,
)
from stillframe.hypervisor.domain_xml import with_source
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import (
    BOOT_SOCKETS,
    OVERLAY_SUFFIX,
    Disk,
    DomainView,
    DomainXml,
    ExcludedDisk,
    Power,
    Source,
)
from stillframe.hypervisor.monitor import plain_file
from stillframe.units import DAY_S, duration_text

#: No changes are believed for ever: after so long a disk is read whole, unless the user says otherwise.
FULL_READ_EVERY_S = 30 * DAY_S
_FORMATS = ("raw", "qcow2")
_RBD_PORT = 6789


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for, for one guest. *exclude* are targets not to capture.

    *command* is what they could call again, with other options; ``{guest}`` stands for the guest.
    After *full_read_every_s* seconds a disk is read whole, whatever is known of its changes.
    """

    quiesce: Quiesce = Quiesce.AUTO
    overlay_folder: Path | None = None
    exclude: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    command: str = "stillframe mirror {guest} DEST"
    method: Method = Method.AUTO
    full_read_every_s: float = FULL_READ_EVERY_S

    def again(self, guest: str, option: str) -> str:
        """Return the command with one more option, to be typed."""
        return f"{self.command.replace('{guest}', guest)} {option}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that may begin. *others* are the targets that get no overlay.

    Of a guest that is shut off, *live* is its definition, and no disk has an overlay. *standing* is the run
    whose overlays the guest stands on by intention: what a disk's record calls its base is such an overlay
    then, with the guest's image below it.
    """

    domain: Guest
    view: DomainView
    live: DomainXml
    disks: tuple[DiskRecord, ...]
    others: tuple[str, ...]
    excluded: tuple[ExcludedDisk, ...]
    quiesce: Quiesce
    warnings: tuple[str, ...]
    watermarks: tuple[Watermark, ...]
    wishes: Wishes
    standing: RunRecord | None = None

    @property
    def limits(self) -> Limits:
        """How long things may take, and how large overlays may grow."""
        return self.wishes.limits

    @property
    def definition(self) -> str:
        """The domain's definition on its own images, "" if it has none: what to keep of it.

        A standing overlay is left out, since it is of no use without this host's images.
        """
        if self.view.inactive is None:
            return ""
        text = self.view.inactive.text
        for disk in self.standing.disks if self.standing is not None else ():
            if disk.target in self.view.inactive.disks:
                text = with_source(text, disk.target, disk.source())
        return text


def make_plan(domain: Guest, wishes: Wishes, standing: RunRecord | None = None) -> Plan:
    """Return the plan for capturing *domain* with the overlay method, or with standing overlays.

    *standing* is what the journal knows of standing overlays of the domain. Changes nothing. Raises a
    Refused error that names what is in the way, NeedsAttention if a standing overlay is not in use any more.
    """
    view = domain.view()
    live = _running(domain, view, wishes)
    _refuse_jobs(domain, view, live)
    _refuse_snapshots(domain)
    _refuse_left_overlays(view, live, standing)
    chosen, excluded = choose_disks(domain, live, wishes)
    disks = tuple(_plan_disk(domain, view, disk, wishes, standing) for disk in chosen)
    for disk, planned in zip(chosen, disks, strict=True):
        _refuse_other_chain(domain, view, disk, planned)
    refuse_shared(domain, live, chosen, _grounds(standing))
    quiesce, warnings = _choose_quiesce(domain, view, live, wishes)
    watermarks = plan_watermarks([disk.overlay_path for disk in disks], wishes.limits)
    targets = {disk.target for disk in disks}
    others = tuple(
        target for target in (*live.disks, *(each.target for each in live.excluded))
        if target not in targets
    )
    return Plan(
        domain, view, live, disks, others, excluded, quiesce, warnings, watermarks, wishes, standing
    )


def _running(domain: Guest, view: DomainView, wishes: Wishes) -> DomainXml:
    advice = domain.advice
    if view.power is Power.GONE:
        raise GuestUnknown(f"There is no guest called {view.name} any more.", advice.guests)
    if view.power is Power.OFF:
        raise GuestShutOff(
            f"{view.name} is shut off; this method captures a guest that runs.",
            wishes.again(view.name, "--method offline") + f"   # or {advice.start}",
        )
    if view.power is Power.HIDDEN:
        raise NeedsAttention(
            f"libvirt takes {view.name} for shut off, but its QEMU still runs.",
            f"stillframe recover {view.name}", GuestState.UNKNOWN,
        )
    if view.power is not Power.RUNNING or view.live is None or view.qemu is None:
        raise GuestPaused(
            f"{view.name} is {view.power.value}.", f"{advice.resume}   # then run again"
        )
    return view.live


def _refuse_jobs(domain: Guest, view: DomainView, live: DomainXml) -> None:
    advice = domain.advice
    for disk in live.disks.values():
        kind = disk.mirror.job or "unknown" if disk.mirror else ""
        if kind or disk.target in (view.jobs or {}):
            raise GuestBusy(
                f"Another program runs a block job ({kind or 'starting'}) on {disk.target} of {view.name}.",
                advice.disk_job_of(disk.target) + "   # wait for its end, then run again",
            )
    if view.domain_job:
        raise GuestBusy(
            f"Another job (a backup, a migration or a save) runs on {view.name}.",
            f"{advice.jobs}   # wait for its end, then run again",
        )
    if view.qemu and view.qemu.jobs:
        names = ", ".join(job.name for job in view.qemu.jobs)
        raise GuestBusy(
            f"QEMU runs jobs on {view.name} that nothing else tells of: {names}.", advice.qemu_jobs
        )


def _refuse_snapshots(domain: Guest) -> None:
    holders = domain.snapshot_holders()
    if holders:
        raise ForeignSnapshot(
            f"{domain.name} stands on the external snapshot {', '.join(holders)}, "
            "which stillframe did not make.",
            f"virsh snapshot-list {domain.name}; commit and delete it, then run again",
        )


def choose_disks(
    domain: Guest, live: DomainXml, wishes: Wishes
) -> tuple[list[Disk], tuple[ExcludedDisk, ...]]:
    """Return the disks of *live* to capture, and those left out. Raises GuestUnfit, GuestHasNoDisks."""
    name, exclude = live.name, wishes.exclude
    unsupported = {each.target: each.reason for each in live.excluded if each.unsupported}
    for target, reason in unsupported.items():
        if target not in exclude:
            raise GuestUnfit(
                f"{target} of {name} can't be captured: {reason}.",
                wishes.again(name, f"--exclude {target}   # to capture the others all the same"),
            )
    unknown = [target for target in exclude if target not in (*live.disks, *unsupported)]
    if unknown:
        raise GuestUnfit(
            f"{name} has no disk {', '.join(unknown)} that could be excluded.", domain.advice.disks
        )
    chosen = [disk for target, disk in live.disks.items() if target not in exclude]
    _refuse_booted(name, chosen)
    asked = tuple(ExcludedDisk(target, "you excluded it") for target in exclude if target in live.disks)
    if not chosen:
        reasons = "".join(f"\n  {each.target}: {each.reason}" for each in (*live.excluded, *asked))
        raise GuestHasNoDisks(f"{name} has no disk that can be captured.{reasons}", domain.advice.disks)
    return chosen, (*live.excluded, *asked)


def _refuse_booted(name: str, disks: list[Disk]) -> None:
    """Refuse a guest that still reads from the snapshot that it was booted from."""
    for disk in disks:
        if any(source.socket.startswith(f"{BOOT_SOCKETS}/") for source in disk.chain):
            raise GuestUnfit(
                f"{disk.target} of {name} still reads from the snapshot that it was booted from.",
                f"stillframe land {name}   # then it can be captured")


def _refuse_left_overlays(view: DomainView, live: DomainXml, standing: RunRecord | None) -> None:
    """Refuse a guest that should stand on overlays of ours and does not: their data may be what counts."""
    for known in standing.disks if standing is not None else ():
        disk = live.disks.get(known.target)
        if disk is None or disk.top.place != known.overlay_path:
            now = "is not in the guest any more" if disk is None else f"is on {disk.top.place}"
            raise NeedsAttention(
                f"{known.target} of {view.name} stood on {known.overlay_path}, over {known.base.text()}, but "
                f"{now}: what was written to that overlay may be missing.",
                f"stillframe settle --dry-run {view.name}", GuestState.UNKNOWN,
            )


def _grounds(standing: RunRecord | None) -> dict[str, str]:
    """Return the targets of the images below standing overlays, by their places."""
    disks = standing.disks if standing is not None else ()
    return {disk.base_key.partition(":")[2]: disk.target for disk in disks}


def _plan_disk(
    domain: Guest, view: DomainView, disk: Disk, wishes: Wishes, standing: RunRecord | None
) -> DiskRecord:
    top = disk.top
    refuse_format(disk, view.name, wishes)
    ours = {each.overlay_path for each in standing.disks} if standing is not None else set()
    if top.place.endswith(OVERLAY_SUFFIX) and top.place not in ours:
        raise OverlayTaken(
            f"{disk.target} of {view.name} stands on {top.place}, an overlay of stillframe "
            "that this journal does not know.",
            "stillframe status --state-dir with the state folder of the run that made it; "
            "or " + domain.advice.commit_of(disk.target),
        )
    _refuse_other_definition(view, disk)
    known = None if view.qemu is None else view.qemu.disks.get(disk.target)
    if known is None or not known.files:
        raise GuestUnfit(
            f"QEMU does not tell which image {disk.target} of {view.name} uses.",
            domain.advice.qemu_disks,
        )
    return DiskRecord(
        target=disk.target,
        base=place_of_chain(disk.chain),
        base_source_xml=top.xml,
        base_kind=top.kind,
        base_format=top.format,
        base_key=top.key,
        base_qemu_file=known.files[0],
        size_bytes=domain.capacity_bytes(disk.target),
        overlay_path=_overlay_path(view.name, disk, wishes, ours),
    )


def refuse_format(disk: Disk, name: str, wishes: Wishes) -> None:
    """Raise GuestUnfit for an image that is neither raw nor qcow2, or is encrypted by QEMU."""
    exclude = wishes.again(name, f"--exclude {disk.target}")
    if disk.top.format not in _FORMATS:
        raise GuestUnfit(
            f"{disk.target} of {name} is {disk.top.format}; stillframe captures raw and qcow2.", exclude)
    if "<encryption" in disk.top.xml:
        raise GuestUnfit(f"{disk.target} of {name} is encrypted by QEMU, which is not supported.", exclude)


def _refuse_other_definition(view: DomainView, disk: Disk) -> None:
    if view.inactive is None:
        return
    defined = view.inactive.disks.get(disk.target)
    # A disk that was hot-plugged for this boot alone has no definition, and that is fine.
    if defined is not None and defined.top.key != disk.top.key:
        raise GuestUnfit(
            f"{disk.target} of {view.name} runs on {disk.top.place}, but its definition names "
            f"{defined.top.place}: the next start would use another image.",
            f"virsh edit {view.name}   # make it name the image that is in use",
        )


def _refuse_other_chain(domain: Guest, view: DomainView, disk: Disk, planned: DiskRecord) -> None:
    """Refuse a chain that the images' headers tell otherwise than it runs.

    The base is read by its headers (qemu-nbd), the guest by libvirt's <backingStore>: where they
    differ, the copy would be of another disk than the guest's. A backing file without a format
    would be probed, which lets a guest choose what a raw image is taken for.
    """
    advice = f"{how_to_look(disk.top)}; {domain.advice.definition}"
    if "<slices" in disk.top.xml:
        raise GuestUnfit(f"{disk.target} of {view.name} is a slice of its image.", advice)
    try:
        headers = chain_info(planned.base)
    except (ProgramFailed, ProgramTimedOut) as error:
        raise GuestUnfit(
            f"The chain of {disk.target} of {view.name} can't be read: {error.message}", advice
        ) from error
    known = _without_filters(view.qemu.disks[disk.target].files if view.qemu else ())
    told = [real_path(info.name) for info in headers[1:]]
    if len(told) != len(known) - 1 or any(map(is_other, told, map(real_path, known[1:]))):
        raise GuestUnfit(
            f"{disk.target} of {view.name} runs on {' ← '.join(known[::-1])}, but its images' headers "
            f"name {' ← '.join((*told[::-1], known[0]))}.", advice,
        )
    for info, below, source in zip(headers[:-1], headers[1:], disk.chain[1:], strict=False):
        told_format = below.driver if info.backing.startswith("json:") else info.backing_format
        if told_format != source.format:
            raise GuestUnfit(
                f"{info.name} of {view.name} names the format {told_format or 'nothing'} for its "
                f"backing file, which runs as {source.format}.",
                f"{domain.advice.shut_down}; qemu-img rebase -u -b {source.place} -F {source.format} IMAGE",
            )


def how_to_look(source: Source) -> str:
    """Return the command that shows a person the image as stillframe is to open it."""
    if source.protocol != "rbd":
        return f"qemu-img info -U --backing-chain {source.place}"
    user = source.user or "admin"
    return f"rbd --id {user} info {source.export}   # needs /etc/ceph/ceph.client.{user}.keyring"


def _without_filters(files: tuple[str, ...]) -> tuple[str, ...]:
    """Return the chain without repeats: a filter (copy-on-read) shows its image a second time."""
    return tuple(name for at, name in enumerate(files) if at == 0 or files[at - 1] != name)


def is_other(one: str, other: str) -> bool:
    """Return whether two names are of different images. Network names have many spellings."""
    return one != other and one.startswith("/") and other.startswith("/")


def real_path(name: str) -> str:
    """Return where the file is that QEMU names so, without links; of anything else the name."""
    plain = plain_file(name)
    return os.path.realpath(plain) if plain.startswith("/") else plain


def place_of_chain(chain: tuple[Source, ...]) -> ImagePlace:
    """Return the image on top of *chain*, of which libvirt names at least that. Raises GuestUnfit.

    What is below is named outright if an image there opens only for a user: headers often lack the user.
    """
    below = chain[1:]
    beneath = place_of_chain(below) if any(source.user for source in below) else None
    return replace(place_of(chain[0]), beneath=beneath)


def place_of(source: Source) -> ImagePlace:
    """Return the image that libvirt's *source* names. Raises GuestUnfit for protocols not known."""
    if source.kind == "file":
        return file_place(source.place, source.format)
    if source.kind == "block":
        return block_place(source.place, source.format)
    if source.protocol == "nbd":
        return nbd_place(
            source.format, socket=source.socket, host=source.host, port=source.port or 10809,
            export=source.export,
        )
    if source.protocol == "rbd":
        pool, _, image = source.export.partition("/")
        hosts = tuple((host, port or _RBD_PORT) for host, port in source.hosts)
        return rbd_place(
            source.format, pool=pool, image=image, hosts=hosts, user=source.user, conf=source.conf)
    raise GuestUnfit(
        f"Network disks by {source.protocol} are not supported.", "virsh domblklist GUEST --details"
    )


def _overlay_path(name: str, disk: Disk, wishes: Wishes, ours: set[str]) -> str:
    folder = wishes.overlay_folder
    if folder is None and disk.top.kind != "file":
        raise OverlayFolderNeeded(
            f"{disk.target} of {name} is {disk.top.place}, which has no folder for an overlay.",
            wishes.again(name, "--overlay-dir /var/lib/libvirt/images"),
        )
    place = folder if folder is not None else Path(disk.top.place).parent
    if not place.is_dir():
        raise OverlayFolderNeeded(
            f"The folder for overlays {place} does not exist.", f"mkdir -p {place}"
        )
    path = str(place.absolute() / f"{name}-{disk.target}{OVERLAY_SUFFIX}")
    if path in ours:  # the one that it stands on: the two names take turns
        path = str(place.absolute() / f"{name}-{disk.target}-2{OVERLAY_SUFFIX}")
    if os.path.lexists(path):
        raise OverlayTaken(
            f"{path} already exists, and no open run of this journal made it.",
            f"qemu-img info -U {path}   # move it away if it is not needed, then run again",
        )
    return path


def refuse_shared(
    domain: Guest, live: DomainXml, chosen: list[Disk], grounds: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise ImageShared if an image of a chosen disk is also part of another disk or domain.

    *grounds* are images below standing overlays, and the targets of their disks.
    """
    tops = {disk.top.place: disk.target for disk in chosen}
    places = {**grounds, **tops}
    users = other_users(domain, set(places))
    for disk in (*live.disks.values(), *live.bystanders.values()):
        below = disk.chain[1:] if disk.top.place in tops else disk.chain
        for source in below:
            if places.get(source.place, disk.target) != disk.target or source.place in tops:
                users[source.place] = f"{domain.name} ({disk.target})"
    for place, user in users.items():
        raise ImageShared(
            f"{place} ({places[place]} of {domain.name}) is also an image of {user}.",
            f"virsh dumpxml {user.split()[0]}   # a shared image can't be captured safely",
        )


def _choose_quiesce(
    domain: Guest, view: DomainView, live: DomainXml, wishes: Wishes
) -> tuple[Quiesce, tuple[str, ...]]:
    wanted = wishes.quiesce
    if wanted is Quiesce.SHUTDOWN and not view.persistent:
        raise ShutdownImpossible(
            f"{view.name} is transient: it would be gone after a shutdown.",
            wishes.again(view.name, "--quiesce agent"),
        )
    if wanted in (Quiesce.SHUTDOWN, Quiesce.NONE):
        return wanted, ()
    if live.has_agent_channel and domain.agent_answers(max(1, round(wishes.limits.agent_s))):
        return Quiesce.AGENT, ()
    why = "does not answer" if live.has_agent_channel else domain.advice.no_agent
    if wanted is Quiesce.AGENT:
        raise AgentSilent(
            f"The guest agent of {view.name} {why}.", domain.advice.try_agent
        )
    return Quiesce.NONE, (f"the guest agent {why}: the copy is only crash-consistent",)


def why_due(clock: Clock, read_whole_at: str, every_s: float) -> str:
    """Return why a disk is to be read whole again, "" if it is not: no bitmap is believed for ever.

    *read_whole_at* is RFC 3339 text, "" if nobody knows.
    """
    if not read_whole_at:
        return "it was last read whole nobody knows when"
    age = age_s(clock, read_whole_at)
    return f"it was last read whole {duration_text(age)} ago" if age > every_s else ""
