"""Records and sights for tests of the capture room, made from a few words."""

from __future__ import annotations

from typing import Any

from stillframe.block.image import FileIdentity, file_place
from stillframe.capture.decide import DiskSight, Seen, Sight
from stillframe.capture.journal import DiskRecord, RunRecord
from stillframe.capture.states import DiskPhase, Quiesce, State
from stillframe.hypervisor.model import Power

UUID = "8b2e3b8e-0d2d-4a0c-9d7e-6f1f6f3c1a11"
AT = "2026-11-23T01:02:03.000004Z"
SINGLE = {"vda": DiskPhase.OVERLAID}


def disk_record(target: str = "vda", phase: DiskPhase = DiskPhase.OVERLAID, **changes: Any) -> DiskRecord:
    base = f"/images/g-{target}.img"
    identity = FileIdentity(1, 2, 3, 4)
    return DiskRecord(**{
        "target": target, "base": file_place(base, "raw"), "base_source_xml": f'<source file="{base}"/>',
        "base_kind": "file", "base_format": "raw", "base_key": f"file:{base}", "base_qemu_file": base,
        "size_bytes": 1 << 30, "overlay_path": f"/images/g-{target}.stillframe-overlay.qcow2",
        "overlay_identity": identity, "base_identity": identity, "phase": phase, **changes,
    })


def run_record(
    state: State = State.RELEASED, phases: dict[str, DiskPhase] | None = None, **changes: Any
) -> RunRecord:
    """A run whose snapshot was begun, if its state is not before that."""
    early = (State.PLANNED, State.OVERLAYS, State.SHUTTING_DOWN, State.FREEZING)
    disks = tuple(disk_record(target, phase) for target, phase in (phases or SINGLE).items())
    return RunRecord(**{
        "id": f"20261123T010203000004-{UUID[:8]}", "uuid": UUID, "name": "g", "uri": "qemu:///system",
        "destination": "/backup/g", "quiesce": Quiesce.NONE, "state": state, "began_at": AT, "pid": 1,
        "disks": disks, "snapshot_begun": state not in early, **changes,
    })


def on_overlay(target: str = "vda", **changes: Any) -> DiskSight:
    return disk_sight(target, Seen.OVERLAY, **changes)


def on_base(target: str = "vda", **changes: Any) -> DiskSight:
    return disk_sight(target, Seen.BASE, **changes)


def disk_sight(target: str, seen: Seen, **changes: Any) -> DiskSight:
    """A disk that QEMU and both XMLs name alike."""
    return DiskSight(**{"target": target, "qemu": seen, "live": seen, "inactive": seen, **changes})


def off_disk(inactive: Seen, target: str = "vda", **changes: Any) -> DiskSight:
    """A disk of a guest that is shut off."""
    unknown = Seen.UNKNOWN
    return DiskSight(**{
        "target": target, "qemu": unknown, "live": unknown, "inactive": inactive, **changes})


def running(*disks: DiskSight, **changes: Any) -> Sight:
    return Sight(Power.RUNNING, disks, **changes)


def paused(*disks: DiskSight, **changes: Any) -> Sight:
    return Sight(Power.PAUSED, disks, **changes)


def off(*disks: DiskSight, **changes: Any) -> Sight:
    return Sight(Power.OFF, disks, **changes)
