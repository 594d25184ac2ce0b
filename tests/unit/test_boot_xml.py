"""Definitions of booted guests: what is below an overlay is named, kept named, and taken out."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from stillframe.hypervisor.domain_xml import read_domain_xml
from stillframe.hypervisor.model import BOOT_SOCKETS
from stillframe.repository.manifest import Content
from stillframe.restore.boot_decide import Stand
from stillframe.restore.boot_record import BootDisk
from stillframe.restore.boot_server import socket_of
from stillframe.restore.boot_xml import (
    kept_on_snapshot,
    on_image_alone,
    policies_of,
    stand_of,
    with_policies,
    with_snapshot,
)
from stillframe.restore.definition import Identity, Place, domain_for, file_disk

_UUID = "bb680c73-133e-4fb6-b245-9c9802a346e9"
_TEXT = f"""<domain type='qemu'><name>web</name><uuid>{_UUID}</uuid><devices>
<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none' error_policy='enospace'/>
<source dev='/dev/vg/web'/><target dev='vda' bus='virtio'/></disk></devices></domain>"""
_DISK = BootDisk(
    target="vda", overlay_path="/pool/b1-vda.qcow2", socket=socket_of(_UUID, "vda"),
    content=Content(size_bytes=1024, root=None), data_bytes=0, policies=policies_of(_TEXT, "vda"))


def booted() -> str:
    place = Place("b1", Identity(_UUID, ()), {"vda": file_disk(_DISK.overlay_path, "qcow2")})
    return with_policies(with_snapshot(domain_for(_TEXT, place), [_DISK]), [_DISK], pauses=True)


def stand(text: str) -> Stand:
    return stand_of(read_domain_xml(text).disks.get("vda"), _DISK)


def driver(text: str) -> dict[str, str]:
    found = ET.fromstring(text).find("devices/disk/driver")
    assert found is not None
    return found.attrib


def test_a_booted_guest_stands_on_its_snapshot_and_is_paused_on_errors() -> None:
    assert stand(booted()) is Stand.SNAPSHOT
    assert driver(booted())["error_policy"] == driver(booted())["rerror_policy"] == "stop"
    assert driver(booted())["cache"] == "none"
    assert read_domain_xml(booted()).disks["vda"].top.place == _DISK.overlay_path


def test_it_gets_errors_where_that_was_asked_for() -> None:
    text = with_policies(booted(), [_DISK], pauses=False)
    assert driver(text)["error_policy"] == driver(text)["rerror_policy"] == "report"


def test_a_kept_definition_names_the_overlay_by_another_text_than_the_running_guest() -> None:
    names = {"vda": _DISK.overlay_path}
    kept = kept_on_snapshot(booted(), [_DISK], names)
    other = read_domain_xml(kept).disks["vda"].top.place
    assert other != _DISK.overlay_path
    assert stand(kept) is Stand.SNAPSHOT
    again = kept_on_snapshot(kept, [_DISK], {"vda": other})
    assert read_domain_xml(again).disks["vda"].top.place == _DISK.overlay_path
    assert stand(again) is Stand.SNAPSHOT


def test_a_landed_guest_has_its_own_policies_and_nothing_below() -> None:
    for text in (booted(), kept_on_snapshot(booted(), [_DISK], {"vda": _DISK.overlay_path})):
        landed = on_image_alone(text, [_DISK])
        assert stand(landed) is Stand.WHOLE
        assert driver(landed)["error_policy"] == "enospace"
        assert "rerror_policy" not in driver(landed)
        assert read_domain_xml(landed).disks["vda"].top.place == _DISK.overlay_path


def test_another_image_is_told_from_the_overlay() -> None:
    assert stand(booted().replace("b1-vda", "c1-vda")) is Stand.OTHER
    assert stand(booted().replace("vda'", "vdb'").replace('vda"', 'vdb"')) is Stand.NONE


def test_every_socket_has_a_path_that_a_socket_may_have() -> None:
    longest = socket_of(_UUID, "x" * 40)
    assert len(longest) < 108
    assert longest.startswith(f"{BOOT_SOCKETS}/")
