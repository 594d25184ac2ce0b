"""What the demo shows a person: steps, commands as one would type them, promises kept or broken."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

# A repository may be behind a slow line.
_COMMAND_TIMEOUT_S = 900.0
_DRAIN_TIMEOUT_S = 5.0
_BOLD, _DIM, _RED, _GREEN, _CYAN = "1", "2", "31;1", "32", "36"


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that was run: its exit code, what it said, and how long it took."""

    code: int
    said: str
    seconds: float


class Running:
    """A command that runs; what it says is shown line by line as it comes."""

    def __init__(self, process: subprocess.Popen[str], show: Show) -> None:
        self.process = process
        self._show = show
        self._began_s = time.monotonic()
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def end(self, timeout_s: float = _COMMAND_TIMEOUT_S) -> Ran:
        """Wait for the end; a command that takes too long is killed. Raises TimeoutExpired."""
        try:
            code = self.process.wait(timeout_s)
        finally:
            self.kill()
        return Ran(code, "".join(self._lines), time.monotonic() - self._began_s)

    def kill(self) -> None:
        """Kill it (SIGKILL) if it still runs; return once it is gone and all it said is shown."""
        self.process.kill()
        self.process.wait()
        self._reader.join(_DRAIN_TIMEOUT_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            self._show.output(line)


class Show:
    """Prints to stdout, in colour if that is a terminal; remembers promises that were not kept."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = {**os.environ, **environment}
        self._began_s = time.monotonic()
        self._coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._steps = 0
        self._broken: list[str] = []

    def step(self, title: str) -> None:
        """Begin the next numbered step."""
        self._steps += 1
        self._heading(f"{self._steps}. {title}")

    def tell(self, text: str) -> None:
        """Print a line of the story."""
        print(f"   {text}", flush=True)

    def promise(self, kept: bool, text: str) -> None:
        """Say that something was to be so, and whether it is; if it is not, the demo fails."""
        if not kept:
            self._broken.append(text)
        mark = self._in(_GREEN, "ok:") if kept else self._in(_RED, "NOT AS PROMISED:")
        print(f"   {mark} {text}", flush=True)

    def run(self, *command: str) -> Ran:
        """Run a command to its end, shown as a person would type it."""
        return self.start(*command).end()

    def start(self, *command: str) -> Running:
        """Start a command, shown as a person would type it; ``stillframe`` is this checkout's."""
        self.typed(*command)
        return Running(
            subprocess.Popen(_really(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, env=self._environment),
            self,
        )

    def typed(self, *command: str) -> None:
        """Show a command as a person would type it."""
        print(f"   {self._in(_CYAN, f'$ {shlex.join(command)}')}", flush=True)

    def ask(self, *command: str) -> Ran:
        """Run a command whose output is for the demo: nothing is shown."""
        began_s = time.monotonic()
        done = subprocess.run(_really(command), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              check=False, timeout=_COMMAND_TIMEOUT_S, env=self._environment)
        return Ran(done.returncode, done.stdout, time.monotonic() - began_s)

    def output(self, line: str) -> None:
        """Show a line that a command said."""
        if line.strip():
            print(f"     {self._in(_DIM, line.rstrip())}", flush=True)

    def verdict(self, lines: Sequence[str]) -> int:
        """Print *lines* if all promises were kept, else those that were not; return the exit code."""
        self._heading("In short")
        for line in lines if not self._broken else ():
            self.tell(line)
        for text in self._broken:
            print(f"   {self._in(_RED, 'NOT AS PROMISED:')} {text}")
        if not self._broken:
            print(f"   {self._in(_GREEN, 'Everything is as promised.')}", flush=True)
        return 1 if self._broken else 0

    def _heading(self, title: str) -> None:
        seconds = f"[{time.monotonic() - self._began_s:.0f} s]"
        print(f"\n{self._in(_BOLD, title)} {self._in(_DIM, seconds)}", flush=True)

    def _in(self, colour: str, text: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._coloured else text


def _really(command: Sequence[str]) -> list[str]:
    if command[0] == "stillframe":
        return [sys.executable, "-m", *command]
    return list(command)
