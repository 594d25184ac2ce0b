"""Every snapshot restores, byte for byte, to what the guest's disks held at its moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import MIB
from stillframe.capture.states import State
from stillframe.errors import EXIT_FELL_BACK
from stillframe.repository.layout import PackKind, packs_prefix
from stillframe.storage.local import LocalStorage
from tests.fault.harness import Place, Run, overlays_left
from tests.integration.repositories import Repo, make_repo

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 32 * MIB
_ROUNDS = 10


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    """Give an empty repository."""
    return make_repo(place, tmp_path)


def moment_of(guest: DiskGuest) -> dict[str, Path]:
    return {target: guest.model(target).copy_at_moment() for target in guest.disks}


def change(guest: DiskGuest, round_: int) -> None:
    for target in guest.disks:
        at = round_ % 7
        guest.write(target, (1 + at) * MIB + round_ * 512, 300 * 1024, 0xA0 + round_)
        guest.write_zeroes(target, (8 + at) * MIB, 200 * 1024, unmap=bool(round_ % 2))
        guest.write(target, 30 * MIB + round_ * 4096, 512, 0x10 + round_)
        guest.discard(target, (16 + at) * MIB, MIB)
    guest.flush()


def backup_with_writes_behind(repo: Repo, guest: DiskGuest, round_: int) -> str:
    """Back the guest up; write to it once the moment was captured. Return the snapshot's ID."""
    place = replace(repo.place, destination=repo.path)
    run = Run(place, guest, what="backup", state=State.COPYING, phase="done")
    assert run.wait_reached(), run.output
    change(guest, round_ + 3)  # after the moment: none of it may show in the snapshot
    assert run.go_on() == 0, run.output
    assert not overlays_left(place)
    return run.output.rpartition("snapshot ")[2].split()[0]


def stored_bytes(repo: Repo, kind: PackKind) -> int:
    return sum(each.size_bytes for each in LocalStorage(repo.path).list(packs_prefix(kind)))


def test_every_snapshot_of_a_chain_is_the_disk_at_its_moment(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path
) -> None:
    """Two guests that share what they hold, ten snapshots of each, in turn; a raw and a qcow2 disk."""
    guests = [disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), DiskSpec("vdb", Kind.QCOW2, _SIZE_BYTES))
              for _ in range(2)]
    chain: list[tuple[str, dict[str, Path]]] = []
    for round_ in range(_ROUNDS):
        for guest in guests:
            change(guest, round_)
            expected = moment_of(guest)
            chain.append((backup_with_writes_behind(repo, guest, round_), expected))
    assert len({snapshot for snapshot, _ in chain}) == 2 * _ROUNDS
    for snapshot, expected in chain:
        repo.assert_restores(snapshot, expected, tmp_path)
    found = repo.json("verify", "--level", "full")
    assert found["sound"] is True
    assert found["snapshots"] == 2 * _ROUNDS
    for guest in guests:
        guest.destroy()
        for target in guest.disks:
            guest.assert_disk_equals_model(target)


def test_what_two_guests_share_is_stored_once(disk_guest: MakeGuest, repo: Repo) -> None:
    one, other = (disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES)) for _ in range(2))
    data = bytes(range(256)) * (4 * MIB // 256)
    for number, guest in enumerate((one, other)):
        block = bytearray(data)
        for at in range(0, len(block), 4096):
            block[at : at + 8] = (at * 2654435761 % 2**63).to_bytes(8, "little")
        guest.write_bytes("vda", (6 + number) * MIB, bytes(block))
        guest.flush()
    repo.backup(one)
    before = stored_bytes(repo, PackKind.DATA)
    result = repo.backup(other)
    added = stored_bytes(repo, PackKind.DATA) - before
    assert result["parent"] == ""
    # What was made at random differs; the 4 MiB at another place of the disk are found by their IDs.
    assert result["disks"][0]["data_bytes"] > 4 * MIB
    assert added < result["disks"][0]["data_bytes"] - 4 * MIB + MIB


def test_a_second_backup_stores_what_changed(disk_guest: MakeGuest, repo: Repo) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, 64 * MIB))
    first = repo.backup(guest)
    guest.write("vda", 10 * MIB, 64 * 1024, 0x22)
    guest.write("vda", 30 * MIB + 512, 512, 0x33)
    guest.flush()
    second = repo.backup(guest)
    assert second["parent"] == first["snapshot"]
    assert second["disks"][0]["changed_bytes"] == 2 * 64 * 1024
    assert second["stored_bytes"] < 64 * 1024
    found = repo.json("diff", first["snapshot"], second["snapshot"])["disks"][0]
    assert found["changed_bytes"] == 2 * 64 * 1024
    assert [each["offset"] for each in found["extents"]] == [10 * MIB, 30 * MIB]
    third = repo.backup(guest)
    assert third["disks"][0]["changed_bytes"] == 0
    assert repo.json("diff", second["snapshot"], third["snapshot"])["disks"][0]["extents"] == []
    listed = repo.json("list")["snapshots"]
    assert [each["id"] for each in listed] == [each["snapshot"] for each in (first, second, third)]


def test_disks_resized_and_added_between_backups(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES), DiskSpec("vdb", Kind.RAW, _SIZE_BYTES))
    first, before = repo.backup(guest), moment_of(guest)
    guest.domain().blockResize("vda", _SIZE_BYTES + 8 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    guest.model("vda").resize(_SIZE_BYTES + 8 * MIB)
    guest.write("vda", _SIZE_BYTES + MIB, MIB, 0x44)
    guest.flush()
    second, after = repo.backup(guest, code=EXIT_FELL_BACK), moment_of(guest)
    assert second["disks"][0]["changed_bytes"] <= MIB
    assert [disk["fell_back"] for disk in second["disks"]] == [True, False]
    repo.assert_restores(first["snapshot"], before, tmp_path)
    repo.assert_restores(second["snapshot"], after, tmp_path)
    guest.destroy()
    xml = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    guest.daemons.connect().defineXML(xml.replace("dev='vdb'", "dev='vdc'"))
    guest.start()
    third = repo.backup(guest)
    assert [(disk["target"], disk["compared"]) for disk in third["disks"]] == [("vda", True), ("vdc", False)]
    assert third["stored_bytes"] < MIB, "what the new disk holds was known from the old one"


def test_a_guest_of_the_same_name_with_another_uuid_is_another_guest(
    disk_guest: MakeGuest, repo: Repo
) -> None:
    first = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), name="twin")
    assert repo.backup(first)["parent"] == ""
    first.remove()
    second = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), name="twin")
    result = repo.backup(second)
    assert result["parent"] == ""
    assert result["parent_note"]


def test_what_belongs_to_the_machine_is_kept(disk_guest: MakeGuest, repo: Repo, tmp_path: Path) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    snapshot = repo.backup(guest)["snapshot"]
    shown = repo.json("show", snapshot)["snapshot"]
    assert guest.name in shown["live_xml"]
    assert guest.name in shown["inactive_xml"]
    assert shown["versions"]["machine"].startswith("pc-q35")
    assert shown["consistency"] == "crash"
    assert shown["disks"][0]["format"] == "raw"
    assert json.dumps(shown["files"]) == "[]"
