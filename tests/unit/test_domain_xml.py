"""Domain XML as libvirt writes it, read and changed."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from stillframe.errors import NeedsAttention
from stillframe.hypervisor.domain_xml import read_domain_xml, snapshot_xml, with_source
from stillframe.hypervisor.model import Disk, Source

_AGENT = """<channel type='unix'>
      <source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-1-g/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
      <address type='virtio-serial' controller='0' bus='0' port='1'/>
    </channel>"""

#: Live XML, as `virsh dumpxml` shows it.
_FILE = """<disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
      <source file='/images/g-vda.img' index='1'/>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>"""
_CHAIN = """<disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/images/top.qcow2' index='4'/>
      <backingStore type='file' index='2'>
        <format type='qcow2'/>
        <source file='/images/mid.qcow2'/>
        <backingStore type='block' index='1'>
          <format type='raw'/>
          <source dev='/dev/vg/base'/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>"""
_COMMITTING = """<disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/images/g-vda.stillframe-overlay.qcow2' index='3'/>
      <backingStore type='file' index='1'>
        <format type='raw'/>
        <source file='/images/g-vda.img'/>
        <backingStore/>
      </backingStore>
      <mirror type='file' job='active-commit'{ready}>
        <format type='raw'/>
        <source file='/images/g-vda.img' index='1'/>
      </mirror>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>"""
_BLOCK = """<disk type='block' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native'/>
      <source dev='/dev/vg/g' index='2'/>
      <backingStore/>
      <target dev='sda' bus='scsi'/>
      <alias name='scsi0-0-0-0'/>
    </disk>"""
_NBD_UNIX = """<disk type='network' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source protocol='nbd' name='export one' index='2'>
        <host transport='unix' socket='/run/nbd.sock'/>
        <reconnect delay='10'/>
      </source>
      <target dev='vdb' bus='virtio'/>
      <alias name='virtio-disk1'/>
    </disk>"""
_NBD_TCP = """<disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='nbd' name='disk' tls='no'><host name='10.0.0.1' port='10810'/></source>
      <target dev='vdb' bus='virtio'/>
    </disk>"""
_RBD = """<disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <auth username='libvirt'><secret type='ceph' uuid='2ec115d7-3a88-3ceb-bc12-0ac909a6fd87'/></auth>
      <source protocol='rbd' name='pool/image' index='1'>
        <host name='mon1' port='6789'/>
        <host name='mon2' port='6790'/>
      </source>
      <target dev='vdc' bus='virtio'/>
      <alias name='virtio-disk2'/>
    </disk>"""


def disk_xml(target: str, inside: str, kind: str = "file", device: str = "disk") -> str:
    return f"<disk type='{kind}' device='{device}'><target dev='{target}' bus='virtio'/>{inside}</disk>"


def domain_xml(*disks: str, rest: str = "") -> str:
    devices = "\n    ".join((*disks, rest))
    return f"""<domain type='qemu' id='1'>
  <name>g</name>
  <uuid>8b2e3b8e-0d2d-4a0c-9d7e-6f1f6f3c1a11</uuid>
  <metadata><app:info xmlns:app='http://example.org/app' kept='yes'/></metadata>
  <memory unit='KiB'>1048576</memory>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {devices}
  </devices>
