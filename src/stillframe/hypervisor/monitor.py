"""QEMU's own word, asked for through libvirt's monitor passthrough, or QEMU's own socket (qmp.py).

libvirt's XML can be wrong for ever after a crash at the wrong instant; QEMU's block
graph can't. The answers are read here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from typing import Any

import libvirt_qemu

from stillframe.errors import HypervisorError
from stillframe.hypervisor.model import QemuBitmap, QemuDisk, QemuJob, QemuNode, QemuView

_MAJOR_WITH_SAFE_NBD = 9
#: Runs one QMP command and returns what is under "return".
Qmp = Callable[[str, Mapping[str, Any]], Any]


def passthrough(domain: Any) -> Qmp:
    """Return a Qmp over libvirt domain object *domain*."""

    def execute(command: str, arguments: Mapping[str, Any]) -> Any:
        text = json.dumps({"execute": command, "arguments": arguments})
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, text, 0))
        if "error" in answer:
            raise HypervisorError(f"QEMU said: {answer['error'].get('desc', answer['error'])}", 0)
        return answer["return"]

    return execute


def read_view(qmp: Qmp, aliases: Mapping[str, str]) -> QemuView:
    """Return QEMU's block graph; *aliases* maps a target to libvirt's device alias."""
    devices = qmp("query-block", {})
    disks: dict[str, QemuDisk] = {}
    for target, alias in aliases.items():
        for device in devices:
            if alias in str(device.get("qdev", "")).split("/") and "inserted" in device:
                disks[target] = read_disk(device["inserted"])
    return QemuView(disks, block_nodes(qmp), block_jobs(qmp))


def block_jobs(qmp: Qmp) -> tuple[QemuJob, ...]:
    """Return QEMU's block jobs, those that are over but not dismissed among them."""
    return tuple(
        QemuJob(job["device"], job["type"], job.get("status", ""), job["offset"], job["len"])
        for job in qmp("query-block-jobs", {})
    )


def format_node(nodes: tuple[QemuNode, ...], file: str) -> str:
    """Return the name of the topmost node over *file*: its format, not its storage.

    Raises HypervisorError when QEMU has no such node.
    """
    found = [node for node in nodes if node.file == file]
    formats = [node for node in found if node.driver in ("qcow2", "raw")]
    for node in formats or found:
        return node.name
    raise HypervisorError(f"QEMU has no block node for {file}", 0)


def drop_nodes(qmp: Qmp, names: tuple[str, ...]) -> None:
    """Close the named nodes, which nothing uses. Raises HypervisorError."""
    for name in names:
        qmp("blockdev-del", {"node-name": name})


def drop_file(qmp: Qmp, file: str) -> None:
    """Close all nodes over *file*, format before storage. Raises HypervisorError where one is in use."""
    before: tuple[str, ...] = ()
    # Looked at anew after each: a node that QEMU made itself goes with the one that it was made for.
    while (names := nodes_of(qmp, file)) and names != before:
        drop_nodes(qmp, names[:1])
        before = names


def job_of(qmp: Qmp, name: str) -> Mapping[str, Any] | None:
    """Return what query-jobs says of the job called *name*, None if there is none."""
    found: list[Mapping[str, Any]] = [job for job in qmp("query-jobs", {}) if job["id"] == name]
    return found[0] if found else None


def dismiss_concluded(qmp: Qmp, name: str) -> str:
    """Dismiss the job called *name* if it is over; return the error that it ended with, "" if none."""
    job = job_of(qmp, name)
    if job is None or job["status"] != "concluded":
        return ""
    qmp("job-dismiss", {"id": name})
    return str(job.get("error", ""))


def delete_bitmap(qmp: Qmp, files: Container[str], name: str) -> None:
    """Delete the bitmap called *name* from all images over *files*. Raises HypervisorError."""
    for node in block_nodes(qmp):
        if node.file in files and any(bitmap.name == name for bitmap in node.bitmaps):
            qmp("block-dirty-bitmap-remove", {"node": node.name, "name": name})


def flush_node(qmp: Qmp, node: str) -> None:
    """Have QEMU write down all that it keeps of a node in memory. Raises HypervisorError."""
    # QMP has no command for it. Without quotes, the words would be taken for further arguments.
    said = qmp("human-monitor-command", {"command-line": f'qemu-io {node} "flush"'})
    if said.strip():
        raise HypervisorError(f"QEMU said of a flush of {node}: {said.strip()}", 0)


def poke_node(qmp: Qmp, node: str) -> None:
    """Have QEMU begin to read a little from a node; what comes of it is not said. Raises HypervisorError."""
    qmp("human-monitor-command", {"command-line": f'qemu-io {node} "aio_read -q 1M 512"'})


def qemu_major(qmp: Qmp) -> int:
    """Return the first number of the version of the QEMU that runs."""
    return int(qmp("query-version", {})["qemu"]["major"])


