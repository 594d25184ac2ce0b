"""What QEMU says of its disks, read into plain data: names, chains, what is left out and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillframe.errors import GuestUnfit
from stillframe.hypervisor.advice import advice_for, is_bare
from stillframe.hypervisor.bare_view import (
    commits,
    description,
    guest_devices,
    jobs_at_work,
    name_of,
    power_of,
    uuid_of,
)
from stillframe.hypervisor.checkpoint import checkpoint_note, read_checkpoint
from stillframe.hypervisor.model import Checkpoint, Power, QemuJob, QemuNode

_BLOCKDEV = "/machine/peripheral-anon/device[0]/virtio-backend"


def device(
    *files: str, qdev: str = "/machine/peripheral/d0/virtio-backend", name: str = "", node: str = "#block1",
    **inserted: Any,
) -> dict[str, Any]:
    image: dict[str, Any] | None = None
    for file in reversed(files):
        below = {"backing-image": image} if image else {}
        image = {"filename": file, "format": "qcow2" if below else "raw", "virtual-size": 1 << 20, **below}
    return {"device": name, "qdev": qdev,
            "inserted": {"node-name": node, "file": files[0], "image": image, **inserted}}


def described(found: dict[str, Any], *jobs: QemuJob, folder: str = "/cwd") -> Any:
    return description("g", "u", guest_devices([found], ()), jobs, folder)


@pytest.mark.parametrize(("found", "target"), [
    (device("/a", qdev="/machine/peripheral/boot/virtio-backend", name="drive0", node="n"), "boot"),
    (device("/a", qdev=_BLOCKDEV, name="drive0", node="n"), "drive0"),
    (device("/a", qdev=_BLOCKDEV, node="n"), "n"),
    (device("/a", qdev=_BLOCKDEV, node="#block7"), "peripheral-anon-device-0-virtio-backend"),
])
def test_a_disk_goes_by_the_name_that_its_owner_gave_it(found: dict[str, Any], target: str) -> None:
    assert list(guest_devices([found], ())) == [target]


def test_an_overlay_does_not_rename_a_disk_that_its_node_names() -> None:
    found = device("/o", "/a", qdev=_BLOCKDEV, node="stillframe-0123456789")
    nodes = (QemuNode("stillframe-0123456789", "qcow2", "/o"), QemuNode("disk", "raw", "/a"),
             QemuNode("disk-file", "file", "/a"))
    assert list(guest_devices([found], nodes)) == ["disk"]


def test_two_disks_of_one_name_are_refused() -> None:
    with pytest.raises(GuestUnfit, match="'d0'"):
        guest_devices([device("/a"), device("/b", qdev=_BLOCKDEV, name="d0")], ())


def test_a_drive_that_no_device_uses_is_no_disk_of_the_guest() -> None:
    assert not guest_devices([{"device": "unused", **device("/a", qdev="")}], ())


def test_a_chain_with_relative_names_counts_from_qemus_folder(tmp_path: Path) -> None:
    disk = described(device("top.qcow2", "sub/base.raw"), folder=str(tmp_path)).disks["d0"]
    assert [source.place for source in disk.chain] == [f"{tmp_path}/top.qcow2", f"{tmp_path}/sub/base.raw"]
    assert [(source.kind, source.format, source.index) for source in disk.chain] == [
        ("file", "qcow2", 0), ("file", "raw", 1)]
    assert disk.top.key == f"file:{tmp_path}/top.qcow2"


@pytest.mark.parametrize(("found", "reason", "unsupported"), [
    ({**device("/a"), "removable": True}, "it is a removable medium", False),
    ({"device": "cd", "qdev": "/machine/unattached/device[3]", "removable": True}, "removable", False),
    (device("/a", ro=True), "it is readonly", False),
    (device("/a", qdev="/machine/system.flash1", name="pflash1"), "firmware's flash", False),
    (device("/a", encrypted=True), "encrypted", True),
    (device("nbd://host/x"), "neither a file nor a device of this host (nbd://host/x)", True),
    (device("/top", "rbd:pool/image"), "(rbd:pool/image)", True),
    (device('json:{"driver": "nbd", "server.host": "h"}'), "neither a file", True),
    (device('json:{"driver": "nbd", "server": {"type": "in...'), "neither a file", True),
    (device('json:{"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "/a"}}'),
     "slice", True),
    (device('json:{"driver": "qcow2", "file": {"driver": "raw", "size": 9, "file": {"filename": "/a"}}}'),
     "slice", True),
])
def test_what_is_left_out_says_why(found: dict[str, Any], reason: str, unsupported: bool) -> None:
    seen = described(found)
    assert not seen.disks
    (excluded,) = seen.excluded
    assert reason in excluded.reason
    assert excluded.unsupported is unsupported


def test_a_relative_name_is_refused_where_qemus_folder_is_not_seen() -> None:
    (excluded,) = described(device("a.raw"), folder="").excluded
    assert "relative name" in excluded.reason
    assert excluded.unsupported


def test_a_name_with_a_colon_in_its_path_is_a_file() -> None:
    assert described(device("/images/a:b.raw")).disks["d0"].top.place == "/images/a:b.raw"


@pytest.mark.parametrize(("status", "ready"), [("running", False), ("paused", False), ("ready", True)])
def test_a_commit_at_work_is_a_job_on_its_disk(status: str, ready: bool) -> None:
    job = QemuJob("stillframe-commit-d0", "commit", status, 5, 9)
    mirror = described(device("/a"), job).disks["d0"].mirror
    assert mirror is not None
    assert (mirror.job, mirror.ready) == ("active-commit", ready)
    assert commits({"d0": {}, "d1": {}}, (job,))["d0"].cur == 5


def test_a_commit_that_is_over_is_none() -> None:
    over = QemuJob("stillframe-commit-d0", "commit", "concluded", 9, 9)
    theirs = QemuJob("mirror-d0", "mirror", "concluded", 9, 9)
    assert described(device("/a"), over).disks["d0"].mirror is None
    assert not commits({"d0": {}}, (over,))
    assert jobs_at_work((over, theirs)) == (theirs,)


def test_power() -> None:
    assert power_of("running") is Power.RUNNING
    assert power_of("io-error") is Power.PAUSED_ON_IO_ERROR
    assert {power_of(status) for status in ("prelaunch", "paused", "shutdown")} == {Power.PAUSED}


@pytest.mark.parametrize(("told", "path", "name"), [
    ("web", "/run/x.sock", "web"), ("", "/run/web-1.qmp.sock", "web-1"), ("../a b", "/s", "a-b"),
    ("", "/run/.sock", "guest"),
])
def test_a_name_can_be_that_of_a_folder(told: str, path: str, name: str) -> None:
    assert name_of(told, path) == name


def test_a_uuid_is_told_or_made_of_name_and_first_image() -> None:
    none = "00000000-0000-0000-0000-000000000000"
    told = "6f1b7c52-3a80-4b5e-9d0c-2f4f6b1d7a11"
    plain = [device("/a.raw"), device("/b.raw")]
    made = uuid_of(none, "g", plain)
    assert uuid_of(told, "g", plain) == told
    assert uuid_of(none, "g", [device("/g-d0.stillframe-overlay.qcow2", "/a.raw"), plain[1]]) == made
    assert uuid_of(none, "g", [plain[0], device("/c.raw")]) == made
    assert uuid_of(none, "g", [{**device("/medium.iso"), "removable": True}, *plain]) == made
    assert len({made, uuid_of(none, "h", plain), uuid_of(none, "g", plain[1:]), uuid_of(none, "g", [])}) == 4


def test_a_checkpoint_is_read_back() -> None:
    made = Checkpoint("n", ("d0",), {"d0": "file:/a", "d1": "file:/b"}, {"d0": "mark", "d1": "other"})
    assert read_checkpoint(checkpoint_note(made)) == Checkpoint(
        "n", ("d0",), {"d0": "file:/a"}, {"d0": "mark", "d1": "other"})
    assert read_checkpoint('{"name": 1}') is None
    assert read_checkpoint("{") is None


def test_what_people_type_fits_what_runs_the_guest() -> None:
    assert is_bare("qmp:/run/a b.sock")
    assert not is_bare("qemu:///system")
    bare, domain = advice_for("qmp:/run/a b.sock", "g"), advice_for("qemu:///system", "g")
    assert domain.disk_job_of("vda") == "virsh blockjob g vda --info"
    assert domain.commit_of("vda").startswith("virsh blockcommit g vda ")
    assert "UNIX-CONNECT:'/run/a b.sock'" in bare.resume
    assert '{"execute":"cont"}' in bare.resume
    assert not [each for each in (bare.state, bare.disk_job_of("d0"), bare.definition) if "virsh" in each]
