"""Following a page of docs/ word for word: what it has in its indented blocks is run as it stands there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from stillframe.errors import EXIT_OK
from tests.integration.repositories import ROOT

#: Where pages put things; the lab has these folders for itself.
SETTINGS, STATE, SERVED = Path("/etc/stillframe"), Path("/var/lib/stillframe"), Path("/srv")
_TIMEOUT_S = 250.0


@contextlib.contextmanager
def typing(folder: Path) -> Iterator[dict[str, str]]:
    """Give an environment in which `stillframe` is this one, and no setting is made; clear up behind it."""
    command = folder / "bin" / "stillframe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m stillframe "$@"\n')
    command.chmod(0o755)
    settings = {name: value for name, value in os.environ.items() if not name.startswith("STILLFRAME_")}
    try:
        yield {**settings, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    finally:
        for place in (SETTINGS, STATE, SERVED):
            clear(place)


def clear(folder: Path) -> None:
    """Delete what is in a folder."""
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def run(text: str, environment: Mapping[str, str], code: int = EXIT_OK) -> str:
    """Have bash run a line or a block; it must end with *code*. Return what it printed."""
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", text], env=environment, capture_output=True, text=True,
        check=False, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert done.returncode == code, f"{text}\n{done.stdout}{done.stderr}"
    return done.stdout


def commands(page: str) -> list[str]:
    """Return the commands of a page, in order: a line each, or more where a here-document belongs to it."""
    text = (ROOT / "docs" / page).read_text()
    # Lines of a block may be empty; an indented list item is none.
    blocks = re.findall(r"^\n((?:    .*\n(?:\n(?=    ))*)+)", text, re.MULTILINE)
    lines = "".join(blocks).replace("\n    ", "\n").removeprefix("    ")
    return re.findall(r"^(?:.*<<'END'\n(?:.*\n)*?END|.+)$", lines, re.MULTILINE)
