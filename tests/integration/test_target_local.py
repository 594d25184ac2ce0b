"""docs/TARGET-LOCAL.md, done word for word; and then the disk is not there when a backup wants it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.daemons import LibvirtDaemons
from lab.images import MIB, assert_equal_images
from stillframe.errors import StorageLost
from tests.integration.targets import Target, followed

_PAGE = "TARGET-LOCAL.md"
_OPTIONS = "--repo /srv/backup/repository --key-file /etc/stillframe/key"

pytestmark = [pytest.mark.timeout(600), pytest.mark.together]


@pytest.fixture(scope="module")
def target(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Follow the page up to the backup. The disk is a file with a file system."""
    folder = tmp_path_factory.mktemp("target")
    disk = folder / "disk"
    with open(disk, "wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    names = {"DISK": str(disk), "TYPE": "ext4"}
    with followed(session_daemons, folder / "machine", _PAGE, names, _OPTIONS) as target:
        yield target


def test_a_disk_that_is_not_mounted_is_told_and_nothing_is_written_in_its_place(target: Target) -> None:
    """The mount point is left empty, and the next backup goes on where the disk is back."""
    target.machine.run("umount /srv/backup")
    target.machine.run(f"stillframe backup web {_OPTIONS}", StorageLost.exit_code)
    assert target.machine.run("ls -A /srv/backup") == ""
    target.machine.run("mount /srv/backup")
    target.machine.follow(f"stillframe backup web {_OPTIONS}")


def test_nobody_else_reads_the_repository(target: Target) -> None:
    assert target.machine.run("find /srv/backup /etc/stillframe -perm /077 ! -path '*/lost+found*'") == (
        "/srv/backup\n")  # the disk's own folder; what is in it is closed


def test_everything_is_there_in_the_end(target: Target, tmp_path: Path) -> None:
    """The rest of the page: the image that it restores has every byte."""
    target.assert_whole(tmp_path)
    for block in target.rest:
        target.machine.follow(block)
    assert_equal_images(target.machine.path("/srv/restored/vda.img"), target.moment)
    assert target.machine.run("ls -A /srv/backup") == ""
