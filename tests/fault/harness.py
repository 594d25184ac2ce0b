"""Stopping a run at a step, killing something there, recovering, and looking at every byte."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import forked
from lab.barequemu import BareQemu
from lab.daemons import LibvirtDaemons
from lab.forked import Forked
from lab.guest import Guest
from lab.waiting import PATIENCE_S, wait_for
from stillframe.capture.states import State

_ROOT = Path(__file__).resolve().parent.parent.parent
_RUN_TIMEOUT_S = 150.0


class Victim(enum.Enum):
    """What is killed (SIGKILL)."""

    TOOL = "tool"
    LIBVIRTD = "libvirtd"
    QEMU = "qemu"


@dataclass(frozen=True)
class Place:
    """Where a run's things are."""

    destination: Path
    state_dir: Path
    overlays: Path

    def mirror(self, guest: Guest | BareQemu) -> Path:
        """Return the mirror folder of *guest*."""
        return self.destination / guest.name


def named(guest: Guest | BareQemu) -> str:
    """Return what names *guest* to stillframe."""
    return guest.address if isinstance(guest, BareQemu) else guest.name


class Run:
    """A run in a process of its own, stopped at a step if one is given."""

    def __init__(
        self, place: Place, guest: Guest | BareQemu, *, what: str = "mirror", quiesce: str = "none",
        state: State | None = None, phase: str = "-", overlay_limit_bytes: int = 0,
    ) -> None:
        self._start([
            sys.executable, "-m", "tests.fault.driver", what, named(guest),
            str(place.destination), str(place.state_dir), str(place.overlays), quiesce,
            state.value if state else "-", phase, str(overlay_limit_bytes)])

    def _start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        said, output = os.pipe()
        self._process = Forked(command, output=output, errors=output, env=env, cwd=_ROOT)
        os.close(output)
        self._said = os.fdopen(said)
        self.output = ""

    def wait_reached(self) -> bool:
        """Wait until the run stopped at its step; return False if it ended without coming there."""
        for line in self._said:
            self.output += line
            if line == "reached\n":
                wait_for("the run stops itself", self._is_stopped, PATIENCE_S)
                return True
        return False

    def kill(self) -> None:
        """Kill the run."""
        self._process.kill()

    def resume_only(self) -> None:
        """Let the run go on, without waiting."""
        self._process.send_signal(signal.SIGCONT)

    def go_on(self) -> int:
        """Let the run go on; return its exit code once it ended."""
        self.resume_only()
        return self.end()

    def end(self) -> int:
        """Return the exit code once the run ended."""
        code = self._process.wait(_RUN_TIMEOUT_S)
        self.output += self._said.read()
        return code

    def _is_stopped(self) -> bool:
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"


def strike(victim: Victim, run: Run, guest: Guest, daemons: LibvirtDaemons) -> None:
    """Kill *victim* while *run* stands at its step; what survives goes on to its end."""
    if victim is Victim.TOOL:
        run.kill()
        return
    if victim is Victim.LIBVIRTD:
        daemons.kill_libvirtd()
        daemons.start()
    else:
        daemons.kill_qemu(guest.name)
    run.go_on()


def recover(place: Place, guest: Guest | BareQemu, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `stillframe recover` on the guest and return what came of it."""
    return forked.run(
        [sys.executable, "-m", "stillframe", "recover", named(guest), "--state-dir", str(place.state_dir),
         "--json", *options],
        timeout_s=_RUN_TIMEOUT_S, cwd=_ROOT)


def overlays_left(place: Place) -> list[Path]:
    """Return the overlay files that are there."""
    return list(place.overlays.rglob("*.stillframe-overlay.qcow2"))


@contextlib.contextmanager
def small_file_system(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of a given size in the lab's own mount namespace."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder], check=True)
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
