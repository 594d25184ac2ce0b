"""The process that guards a guest which stands still."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.capture.guard import start_guard
from stillframe.clock import SystemClock


def test_it_takes_no_module_of_the_folder_that_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    mark = tmp_path / "taken"
    for name in ("libvirt", "msgspec", "stillframe"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w'); raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    guard = start_guard(
        "stillframe.capture.guard_capture", ["thaw", "qmp:/nowhere", "uuid", "name", "state", "run", "1"],
        SystemClock())
    assert not mark.exists()
    assert guard is not None
    guard.dismiss()
