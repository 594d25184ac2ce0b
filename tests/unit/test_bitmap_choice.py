"""What a backup job's XML says, and each reason for which a disk is not counted."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from stillframe.block.anchor import Anchor
from stillframe.block.image import file_place
from stillframe.capture.bitmap_choice import (
    bitmap_reasons,
    checkpoint_prefix,
    choose_disks,
    image_marks,
    is_our_name,
)
from stillframe.capture.journal import DiskRecord
from stillframe.hypervisor.backup_xml import (
    checkpoint_xml,
    job_socket,
    pull_xml,
    read_about,
    read_checkpoint_xml,
    redefinition,
)
from stillframe.hypervisor.domain_xml import read_domain_xml
from stillframe.hypervisor.model import (
    DomainView,
    Power,
    PulledDisk,
    QemuBitmap,
    QemuDisk,
    QemuNode,
    QemuView,
)

RUN = "20260101T000000000000-abcdefab"
NAME = checkpoint_prefix("there") + RUN
SIZE = 1 << 30


def domain_xml(path: Path) -> str:
    return (f"<domain><name>g</name><uuid>u</uuid><devices><disk type='file' device='disk'>"
            f"<driver name='qemu' type='qcow2'/><source file='{path}'/><target dev='vda'/></disk>"
            f"</devices></domain>")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    image.touch()
    return image


def disk_of(path: Path) -> DiskRecord:
    return DiskRecord(
        target="vda", base=file_place(str(path), "qcow2"), base_source_xml="", base_kind="file",
        base_format="qcow2", base_key=f"file:{path}", base_qemu_file=str(path), size_bytes=SIZE,
        overlay_path="")


def anchor_of(path: Path) -> Anchor:
    made = checkpoint_xml(NAME, ["vda"], ["vdb"], image_marks((disk_of(path),)))
    whole = made.replace("</domaincheckpoint>", domain_xml(path) + "</domaincheckpoint>")
    return Anchor(capture=RUN, sizes={"vda": SIZE}, checkpoint=NAME, checkpoint_xml=whole)


def view_of(path: Path, *bitmaps: QemuBitmap, compat: str = "1.1") -> DomainView:
    nodes = (QemuNode("n", "qcow2", str(path), bitmaps), QemuNode("f", "file", str(path)))
    qemu = QemuView({"vda": QemuDisk("n", (str(path),), compat)}, nodes, ())
    return DomainView("g", "u", Power.RUNNING, live=read_domain_xml(domain_xml(path)), qemu=qemu)


GOOD = QemuBitmap(NAME, usable=True, inconsistent=False)


def note(path: Path, *bitmaps: QemuBitmap, **changes: object) -> str:
    anchor = msgspec.structs.replace(anchor_of(path), **changes)
    (choice,) = choose_disks((disk_of(path),), view_of(path, *bitmaps), "there", anchor)
    assert choice.keeps
    assert choice.counts is not bool(choice.note)
    return choice.note


def test_a_disk_that_can_be_counted(path: Path) -> None:
    assert note(path, GOOD) == ""


def test_the_first_capture_has_no_note(path: Path) -> None:
    (choice,) = choose_disks((disk_of(path),), view_of(path), "there", None)
    assert (choice.keeps, choice.counts, choice.note) == (True, False, "")


@pytest.mark.parametrize(("changes", "words"), [
    ({"checkpoint": ""}, "left no checkpoint"),
    ({"checkpoint_xml": "<other/>"}, "left no checkpoint"),
    ({"checkpoint_xml": "not XML"}, "left no checkpoint"),
    ({"checkpoint": "theirs"}, "is not the checkpoint"),
    ({"checkpoint": checkpoint_prefix("elsewhere") + RUN}, "is not the checkpoint"),
    ({"capture": "another"}, "is not the checkpoint"),
    ({"sizes": {}}, "added"),
    ({"sizes": {"vda": SIZE // 2}}, "resized"),
])
def test_an_anchor_that_does_not_fit(path: Path, changes: Mapping[str, object], words: str) -> None:
    assert words in note(path, GOOD, **changes)


@pytest.mark.parametrize(("bitmaps", "words"), [
    ((), "is lost"),
    ((QemuBitmap("another", usable=True, inconsistent=False),), "is lost"),
    ((QemuBitmap(NAME, usable=False, inconsistent=True),), "inconsistent"),
    ((QemuBitmap(NAME, usable=False, inconsistent=False),), "does not record"),
])
def test_a_bitmap_that_is_no_use(path: Path, bitmaps: tuple[QemuBitmap, ...], words: str) -> None:
    assert words in note(path, *bitmaps)


def test_another_file_under_the_same_name(path: Path) -> None:
    anchor = anchor_of(path)
    aside = path.with_name("aside")
    path.rename(aside)
    path.touch()
    (choice,) = choose_disks((disk_of(path),), view_of(path, GOOD), "there", anchor)
    assert "another image" in choice.note


def test_names_of_ours() -> None:
    assert is_our_name(checkpoint_prefix("/backups/web") + "20261128T031415926535-0d722b9d")
    for theirs in ("backup-vda", "virtnbdbackup.1", "stillframe-nightly", "my-" + checkpoint_prefix("x")):
        assert not is_our_name(theirs)


def test_disks_that_keep_no_bitmap(path: Path) -> None:
    view = view_of(path, compat="0.10")
    assert "version 2" in bitmap_reasons(view)["vda"]
    (choice,) = choose_disks((disk_of(path),), view, "there", anchor_of(path))
    assert not choice.keeps
    assert not choice.counts
    raw = msgspec.structs.replace(disk_of(path), base_format="raw")
    assert raw.base_format == "raw"


def test_the_xml_of_a_job_names_a_mode_and_a_scratch_file_for_every_disk() -> None:
    text = pull_xml("/s", [PulledDisk("vda", "/a", NAME), PulledDisk("vdb", "/b")], ["vdc"])
    assert job_socket(text) == "/s"
    assert job_socket("") == ""
    disks = {disk.get("name"): disk for disk in ET.fromstring(text).iter("disk")}
    assert disks["vda"].get("incremental") == NAME
    assert disks["vdb"].get("backupmode") == "full"
    assert disks["vdb"].get("incremental") is None
    assert all(disks[name].get("type") == "file" for name in ("vda", "vdb"))
    assert [each.get("file") for each in ET.fromstring(text).iter("scratch")] == ["/a", "/b"]
    assert disks["vdc"].get("backup") == "no"


def test_a_checkpoint_is_read_back_and_defined_again_for_some_disks() -> None:
    text = checkpoint_xml("n", ["vda", "vdb"], ["vdc"], {"vda": "mark"})
    text = text.replace("<disks>", "<parent><name>p</name></parent><disks>")
    found = read_checkpoint_xml(text)
    assert found is not None
    assert (found.name, found.targets) == ("n", ("vda", "vdb"))
    assert found.about == {"vda": "mark"}
    assert read_about("a person's own words") == {}
    again = redefinition(text, ["vda"], [])
    assert read_checkpoint_xml(again) is not None
    assert "<parent>" not in again
    assert [disk.get("checkpoint") for disk in ET.fromstring(again).iter("disk")] == ["bitmap", "no", "no"]
    assert "<parent>" in redefinition(text, ["vda"], ["p"])
