"""From nothing to seeing it: a live guest is mirrored, a run is killed in its commit, nothing is lost.

    make demo          (or: python -m lab.enter -- python -m lab.demo)

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
from dataclasses import dataclass
from pathlib import Path

import libvirt

from lab.daemons import LibvirtDaemons, OutsideLab
from lab.dbguest import CheckResult, DbGuest, check_image, make_file_system
from lab.disks import DiskSpec
from lab.enter import IMAGES_DIR
from lab.images import MIB, run
from lab.show import Show, file_text
from lab.waiting import TooLate
from stillframe.capture.journal import Journal, RunRecord
from stillframe.capture.states import State
from stillframe.clock import SystemClock
from stillframe.errors import EXIT_OK, NeedsAttention
from stillframe.units import duration_text, parse_size_bytes, size_text

_GUEST = "shop"
_DISK_BYTES = 1024 * MIB
_FILES = 64
_FILE_BYTES = 4 * MIB
# Beside the images, not among them; all of it is in the lab's temporary folder.
_PLACE = Path("/var/lib/libvirt")
_BACKUPS = _PLACE / "backups"
_STATE = _PLACE / "stillframe"
_WRITTEN = re.compile(r", ([^,]+) written")
_TRIES = 5
_LOOK_S = 0.005
_RUN_TIMEOUT_S = 120.0
# A run is before its capture in these states, so what was acknowledged then must be in the mirror.
_BEFORE_CAPTURE = (State.PLANNED, State.OVERLAYS, State.FREEZING)


class DemoFailed(RuntimeError):
    """The demo can't go on."""


@dataclass(frozen=True, slots=True)
class Killed:
    """A run that was killed in its commit, and the last row acknowledged before its capture."""

    acknowledged: int


def main() -> int:
    """Show it; return the exit code."""
    try:
        daemons = LibvirtDaemons()
    except OutsideLab as error:
        print(f"{error}; for the demo: make demo", file=sys.stderr)
        return 2
    settings = _PLACE / "stillframe.toml"
    settings.write_text(f'state_dir = "{_STATE}"\n')
    show = Show({"STILLFRAME_CONFIG": str(settings), "LC_ALL": "C.UTF-8"})
    try:
        with _guest(show, daemons) as guest:
            return _story(show, guest)
    except (DemoFailed, TooLate, libvirt.libvirtError, subprocess.SubprocessError) as error:
        show.promise(False, f"the demo could not go on: {error}")
        return show.verdict([])
    finally:
        daemons.terminate()


def _story(show: Show, guest: DbGuest) -> int:
    _BACKUPS.mkdir()
    first = _mirror(show, guest, "Mirror it while it runs")
    show.tell(f"The mirror is a plain image: {file_text(_image())}.")
    second = _mirror(show, guest, "Mirror it again: only what changed is moved")
    show.promise(second * 10 < first, f"the second run moved {size_text(second)}, "
                                      f"{second / first:.1%} of the first one's {size_text(first)}")
    killed = _kill_in_commit(show, guest)
    _show_left(show)
    _recover(show, guest)
    found = _boot_mirror(show, guest, killed)
    return show.verdict([
        f"first mirror {size_text(first)} moved, second {size_text(second)}; a third run was killed in its commit;",
        "one `stillframe recover` brought the guest back onto its own image, which it never stopped using;",
        f"the mirror boots, and its database is whole: {found.rows} rows, none missing.",
    ])


@contextlib.contextmanager
def _guest(show: Show, daemons: LibvirtDaemons) -> Iterator[DbGuest]:
    """Give the running guest; it and its files are removed behind the block."""
    show.step("Boot a guest with a database that is written all the time")
    daemons.start()
    content = IMAGES_DIR / "content.raw"
    _make_content(content)
    guest = DbGuest(daemons, IMAGES_DIR, _GUEST, [DiskSpec(size_bytes=_DISK_BYTES, content=content)])
    content.unlink()
    try:
        guest.define()
        began_s = time.monotonic()
        guest.start()
        guest.wait_ready()
        show.tell(f"Guest '{_GUEST}' booted in {duration_text(time.monotonic() - began_s)} "
                  f"(emulated, with guest agent), on {guest.disks['vda'].path}")
        show.tell(f"with {size_text(_FILES * _FILE_BYTES)} of files and an SQLite database (WAL, synchronous=FULL). "
                  "It says on its console which rows are durable:")
        rows, began_s = guest.acknowledged(), time.monotonic()
        more = guest.wait_more_rows(100) - rows
        show.tell(f"row {rows + more} by now, {more / (time.monotonic() - began_s):.0f} rows a second.")
        yield guest
    finally:
        guest.remove()


def _make_content(raw: Path) -> None:
    files = raw.with_suffix(".files")
    files.mkdir()
    for number in range(_FILES):
        (files / f"photo-{number:02d}").write_bytes(os.urandom(_FILE_BYTES))
    make_file_system(raw, _DISK_BYTES)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", files, raw)
    run("rm", "-r", files)


