"""A server on loopback that the lab starts and ends."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from lab.ports import listens
from lab.waiting import PATIENCE_S, wait_for


class Server:
    """A process that listens at `port` once `_start` has returned, and is gone after the block.

    *folder* is for all that it keeps; its output is in ``output`` there.
    """

    #: What ends it.
    _END = signal.SIGTERM

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, folder: str) -> str:
        """Return the address of a repository in *folder*."""
        raise NotImplementedError

    @property
    def credentials(self) -> str:
        """What a credentials file for the server says, "" if it needs none."""
        return ""

    def said(self, most_bytes: int = 4000) -> str:
        """Return the end of what the process has printed."""
        return (self._folder / "output").read_bytes()[-most_bytes:].decode(errors="replace")

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(self._END)
            self._process.wait(PATIENCE_S)
            self._process = None

    def _start(self, command: Sequence[str]) -> None:
        with open(self._folder / "output", "ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        wait_for(f"{command[0]} listens", lambda: listens(self.port), PATIENCE_S)
