"""What a person is told when no safe step exists: what was found, and the commands to choose from."""

from __future__ import annotations

from stillframe.capture.decide import Decision
from stillframe.capture.journal import RunRecord
from stillframe.capture.limits import Limits
from stillframe.errors import GuestState, NeedsAttention


def attention(record: RunRecord, decision: Decision, _limits: Limits) -> NeedsAttention:
    """Return the error for a decision to ASK: nothing was changed, and these are the choices."""
    if "does not confirm that the guest is thawed" in decision.reason:
        return NeedsAttention(
            f"{record.name} is on its own images again, but {decision.reason}.",
            _choices(record, decision), GuestState.UNKNOWN,
        )
    disks = [record.disk(target) for target in decision.targets]
    facts = "".join(
        f"\n  {disk.target}: base {disk.base.text()}, overlay {disk.overlay_path}" for disk in disks
    )
    return NeedsAttention(
        f"{record.name} needs a person: {decision.reason}. Nothing was changed.{facts}",
        _choices(record, decision),
        GuestState.OVERLAID if disks else GuestState.UNKNOWN,
    )


def _choices(record: RunRecord, decision: Decision) -> str:
    name = record.name
    if "its QEMU still runs" in decision.reason:
        return (
            "choose one of\n"
            f"  a) systemctl stop 'libvirtd*.socket' libvirtd; stillframe recover --repair-status {name}; "
            "systemctl start libvirtd\n"
            f"  b) shut the guest down from inside, then: stillframe recover {name}"
        )
    if "libvirt's live view" in decision.reason:
        return (
            f"systemctl stop 'libvirtd*.socket' libvirtd; stillframe recover --repair-status {name}; "
            f"systemctl start libvirtd; stillframe recover {name}   # the guest runs on meanwhile"
        )
    if "managed save" in decision.reason:
        return f"virsh start {name} && stillframe recover {name}   # brings the saved guest up first"
    if "does not confirm that the guest is thawed" in decision.reason:
        return f"virsh domfsthaw {name}; stillframe recover {name}"
    if "block job" in decision.reason:
        return f"virsh blockjob {name} {' '.join(decision.targets)} --info; then: stillframe recover {name}"
    if "another overlay on top" in decision.reason:
        return (
            f"virsh blockcommit {name} {' '.join(decision.targets)} --active --pivot --shallow; "
            f"stillframe recover {name}"
        )
    if "paused after an I/O error" in decision.reason:
        return f"df -h; free some space, then: virsh resume {name}; stillframe recover {name}"
    return _image_choices(record, decision)


def _image_choices(record: RunRecord, decision: Decision) -> str:
    lines = ["shut the guest down if it runs, keep copies of both files, then choose one of"]
    for target in decision.targets:
        disk = record.disk(target)
        base = disk.base.text()
        lines += [
            (f"  a) {target}: the overlay's data is right: "
             f"qemu-img rebase -u -b {base} -F {disk.base_format} {disk.overlay_path} && "
             f"qemu-img commit -d {disk.overlay_path}"),
            f"  b) {target}: the base alone is right: mv {disk.overlay_path} {disk.overlay_path}.set-aside",
        ]
    lines.append(f"  then: virsh edit {record.name} (name the base), stillframe recover {record.name}")
    return "\n".join(lines)
