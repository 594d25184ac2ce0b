"""From libvirt's source of a disk to a place that QEMU's programs can open."""

from __future__ import annotations

import json

import pytest

from stillframe.block.image import ImageKind
from stillframe.capture.plan import place_of, place_of_chain
from stillframe.errors import GuestUnfit
from stillframe.hypervisor.domain_xml import read_domain_xml
from stillframe.hypervisor.model import Source


def source(kind: str, inside: str, image_format: str = "raw") -> Source:
    """The source as it is read from a domain's XML."""
    found = read_domain_xml(
        f"<domain><devices><disk type='{kind}'><driver type='{image_format}'/>{inside}"
        "<target dev='vda'/></disk></devices></domain>")
    return found.disks["vda"].top


def test_a_file() -> None:
    place = place_of(source("file", "<source file='/images/a b.qcow2'/>", "qcow2"))
    assert (place.kind, place.driver, place.path) == (ImageKind.FILE, "qcow2", "/images/a b.qcow2")


def test_a_block_device() -> None:
    place = place_of(source("block", "<source dev='/dev/vg/g'/>"))
    assert (place.kind, place.driver, place.path) == (ImageKind.BLOCK, "raw", "/dev/vg/g")


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(GuestUnfit, match="not absolute"):
        place_of(Source("file", "raw", "images/a"))


@pytest.mark.parametrize(("host", "server"), [
    ("<host transport='unix' socket='/run/nbd.sock'/>", {"type": "unix", "path": "/run/nbd.sock"}),
    ("<host name='10.0.0.1' port='10810'/>", {"type": "inet", "host": "10.0.0.1", "port": "10810"}),
    ("<host name='::1'/>", {"type": "inet", "host": "::1", "port": "10809"}),
])
def test_nbd(host: str, server: dict[str, str]) -> None:
    place = place_of(source("network", f"<source protocol='nbd' name='e x'>{host}</source>", "qcow2"))
    assert (place.kind, place.driver) == (ImageKind.NBD, "qcow2")
    assert json.loads(place.protocol_json) == {"driver": "nbd", "export": "e x", "server": server}


@pytest.mark.parametrize(("hosts", "server"), [
    ("", None),
    ("<host name='mon1' port='6790'/>", [{"host": "mon1", "port": "6790"}]),
    ("<host name='mon1'/>", [{"host": "mon1", "port": "6789"}]),
    ("<host name='mon1'/><host name='mon2' port='6790'/>",
     [{"host": "mon1", "port": "6789"}, {"host": "mon2", "port": "6790"}]),
])
def test_rbd(hosts: str, server: list[dict[str, str]] | None) -> None:
    place = place_of(source("network", f"<source protocol='rbd' name='pool/image'>{hosts}</source>"))
    options = json.loads(place.protocol_json)
    assert (place.kind, options["pool"], options["image"]) == (ImageKind.RBD, "pool", "image")
    assert options.get("server") == server


@pytest.mark.parametrize("beside", [True, False])
def test_whom_ceph_lets_in_and_by_which_settings(beside: bool) -> None:
    auth = "<auth username='libvirt'><secret type='ceph' uuid='x'/></auth>"
    inside = "<config file='/etc/ceph/other.conf'/>" + ("" if beside else auth)
    text = f"<source protocol='rbd' name='pool/image'>{inside}</source>" + (auth if beside else "")
    options = json.loads(place_of(source("network", text)).protocol_json)
    assert (options["user"], options["conf"]) == ("libvirt", "/etc/ceph/other.conf")


@pytest.mark.parametrize("protocol", ["iscsi", "gluster", "https"])
def test_another_protocol_is_refused_by_name(protocol: str) -> None:
    with pytest.raises(GuestUnfit, match=protocol):
        place_of(source("network", f"<source protocol='{protocol}' name='x'><host name='h'/></source>"))


def test_what_is_below_is_named_outright_where_an_image_there_opens_only_for_a_user() -> None:
    lower = ("<backingStore type='network'><format type='raw'/><source protocol='rbd' name='pool/image'>{}"
             "</source></backingStore>")
    chains = [
        read_domain_xml(
            "<domain><devices><disk type='file'><driver type='qcow2'/><source file='/o'/>"
            f"{lower.format(auth)}<target dev='vda'/></disk></devices></domain>").disks["vda"].chain
        for auth in ("", "<auth username='libvirt'><secret type='ceph' uuid='x'/></auth>")]
    assert [place_of_chain(chain).beneath for chain in chains] == [None, place_of(chains[1][1])]
    assert place_of_chain(chains[1]).qemu_options()["backing"]["file"]["user"] == "libvirt"
    assert "backing" not in place_of_chain(chains[1]).alone().qemu_options()
