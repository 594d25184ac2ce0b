"""The database guest runs from its snapshot and lands while it writes: no acknowledged row is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.daemons import UNDEFINE_WHOLLY
from lab.database import check_image
from lab.dbguest import DbGuest
from lab.images import run
from tests.fault.harness import Place
from tests.integration.booting import end_servers, servers
from tests.integration.repositories import Repo, make_repo

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Iterator[Repo]:
    """Give an empty repository; whatever serves from it ends with the test."""
    yield make_repo(place, tmp_path)
    end_servers()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_database_is_booted_and_lands_while_it_writes(
    repo: Repo, db_guest: Callable[..., DbGuest], *, elsewhere: bool,
) -> None:
    other = repo.place.overlays / "other"
    other.mkdir()
    guest = db_guest()
    before = guest.wait_more_rows(20)
    sid = repo.json("backup", guest.name, "--quiesce", "agent", "--method", "overlay", "--min-free", "64M")[
        "guests"][0]["snapshot"]
    guest.wait_more_rows(5)
    guest.destroy()
    guest.domain().undefineFlags(UNDEFINE_WHOLLY)

    guest.expect_boot()
    said = repo.json("boot", sid, "--same-identity", "--pool", repo.place.overlays)
    assert said["guest"] == guest.name
    guest.wait_ready()
    assert guest.acknowledged() > before
    guest.wait_more_rows(20)
    during = guest.acknowledged()
    repo.json("land", guest.name, *(("--pool", str(other), "--format", "raw") if elsewhere else ()))
    after = guest.wait_more_rows(20)
    assert after > during
    assert not servers()
    guest.power_off()
    acknowledged = guest.acknowledged()

    image_format = "raw" if elsewhere else "qcow2"
    [image] = list(repo.place.overlays.rglob("*-vda.*"))
    assert image.parent == (other if elsewhere else repo.place.overlays)
    if not elsewhere:
        run("qemu-img", "check", image)
        assert "backing-filename" not in json.loads(run("qemu-img", "info", "--output=json", image))
    check = check_image(image, image_format)
    assert check.whole, check
    assert check.last >= acknowledged
