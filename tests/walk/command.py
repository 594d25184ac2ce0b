"""One call of the command, which stands still at each step of its journal until the test lets it go on."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.forked import Forked

_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 150.0


@dataclass(frozen=True)
class Ended:
    """How a call ended. *steps* are those that it came to."""

    code: int
    out: str
    err: str
    steps: tuple[tuple[str, str], ...]

    @property
    def body(self) -> dict[str, Any]:
        """What it said as JSON, {} if nothing."""
        found: dict[str, Any] = json.loads(self.out) if self.out.strip() else {}
        return found

    @property
    def guest(self) -> dict[str, Any]:
        """What it said of its one guest."""
        found: dict[str, Any] = self.body["guests"][0]
        return found


class Command:
    """The command while it runs. *at_step* is called with the step's number from 0, its state and phase."""

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str],
        at_step: Callable[[Command, int, str, str], None], mutation: str = "-",
    ) -> None:
        self._at_step = at_step
        self._files = files = contextlib.ExitStack()
        self._out = files.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 -- closed by `end`
        self._err = files.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        self._link, theirs = socket.socketpair()
        self._link.settimeout(_TIMEOUT_S)
        with theirs:
            self._process = Forked(
                [sys.executable, "-m", "tests.walk.driver", mutation, *words], passing=theirs.fileno(),
                output=self._out.fileno(), errors=self._err.fileno(), env=environment, cwd=_ROOT)

    def kill(self) -> None:
        """Kill the command with SIGKILL."""
        self._process.kill()

    def interrupt(self) -> None:
        """Send it what Ctrl-C sends."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> Ended:
        """Let it go on from step to step; return how it ended."""
        steps: list[tuple[str, str]] = []
        try:
            with self._link, self._link.makefile("r") as told:
                for line in told:
                    state, phase = line.split()
                    steps.append((state, phase))
                    self._at_step(self, len(steps) - 1, state, phase)
                    if self._process.running:
                        self._link.sendall(b".")
            code = self._process.wait(_TIMEOUT_S)
        finally:
            self.kill()
        with self._files:
            self._out.seek(0)
            self._err.seek(0)
            return Ended(code, self._out.read(), self._err.read(), tuple(steps))