</domain>
"""


def only_disk(text: str) -> Disk:
    (disk,) = read_domain_xml(domain_xml(text)).disks.values()
    return disk


# --- Reading ----------------------------------------------------------------------------------


def test_name_uuid_text_and_agent() -> None:
    text = domain_xml(_FILE, rest=_AGENT)
    found = read_domain_xml(text)
    assert (found.name, found.uuid, found.text) == ("g", "8b2e3b8e-0d2d-4a0c-9d7e-6f1f6f3c1a11", text)
    assert found.has_agent_channel
    assert not read_domain_xml(domain_xml(_FILE)).has_agent_channel
    other = _AGENT.replace("org.qemu.guest_agent.0", "com.redhat.spice.0")
    assert not read_domain_xml(domain_xml(_FILE, rest=other)).has_agent_channel


def test_a_file_disk_of_a_running_domain() -> None:
    disk = only_disk(_FILE)
    assert (disk.target, disk.alias, disk.mirror) == ("vda", "virtio-disk0", None)
    (top,) = disk.chain
    assert (top.kind, top.format, top.place, top.index) == ("file", "raw", "/images/g-vda.img", 1)
    assert top.key == "file:/images/g-vda.img"


def test_a_file_disk_of_a_domain_that_is_off_has_no_index() -> None:
    off = _FILE.replace(" index='1'", "").replace("<backingStore/>", "").replace(
        "<alias name='virtio-disk0'/>", "")
    disk = only_disk(off)
    assert (disk.alias, disk.top.index) == ("", -1)
    assert disk.top.key == only_disk(_FILE).top.key


def test_a_chain_is_read_from_top_to_bottom_with_its_indexes() -> None:
    seen = [(each.kind, each.format, each.place, each.index) for each in only_disk(_CHAIN).chain]
    assert seen == [
        ("file", "qcow2", "/images/top.qcow2", 4),
        ("file", "qcow2", "/images/mid.qcow2", 2),
        ("block", "raw", "/dev/vg/base", 1),
    ]


def test_whether_a_chain_is_said_to_end() -> None:
    assert only_disk(_CHAIN).ends
    assert only_disk(_FILE).ends
    assert not only_disk(_FILE.replace("<backingStore/>", "")).ends
    assert not only_disk(_CHAIN.replace("<backingStore/>", "")).ends


@pytest.mark.parametrize(("ready", "expected"), [
    ("", False), (" ready='yes'", True), (" ready='abort'", False),
])
def test_a_mirror_element_is_a_job_and_no_part_of_the_chain(ready: str, expected: bool) -> None:
    disk = only_disk(_COMMITTING.format(ready=ready))
    assert disk.mirror is not None
    assert (disk.mirror.job, disk.mirror.ready) == ("active-commit", expected)
    assert [each.place for each in disk.chain] == [
        "/images/g-vda.stillframe-overlay.qcow2", "/images/g-vda.img"]


def test_a_mirror_element_without_a_job_is_still_one() -> None:
    disk = only_disk(_COMMITTING.format(ready="").replace("job='active-commit'", "job=''"))
    assert disk.mirror is not None
    assert disk.mirror.job == ""


def test_a_block_device() -> None:
    top = only_disk(_BLOCK).top
    assert (top.kind, top.format, top.place, top.index) == ("block", "raw", "/dev/vg/g", 2)


def test_nbd_by_unix_socket() -> None:
    top = only_disk(_NBD_UNIX).top
    assert (top.kind, top.protocol, top.format) == ("network", "nbd", "qcow2")
    assert (top.socket, top.host, top.port, top.export) == ("/run/nbd.sock", "", 0, "export one")
    assert top.place == "nbd:///run/nbd.sock/export one"


def test_nbd_by_tcp() -> None:
    top = only_disk(_NBD_TCP).top
    assert (top.socket, top.host, top.port, top.export) == ("", "10.0.0.1", 10810, "disk")
    assert top.place == "nbd://10.0.0.1:10810/disk"
    elsewhere = only_disk(_NBD_TCP.replace("10810", "10811")).top
    assert elsewhere.key != top.key


def test_rbd_names_its_first_monitor_and_keeps_the_others_in_its_source() -> None:
    top = only_disk(_RBD).top
    assert (top.protocol, top.host, top.port, top.export) == ("rbd", "mon1", 6789, "pool/image")
    assert "mon2" in top.xml


@pytest.mark.parametrize("part", [
    "<auth username='libvirt'><secret type='ceph' usage='x'/></auth>",
    "<encryption format='luks'><secret type='passphrase' usage='x'/></encryption>",
])
def test_what_belongs_to_the_source_is_read_with_it_wherever_it_stands(part: str) -> None:
    """libvirt drops it from the disk once the overlay is the disk's source."""
    name = part[1:].split(maxsplit=1)[0]
    for inside in (f"<source file='/a'/>{part}", f"<source file='/a'>{part}</source>"):
        top = only_disk(disk_xml("vda", inside)).top
        assert top.xml.count(f"<{name} ") == 1
        gone = changed(domain_xml(disk_xml("vda", "<source file='/overlay'/>")), "vda", top)
        stayed = changed(domain_xml(disk_xml("vda", f"<source file='/overlay'/>{part}")), "vda", top)
        for disk in (gone, stayed):
            assert disk.find(name) is None
            assert disk.find(f"source/{name}/secret") is not None


