"""The measurement of prune measures a prune."""

from __future__ import annotations

from pathlib import Path

from bench.prune import measure
from stillframe.units import GIB


def test_it_builds_marks_and_deletes(tmp_path: Path) -> None:
    lines: list[str] = []
    measure(tmp_path / "repository", 60, GIB // 4, 10, 2, lines.append)
    assert any(line.startswith("prune, 2 snapshots left") for line in lines)
    deleted = int(next(line for line in lines if line.startswith("deleted")).split()[1])
    assert deleted > 0
