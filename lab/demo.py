"""From nothing to seeing it: a live guest is mirrored, a run is killed in its commit, nothing is lost.

Then three snapshots of it are made in a repository, the middle one is restored, and the newest is drilled.

    make demo          (or: python -m lab.enter -- python -m lab.demo)

With an argument the snapshots are kept elsewhere, and the mirror is left out: `s3`, `sftp` and `smb` are
servers that the lab starts, anything else is the address of a repository to make, which stays in the end.

Everything happens in the lab's own namespaces with a libvirtd of its own; guests and files are
removed at the end. The commands shown are really run. Exit code 1 if anything is not as promised.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt

from lab.daemons import LibvirtDaemons, OutsideLab
from lab.database import CheckResult
from lab.dbguest import DbGuest, boot_and_check
from lab.demo_snapshots import DemoFailed, show_snapshots
from lab.disks import DiskSpec
from lab.enter import IMAGES_DIR
from lab.images import MIB, run
from lab.servers import repository_for
from lab.show import Running, Show
from lab.waiting import TooLate
from stillframe.capture.journal import Journal, RunRecord
from stillframe.capture.states import State
from stillframe.clock import SystemClock
from stillframe.config.settings import SECRETS
from stillframe.errors import EXIT_OK, NeedsAttention, StillframeError
from stillframe.units import duration_text, parse_size_bytes, size_text

_GUEST = "shop"
_DISK_BYTES = 1024 * MIB
_FILES = 64
_FILE_BYTES = 4 * MIB
# Beside the images, not among them; all of it is in the lab's temporary folder.
_PLACE = Path("/var/lib/libvirt")
_BACKUPS = _PLACE / "backups"
_STATE = _PLACE / "stillframe"
_IMAGE = _BACKUPS / _GUEST / "vda.img"
_WRITTEN = re.compile(r", ([^,]+) written")
_TRIES = 5
_LOOK_S = 0.005
_INTERRUPTED = 130
# A run is before its capture in these states: what was acknowledged by then must be in the mirror.
_BEFORE_CAPTURE = (State.PLANNED, State.OVERLAYS, State.FREEZING)


def main(where: str = "") -> int:
    """Show it, with the repository at *where*; return the exit code."""
    try:
        daemons = LibvirtDaemons()
    except OutsideLab:
        print("The demo needs the lab: make demo", file=sys.stderr)
        return 2
    settings = _PLACE / "stillframe.toml"
    settings.write_text(f'state_dir = "{_STATE}"\n')
    # What the caller has set for backups of their own must not come into it.
    own = dict.fromkeys(("STILLFRAME_REPOSITORY", *(f"STILLFRAME_{name.upper()}" for name in SECRETS)), "")
    show = Show({**own, "STILLFRAME_CONFIG": str(settings), "LC_ALL": "C.UTF-8"})
    try:
        with repository_for(where, _PLACE) as repository, _guest(show, daemons) as guest:
            mirrored = [] if where else _show_mirror(show, guest)
            return show.verdict([*mirrored, *show_snapshots(show, guest, _PLACE, settings, repository)])
    except (RuntimeError, ValueError, TooLate, StillframeError, libvirt.libvirtError,
            subprocess.SubprocessError) as error:
        show.promise(False, f"the demo could not go on: {error}")
        return show.verdict([])
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        daemons.terminate()


def _show_mirror(show: Show, guest: DbGuest) -> list[str]:
    """Show mirrors, one of them killed in its commit, and its recovery; return what to say in the end."""
    _BACKUPS.mkdir()
    first = _mirror(show, guest, "Mirror it while it runs")
    found = _IMAGE.stat()
    show.tell(f"The mirror is a plain raw image: {size_text(found.st_size)} long, "
              f"{size_text(found.st_blocks * 512)} on disk.")
    second = _mirror(show, guest, "Mirror it again: only what changed is moved")
    show.promise(second * 10 < first, f"it moved {size_text(second)}, {second / first:.1%} of the "
                                      f"{size_text(first)} that the first one did")
    acknowledged = _kill_in_commit(show, guest)
    _show_left(show, guest)
    _recover(show, guest)
    check = _boot_mirror(show, guest, acknowledged)
    return [
        f"The first mirror moved {size_text(first)}, the second {size_text(second)}.",
        "A third run was killed in its commit, and left the guest on an overlay.",
        "`stillframe recover` brought it back onto its own image; the guest ran on throughout.",
        f"The mirror boots, and its database is whole: {check.rows} rows, not one is missing.",
    ]


@contextlib.contextmanager
def _guest(show: Show, daemons: LibvirtDaemons) -> Iterator[DbGuest]:
    """Give the running guest; it and its files are removed behind the block."""
    show.step("Boot a guest with a database that is written all the time")
    daemons.start()
    content = IMAGES_DIR / "content.raw"
    _make_content(content)
    guest = DbGuest(daemons, IMAGES_DIR, _GUEST, [DiskSpec(size_bytes=_DISK_BYTES, content=content)],
                    pause_s=0.02)
    content.unlink()
    try:
        guest.define()
        began_s = time.monotonic()
        guest.start()
        guest.wait_ready()
        show.tell(f"Guest '{_GUEST}' booted in {duration_text(time.monotonic() - began_s)} (emulated, with "
                  f"the guest agent). Its disk is {guest.disks['vda'].path}:")
        show.tell(f"{size_text(_DISK_BYTES)}, {size_text(_FILES * _FILE_BYTES)} of it files, and an SQLite "
                  "database (WAL, synchronous=FULL).")
        rows, began_s = guest.acknowledged(), time.monotonic()
        last = guest.wait_more_rows(100)
        show.tell("The guest says on its console which rows are committed: "
                  f"{last} by now, {(last - rows) / (time.monotonic() - began_s):.0f} a second.")
        yield guest
    finally:
        guest.remove()


def _make_content(raw: Path) -> None:
    """Make an ext4 file system with files that don't compress."""
    files = raw.with_suffix(".files")
    files.mkdir()
    for number in range(_FILES):
        (files / f"photo-{number:02d}.jpg").write_bytes(os.urandom(_FILE_BYTES))
    with raw.open("wb") as file:
        file.truncate(_DISK_BYTES)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", files, raw)
    run("rm", "-r", files)


