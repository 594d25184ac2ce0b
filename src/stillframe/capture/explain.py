"""What a person is told when no safe step exists: what was found, and the commands to choose from."""

from __future__ import annotations

from stillframe.capture.decide import Decision, Why
from stillframe.capture.journal import DiskRecord, RunRecord
from stillframe.errors import GuestState, NeedsAttention
from stillframe.hypervisor.advice import advice_for

_REPAIR = (
    "systemctl stop 'libvirtd*.socket' libvirtd; stillframe recover --repair-status {name}; "
    "systemctl start libvirtd; stillframe recover {name}"
)

#: For each cause, the next command; {name} is the guest, {advice}, {job} and {commit} come from advice.py.
_NEXT = {
    Why.HIDDEN: f"{_REPAIR}   # or shut the guest down from inside, then: stillframe recover {{name}}",
    Why.LIVE_VIEW: f"{_REPAIR}   # the guest runs on meanwhile",
    Why.STALE_CHAIN: (
        "shut the guest down from inside and start it again, then: stillframe recover {name}"
        "   # nothing is lost; it runs well meanwhile"),
    Why.MANAGED_SAVE: "virsh start {name} && stillframe recover {name}   # brings the saved guest up first",
    Why.FROZEN: "{advice.thaw}; stillframe recover {name}",
    Why.FOREIGN_JOB: "{job}   # when it is over: stillframe recover {name}",
    Why.FOREIGN_OVERLAY: (
        "{commit}; stillframe recover {name}"),
    Why.IO_ERROR: "df -h; free some space, then: {advice.resume}; stillframe recover {name}",
    Why.UNCERTAIN: (
        "{advice.definition}   # put the image right: {advice.edit}"),
    Why.FILE_GONE: "find the file and put it back where it was, then: stillframe recover {name}",
    Why.STANDS: "stillframe settle {name}",
    Why.NAMED_ELSEWHERE: (
        "virsh edit that guest, so that it does not name the overlay; stillframe recover {name}"),
}


def attention(record: RunRecord, decision: Decision) -> NeedsAttention:
    """Return the error for a decision to ASK: nothing was changed, and these are the choices."""
    disks = [record.disk(target) for target in decision.targets]
    facts = "".join(
        f"\n  {disk.target}: base {disk.base.text()}, overlay {disk.overlay_path}" for disk in disks
    )
    return NeedsAttention(
        f"{record.name} needs a person: {decision.reason}.{facts}", _next(record, decision), _guest(decision)
    )


def _guest(decision: Decision) -> GuestState:
    if decision.why in (Why.DIVERGED, Why.FROZEN, Why.HIDDEN):
        return GuestState.UNKNOWN
    return GuestState.OVERLAID


def _next(record: RunRecord, decision: Decision) -> str:
    advice = advice_for(record.uri, record.name)
    if decision.why in (Why.DIVERGED, Why.UNPLUGGED):
        disks = [record.disk(target) for target in decision.targets]
        return "\n".join([
            "shut the guest down, keep copies of base and overlay, then choose for each disk:",
            *(line for disk in disks for line in _choices(record, disk)),
            f"  then: {advice.edit} (name the image chosen), stillframe recover {record.name}",
        ])
    text = _NEXT.get(decision.why, "stillframe recover {name}")
    disk = " ".join(decision.targets)
    return text.format(name=record.name, advice=advice, job=advice.disk_job_of(disk),
                       commit=advice.commit_of(disk))


def _choices(record: RunRecord, disk: DiskRecord) -> list[str]:
    """Return the ways out where base and overlay each have a history of their own.

    Never a merge: an overlay put back on a base that was written to since gives a disk that
    never was. It fits only what the base held at the capture.
    """
    moment = record.captured_at or "just this run"
    if record.repository:
        kept = f"the snapshot of {moment} in {record.repository} is there (stillframe list)"
        copy = (f"stillframe restore {record.name}@{record.captured_at or 'MOMENT'}:{disk.target} "
                f"--repo {record.repository} --to COPY")
    else:
        mirror = f"{record.destination}/{disk.target}.img"
        kept = f"{mirror} is the mirror of {moment} (look into its mirror.json)"
        copy = f"cp --sparse=always {mirror} COPY"
    return [
        (f"  a) {disk.target}: what the base holds now is right: "
        f"mv {disk.overlay_path} {disk.overlay_path}.set-aside"),
        (f"  b) {disk.target}: what was written to the overlay is right, and {kept}: "
        f"{copy} && qemu-img rebase -u -b COPY -F raw {disk.overlay_path}"),
    ]