@pytest.mark.parametrize(("text", "reason"), [
    (disk_xml("sda", "<source file='/iso'/><readonly/>", device="cdrom"), "it is a cdrom"),
    (disk_xml("fda", "<source file='/fd'/>", device="floppy"), "it is a floppy"),
    (disk_xml("sdb", "<source dev='/dev/sdx'/>", "block", "lun"), "it is a lun"),
    (disk_xml("vdb", "<source file='/a'/><readonly/>"), "it is readonly"),
    (disk_xml("vdc", "<source file='/a'/><shareable/>"), "it is shareable"),
    (disk_xml("vdd", "<source file='/a'/><transient/>"), "it is transient"),
    (disk_xml("vde", ""), "it has no image"),
    (disk_xml("vdf", "<source pool='p' volume='v'/>", "volume"), "disks of type volume are not supported"),
    (disk_xml("vdg", "<source type='pci'/>", "nvme"), "disks of type nvme are not supported"),
])
def test_a_disk_that_is_left_out_and_why(text: str, reason: str) -> None:
    found = read_domain_xml(domain_xml(_FILE, text))
    assert list(found.disks) == ["vda"]
    (excluded,) = found.excluded
    assert excluded.reason == reason
    # What it names counts all the same: it may be another guest's backing file.
    assert list(found.bystanders) == ([excluded.target] if "<source" in text else [])


def test_a_bystander_shows_the_image_it_uses() -> None:
    found = read_domain_xml(domain_xml(disk_xml("sda", "<source file='/iso'/>", device="cdrom")))
    assert found.bystanders["sda"].top.place == "/iso"


# --- Writing ----------------------------------------------------------------------------------


def overlaid(base: str) -> str:
    """The same disk on an overlay, as inactive XML has it after a snapshot."""
    root = ET.fromstring(base)
    for child in [*root.findall("source"), *root.findall("backingStore")]:
        root.remove(child)
    root.set("type", "file")
    driver = root.find("driver")
    assert driver is not None
    driver.set("type", "qcow2")
    root.insert(1, ET.fromstring("<source file='/images/g.stillframe-overlay.qcow2'/>"))
    root.insert(2, ET.fromstring(
        "<backingStore type='file'><format type='raw'/><source file='/images/x'/></backingStore>"))
    return ET.tostring(root, encoding="unicode")


_CEPH = ("<source protocol='rbd' name='pool/image'><auth username='u'><secret type='ceph' usage='x'/></auth>"
         "</source>")
_ON_CEPH = disk_xml(
    "vda", "<source file='/new'/><backingStore type='file'><format type='qcow2'/><source file='/old'/>"
    f"<backingStore type='network'><format type='qcow2'/>{_CEPH}<backingStore type='file'>"
    "<format type='raw'/><source file='/golden'/></backingStore></backingStore></backingStore>")


