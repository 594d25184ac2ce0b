"""Following a page of docs/ word for word: its commands, and a machine to run them on."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from lab.waiting import PATIENCE_S
from stillframe.errors import EXIT_CRASH_CONSISTENT, EXIT_OK
from tests.integration.repositories import ROOT

#: Where pages put things; the lab has these folders for itself.
SETTINGS, STATE, SERVED = Path("/etc/stillframe"), Path("/var/lib/stillframe"), Path("/srv")
_TIMEOUT_S = 250.0
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# Lines of a block may be empty; an indented list item is none.
_BLOCK = re.compile(r"^\n((?:    .*\n(?:\n(?=    ))*)+)", re.MULTILINE)
_COMMAND = re.compile(r"^(?:.*<<'END'\n(?:.*\n)*?END|.+)$", re.MULTILINE)
_OWN = ("/etc", "/srv", "/root", "/var/lib/stillframe",
        "/var/lib/samba", "/var/cache/samba", "/var/log/samba")
_MOUNTS = "".join(f"""
mkdir -p {folder} "$0{folder}/upper" "$0{folder}/work"
mount -t overlay overlay -o lowerdir={folder},upperdir="$0{folder}/upper",workdir="$0{folder}/work" {folder}
""" for folder in _OWN)


def blocks(page: str) -> list[str]:
    """Return the blocks of commands of a page, in order."""
    text = _FENCED.sub("", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [textwrap.dedent(found).strip("\n") for found in _BLOCK.findall(text)]


def commands(page: str) -> list[str]:
    """Return the commands of a page, in order: a line each, or more where a here-document belongs to it."""
    return _COMMAND.findall("\n".join(blocks(page)))


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which `stillframe` is this one, and no setting is made. *folder* is for it."""
    command = folder / "stillframe"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m stillframe "$@"\n')
    command.chmod(0o755)
    settings = {name: value for name, value in os.environ.items() if not name.startswith("STILLFRAME_")}
    return {**settings, "PATH": f"{folder}:{os.environ['PATH']}"}


@contextlib.contextmanager
def typing(folder: Path) -> Iterator[dict[str, str]]:
    """Give an `environment` in which the lab itself is the machine of the page; clear up behind it."""
    programs = folder / "bin"
    programs.mkdir()
    try:
        yield environment(programs)
    finally:
        for place in (SETTINGS, STATE, SERVED):
            clear(place)


def clear(folder: Path) -> None:
    """Delete what is in a folder."""
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def run(
    text: str, environment: Mapping[str, str], code: int = EXIT_OK, within: tuple[str, ...] = (),
) -> str:
    """Have bash run a line or a block, which must end with that code, and return what it prints."""
    done = subprocess.run(
        [*within, "bash", "-eu", "-o", "pipefail", "-c", text], env=environment, capture_output=True,
        text=True, check=False, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert done.returncode == code, f"{done.returncode}: {text}\n{done.stdout}{done.stderr}"
    return done.stdout


class OwnMachine:
    """A mount namespace with /etc, /srv, /root and stillframe's state of its own, for as long as the block.

    What a page does to a server and a host is done there and nowhere else. *names* are the values of what the
    page's line `export NAME=VALUE …` leaves to the reader. *services* is the line that `systemctl` is there.
    """

    def __init__(self, folder: Path, names: Mapping[str, str], services: str = "true") -> None:
        self._folder = folder
        self.names = dict(names)
        for each in ("mounted", "bin"):
            (folder / each).mkdir(parents=True)
        self._environment = {**environment(folder / "bin"), **names, "HOME": "/root"}
        systemctl = folder / "bin" / "systemctl"
        systemctl.write_text(f"#!/bin/sh\n{services}\n")
        systemctl.chmod(0o755)

    def __enter__(self) -> Self:
        # On a file system of its own: an overlay can't lie on another.
        script = (f'set -e; mount -t tmpfs tmpfs "$0"; {_MOUNTS}\nset +e\n'
                  'echo ready; exec sleep infinity')
        self._process = subprocess.Popen(
            ["unshare", "--mount", "bash", "-c", script, self._folder / "mounted"], text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def within(self) -> tuple[str, ...]:
        """What to put before a command, so that it runs there."""
        return "nsenter", "--mount", f"--target={self._process.pid}", "--"

    def path(self, name: str) -> Path:
        """Return where a file of that machine is to be seen from here."""
        return Path(f"/proc/{self._process.pid}/root{name}")

    def run(self, lines: str, code: int = EXIT_OK) -> str:
        """See run."""
        return run(lines, self._environment, code, self.within)

    def follow(self, block: str) -> str:
        """Do what a block of the page says; return what was printed. The guest has no agent."""
        if block.startswith("export "):
            assert set(re.findall(r"\b([A-Z_]+)=", block)) == set(self.names)
            return ""
        return self.run(block, EXIT_CRASH_CONSISTENT if "stillframe backup" in block else EXIT_OK)