def _mirror(show: Show, guest: DbGuest, title: str) -> int:
    """Run a mirror to its end; return the bytes that were moved."""
    show.step(title)
    before = guest.acknowledged()
    ran = show.run("stillframe", "mirror", _GUEST, str(_BACKUPS), "--method", "overlay")
    show.promise(ran.code == EXIT_OK, f"exit code {ran.code} after {duration_text(ran.seconds)}; "
                                      f"the guest wrote {guest.acknowledged() - before} rows meanwhile")
    moved = _WRITTEN.search(ran.said)
    if moved is None:
        raise DemoFailed("the run did not say how much it wrote")
    return parse_size_bytes(moved[1])


def _kill_in_commit(show: Show, guest: DbGuest) -> int:
    """Kill a run in its commit; return the last row acknowledged before its capture."""
    show.step("Kill a third run (SIGKILL) while it writes the overlay back into the guest's image")
    with contextlib.closing(Journal(_STATE, SystemClock())) as journal:
        for _ in range(_TRIES):
            running = show.start("stillframe", "mirror", _GUEST, str(_BACKUPS), "--method", "overlay")
            try:
                acknowledged = _watch_until_commit(running, journal, guest)
                if _stop(running.process) and _committing(show):
                    show.tell("Caught in its commit. For this look it is held still (SIGSTOP):")
                    show.run("stillframe", "status")
                    show.typed("kill", "-KILL", str(running.process.pid))
                    running.kill()
                    return acknowledged
                show.tell("The commit was over before it could be caught. Once more.")
                running.process.send_signal(signal.SIGCONT)
                running.end()
            finally:
                running.kill()
    raise DemoFailed(f"none of {_TRIES} runs could be caught in its commit")


