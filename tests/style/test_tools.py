"""ruff, mypy and import-linter find nothing, and each of them would find something if it was there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.style.sources import BIN, ROOT

# mypy's later runs go on from what the first one found out, which takes it most of a minute.
pytestmark = pytest.mark.together


def _run(*command: str | Path, cwd: Path = ROOT, stdin: str = "", **environment: str) -> tuple[int, str]:
    # The lab sets PYTHONPATH; to mypy that would make the project's own packages installed, untyped ones.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, input=stdin, capture_output=True, text=True, check=False,
        env={**inherited, "NO_COLOR": "1", "COLUMNS": "200", **environment},
    )
    return done.returncode, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    status, output = _run(BIN / "ruff", "check", "--quiet", ".")
    assert status == 0, output


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("src/stillframe/bad.py", '"""Bad."""\n\nimport os\n', "F401"),
        ("src/stillframe/bad.py", '"""Bad."""\n\n\ndef shown() -> None:\n    pass\n', "D103"),
        ("src/stillframe/bad.py", '"""Bad."""\n\nprint(1)\n', "T201"),
        ("src/stillframe/bad.py", '"""Bad."""\n\nfrom .errors import Refused\n\nRefused("x")\n', "TID252"),
        ("tests/unit/test_bad.py", "def test_it():\n    pass\n", "ANN201"),
    ],
)
def test_ruff_catches_a_bad_line(path: str, source: str, rule: str) -> None:
    status, output = _run(BIN / "ruff", "check", "--stdin-filename", path, "-", stdin=source)
    assert status == 1
    assert rule in output


def test_mypy_finds_nothing() -> None:
    status, output = _run(sys.executable, "-m", "mypy")
    assert status == 0, output


def test_mypy_catches_an_untyped_function(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f(x):\n    return x\n")
    status, output = _run(sys.executable, "-m", "mypy", bad)
    assert status == 1
    assert "no-untyped-def" in output


def test_mypy_knows_the_types_of_the_project(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from stillframe.units import parse_size_bytes\n\nx: str = parse_size_bytes('1M')\n")
    status, output = _run(sys.executable, "-m", "mypy", bad)
    assert status == 1
    assert "[assignment]" in output


def test_the_layers_hold() -> None:
    status, output = _run(BIN / "lint-imports", "--no-cache")
    assert status == 0, output


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("errors", "from stillframe import clock"),  # siblings
        ("process", "import stillframe.cli"),  # upwards
        ("block", "import stillframe.hypervisor"),  # siblings
        ("attic", ""),  # a room that the plan of the house does not show
    ],
)
def test_a_wall_that_is_broken_is_found(tmp_path: Path, importer: str, line: str) -> None:
    status, output = _lint_a_house(tmp_path)
    assert status == 0, output
    (tmp_path / "stillframe" / f"{importer}.py").write_text(f"{line}\n")
    status, output = _lint_a_house(tmp_path)
    assert status == 1
    assert importer in output


def _lint_a_house(folder: Path) -> tuple[int, str]:
    """Run import-linter with the project's own contracts over empty rooms in *folder*."""
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(config)
    package = folder / "stillframe"
    package.mkdir(exist_ok=True)
    drawn = config.partition("\nlayers = [")[2].partition("\n]")[0]
    rooms = re.findall(r"\w+", drawn)
    assert len(rooms) > 5
    for room in ["__init__", *rooms]:
        path = package / f"{room}.py"
        if not path.exists():
            path.write_text("")
    return _run(BIN / "lint-imports", "--no-cache", cwd=folder, PYTHONPATH=str(folder))