def nbd_problem(qmp: Qmp) -> str:
    """Return why QEMU may not serve the guest's disks by NBD, "" if it may.

    Older ones end a client of an export in the disk's own I/O thread, where a failed assertion ends QEMU, and
    so the guest. Measured with 7.2, by libvirt's backup jobs as well as by QMP; that 9.0 is the first one
    without is from its sources.
    """
    if qemu_major(qmp) >= _MAJOR_WITH_SAFE_NBD or not qmp("query-iothreads", {}):
        return ""
    return (f"the guest has I/O threads, and a QEMU before {_MAJOR_WITH_SAFE_NBD}.0 crashes when a disk with "
            "one was read by NBD")


def close_exports(qmp: Qmp, nodes: tuple[str, ...], *, server: bool) -> None:
    """End exports of *nodes* and jobs that write to them, then close them; the NBD *server*, too, if asked.

    For a backup job that libvirt has lost. Raises HypervisorError where something does not end at once; it
    can be repeated.
    """
    for export in qmp("query-block-exports", {}):
        if export["node-name"] in nodes:
            qmp("block-export-del", {"id": export["id"], "mode": "hard"})
    if server:
        qmp("nbd-server-stop", {})
    for job in qmp("query-jobs", {}):
        # libvirt names the job after the disk and the disk's own node, and not after the scratch.
        if job["type"] == "backup" and job["status"] == "concluded":
            qmp("job-dismiss", {"id": job["id"]})
        elif job["type"] == "backup":
            qmp("block-job-cancel", {"device": job["id"], "force": True})
    drop_nodes(qmp, nodes)


def nodes_of(qmp: Qmp, file: str) -> tuple[str, ...]:
    """Return the names of all nodes over *file*, format before storage."""
    found = [node for node in block_nodes(qmp) if node.file == file]
    return tuple(node.name for node in sorted(found, key=lambda node: node.driver not in ("qcow2", "raw")))


def plain_file(name: str) -> str:
    """Return the path or address inside QEMU's *name* of an image, without a json: wrapping."""
    options = options_in(name)
    if not options:
        return name
    while isinstance(options.get("file"), dict):
        options = options["file"]
    if options.get("driver") == "nbd":
        return name
    return str(options.get("filename", name))


def options_in(name: str) -> Mapping[str, Any]:
    """Return the options that QEMU's *name* of an image is made of; none if it is a plain one, or cut off.

    QEMU cuts a name off at 4096 bytes.
    """
    if not name.startswith("json:"):
        return {}
    try:
        found = json.loads(name.removeprefix("json:"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def block_nodes(qmp: Qmp) -> tuple[QemuNode, ...]:
    """Return all nodes of QEMU's block graph."""
    return tuple(
        QemuNode(node["node-name"], node["drv"], plain_file(node["file"]), _bitmaps(node))
        for node in qmp("query-named-block-nodes", {"flat": True})
    )


def _bitmaps(node: Mapping[str, Any]) -> tuple[QemuBitmap, ...]:
    return tuple(
        QemuBitmap(
            bitmap["name"], inconsistent=bool(bitmap.get("inconsistent")),
            usable=bool(bitmap["persistent"] and bitmap["recording"] and not bitmap.get("inconsistent")),
        )
        for bitmap in node.get("dirty-bitmaps", ()) if bitmap.get("name")
    )


def read_disk(inserted: Mapping[str, Any]) -> QemuDisk:
    """Return what query-block says of an inserted image."""
    files = []
    image: Mapping[str, Any] | None = inserted.get("image")
    about = (image or {}).get("format-specific", {}).get("data", {})
    while image is not None:
        files.append(plain_file(str(image.get("filename", ""))))
        image = image.get("backing-image")
    return QemuDisk(str(inserted.get("node-name", "")), tuple(files), str(about.get("compat", "")))


def fsfreeze_status(look: Callable[[Callable[[Any], str]], str], timeout_s: int) -> str:
    """Return the guest agent's fsfreeze status ("thawed" or "frozen"), asked through *look*."""
    return look(lambda domain: str(agent_command(domain, "guest-fsfreeze-status", timeout_s)))


def agent_ping(look: Callable[[Callable[[Any], bool]], bool], timeout_s: int) -> bool:
    """Return True once the guest agent answered, asked through *look*."""

    def ping(domain: Any) -> bool:
        agent_command(domain, "guest-ping", timeout_s)
        return True

    return look(ping)


def agent_command(
    domain: Any, command: str, timeout_s: int, arguments: Mapping[str, object] | None = None
) -> Any:
    """Return what the guest agent answers to a command. Raises libvirtError."""
    text = json.dumps({"execute": command, "arguments": arguments or {}})
    return json.loads(libvirt_qemu.qemuAgentCommand(domain, text, timeout_s, 0))["return"]
