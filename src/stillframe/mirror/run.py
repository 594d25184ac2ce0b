"""The story of one mirror run: capture, copy, publish, commit back, finish."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stillframe.capture.apart import about_bytes
from stillframe.capture.choose import captured, planned
from stillframe.capture.lock import domain_lock
from stillframe.capture.plan import Plan, Wishes
from stillframe.capture.recover import recover_domain
from stillframe.capture.run import Capture, Stop, Tools
from stillframe.errors import DestinationSpace, StillframeError
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.model import ExcludedDisk
from stillframe.mirror.folder import MirrorFolder
from stillframe.mirror.layout import image_name
from stillframe.mirror.place import Destination, MirrorPlace
from stillframe.mirror.record import CaptureFacts
from stillframe.mirror.trouble import destination_errors
from stillframe.mirror.update import CopyProgress, CopyResult, Update
from stillframe.units import size_text


@dataclass(frozen=True, slots=True)
class MirrorResult:
    """What one mirror run came to. Times in seconds."""

    guest: str
    folder: str
    captured_at: str
    consistency: str
    disks: tuple[CopyResult, ...]
    excluded: tuple[ExcludedDisk, ...]
    warnings: tuple[str, ...]
    recovered: tuple[str, ...]
    frozen_s: float
    seconds: float

    @property
    def fell_back(self) -> bool:
        """Whether a disk was read or compared in full although less was to be enough."""
        return any(disk.fell_back for disk in self.disks)


@dataclass(frozen=True, slots=True)
class MirrorJob:
    """What is to be mirrored, where to, and how. *report* is told how far each copy is."""

    domain: Guest
    destination: Destination
    wishes: Wishes
    verify_destination: bool
    stop: Stop
    report: Callable[[CopyProgress], None]


def mirror_guest(job: MirrorJob, tools: Tools) -> MirrorResult:
    """Make DEST/GUEST equal to what the guest's disks hold now.

    What an earlier run left is recovered first. When this returns or raises anything but
    NeedsAttention, the guest is on its own images. Raises any StillframeError.
    """
    began_s = tools.clock.monotonic_s()
    domain = job.domain
    purpose = f"mirror to {job.destination}"
    with domain_lock(tools.journal.folder, domain.uuid, domain.name, purpose, tools.clock):
        recovered = recover_domain(domain, tools, job.wishes.limits)
        plan = planned(domain, job.wishes, tools)
        place = job.destination.place_for(plan)
        folder = MirrorFolder(place, clock=tools.clock)
        with folder.lock(f"mirror of {domain.name}"):
            words = [word for each in recovered for word in each.told]
            words += [told for told in [folder.recover().words] if told]
            update = folder.begin(domain.name, domain.uuid)
            _check_space(place, plan)
            capture, results = _update(job, plan, tools, str(place), update)
            update.finish()
    return MirrorResult(
        guest=domain.name, folder=str(place), captured_at=capture.captured_at,
        consistency=capture.consistency.value, disks=results, excluded=plan.excluded,
        warnings=(*capture.warnings, *_audit_warnings(results)), recovered=tuple(words),
        frozen_s=capture.frozen_s, seconds=tools.clock.monotonic_s() - began_s,
    )


def _update(
    job: MirrorJob, plan: Plan, tools: Tools, where: str, update: Update
) -> tuple[Capture, tuple[CopyResult, ...]]:
    with _abandoned_on_error(update), \
            captured(plan, tools, where, job.stop, update.anchor) as capture:
        results = tuple(_copy(job, capture, update))
        capture.check_still()
        update.publish(
            CaptureFacts(
                capture.captured_at, capture.consistency.value, _definition(plan), capture.anchor),
            stop=capture.stop,
        )
    return capture, results


def _audit_warnings(results: tuple[CopyResult, ...]) -> list[str]:
    return [
        f"AUDIT: {disk.target} differs from its mirror at {disk.audit_differs_at_bytes}, where it was said "
        "not to have changed. It was read whole, and the mirror is right now; find out what wrote there"
        for disk in results if disk.audit_differs_at_bytes is not None
    ]


@contextlib.contextmanager
def _abandoned_on_error(update: Update) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # Published, it is the mirror now, even if the guest still needs attention.
        if update.published:
            with contextlib.suppress(StillframeError):
                update.finish()
        else:
            update.abandon()
        raise


def _copy(job: MirrorJob, capture: Capture, update: Update) -> Iterator[CopyResult]:
    for disk in capture.disks:
        stopped = capture.stop()
        if stopped is not None:
            raise stopped
        with disk.read() as reader:
            yield update.copy_disk(
                disk.target, reader, source=disk.base.text(), stop=capture.stop, report=job.report,
                verify_destination=job.verify_destination, method=disk.method.value, note=disk.note,
                fell_back=disk.fell_back,
                full_read_every_s=job.wishes.full_read_every_s,
            )


def _check_space(place: MirrorPlace, plan: Plan) -> None:
    """Refuse a first copy that can't fit: what the images take now is about what the copy will take."""
    with destination_errors(str(place)):
        there = place.files.names()
        free = place.files.free_bytes()
    needed = sum(about_bytes(disk) for disk in plan.disks if image_name(disk.target) not in there)
    if needed > free:
        raise DestinationSpace(
            f"The first copy needs about {size_text(needed)}, but {place} has {size_text(free)} free.",
            f"df -h {place}   # free some space or choose another destination",
        )


def _definition(plan: Plan) -> str:
    return plan.definition or plan.live.text
