"""The measurement of prune measures a prune."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bench.prune import PutData, in_folder, measure, on_s3
from stillframe.storage.model import Storage
from stillframe.units import GIB

Place = Callable[[Path], AbstractContextManager[tuple[Storage, PutData]]]


@pytest.mark.parametrize("place", [in_folder, on_s3])
def test_it_builds_marks_and_deletes(place: Place, tmp_path: Path) -> None:
    lines: list[str] = []
    with place(tmp_path / "repository") as (storage, put_data):
        measure(storage, put_data, 60, GIB // 4, 10, 2, lines.append)
    assert any(line.startswith("prune, 2 snapshots left") for line in lines)
    deleted = int(next(line for line in lines if line.startswith("deleted")).split()[1])
    assert deleted > 0
