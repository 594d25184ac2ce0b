"""One run in a process of its own that stops itself (SIGSTOP) at a given step of the journal.

    python -m tests.fault.driver WHAT GUEST DEST STATE_DIR OVERLAY_DIR QUIESCE STATE PHASE LIMIT

GUEST is a name, or qmp:SOCKET. WHAT is mirror, backup, bitmap, recover, standing, standing-fail or settle.
For a backup, DEST is the repository, which PASSPHRASE opens; for bitmap, a PullStore. `standing` leaves the
guest on overlays, and makes DEST/current the images of that moment; with `-fail`, the copy is given up. STATE
and PHASE ("intent" or "done") say where; "-" runs through. `reached` is printed just before stopping. LIMIT
is the overlays' limit in bytes, 0 for none. The exit code is the error's, 0 for none; the error is printed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from stillframe.backup.run import BackupJob, backup_guest
from stillframe.block.anchor import Anchor
from stillframe.capture.journal import Journal, in_repository
from stillframe.capture.limits import Limits
from stillframe.capture.lock import domain_lock
from stillframe.capture.method import Method
from stillframe.capture.plan import Wishes, make_plan
from stillframe.capture.recover import recover_domain
from stillframe.capture.run import Tools
from stillframe.capture.standing import captured_by_standing_overlay, settle
from stillframe.capture.states import Quiesce, State
from stillframe.capture.stepping import Watcher
from stillframe.clock import Clock, SystemClock
from stillframe.errors import Interrupted, StillframeError
from stillframe.hypervisor.advice import BARE, is_bare
from stillframe.hypervisor.bare import find_bare
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import find_domain
from stillframe.hypervisor.guest import Guest
from stillframe.hypervisor.qmp import QmpLink
from stillframe.mirror.place import LocalDestination
from stillframe.mirror.run import MirrorJob, mirror_guest
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.opened import Secret, open_repository
from stillframe.storage.local import LocalStorage
from stillframe.units import MIB
from tests.pull_store import PullStore

PASSPHRASE = b"correct horse"
HOST = "lab"

LIMITS = Limits(freeze_s=10, agent_s=5, shutdown_s=20, commit_s=60, min_free_bytes=64 * MIB)


def stop_at(state: str, phase: str) -> Callable[[State, str], None]:
    """Return the journal's hook that stops this process at the first such step."""
    reached = False

    def hook(seen_state: State, seen_phase: str) -> None:
        nonlocal reached
        if not reached and (seen_state.value, seen_phase) == (state, phase):
            reached = True
            print("reached", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    return hook


def find(guest: str, clock: Clock) -> Guest:
    """Return the guest by its name, or by its QMP socket."""
    if is_bare(guest):
        return find_bare(QmpLink(guest.removeprefix(BARE), clock))
    return find_domain(Connection("qemu:///system", clock), guest)


def back_up(domain: Guest, repository: Path, wishes: Wishes, tools: Tools) -> None:
    """Back one guest up, and print the ID of the snapshot."""
    secret = Secret(SlotKind.PASSPHRASE, PASSPHRASE)
    job = BackupJob(
        domain, lambda: open_repository(LocalStorage(repository), secret), repository, HOST,
        tools.journal.folder / "hints", wishes, lambda: None, lambda *_: None)
    result = backup_guest(job, tools)
    print(f"snapshot {result.snapshot}", flush=True)


def stand(domain: Guest, destination: Path, wishes: Wishes, tools: Tools, *, fail: bool) -> None:
    """Capture the guest by standing overlays into images that are replaced all at once."""
    current = destination / "current"
    anchor = None
    if current.exists():
        anchor = msgspec.json.decode((current / "anchor.json").read_bytes(), type=Anchor)
    plan = make_plan(domain, wishes, tools.journal.standing(domain.uuid))
    where = in_repository(str(destination))  # whose folder recover does not look into
    with captured_by_standing_overlay(plan, tools, where, lambda: None, anchor) as capture:
        if fail:
            raise Interrupted("given up by the test")
        new = destination / capture.run_id
        new.mkdir()
        for disk in capture.disks:
            old, image = current / f"{disk.target}.img", new / f"{disk.target}.img"
            with disk.read() as reader, reader.connect() as connection:
                changed = reader.changed()
                shutil.copy2(old, image) if changed is not None else image.touch()
                with image.open("r+b") as file:
                    file.truncate(reader.size_bytes)
                    for extent in reader.extents() if changed is None else changed:
                        buffer = bytearray(extent.length_bytes)
                        if not extent.kind.reads_as_zero:
                            connection.pread_into(memoryview(buffer), extent.offset_bytes)
                        os.pwrite(file.fileno(), buffer, extent.offset_bytes)
            print(f"{disk.target}: {'whole' if changed is None else 'by changes'}, {disk.note}", flush=True)
        capture.check_still()
        (new / "anchor.json").write_bytes(msgspec.json.encode(capture.anchor))
        link = destination / "next"
        link.symlink_to(new.name)
        link.replace(current)


def main() -> int:
    """Do the run."""
    what, guest, destination, state_dir, overlays, quiesce, state, phase, limit = sys.argv[1:]
    limits = replace(LIMITS, overlay_bytes=int(limit) or None)
    clock = SystemClock()
    journal = Journal(Path(state_dir), clock, stop_at(state, phase))
    say = Watcher(say=lambda text: print(f"# {text}", flush=True), commit=lambda _progress: None)
    tools = Tools(journal, clock, say)
    try:
        domain = find(guest, clock)
        if what == "recover":
            with domain_lock(journal.folder, domain.uuid, domain.name, "recover", clock):
                recover_domain(domain, tools, limits)
        elif what == "bitmap":
            PullStore(Path(destination)).take(
                domain, tools, Wishes(Quiesce(quiesce), Path(overlays), limits=limits))
        elif what in ("standing", "standing-fail", "settle"):
            with domain_lock(journal.folder, domain.uuid, domain.name, what, clock):
                recover_domain(domain, tools, limits)
                if what == "settle":
                    settle(domain, tools, limits)
                else:
                    wishes = Wishes(Quiesce(quiesce), Path(overlays), limits=limits, method=Method.OVERLAY)
                    stand(domain, Path(destination), wishes, tools, fail=what == "standing-fail")
        elif what == "backup":
            wishes = Wishes(Quiesce(quiesce), Path(overlays), limits=limits, method=Method.OVERLAY)
            back_up(domain, Path(destination), wishes, tools)
        else:
            wishes = Wishes(Quiesce(quiesce), Path(overlays), limits=limits, method=Method.OVERLAY)
            mirror_guest(
                MirrorJob(domain, LocalDestination(Path(destination)), wishes, False, lambda: None,
                          lambda _progress: None),
                tools,
            )
    except StillframeError as error:
        print(error.text(), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
