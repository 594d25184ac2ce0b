"""A snapshot's definition for the guest that it is restored over: the same one, or another."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import msgspec

from stillframe.hypervisor.domain_xml import nvram_file, read_domain_xml
from stillframe.restore.definition import same_identity
from stillframe.restore.definition_in_place import definition_in_place
from tests.unit.test_definition import GUEST
from tests.unit.test_whole_guest import manifest

_UUID = same_identity(GUEST).uuid
_OTHER_UUID = "99999999-2222-4333-8444-555555555555"
_NVRAM = "<nvram template='/old/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/shop_VARS.fd</nvram>"
_OWN_NVRAM = "<nvram type='file'><source file='/srv/own.fd'/></nvram>"
#: The guest has one interface less than the snapshot's definition.
_OWN_MAC = "52:54:00:cc:cc:cc"
_OWN_INTERFACE = f"<interface type='bridge'><mac address='{_OWN_MAC}'/></interface>"


def made(now: str, snapshot: str = GUEST, live: str = "") -> ET.Element:
    taken = msgspec.structs.replace(manifest(), uuid=_UUID, inactive_xml=snapshot, live_xml=live)
    return ET.fromstring(definition_in_place(taken, read_domain_xml(now), random.Random(1)))


def defined(name: str, uuid: str, nvram: str) -> str:
    head, interface = GUEST.index("<interface"), GUEST.rindex("</interface>") + len("</interface>")
    text = GUEST[:head] + _OWN_INTERFACE + GUEST[interface:]
    text = text.replace("shop</name>", f"{name}</name>").replace(_UUID, uuid).replace(_NVRAM, nvram)
    return text.replace("/images/", "/own/").replace("1048576", "2097152")


def test_the_same_guest_keeps_its_name_and_where_its_files_are() -> None:
    root = made(defined("renamed", _UUID, _OWN_NVRAM))
    assert root.findtext("name") == "renamed"
    assert root.findtext("memory") == "1048576"
    assert nvram_file(root) == "/srv/own.fd"
    assert same_identity(ET.tostring(root, encoding="unicode")) == same_identity(GUEST)
    disks = read_domain_xml(ET.tostring(root, encoding="unicode"))
    assert disks.disks["vda"].top.place == "/own/shop.qcow2"
    # What is never captured, and what a guest can't share, is the guest's own still.
    assert disks.bystanders["vdc"].top.place == "/images/shared"
    assert root.find("devices/graphics[@port='5907']") is not None


def test_a_guest_without_nvram_gets_it_where_the_snapshot_had_it() -> None:
    assert nvram_file(made(defined("shop", _UUID, ""))) == "/var/lib/libvirt/qemu/nvram/shop_VARS.fd"
    # libvirt chose the place when that guest was started.
    root = made(defined("shop", _UUID, ""), GUEST.replace(_NVRAM, ""), GUEST)
    assert nvram_file(root) == "/var/lib/libvirt/qemu/nvram/shop_VARS.fd"
    assert nvram_file(made(defined("shop", _UUID, _OWN_NVRAM), GUEST.replace(_NVRAM, ""))) is None


def test_another_guest_takes_nothing_that_is_the_originals() -> None:
    root = made(defined("web2", _OTHER_UUID, _OWN_NVRAM))
    text = ET.tostring(root, encoding="unicode")
    assert (root.findtext("name"), root.findtext("uuid")) == ("web2", _OTHER_UUID)
    assert nvram_file(root) == "/srv/own.fd"
    own, fresh = same_identity(text).macs
    assert own == _OWN_MAC
    assert fresh not in same_identity(GUEST).macs
    for theirs in ("/images/", "shop_VARS.fd", "5907", "tapshop", "control.sock", _UUID):
        assert theirs not in text
    assert read_domain_xml(text).disks["vda"].top.place == "/own/shop.qcow2"
    assert nvram_file(made(defined("web2", _OTHER_UUID, ""))).endswith("/web2_VARS.fd")  # type: ignore[union-attr]


def test_a_snapshot_without_a_definition_has_none_to_give() -> None:
    taken = msgspec.structs.replace(manifest(), uuid=_UUID)
    assert definition_in_place(taken, read_domain_xml(GUEST), random.Random(1)) == ""
