"""Committing an overlay by QEMU's own commands: without libvirt, and where libvirt has forgotten it.

A libvirtd that is killed between QEMU's transaction and its own record leaves a QEMU that
writes to the overlay while every XML says base. libvirt can't commit what it doesn't know.
"""

from __future__ import annotations

from stillframe.errors import HypervisorError
from stillframe.hypervisor.model import OWN_COMMIT
from stillframe.hypervisor.monitor import Qmp, block_nodes, dismiss_concluded, drop_file, format_node, job_of

#: A job in one of these ends by itself, and refuses to be told so.
_ENDING = ("aborting", "waiting", "pending", "null")


def start(qmp: Qmp, target: str, overlay_file: str, base_file: str) -> None:
    """Start committing *overlay_file*, which disk *target* uses, into *base_file*. Raises HypervisorError."""
    nodes, name = block_nodes(qmp), OWN_COMMIT.format(target)
    top, base = format_node(nodes, overlay_file), format_node(nodes, base_file)
    dismiss_concluded(qmp, name)
    qmp("block-commit", {
        "job-id": name, "device": top, "top-node": top, "base-node": base, "auto-dismiss": False,
    })


def finish(qmp: Qmp, target: str, overlay_file: str) -> bool:
    """Take the commit one step on; return whether it is over and its nodes are closed.

    Raises HypervisorError, also with the reason when the commit failed: the overlay is whole then.
    """
    name = OWN_COMMIT.format(target)
    job = job_of(qmp, name)
    if job is None:
        drop_file(qmp, overlay_file)
        return True
    if job["status"] == "ready":
        qmp("job-complete", {"id": name})
    failed = dismiss_concluded(qmp, name)
    if failed:
        raise HypervisorError(f"QEMU's commit failed: {failed}", 0)
    return False


def cancel(qmp: Qmp, job: str) -> None:
    """End *job* without completing it: the guest stays on its overlay, and nothing is lost."""
    found = job_of(qmp, job)
    if found is not None and found["status"] == "concluded":
        qmp("job-dismiss", {"id": job})
    elif found is not None and found["status"] not in _ENDING:
        try:
            qmp("block-job-cancel", {"device": job, "force": True})
        except HypervisorError:
            now = job_of(qmp, job)
            if now is not None and now["status"] != "concluded":
                raise
            dismiss_concluded(qmp, job)  # it ended between the look and the request


def close_unused(qmp: Qmp, target: str, overlay_file: str) -> None:
    """Close the nodes over the disk's overlay, and forget its commit if that is over.

    Raises HypervisorError if a node is in use.
    """
    dismiss_concluded(qmp, OWN_COMMIT.format(target))
    drop_file(qmp, overlay_file)
