"""Stillframe's own command as a contender: each call a process, its time from its start to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Own:
    """The command with a repository of its own: in the folder *place*, or at *address* on a server.

    *settings* are environment variables by which it learns who we are there.
    """

    def __init__(
        self, guest: str, place: Path, address: str = "", settings: Mapping[str, str] | None = None,
    ) -> None:
        self._state = ["--state-dir", str(place / "state"), "--config", "/dev/null"]
        self._settings = {**os.environ, **(settings or {})}
        secret = place / "secret"
        secret.touch(0o600)
        secret.write_text("bench\n")
        self._address = address or str(place / "repository")
        self._repository = ["--repo", self._address, "--passphrase-file", str(secret)]
        self._guest = guest

    def call(self, *words: str, repository: bool = True) -> tuple[float, dict[str, Any]]:
        """Return the seconds that a command took, and its JSON. Ends the benchmark if it fails."""
        command = [sys.executable, "-m", "stillframe", *words, *self._state, "--json",
                   *(self._repository if repository else [])]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._settings)
        seconds = time.monotonic() - began
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return seconds, json.loads(done.stdout)

    def init(self) -> None:
        """Make the repository."""
        self.call("init", self._address, *self._repository[2:], repository=False)

    def backup(self, method: str) -> tuple[float, dict[str, Any]]:
        """Back the guest up; return the seconds, and what is said of the guest."""
        seconds, body = self.call("backup", self._guest, "--quiesce", "none", "--method", method)
        return seconds, body["guests"][0]
