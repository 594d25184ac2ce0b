"""Measure how long a guest takes to boot from a repository, next to booting from its local qcow2.

    .venv/bin/python -m lab.enter -- .venv/bin/python -m bench.boot [--rounds 5]

The lab's database guest is backed up. In each round, in turns: the guest is started on its own qcow2, and its
snapshot is booted by the command; measured until the guest agent answers, from before the start of libvirt's
call or of the command. The first boot has nothing to fetch ahead by. Kernel and initramfs come from the
host in both cases; of the disk, the guest reads its file system and its database.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.verdict import target
from lab.daemons import UNDEFINE_WHOLLY, LibvirtDaemons
from lab.dbguest import DbGuest
from lab.enter import IMAGES_DIR
from tests.fault.harness import Place
from tests.integration.repositories import Repo, make_repo

_ROWS = 2000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    daemons = LibvirtDaemons()
    daemons.start()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place, \
            DbGuest(daemons, IMAGES_DIR, "bench", pause_s=0.02) as guest:
        repo = make_repo(Place(Path(place), Path(place) / "state", IMAGES_DIR), Path(place))
        guest.wait_ready()
        guest.wait_acknowledged(_ROWS)
        words = ("--quiesce", "agent", "--method", "overlay", "--min-free", "64M")
        sid = str(repo.json("backup", "bench", *words)["guests"][0]["snapshot"])
        guest.destroy()
        guest.domain().undefineFlags(UNDEFINE_WHOLLY)
        measure(guest, repo, sid, options.rounds)
    return 0


def measure(guest: DbGuest, repo: Repo, sid: str, rounds: int) -> None:
    """Boot by turns, and print what came of it."""
    print(f"boot: {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; {rounds} rounds", flush=True)
    first = booted(guest, repo, sid)
    local: list[float] = []
    served: list[float] = []
    for number in range(rounds):
        ways: list[tuple[list[float], Callable[[], float]]] = [
            (local, lambda: started(guest)), (served, lambda: booted(guest, repo, sid))]
        for seconds, way in ways[:: 1 - number % 2 * 2]:
            seconds.append(way())
    for name, seconds in (("local qcow2", local), ("boot", served)):
        print(f"  {name:12} {statistics.median(seconds):6.2f} s   "
              + " ".join(f"{each:.2f}" for each in seconds))
    print(f"  the first boot, with nothing to fetch ahead by: {first:.2f} s")
    target("boot to the agent's answer, of the time from a local qcow2",
           statistics.median(served) / statistics.median(local), 1.5, most=True)


def started(guest: DbGuest) -> float:
    """Start the guest on its own image; return the seconds until its agent answers."""
    guest.define()
    began = time.monotonic()
    guest.start()
    seconds = until_agent(guest, began)
    guest.destroy()
    guest.domain().undefineFlags(UNDEFINE_WHOLLY)
    return seconds


def booted(guest: DbGuest, repo: Repo, sid: str) -> float:
    """Boot the snapshot; return the seconds until the guest's agent answers."""
    guest.expect_boot()
    began = time.monotonic()
    repo.json("boot", sid, "--same-identity", "--pool", IMAGES_DIR)
    seconds = until_agent(guest, began)
    repo.json("discard", guest.name)
    return seconds


def until_agent(guest: DbGuest, began: float) -> float:
    """Return the seconds since *began*, once the agent answers."""
    guest.wait_ready()
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
