"""What the demo shows a person: steps, commands as one would type them, promises kept or broken."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_COMMAND_TIMEOUT_S = 120.0
_BOLD, _DIM, _RED, _GREEN, _CYAN = "1", "2", "31;1", "32", "36"


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that was run: its exit code, what it said on stdout, and how long it took."""

    code: int
    said: str
    seconds: float


class Show:
    """Prints to stdout, in colour if that is a terminal; counts promises that were not kept."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = {**os.environ, **environment}
        self._began_s = time.monotonic()
        self._coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._steps = 0
        self.broken: list[str] = []

    def elapsed_s(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self._began_s

    def step(self, title: str) -> None:
        """Begin the next numbered step."""
        self._steps += 1
        print(f"\n{self._in(_BOLD, f'{self._steps}. {title}')} {self._in(_DIM, f'[{self.elapsed_s():.0f} s]')}",
              flush=True)

    def tell(self, text: str) -> None:
        """Print a line of the story."""
        print(f"   {text}", flush=True)

    def promise(self, kept: bool, text: str) -> None:
        """Say that a promise is kept, or broken; a broken one makes the demo fail."""
        if not kept:
            self.broken.append(text)
        mark = self._in(_GREEN, "ok") if kept else self._in(_RED, "NOT SO")
        print(f"   {mark}: {text}", flush=True)

    def run(self, *command: str) -> Ran:
        """Run a command, shown as a person would type it; ``stillframe`` is this checkout's."""
        began_s = time.monotonic()
        process = self.start(*command)
        try:
            said = process.communicate(timeout=_COMMAND_TIMEOUT_S)[0]
        finally:
            process.kill()
        self.output(said)
        return Ran(process.returncode, said, time.monotonic() - began_s)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command, shown as a person would type it; its stdout is a pipe."""
        print(f"   {self._in(_CYAN, f'$ {shlex.join(command)}')}", flush=True)
        return subprocess.Popen(_really(command), stdout=subprocess.PIPE, text=True, env=self._environment)

    def ask(self, *command: str) -> Ran:
        """Run a command whose output is for the demo, not for the person, and show nothing."""
        began_s = time.monotonic()
        done = subprocess.run(_really(command), capture_output=True, text=True, check=False,
                              timeout=_COMMAND_TIMEOUT_S, env=self._environment)
        return Ran(done.returncode, done.stdout, time.monotonic() - began_s)

    def output(self, said: str) -> None:
        """Show what a command said."""
        for line in said.splitlines():
            if line.strip():
                print(f"     {self._in(_DIM, line)}", flush=True)

    def verdict(self, lines: list[str]) -> int:
        """Print the summary; return the exit code of the demo."""
        print(f"\n{self._in(_BOLD, 'In short')} {self._in(_DIM, f'[{self.elapsed_s():.0f} s]')}")
        for line in lines:
            self.tell(line)
        for text in self.broken:
            print(f"   {self._in(_RED, 'NOT AS PROMISED')}: {text}")
        if self.broken:
            return 1
        print(f"   {self._in(_GREEN, 'Everything is as promised.')}")
        return 0

    def _in(self, colour: str, text: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._coloured else text


def _really(command: tuple[str, ...]) -> list[str]:
    if command[0] == "stillframe":
        return [sys.executable, "-m", *command]
    return list(command)


def file_text(path: Path) -> str:
    """Return what a file takes on disk and what it seems to hold, for a person."""
    found = path.stat()
    return f"{found.st_size / 2**20:.0f} MiB long, {found.st_blocks * 512 / 2**20:.0f} MiB on disk"
