"""What a person types to look at a guest or to help it: another thing for libvirt than for QEMU alone."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

#: What the address of a guest without libvirt begins with; the path of its QMP socket follows.
BARE = "qmp:"
_DISK = "{disk}"


@dataclass(frozen=True, slots=True)
class Advice:
    """Commands for one guest, as they are typed. ``{disk}`` stands for a disk's target.

    *guest* is what names it to stillframe. *runner* is who carries out what stillframe asks for, *log* where
    that says more. *no_agent* is why the guest agent can't be asked, said of "the guest agent", and
    *try_agent* what helps.
    """

    guest: str
    runner: str
    guests: str
    state: str
    resume: str
    start: str
    shut_down: str
    disks: str
    disk_job: str
    jobs: str
    qemu_disks: str
    qemu_jobs: str
    definition: str
    edit: str
    commit: str
    thaw: str
    log: str
    no_agent: str
    try_agent: str

    def disk_job_of(self, target: str) -> str:
        """Return what shows the block job on disk *target*."""
        return self.disk_job.replace(_DISK, target)

    def commit_of(self, target: str) -> str:
        """Return what commits the top of disk *target* into the image below it."""
        return self.commit.replace(_DISK, target)


def advice_for(uri: str, name: str) -> Advice:
    """Return the commands for the guest *name* at *uri*."""
    return _of_qemu(uri) if is_bare(uri) else _of_libvirt(name)


def is_bare(uri: str) -> bool:
    """Return whether *uri* is the address of a QEMU without libvirt."""
    return uri.startswith(BARE)


def _of_libvirt(name: str) -> Advice:
    monitor = f"virsh qemu-monitor-command {name} --pretty "
    return Advice(
        guest=name, runner="libvirt", guests="virsh list --all", state=f"virsh domstate {name}",
        resume=f"virsh resume {name}", start=f"virsh start {name}", shut_down=f"virsh shutdown {name}",
        disks=f"virsh domblklist {name} --details", disk_job=f"virsh blockjob {name} {{disk}} --info",
        jobs=f"virsh domjobinfo {name}", qemu_disks=f"{monitor}'{{\"execute\":\"query-block\"}}'",
        qemu_jobs=f"{monitor}'{{\"execute\":\"query-block-jobs\"}}'", definition=f"virsh dumpxml {name}",
        edit=f"virsh edit {name}",
        commit=f"virsh blockcommit {name} {{disk}} --active --pivot --shallow",
        thaw=f"virsh domfsthaw {name}", log=f"tail /var/log/libvirt/qemu/{name}.log",
        no_agent="is not configured",
        try_agent="systemctl status qemu-guest-agent   # inside the guest; or use --quiesce auto",
    )


def _of_qemu(uri: str) -> Advice:
    socket = uri.removeprefix(BARE)

    def typed(command: str) -> str:
        # QEMU answers nothing before the capabilities were negotiated; socat waits for the answer.
        return (f"printf '{{\"execute\":\"qmp_capabilities\"}} {{\"execute\":\"{command}\"}}' | "
                f"socat -t5 - UNIX-CONNECT:{shlex.quote(socket)}")

    listed, jobs = typed("query-block"), typed("query-block-jobs")
    return Advice(
        guest=uri, runner="QEMU", guests=f"ls -l {shlex.quote(socket)}; ps -C qemu-system-x86_64 -f",
        state=typed("query-status"), resume=typed("cont"),
        start="start its QEMU", shut_down=typed("system_powerdown"), disks=listed, disk_job=jobs, jobs=jobs,
        qemu_disks=listed, qemu_jobs=jobs, definition=listed, edit="change QEMU's command line",
        commit=f"{listed}   # commit it with block-commit and job-complete", thaw=jobs,
        log="look at what QEMU printed", no_agent="can't be reached without libvirt",
        try_agent="use --quiesce auto   # the copy is crash-consistent then",
    )