def _watch_until_commit(running: Running, journal: Journal, guest: DbGuest) -> int:
    """Return once the commit began or the run ended, with the last row acknowledged before the capture."""
    acknowledged = 0
    while running.process.poll() is None:
        # In this order: what is acknowledged now was so before the state that is read next.
        rows = guest.acknowledged()
        record = _run_of(journal, running.process.pid)
        if record is not None:
            if record.state in _BEFORE_CAPTURE:
                acknowledged = rows
            last = journal.history(record.id)[-1]
            if (last.state, last.phase) == (State.COMMITTING.value, "done"):
                break
        time.sleep(_LOOK_S)
    return acknowledged


def _run_of(journal: Journal, pid: int) -> RunRecord | None:
    return next((record for record in journal.open_runs() if record.pid == pid), None)


def _stop(process: subprocess.Popen[str]) -> bool:
    """Hold a process still; return False if it ended instead."""
    process.send_signal(signal.SIGSTOP)
    seen = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return seen is not None and seen.si_code == os.CLD_STOPPED


def _committing(show: Show) -> bool:
    """Return whether `stillframe status` says that the one open run is committing."""
    ran = show.ask("stillframe", "status", "--json")
    if ran.code != EXIT_OK:
        return False
    return [run["state"] for run in json.loads(ran.said)["open_runs"]] == [State.COMMITTING.value]


def _show_left(show: Show, guest: DbGuest) -> None:
    show.step("See what the killed run left")
    ran = show.run("stillframe", "status")
    show.promise(ran.code == NeedsAttention.exit_code, f"exit code {ran.code}: something needs attention")
    left = json.loads(show.ask("stillframe", "status", "--json").said)
    states = [each["state"] for each in left["open_runs"]]
    show.promise(states == [State.COMMITTING.value], f"the journal knows where it ended: {', '.join(states)}")
    job = show.run("virsh", "blockjob", _GUEST, "vda")
    show.promise("Commit" in job.said, "QEMU still has the block job, and nobody is there to end it")
    overlays = [each["overlay"] for each in left["guests_on_overlays"]]
    show.promise(guest.disk_source("vda")[0] in overlays, "the guest is on the overlay")
    before = guest.acknowledged()
    show.promise(guest.wait_more_rows(20) > before, "the guest runs on and writes")


def _recover(show: Show, guest: DbGuest) -> None:
    show.step("Recover")
    before, machine = guest.acknowledged(), guest.daemons.qemu_pid(_GUEST)
    ran = show.run("stillframe", "recover")
    show.promise(ran.code == EXIT_OK, f"exit code {ran.code} after {duration_text(ran.seconds)}")
    show.run("virsh", "domblklist", _GUEST)
    image = str(guest.disks["vda"].path)
    sources = [guest.disk_source("vda", inactive=inactive)[0] for inactive in (False, True)]
    show.promise(sources == [image, image], "the guest runs on its own image, and would start on it")
    left = sorted(path.name for path in guest.folder.glob("*overlay*"))
    show.promise(not left, " ".join([f"no overlay is left in {guest.folder}", *left]))
    more = guest.wait_more_rows(20)
    show.promise(guest.daemons.qemu_pid(_GUEST) == machine != 0,
                 f"the guest ran on (the same QEMU process): row {before} before, {more} now")
    code = show.ask("stillframe", "status").code
    show.promise(code == EXIT_OK, f"`stillframe status` now ends with {code}: nothing is left to do")


def _boot_mirror(show: Show, guest: DbGuest, acknowledged: int) -> CheckResult:
    show.step("Boot a second guest from the mirror and let SQLite check the database")
    show.tell("It is the mirror of the run that was killed: its copy was durable before the commit began.")
    began_s = time.monotonic()
    check = boot_and_check(_IMAGE, "raw")
    show.tell(f"Booted, checked and off again in {duration_text(time.monotonic() - began_s)}; "
              f"the live guest is at row {guest.acknowledged()} by now.")
    show.promise(check.integrity == "ok", f"pragma integrity_check: {check.integrity}")
    show.promise(check.whole, f"rows {check.first} to {check.last} are contiguous: {check.rows} of them")
    show.promise(check.last >= acknowledged > 0, "every row acknowledged before the capture is there: "
                 f"{acknowledged} were, the mirror ends with {check.last}")
    return check


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