def _mirror(show: Show, guest: DbGuest, title: str) -> int:
    """Run a mirror to its end; return the bytes that were moved."""
    show.step(title)
    before = guest.acknowledged()
    ran = show.run("stillframe", "mirror", _GUEST, str(_BACKUPS))
    show.promise(ran.code == EXIT_OK, f"exit code {ran.code} after {duration_text(ran.seconds)}; "
                                      f"the guest wrote {guest.acknowledged() - before} rows meanwhile")
    moved = _WRITTEN.search(ran.said)
    if moved is None:
        raise DemoFailed("the run did not say how much it wrote")
    return parse_size_bytes(moved[1])


def _kill_in_commit(show: Show, guest: DbGuest) -> Killed:
    show.step("Kill a third run (SIGKILL) while it writes the overlay back into the guest's image")
    with contextlib.closing(Journal(_STATE, SystemClock())) as journal:
        for _ in range(_TRIES):
            process = show.start("stillframe", "mirror", _GUEST, str(_BACKUPS))
            try:
                acknowledged = _stopped_in_commit(process, journal, guest)
                if acknowledged is not None:
                    show.tell("The journal says `committing` and libvirt that the block job is there: "
                              "the run is stopped (SIGSTOP) to look at it.")
                    show.run("stillframe", "status")
                    show.tell(f"$ kill -9 {process.pid}")
                    process.kill()
                    process.wait()
                    return Killed(acknowledged)
                show.tell("This run's commit was over before it could be caught. Once more.")
                show.output(process.communicate(timeout=_RUN_TIMEOUT_S)[0])
            finally:
                process.kill()
                process.wait()
    raise DemoFailed(f"no run of {_TRIES} could be caught in its commit")


def _stopped_in_commit(process: subprocess.Popen[str], journal: Journal, guest: DbGuest) -> int | None:
    """Stop the run in its commit; return the last row acknowledged before its capture.

    None if the commit was over sooner; the run goes on then, or is at its end.
    """
    domain = guest.domain()
    acknowledged = 0
    while process.poll() is None:
        # Read first: whatever was acknowledged here was so before the state that is read next.
        rows = guest.acknowledged()
        record = _open_run(journal, process.pid)
        if record is not None and record.state in _BEFORE_CAPTURE:
            acknowledged = rows
        if record is not None and record.state is State.COMMITTING and domain.blockJobInfo("vda"):
            process.send_signal(signal.SIGSTOP)
            record = _open_run(journal, process.pid)
            if record is not None and record.state is State.COMMITTING and domain.blockJobInfo("vda"):
                return acknowledged
            process.send_signal(signal.SIGCONT)
            return None
        time.sleep(_LOOK_S)
    return None


def _open_run(journal: Journal, pid: int) -> RunRecord | None:
    return next((record for record in journal.open_runs() if record.pid == pid), None)


def _show_left(show: Show) -> None:
    show.step("See what the killed run left")
    ran = show.run("stillframe", "status")
    show.promise(ran.code == NeedsAttention.exit_code, f"exit code {ran.code}: something needs attention")
    left = json.loads(show.ask("stillframe", "status", "--json").said)
    states = [each["state"] for each in left["open_runs"]]
    show.promise(states == [State.COMMITTING.value], f"the journal knows where the run was: {', '.join(states)}")
    show.promise(len(left["guests_on_overlays"]) == 1, "the guest is on an overlay, and still writes")


def _recover(show: Show, guest: DbGuest) -> None:
    show.step("Recover")
    before = guest.acknowledged()
    ran = show.run("stillframe", "recover")
    show.promise(ran.code == EXIT_OK, f"exit code {ran.code} after {duration_text(ran.seconds)}")
    show.run("virsh", "domblklist", _GUEST)
    image = str(guest.disks["vda"].path)
    sources = [guest.disk_source("vda", inactive=inactive)[0] for inactive in (False, True)]
    show.promise(sources == [image, image], "the guest runs on its own image, and would start on it")
    strange = sorted(path.name for path in guest.folder.iterdir() if "overlay" in path.name or "stillframe" in path.name)
    show.promise(not strange, f"no overlay is left in {guest.folder}" + "".join(f" {name}" for name in strange))
    more = guest.wait_more_rows(20)
    show.promise(more > before, f"the guest never stopped: row {before} before, row {more} now")
    ran = show.ask("stillframe", "status")
    show.promise(ran.code == EXIT_OK, f"`stillframe status` ends with {ran.code}: nothing is left to do")


def _boot_mirror(show: Show, guest: DbGuest, killed: Killed) -> CheckResult:
    show.step("Boot a second guest from the mirror and let SQLite check the database")
    show.tell("The mirror is that of the run that was killed: its copy was complete before the commit began.")
    began_s = time.monotonic()
    found = check_image(_image(), "raw")
    show.tell(f"Booted, checked and off again in {duration_text(time.monotonic() - began_s)}.")
    show.promise(found.integrity == "ok", f"pragma integrity_check: {found.integrity}")
    show.promise(found.whole, f"rows {found.first} to {found.last} are contiguous: {found.rows} of them")
    show.promise(found.last >= killed.acknowledged > 0,
                 f"every row acknowledged before the capture is there: {killed.acknowledged} were, "
                 f"the mirror ends with {found.last}")
    show.tell(f"(The live guest is at row {guest.acknowledged()} meanwhile.)")
    return found


def _image() -> Path:
    return _BACKUPS / _GUEST / "vda.img"


if __name__ == "__main__":
    sys.exit(main())
