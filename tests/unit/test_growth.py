"""Watching overlays grow, on the real file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillframe.capture import growth
from stillframe.capture.growth import (
    Watermark,
    allocated_bytes,
    file_system_of,
    free_bytes,
    on_network,
    plan_watermarks,
)
from stillframe.capture.limits import Limits
from stillframe.errors import OverlaySpace
from stillframe.units import GIB, KIB, MIB


def fill(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.write(b"x" * size_bytes)
        file.flush()


def test_what_a_file_takes_is_not_what_it_seems_to_hold(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(GIB)
    assert allocated_bytes(str(sparse)) < MIB
    fill(tmp_path / "full", 256 * KIB)
    assert 256 * KIB <= allocated_bytes(str(tmp_path / "full")) < MIB
    assert allocated_bytes(str(tmp_path / "absent")) == 0


def test_the_limit_is_for_all_overlays_of_a_file_system_together(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b")]
    (mark,) = plan_watermarks(paths, Limits(overlay_bytes=MIB, min_free_bytes=MIB))
    assert (mark.paths, mark.limit_bytes) == (tuple(paths), MIB)
    assert mark.reached() is None
    fill(tmp_path / "a", 600 * KIB)
    assert mark.reached() is None
    fill(tmp_path / "b", 600 * KIB)
    error = mark.reached()
    assert error is not None
    assert "1.0 MiB" in error.message


def test_overlays_on_two_file_systems_are_watched_apart(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    assert other.stat().st_dev != tmp_path.stat().st_dev
    paths = [str(tmp_path / "a"), str(other / "b"), str(tmp_path / "c")]
    marks = plan_watermarks(paths, Limits(min_free_bytes=1))
    assert sorted(mark.paths for mark in marks) == sorted([(paths[0], paths[2]), (paths[1],)])


def test_without_a_limit_half_of_what_is_free_may_be_used(tmp_path: Path) -> None:
    free = free_bytes(str(tmp_path))
    (mark,) = plan_watermarks([str(tmp_path / "a")], Limits(min_free_bytes=1))
    assert mark.limit_bytes == pytest.approx(free // 2, rel=0.1)


@pytest.mark.parametrize("limits", [
    Limits(min_free_bytes=1 << 60), Limits(overlay_bytes=1 << 60, min_free_bytes=1),
])
def test_too_little_space_is_refused_before_anything_is_made(tmp_path: Path, limits: Limits) -> None:
    with pytest.raises(OverlaySpace, match=str(tmp_path)):
        plan_watermarks([str(tmp_path / "a")], limits)
    assert list(tmp_path.iterdir()) == []


def test_the_last_reserve_of_the_file_system_counts_whoever_uses_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = Watermark((str(tmp_path / "a"),), limit_bytes=GIB, reserve_bytes=16 * MIB)
    assert mark.reached() is None
    monkeypatch.setattr(growth, "free_bytes", lambda _folder: 15 * MIB)
    error = mark.reached()
    assert error is not None
    assert "15.0 MiB are free" in error.message


@pytest.mark.parametrize(("min_free_bytes", "reserve_bytes"), [(GIB, 64 * MIB), (MIB, 16 * MIB)])
def test_the_reserve_follows_what_must_be_free(min_free_bytes: int, reserve_bytes: int) -> None:
    assert Limits(min_free_bytes=min_free_bytes).reserve_bytes == reserve_bytes


_MOUNTS = """\
/dev/vda / ext4 rw 0 0
nas:/backups /mnt/backups nfs4 rw 0 0
//nas/share /mnt/with\\040blank cifs rw 0 0
/dev/vdb /mnt/backups/local xfs rw 0 0
sshfs#host /mnt/over fuse.sshfs rw 0 0
/dev/vdc /mnt/over ext4 rw 0 0
"""


@pytest.mark.parametrize(("folder", "kind"), [
    ("/srv", "ext4"), ("/mnt/backups/guest", "nfs4"), ("/mnt/backups-too", "ext4"),
    ("/mnt/with blank/x", "cifs"), ("/mnt/backups/local/x", "xfs"), ("/mnt/over", "ext4"),
])
def test_the_file_system_of_a_folder_is_the_nearest_mount_above_it(folder: str, kind: str) -> None:
    assert file_system_of(Path(folder), _MOUNTS) == kind


def test_this_machines_own_root_is_no_network(tmp_path: Path) -> None:
    assert not on_network(tmp_path.resolve())
