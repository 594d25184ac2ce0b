"""Watching a guest that is drilled: waiting until it is up, and the user's checks. Every wait has an end.

Each look asks first whether the guest still runs: one that ended or stopped fails the drill at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stillframe import process
from stillframe.clock import Clock, Deadline
from stillframe.errors import ConnectionLost, DrillFailed, GuestUnknown, HypervisorError, StillframeError
from stillframe.hypervisor.model import Power
from stillframe.hypervisor.transient import TransientGuest
from stillframe.repository.drills import CheckResult
from stillframe.units import duration_text

AGENT, CONSOLE, SCRIPT = "agent", "console", "script"
_LOOK_S = 0.25
_SHOWN_BYTES = 16 * 1024
_CONSOLE_BYTES = 4 * 1024 * 1024  # libvirt's log daemon starts a new file long before


@dataclass(frozen=True, slots=True)
class Proof:
    """What is to show that a guest works.

    *expect* is looked for in what the guest prints on its first serial port; *script* is a program on this
    host, *checks* are commands inside the guest. Without *expect* and *script* the agent must answer. The
    guest has *boot_s* to come up, each check and the script has *check_s*; a script that alone tells
    that the guest is up has *boot_s*.
    """

    expect: re.Pattern[str] | None
    script: str
    checks: tuple[str, ...]
    boot_s: float
    check_s: float

    @property
    def waits_for(self) -> tuple[str, ...]:
        """What is waited for, in this order."""
        asks_agent = bool(self.checks) or not (self.expect or self.script)
        wanted = ((CONSOLE, self.expect is not None), (AGENT, asks_agent), (SCRIPT, bool(self.script)))
        return tuple(name for name, is_wanted in wanted if is_wanted)


@dataclass
class Watch:
    """One guest that was started just now. *server_logs* gives what the servers of its disks said.

    *boot_s* is how long it took to be up, None until it is.
    """

    guest: TransientGuest
    console: Path
    clock: Clock
    stop: Callable[[], StillframeError | None]
    server_logs: Callable[[], list[str]]
    boot_s: float | None = None
    results: list[CheckResult] = field(default_factory=list)

    def prove(self, proof: Proof, script_log: Path, facts: Mapping[str, str]) -> None:
        """Wait until the guest is up and carry out all checks. Raises DrillFailed, and what *stop* gives."""
        began_s, deadline = self.clock.monotonic_s(), Deadline(self.clock, proof.boot_s)
        if proof.expect is not None:
            self._wait_console(proof.expect, deadline)
        if AGENT in proof.waits_for:
            self._wait(deadline, self.guest.agent_answers, "its agent did not answer")
        if proof.waits_for != (SCRIPT,):
            self.boot_s = self.clock.monotonic_s() - began_s
        if proof.script:
            self._run(proof.script, script_log, facts, deadline if self.boot_s is None else
                      Deadline(self.clock, proof.check_s))
            if self.boot_s is None:
                self.boot_s = self.clock.monotonic_s() - began_s
        for command in proof.checks:
            self._check(command, proof.check_s)
        self._look()
        failed = [each.command for each in self.results if not each.passed]
        if failed:
            raise DrillFailed(f"the check failed: {'; '.join(failed)}")

    def printed(self) -> str:
        """Return what the guest printed lately on its first serial port."""
        try:
            with self.console.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _CONSOLE_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _wait_console(self, expect: re.Pattern[str], deadline: Deadline) -> None:
        self._wait(deadline, lambda: expect.search(self.printed()) is not None,
                   f"it did not print {expect.pattern!r}")

    def _wait(self, deadline: Deadline, came: Callable[[], bool], otherwise: str) -> None:
        while not self._came(came):
            self._look()
            if deadline.passed():
                raise DrillFailed(f"{otherwise} within {duration_text(deadline.timeout_s)}")
            self.clock.pause(_LOOK_S)

    def _came(self, came: Callable[[], bool]) -> bool:
        try:
            return came()
        except GuestUnknown:  # it ended: libvirt forgets a guest that is not defined
            self._look()
            raise

    def _look(self) -> None:
        """Raise what ends the drill: a signal, a guest that does not run, a disk that can't be read."""
        stopped = self.stop()
        if stopped is not None:
            raise stopped
        power = self.guest.power()
        if self.guest.is_cut_off():
            raise ConnectionLost(
                "libvirt was restarted in the middle of the drill; that says nothing of the snapshot. "
                "Drill it again.", 0)
        if power is Power.RUNNING:
            return
        said = "".join(f"; {line}" for line in self.server_logs()[-3:])
        if power is Power.PAUSED_ON_IO_ERROR:
            raise DrillFailed(f"a disk could not be read, or written to{said}")
        raise DrillFailed(f"the guest stopped by itself ({power.value}){said}")

    def _check(self, command: str, timeout_s: float) -> None:
        deadline, began_s = Deadline(self.clock, timeout_s), self.clock.monotonic_s()
        code, output = None, f"it did not end within {duration_text(timeout_s)}"
        try:
            number = self.guest.begin(command)
            while not deadline.passed():
                ended = self.guest.ended(number)
                if ended is not None:
                    code, output = ended.exit_code, ended.output
                    break
                self._look()
                self.clock.pause(_LOOK_S)
        except (ConnectionLost, GuestUnknown):
            self._look()
            raise
        except HypervisorError as error:
            output = error.message
        self._note(command, code, output, began_s)

    def _run(self, script: str, log: Path, facts: Mapping[str, str], deadline: Deadline) -> None:
        """Run the user's script on this host. Its output goes to a file: it can't hang on a full pipe."""
        began_s = self.clock.monotonic_s()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with process.running([script], environment=facts, output=output) as running:
                try:
                    code = self._ended(running, deadline)
                finally:
                    if running.returncode is None:
                        process.stop_group(running)
        finally:
            os.close(output)
        late = "" if code is not None else f"it did not end within {duration_text(deadline.timeout_s)}\n"
        self._note(script, code, late + log.read_bytes()[-_SHOWN_BYTES:].decode(errors="replace"), began_s)

    def _ended(self, running: process.Helper, deadline: Deadline) -> int | None:
        while running.poll() is None:
            self._look()
            if deadline.passed():
                return None
            self.clock.pause(_LOOK_S)
        return running.returncode

    def _note(self, command: str, code: int | None, output: str, began_s: float) -> None:
        took_s = self.clock.monotonic_s() - began_s
        self.results.append(CheckResult(command, code, output[-_SHOWN_BYTES:], round(took_s, 3)))
