"""Drills' records: names, what a prune drops; what a drilled guest's definition lacks; pictures."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from stillframe.errors import RepositoryDamaged
from stillframe.repository.crypto import DomainKey
from stillframe.repository.drills import (
    CheckResult,
    Drill,
    DrillName,
    drill_name,
    last_drills,
    list_drills,
    outdated,
    read_drill,
    record_drill,
)
from stillframe.repository.layout import Parameters, SnapshotName
from stillframe.repository.manifest import Content
from stillframe.repository.opened import Repository
from stillframe.repository.slots import SlotCodec
from stillframe.restore.boot_record import BootDisk
from stillframe.restore.drill_screen import as_png
from stillframe.restore.drill_xml import has_agent, isolated, reaches_beyond
from stillframe.storage.memory import MemoryStorage

T0 = datetime(2026, 11, 28, 8, 0, 0, 42, tzinfo=UTC)
SID, OTHER = "ab" * 16, "cd" * 16
DRILL = Drill(
    sid=SID, guest="a/web", host="h1", uuid="u", captured_at="c", drilled_on="h2", began_at="b", ended_at="e",
    passed=False, reason="no", waited_for=("agent",), boot_s=None,
    checks=(CheckResult("true", 0, "", 0.1), CheckResult("x", None, "late", 5.0)), warnings=(), console="…",
    screenshot=b"\x89PNG", screenshot_note="", stillframe="1")


def name(guest: str = "web", minutes: int = 0, sid: str = SID, *, passed: bool = True) -> DrillName:
    return DrillName("h1", guest, T0 + timedelta(minutes=minutes), sid, passed)


def test_a_name_is_its_key() -> None:
    for each in (name(), name("../a b", passed=False), replace(name(), utc=T0.replace(microsecond=0))):
        assert drill_name(each.key) == each
    good = name().key
    for key in ("main/d/h1/web/20261128T080000.000042Z-ab-passed", f"{good}x", f"{good[:-6]}maybe"):
        with pytest.raises(ValueError, match="not a drill's key"):
            drill_name(key)


def test_a_record_is_sealed_to_its_name() -> None:
    key, parameters = DomainKey.new(), Parameters("id", "now")
    storage = MemoryStorage()
    repository = Repository(storage, parameters, key, SlotCodec(key, parameters))
    written = record_drill(repository, T0, DRILL)
    assert list_drills(storage) == [written]
    assert read_drill(storage, written, key) == DRILL
    assert [check.passed for check in DRILL.checks] == [True, False]
    # Whoever renames a failed drill to a passed one does not get far.
    forged = replace(written, passed=True)
    storage.create(forged.key, storage.get(written.key))
    with pytest.raises(RepositoryDamaged):
        read_drill(storage, forged, key)


def test_the_last_drill_of_each_guest() -> None:
    drills = [name(minutes=2), name(minutes=5, sid=OTHER), name("db", 1)]
    assert last_drills(drills) == {("h1", "web"): drills[1], ("h1", "db"): drills[2]}


def test_a_prune_keeps_drills_of_snapshots_and_the_newest_of_each_guest() -> None:
    snapshots = [SnapshotName("h1", "web", T0, SID)]
    kept = [name(minutes=1), name(minutes=3, sid=OTHER)]
    dropped = [name(minutes=2, sid=OTHER), name("gone", 4, OTHER)]
    assert outdated([*kept, *dropped], snapshots) == dropped
    assert outdated([*kept, *dropped], []) == [*kept, *dropped]


DOMAIN = """<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>drill-web</name>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>
<source file='/run/x/vda.qcow2'/><target dev='vda' bus='virtio'/></disk>
<interface type='network'><source network='lan'/></interface>
<hostdev mode='subsystem' type='pci'/><filesystem type='mount'/><vsock model='virtio'/><shmem name='x'/>
<tpm model='tpm-crb'><backend type='passthrough'/></tpm>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<serial type='pty'><log file='/var/log/web'/><target port='0'/></serial>
<console type='pty'><target type='serial' port='0'/></console>
<console type='pty'><target type='virtio'/></console>
<graphics type='vnc' port='5901' autoport='no' listen='0.0.0.0'>
<listen type='address' address='0.0.0.0'/></graphics>
</devices><qemu:commandline><qemu:arg value='-netdev'/></qemu:commandline></domain>"""
DISK = BootDisk(target="vda", overlay_path="", socket="/run/d/vda", content=Content(size_bytes=1, root=None),
                data_bytes=0)


def test_a_drilled_guest_has_no_way_out() -> None:
    text, left_out = isolated(DOMAIN, [DISK], "/run/d/console", "")
    root = ET.fromstring(text)
    for tag in ("interface", "hostdev", "filesystem", "vsock", "shmem", "tpm"):
        assert root.find(f"devices/{tag}") is None, tag
        assert any(words.startswith(tag) for words in left_out), tag
    assert "commandline" not in text
    graphics = root.find("devices/graphics")
    assert graphics is not None
    assert graphics.attrib == {"type": "vnc"}
    assert [listen.attrib for listen in graphics] == [{"type": "socket"}]
    source, driver = root.find("devices/disk/source"), root.find("devices/disk/driver")
    assert source is not None
    assert driver is not None
    assert source.attrib == {"protocol": "nbd", "name": "vda"}
    assert "/run/x" not in text
    # An I/O error must stop it: else a kernel that goes on without a file would pass.
    assert driver.get("type") == "raw"
    assert (driver.get("error_policy"), driver.get("rerror_policy")) == ("stop", "stop")
    serial = root.find("devices/serial")
    assert serial is not None
    assert [(child.tag, child.attrib) for child in serial] == [
        ("source", {"path": "/run/d/console"}), ("target", {"port": "0"})]
    targets = [target.get("type") for target in root.iterfind("devices/console/target")]
    assert targets == ["virtio"]
    assert has_agent(text)


def test_interfaces_stay_on_an_isolated_network() -> None:
    text, _ = isolated(DOMAIN, [DISK], "/run/d/console", "drills")
    assert ET.fromstring(text).find("devices/interface") is not None
    assert not reaches_beyond("<network><name>n</name><bridge name='b'/></network>")
    assert reaches_beyond("<network><name>n</name><forward mode='nat'/></network>")


def test_a_guest_without_a_serial_port_gets_one_and_without_an_agent_is_known() -> None:
    bare = "<domain><devices><disk><target dev='vda'/></disk></devices></domain>"
    text, _ = isolated(bare, [DISK], "/c", "")
    source = ET.fromstring(text).find("devices/serial/source")
    assert source is not None
    assert source.get("path") == "/c"
    assert not has_agent(text)


def test_a_pixmap_becomes_a_png() -> None:
    pixels = bytes(range(18))
    png = as_png("image/x-portable-pixmap", b"P6\n3 2\n255\n" + pixels)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (3, 2)
    at = png.index(b"IDAT")
    length, = struct.unpack(">I", png[at - 4 : at])
    assert zlib.decompress(png[at + 4 : at + 4 + length]) == b"\0" + pixels[:9] + b"\0" + pixels[9:]
    assert as_png("image/png", b"as it is") == b"as it is"
    for bad in (b"P6\n3 2\n255\n" + pixels[1:], b"P5\n3 2\n255\n", b""):
        with pytest.raises(ValueError, match="picture"):
            as_png("image/x-portable-pixmap", bad)
