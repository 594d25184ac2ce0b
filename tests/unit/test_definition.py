"""Definitions made over for another place, and what a host lacks for them."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from stillframe.restore.definition import (
    Identity,
    NewDisk,
    Place,
    block_disk,
    domain_for,
    file_disk,
    new_identity,
    same_identity,
)
from stillframe.restore.host_check import Finding, HostFacts, accept, lacking

GUEST = """\
<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>shop</name>
  <uuid>11111111-2222-4333-8444-555555555555</uuid>
  <genid>0d1f6a3e-0000-4000-8000-000000000000</genid>
  <memory unit='KiB'>1048576</memory>
  <sysinfo type='smbios'><system><entry name='uuid'>11111111-2222-4333-8444-555555555555</entry></system></sysinfo>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-9.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/old/OVMF_CODE.fd</loader>
    <nvram template='/old/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/shop_VARS.fd</nvram>
  </os>
  <cpu mode='custom' match='exact'><model fallback='forbid'>GraniteRapids</model><topology sockets='1' cores='2' threads='1'/></cpu>
  <devices>
    <emulator>/opt/qemu/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' io='native'/>
      <source file='/images/shop.qcow2' index='3'/>
      <backingStore type='file' index='4'><format type='raw'/><source file='/images/gold.img'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>ROOT</serial>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/>
      <source dev='/dev/vg/data'/>
      <mirror type='file' job='copy'><source file='/elsewhere'/></mirror>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'><source file='/images/shared'/><target dev='vdc' bus='virtio'/><shareable/></disk>
    <disk type='file' device='cdrom'><source file='/iso/setup.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
    <interface type='network'>
      <mac address='52:54:00:aa:aa:aa'/><source network='lan' portid='x' bridge='virbr7'/>
      <target dev='vnet5'/><model type='virtio'/>
    </interface>
    <interface type='bridge'><mac address='52:54:00:bb:bb:bb'/><source bridge='br9'/><target dev='tapshop'/></interface>
    <serial type='file'><source path='/var/log/shop.log'/><target port='0'/><alias name='serial0'/></serial>
    <console type='pty' tty='/dev/pts/3'><source path='/dev/pts/3'/><target type='serial' port='0'/></console>
    <channel type='unix'>
      <source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-7-shop/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
    </channel>
    <channel type='unix'>
      <source mode='bind' path='/srv/shop/control.sock'/>
      <target type='virtio' name='com.example.control'/>
    </channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <graphics type='vnc' port='5907' autoport='no' websocket='5700'><listen type='address' address='127.0.0.1'/></graphics>
    <disk type='file' device='floppy'><target dev='fda'/></disk>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-1111</label></seclabel>
  <qemu:commandline><qemu:arg value='-no-hpet'/></qemu:commandline>
