"""Committing an overlay by QEMU's own commands, for when libvirt has forgotten it.

A libvirtd that is killed between QEMU's transaction and its own record leaves a QEMU that
writes to the overlay while every XML says base. libvirt can't commit what it doesn't know.
"""

from __future__ import annotations

from stillframe.capture.journal import DiskRecord
from stillframe.capture.sight import OWN_JOB
from stillframe.errors import HypervisorError
from stillframe.hypervisor.monitor import Qmp, commit_unknown_overlay, drop_nodes, nodes_of


def start(qmp: Qmp, disk: DiskRecord) -> None:
    """Start committing the disk's overlay into its base. Raises HypervisorError."""
    commit_unknown_overlay(
        qmp, OWN_JOB.format(disk.target), disk.overlay_path, disk.base_qemu_file
    )


def finish(qmp: Qmp, disk: DiskRecord) -> bool:
    """Take the commit one step on; return whether it is over and its nodes are closed.

    Raises HypervisorError, also with the reason when the commit failed: the overlay is whole then.
    """
    name = OWN_JOB.format(disk.target)
    job = next((job for job in qmp("query-jobs", {}) if job["id"] == name), None)
    if job is None:
        drop_unused(qmp, disk)
        return True
    if job["status"] == "ready":
        qmp("job-complete", {"id": name})
    if job["status"] == "concluded":
        qmp("job-dismiss", {"id": name})
        if job.get("error"):
            raise HypervisorError(f"QEMU's commit failed: {job['error']}", 0)
    return False


def cancel(qmp: Qmp, job: str) -> None:
    """End *job* without completing it: the guest stays on its overlay, and nothing is lost."""
    found = next((each for each in qmp("query-jobs", {}) if each["id"] == job), None)
    if found is not None and found["status"] == "concluded":
        qmp("job-dismiss", {"id": job})
    elif found is not None:
        qmp("block-job-cancel", {"device": job, "force": True})


def drop_unused(qmp: Qmp, disk: DiskRecord) -> None:
    """Close the nodes over the disk's overlay, format before storage. Raises HypervisorError if in use."""
    drop_nodes(qmp, nodes_of(qmp, disk.overlay_path))
