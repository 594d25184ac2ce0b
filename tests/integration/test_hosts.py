"""Two hosts back up into one bucket while a third forgets and prunes: what is listed reads back whole."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.hosts import Host, Network
from lab.images import KIB, MIB
from lab.s3 import BUCKET, S3Server
from lab.waiting import wait_for
from stillframe.clock import SystemClock
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.layout import Parameters, new_sid
from stillframe.repository.opened import Secret, init_repository
from stillframe.storage.s3 import S3Storage
from tests.fault.driver import PASSPHRASE
from tests.fault.harness import Place
from tests.integration.repositories import CHEAP, Repo

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 4 * MIB
_TIMEOUT_S = 300.0
_KEPT = 4
#: Small ones, so that each backup makes several packs and each prune has some to copy.
_SIZES = Parameters(id=new_sid(), created_at="", chunk_bytes=4 * KIB, slot_chunks=4, leaf_chunks=16,
                    pack_bytes=128 * KIB)
_PIECE_BYTES = 16 * KIB
_SECONDS = "STILLFRAME_HOSTS_SECONDS"


@dataclass
class Site:
    """The hosts, and what they have in common."""

    hosts: dict[str, Host]
    server: S3Server
    repo: Repo
    folder: Path
    over: threading.Event = field(default_factory=threading.Event)
    #: What each snapshot must hold, by its host; what was forgotten; and how many packs were deleted.
    moments: dict[str, dict[str, Path]] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    deleted_packs: int = 0

    @property
    def is_enough(self) -> bool:
        """Whether enough happened for a test to mean something."""
        return self.deleted_packs > 0 and all(len(each) > _KEPT for each in self.moments.values())

    def json(self, host: str, *words: str) -> dict[str, Any]:
        """Run stillframe on a host, with a state folder of its own; return its JSON."""
        place = replace(self.repo.place, state_dir=self.folder / f"state-{host}")
        repo = replace(self.repo, place=place)
        done = subprocess.run(
            self.hosts[host].command(repo.command(*words, "--json")), env=repo.environment(), cwd=repo.root,
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (
            f"{host}: {words}\n{done.stdout}{done.stderr}\nthe server: {self.server.said()}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def site(place: Place, tmp_path: Path) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network())
        hosts = {name: stack.enter_context(network.host(name)) for name in ("alpha", "beta", "pruner")}
        server = stack.enter_context(S3Server(tmp_path / "s3", every_address=True))
        query = urlencode({"endpoint": f"http://{network.address}:{server.port}",
                           "region": server.access.region})
        repo = Repo(
            tmp_path / "repository", place, address=f"s3://{BUCKET}/shared?{query}",
            settings={"AWS_ACCESS_KEY_ID": server.access.user, "AWS_SECRET_ACCESS_KEY": server.access.secret})
        passphrase = repo.path.with_suffix(".pass")
        passphrase.write_bytes(PASSPHRASE + b"\n")
        passphrase.chmod(0o600)
        init_repository(
            S3Storage(BUCKET, "shared", server.access), Secret(SlotKind.PASSPHRASE, PASSPHRASE), "test",
            SystemClock(), costs=CHEAP, parameters=_SIZES)
        yield Site(hosts, server, repo, tmp_path)


def _backs_up(site: Site, host: str, guest: DiskGuest) -> None:
    """Change a guest's disk and back it up, again and again."""
    chance, moments = random.Random(host), site.moments[host]
    image = guest.disks["vda"].path
    while not site.over.is_set():
        with image.open("r+b") as file:
            for _ in range(12):
                file.seek(chance.randrange(_SIZE_BYTES // _PIECE_BYTES) * _PIECE_BYTES)
                # Few contents: hosts and moments have many chunks in common.
                file.write(random.Random(chance.randrange(200)).randbytes(_PIECE_BYTES))
        moment = site.folder / f"{host}-{len(moments)}.img"
        shutil.copy(image, moment)
        made = site.json(host, "backup", guest.name, "--quiesce", "none", "--min-free", "32M")["guests"][0]
        moments[made["snapshot"]] = moment


def _prunes(site: Site) -> None:
    """Forget all but the newest, and prune, again and again."""
    while not site.over.is_set():
        dropped = site.json("pruner", "forget", "--keep-last", str(_KEPT))["dropped"]
        site.forgotten |= {each["id"] for each in dropped}
        site.deleted_packs += site.json("pruner", "prune", "--compact-below", "95%")["done"]["deleted_packs"]


def _go_on(site: Site, guests: dict[str, DiskGuest], seconds: float) -> None:
    """Let all work side by side for so long, and look at what is there then."""
    site.moments.update({host: {} for host in guests})
    until_s = time.monotonic() + seconds
    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(_backs_up, site, host, guest) for host, guest in guests.items()]
        working.append(pool.submit(_prunes, site))
        try:
            wait_for("hosts backed up and prunes deleted", lambda: any(each.done() for each in working) or (
                time.monotonic() >= until_s and site.is_enough), seconds + _TIMEOUT_S)
        finally:
            site.over.set()
    for each in working:
        each.result()
    moments = {name: path for made in site.moments.values() for name, path in made.items()}
    listed = {each["id"]: each for each in site.repo.json("list")["snapshots"]}
    assert listed.keys() == moments.keys() - site.forgotten
    assert {each["host"] for each in listed.values()} == guests.keys()
    for name in listed:
        site.repo.assert_restores(name, {"vda": moments[name]}, site.folder)
    assert site.repo.json("verify", "--level", "full")["findings"] == []


@pytest.fixture
def guests(disk_guest: MakeGuest) -> dict[str, DiskGuest]:
    """Give a guest that is off for each of two hosts."""
    return {host: disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), name=f"of-{host}", started=False)
            for host in ("alpha", "beta")}


def test_two_hosts_back_up_while_a_third_prunes(site: Site, guests: dict[str, DiskGuest]) -> None:
    _go_on(site, guests, 60.0)  # or for as long as it takes until that `is_enough`


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_two_hosts_back_up_for_an_hour(site: Site, guests: dict[str, DiskGuest]) -> None:
    _go_on(site, guests, float(os.environ.get(_SECONDS, "3600")))