</domain>
"""  # noqa: E501 -- as libvirt writes it

_DISKS = {"vda": file_disk("/pool/new vda.qcow2", "qcow2"), "vdb": block_disk("/dev/vg/new")}


def place(**more: object) -> Place:
    identity = new_identity(GUEST, random.Random(1))
    return replace(Place("shop-2", identity, _DISKS, nvram="/nvram/shop-2.fd"), **more)  # type: ignore[arg-type]


def made(**more: object) -> ET.Element:
    return ET.fromstring(domain_for(GUEST, place(**more)))


def test_a_copy_is_another_guest() -> None:
    root = made()
    identity = place().identity
    assert root.findtext("name") == "shop-2"
    assert root.findtext("uuid") == root.findtext("sysinfo/system/entry") == identity.uuid
    assert [mac.get("address") for mac in root.iter("mac")] == list(identity.macs)
    assert not {*identity.macs, identity.uuid} & {*same_identity(GUEST).macs, same_identity(GUEST).uuid}
    assert all(mac.startswith("52:54:00:") for mac in identity.macs)
    assert root.findtext("genid") == ""
    assert root.get("id") is None


def test_a_socket_that_was_named_stays_the_originals() -> None:
    def sockets(root: ET.Element) -> list[str | None]:
        return [source.get("path") for source in root.iterfind("devices/channel/source")]

    assert sockets(made()) == []
    original = made(name="shop", identity=same_identity(GUEST), is_original=True)
    assert sockets(original) == ["/srv/shop/control.sock"]  # the agent's is by the number of that run


def test_the_original_keeps_what_tells_it_from_others() -> None:
    root = made(name="shop", identity=same_identity(GUEST), is_original=True)
    assert root.findtext("uuid") == "11111111-2222-4333-8444-555555555555"
    assert [mac.get("address") for mac in root.iter("mac")] == ["52:54:00:aa:aa:aa", "52:54:00:bb:bb:bb"]
    graphics = root.find("devices/graphics")
    assert graphics is not None
    assert graphics.get("port") == "5907"
    serial = root.find("devices/serial/source")
    assert serial is not None
    assert serial.get("path") == "/var/log/shop.log"


def test_disks_are_the_new_ones_and_nothing_of_the_old_host_stays() -> None:
    root = made()
    text = ET.tostring(root, encoding="unicode")
    for gone in ("/images/", "/dev/vg/data", "/elsewhere", "<alias", "index=", "domain-7", "vnet5", "virbr7",
                 "portid", "/dev/pts", "libvirt-1111", "tapshop", "5907", "5700", "shop.log", "seclabel"):
        assert gone not in text
    disks = {disk.find("target").get("dev"): disk for disk in root.iterfind("devices/disk")}  # type: ignore[union-attr]
    assert set(disks) == {"vda", "vdb", "sda", "fda"}  # a shared disk is in no snapshot
    vda = disks["vda"]
    assert vda.find("source").get("file") == "/pool/new vda.qcow2"  # type: ignore[union-attr]
    assert [child.tag for child in vda] == ["driver", "source", "backingStore", "target", "serial", "address"]
    assert vda.find("driver").attrib == {  # type: ignore[union-attr]
        "name": "qemu", "type": "qcow2", "cache": "none", "io": "native"}
    assert disks["vdb"].find("source").get("dev") == "/dev/vg/new"  # type: ignore[union-attr]
    assert disks["sda"].find("source").get("file") == "/iso/setup.iso"  # type: ignore[union-attr]


def test_a_medium_is_ejected() -> None:
    root = made(ejected=("sda",))
    assert root.find("devices/disk[@device='cdrom']/source") is None
    assert root.find("devices/disk[@device='cdrom']/target") is not None


def test_a_disk_on_a_server_with_something_beneath() -> None:
    chain = NewDisk("file", "qcow2", "<source file='/o'/>",
                    "<backingStore type='network'><format type='raw'/></backingStore>")
    root = made(disks={"vda": chain})
    backing = root.find("devices/disk/backingStore")
    assert backing is not None
    assert backing.get("type") == "network"


def test_networks() -> None:
    assert made(network="").find("devices/interface") is None
    for interface in made(network="lab").iterfind("devices/interface"):
        assert interface.get("type") == "network"
        assert [source.attrib for source in interface.findall("source")] == [{"network": "lab"}]


def test_firmware_and_boot_files() -> None:
    root = made(files={"/old/OVMF_CODE.fd": "/new/CODE.fd"})
    assert root.findtext("os/loader") == "/new/CODE.fd"
    assert root.findtext("os/nvram") == "/nvram/shop-2.fd"


def test_what_qemu_is_told_directly_stays() -> None:
    assert "-no-hpet" in domain_for(GUEST, place())
    assert "xmlns:qemu=" in domain_for(GUEST, place())


CAPABILITIES = """\
<capabilities><guest><os_type>hvm</os_type><arch name='x86_64'><emulator>/usr/bin/qemu-system-x86_64</emulator>
<machine>pc-q35-7.2</machine><machine>pc-q35-7.10</machine><machine>pc-i440fx-7.2</machine><domain type='qemu'/></arch></guest>
</capabilities>"""  # noqa: E501
DOMAIN_CAPABILITIES = """\
<domainCapabilities>
<os supported='yes'><enum name='firmware'><value>efi</value></enum><loader supported='yes'>
<value>/usr/share/OVMF/CODE.fd</value></loader></os><cpu><mode name='maximum' supported='yes'/>
<mode name='custom' supported='yes'><model usable='yes'>qemu64</model></mode></cpu></domainCapabilities>"""
HOST = HostFacts(CAPABILITIES, frozenset({"default"}), lambda path: path.startswith("/usr/"),
                 lambda *_asked: DOMAIN_CAPABILITIES)


def test_what_the_host_lacks_is_found_with_the_nearest_choice() -> None:
    found = {(each.what, each.named): each for each in lacking(domain_for(GUEST, place()), HOST)}
    assert {key: each.nearest for key, each in found.items()} == {
        ("virt-type", "kvm"): "qemu",
        ("emulator", "/opt/qemu/qemu-system-x86_64"): "/usr/bin/qemu-system-x86_64",
        ("machine", "pc-q35-9.2"): "pc-q35-7.10", ("cpu", "GraniteRapids"): "maximum",
        ("network", "lan"): "default", ("bridge", "br9"): "default", ("medium", "sda"): ""}
    assert not found["medium", "sda"].is_fatal


def test_what_was_accepted_is_lacking_no_more() -> None:
    accepted = accept(place(), lacking(domain_for(GUEST, place()), HOST))
    assert lacking(domain_for(GUEST, accepted), HOST) == []


def test_a_firmware_that_is_named_by_its_file() -> None:
    text = domain_for(GUEST.replace("<os firmware='efi'>", "<os>"), place())
    assert Finding("firmware", "/old/OVMF_CODE.fd", "/usr/share/OVMF/CODE.fd") in lacking(text, HOST)


def test_a_log_file_whose_folder_is_not_there_becomes_a_terminal() -> None:
    original = place(name="shop", identity=same_identity(GUEST), is_original=True)
    found = [each for each in lacking(domain_for(GUEST, original), HOST) if each.what == "folder"]
    assert [(each.named, each.is_fatal) for each in found] == [("/var/log/shop.log", False)]
    root = ET.fromstring(domain_for(GUEST, accept(original, found)))
    serials = root.findall("devices/serial")
    assert [(serial.get("type"), serial.find("source")) for serial in serials] == [("pty", None)]


def test_another_architecture_is_all_that_is_said() -> None:
    (only,) = lacking(domain_for(GUEST.replace("x86_64", "aarch64"), place()), HOST)
    assert only.what == "architecture"
    assert only.is_fatal
    assert not only.nearest


@pytest.mark.parametrize("path", ["kernel", "initrd", "dtb"])
def test_boot_files_that_are_not_there(path: str) -> None:
    text = GUEST.replace("<nvram", f"<{path}>/boot/own</{path}><nvram")
    assert Finding("file", "/boot/own") in lacking(domain_for(text, place()), HOST)


def test_identities_differ() -> None:
    assert new_identity(GUEST, random.Random(1)) != new_identity(GUEST, random.Random(2))
    assert isinstance(new_identity(GUEST, random.Random(3)), Identity)
