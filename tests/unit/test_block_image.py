"""Places of images, in QEMU's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillframe.block.image import (
    ImageKind,
    ImagePlace,
    block_place,
    file_place,
    local_place,
    nbd_place,
    overlay_place,
    protocol_place,
    rbd_place,
)
from stillframe.errors import GuestUnfit


def test_a_file_is_opened_by_its_format_over_its_protocol() -> None:
    place = file_place("/images/a b.qcow2", "qcow2")
    assert place.qemu_options() == {
        "driver": "qcow2", "file": {"driver": "file", "filename": "/images/a b.qcow2"}}
    assert json.loads(place.json_name().removeprefix("json:")) == place.qemu_options()
    assert place.backing_text() == "/images/a b.qcow2"


def test_a_block_device_is_no_file() -> None:
    assert block_place("/dev/vg/lv", "raw").qemu_options()["file"]["driver"] == "host_device"


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (nbd_place("raw", socket="/run/x y.sock", export="disk/1"),
         "nbd+unix:///disk%2F1?socket=/run/x%20y.sock"),
        (nbd_place("raw", host="store", port=10810, export="d"), "nbd://store:10810/d"),
        (nbd_place("raw", host="::1", export=""), "nbd://[::1]:10809/"),
        (rbd_place("raw", pool="rbd", image="vm:1", conf="/etc/ceph/c.conf", user="admin"),
         r"rbd:rbd/vm\:1:id=admin:conf=/etc/ceph/c.conf"),
        (rbd_place("raw", pool="p", image="i", hosts=(("10.0.0.1", 6789), ("m2", 6789))),
         r"rbd:p/i:mon_host=10.0.0.1\:6789;m2\:6789"),
        (rbd_place("raw", pool="p", image="i", hosts=(("::1", 6789),)), r"rbd:p/i:mon_host=[\:\:1]\:6789"),
    ],
)
def test_network_images_have_a_backing_name(place: ImagePlace, text: str) -> None:
    assert place.backing_text() == text


def test_libvirts_name_of_an_image_on_ceph_lacks_the_user() -> None:
    """As libvirt 9.0 wrote it into the header of an overlay whose lower one it had committed."""
    place = rbd_place("raw", pool="p", image="i", hosts=(("127.0.0.1", 6789),), user="libvirt")
    written = ('json:{"file":{"driver":"rbd","pool":"p","image":"i",'
               '"server":[{"host":"127.0.0.1","port":"6789"}]}}')
    assert place.is_named(written)
    assert not place.is_named(written.replace('"i"', '"j"'))
    assert not place.is_named(written.replace("6789", "6790"))


def test_an_overlay_names_its_base_where_that_opens_only_for_a_user() -> None:
    base = rbd_place("raw", pool="p", image="i", user="libvirt")
    assert overlay_place("/o", base).qemu_options()["backing"] == base.qemu_options()
    assert overlay_place("/o", file_place("/b", "raw")) == file_place("/o", "qcow2")
    assert overlay_place("/o2", overlay_place("/o", base)).beneath == overlay_place("/o", base)


def test_any_other_protocol_goes_through_as_it_is() -> None:
    place = protocol_place("raw", {"driver": "iscsi", "portal": "a", "target": "b", "transport": "tcp"})
    assert place.kind is ImageKind.OTHER
    assert place.backing_text().startswith("json:")
    assert place.identity() is None


def test_a_protocol_that_is_a_file_is_a_file() -> None:
    place = protocol_place("raw", {"driver": "file", "filename": "/a"})
    assert place == file_place("/a", "raw")


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(GuestUnfit):
        file_place("a.img", "raw")


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"x")
    place = local_place(str(path), "raw")
    before = place.identity()
    path.write_bytes(b"xy")
    after = place.identity()
    assert before is not None
    assert after is not None
    assert before != after
    assert before.same_file(after)