def test_an_image_of_the_chain_keeps_what_is_below_it_in_the_definition() -> None:
    """Guests on Ceph would not start without: no header names the secret of the user."""
    top, old, base, golden = only_disk(_ON_CEPH).chain
    for image, below in ((old, (base, golden)), (base, (golden,))):
        after = read_domain_xml(with_source(domain_xml(_ON_CEPH), "vda", image)).disks["vda"]
        assert after.chain == (image, *below)
    past = read_domain_xml(with_source(domain_xml(_ON_CEPH), "vda", top, base)).disks["vda"]
    assert past.chain == (top, base, golden)
    assert past.chain[1].user == "u"
    elsewhere = read_domain_xml(with_source(domain_xml(_ON_CEPH), "vda", only_disk(_FILE).top)).disks["vda"]
    assert [image.key for image in elsewhere.chain] == [only_disk(_FILE).top.key]


def changed(text: str, target: str, source: Source) -> ET.Element:
    root = ET.fromstring(with_source(text, target, source))
    for disk in root.iterfind("./devices/disk"):
        found = disk.find("target")
        assert found is not None
        if found.get("dev") == target:
            return disk
    raise AssertionError(target)


@pytest.mark.parametrize("text", [_FILE, _BLOCK, _NBD_UNIX, _NBD_TCP, _RBD])
def test_a_disk_gets_the_source_back_that_it_had(text: str) -> None:
    before = only_disk(text)
    after = read_domain_xml(with_source(domain_xml(overlaid(text)), before.target, before.top))
    back = after.disks[before.target]
    assert back.top.key == before.top.key
    assert back.top.format == before.top.format
    assert len(back.chain) == 1
    for detail in ("<reconnect", "mon2", "tls="):
        assert (detail in back.top.xml) == (detail in before.top.xml)


def test_only_the_source_the_type_and_the_format_change() -> None:
    text = overlaid(_FILE)
    disk = changed(domain_xml(text), "vda", only_disk(_FILE).top)
    assert disk.get("type") == "file"
    driver = disk.find("driver")
    assert driver is not None
    assert driver.attrib == {
        "name": "qemu", "type": "raw", "cache": "none", "io": "native", "discard": "unmap"}
    assert disk.find("backingStore") is None
    assert [child.tag for child in disk] == ["driver", "source", "target", "alias", "address"]
    source = disk.find("source")
    assert source is not None
    assert source.attrib == {"file": "/images/g-vda.img"}, "an index belongs to a running domain"


def test_what_a_person_changed_elsewhere_meanwhile_is_kept() -> None:
    meanwhile = domain_xml(overlaid(_FILE), _BLOCK).replace("1048576", "2097152")
    text = with_source(meanwhile, "vda", only_disk(_FILE).top)
    assert "2097152" in text
    assert "http://example.org/app" in text
    assert 'kept="yes"' in text
    assert read_domain_xml(text).disks["sda"].top.key == "block:/dev/vg/g"


def test_a_disk_without_a_driver_element_gets_one() -> None:
    text = domain_xml(disk_xml("vda", "<source file='/overlay'/>"))
    disk = changed(text, "vda", Source("block", "raw", "/dev/x", xml="<source dev='/dev/x'/>"))
    driver = disk.find("driver")
    assert driver is not None
    assert (driver.get("name"), driver.get("type"), disk.get("type")) == ("qemu", "raw", "block")


def test_a_disk_that_was_taken_out_of_the_definition_is_named() -> None:
    with pytest.raises(NeedsAttention, match="vdz"):
        with_source(domain_xml(_FILE), "vdz", only_disk(_FILE).top)


def test_a_snapshot_lists_every_disk() -> None:
    root = ET.fromstring(snapshot_xml({"vda": "/o/a & b.qcow2", "vdb": "/o/b"}, ("sda", "vdc")))
    assert root.tag == "domainsnapshot"
    disks = {disk.get("name"): disk for disk in root.iterfind("./disks/disk")}
    assert {name: disk.get("snapshot") for name, disk in disks.items()} == {
        "vda": "external", "vdb": "external", "sda": "no", "vdc": "no"}
    source, driver = disks["vda"].find("source"), disks["vda"].find("driver")
    assert source is not None
    assert source.get("file") == "/o/a & b.qcow2"
    assert driver is not None
    assert driver.get("type") == "qcow2"
