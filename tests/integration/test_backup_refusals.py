"""What a backup and a restore do with bad input, a full storage, and one that hangs: nothing to the guest."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.database import check_image, needs_recovery
from lab.dbguest import DbGuest
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.enter import IMAGES_DIR
from lab.images import MIB, run
from stillframe import errors
from stillframe.backup import snapshot as snapshot_module
from stillframe.backup.run import BackupJob, backup_guest
from stillframe.capture.journal import Journal
from stillframe.capture.method import Method
from stillframe.capture.plan import Wishes
from stillframe.capture.run import Tools
from stillframe.capture.states import Quiesce
from stillframe.capture.stepping import Watcher
from stillframe.clock import SystemClock
from stillframe.hypervisor.connection import Connection
from stillframe.hypervisor.domain import find_domain
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.opened import Repository, Secret, open_repository
from stillframe.storage.local import LocalStorage
from stillframe.storage.model import Content
from stillframe.storage.wrappers import Wrapper
from tests.fault.driver import LIMITS, PASSPHRASE
from tests.fault.harness import Place, overlays_left, small_file_system
from tests.integration.repositories import Repo, make_repo

MakeGuest = Callable[..., DiskGuest]
MakeDbGuest = Callable[..., DbGuest]
_SIZE_BYTES = 32 * MIB


@pytest.fixture
def repo(place: Place, tmp_path: Path) -> Repo:
    """Give an empty repository."""
    return make_repo(place, tmp_path)


def assert_untouched(repo: Repo, guest: DiskGuest) -> None:
    """The guest is on its own images with all that it wrote, and nothing is left to do."""
    assert not overlays_left(repo.place)
    assert not list(IMAGES_DIR.rglob("*.stillframe-overlay.qcow2"))
    for target, disk in guest.disks.items():
        assert guest.disk_source(target)[0] == str(disk.path)
        guest.assert_disk_equals_model(target)
    assert repo.json("status")["open_runs"] == []


def refused(repo: Repo, error: type[errors.StillframeError], *words: str | Path) -> str:
    """The call ends with *error*; return what was said."""
    done = repo.call(*words)
    assert done.returncode == error.exit_code, done.stdout + done.stderr
    assert f"(error {error.code};" in done.stderr
    return done.stderr


def test_a_database_under_load_is_whole_in_its_snapshot(
    db_guest: MakeDbGuest, repo: Repo, tmp_path: Path
) -> None:
    guest = db_guest(pause_s=0)
    repo.json("backup", guest.name, "--quiesce", "agent", "--min-free", "64M")
    guest.wait_more_rows(30)
    acknowledged = guest.acknowledged()
    result = repo.json("backup", guest.name, "--quiesce", "agent", "--min-free", "64M")["guests"][0]
    assert result["consistency"] == "filesystem"
    assert 0 < result["frozen_s"] < 10
    assert result["parent"]
    image = tmp_path / "restored.img"
    repo.json("restore", f"{result['snapshot']}:vda", "--to", image)
    assert not needs_recovery(image)
    check = check_image(image, "raw")
    assert check.integrity == "ok"
    assert check.whole
    assert check.last >= acknowledged > 0
    guest.wait_more_rows(2)


def test_a_repository_that_can_not_be_opened_touches_no_guest(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    refused(repo, errors.KeyNeeded, "backup", guest.name, "--passphrase-file", "/nonexistent")
    wrong = tmp_path / "wrong"
    wrong.write_text("not it")
    refused(repo, errors.KeyWrong, "backup", guest.name, "--passphrase-file", wrong)
    refused(repo, errors.StorageLost, "backup", guest.name, "--repo", tmp_path / "nowhere")
    refused(repo, errors.GuestUnknown, "backup", "nobody")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").touch()
    refused(repo, errors.RepositoryUnknown, "backup", guest.name, "--repo", tmp_path / "other")
    assert_untouched(repo, guest)


def test_a_repository_among_the_guests_images_is_refused(disk_guest: MakeGuest, repo: Repo) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    inside = guest.folder / "repository"
    passphrase = repo.path.with_suffix(".pass")
    assert repo.call("init", "--repo", inside, "--passphrase-file", passphrase).returncode == 0
    refused(repo, errors.DestinationInsideGuest, "backup", guest.name, "--repo", inside, "--quiesce", "none")
    refused(repo, errors.OverlayFolderNeeded, "backup", guest.name, "--quiesce", "none", "--overlay-dir",
            repo.path)
    assert repo.call("doctor", guest.name, "--repo", inside).returncode == \
        errors.DestinationInsideGuest.exit_code
    assert_untouched(repo, guest)


def test_a_storage_that_fills_up_gives_the_copy_up(
    disk_guest: MakeGuest, place: Place, tmp_path: Path
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    with small_file_system(tmp_path / "small", 4 * MIB) as folder:
        repo = make_repo(place, folder)
        done = repo.call("backup", guest.name, "--quiesce", "none", "--min-free", "32M")
        assert done.returncode == errors.StorageFull.exit_code, done.stderr
        assert "it runs on its own images" in done.stderr
        assert_untouched(repo, guest)
        assert repo.json("list")["snapshots"] == []
        repo.json("prune")
        assert repo.json("prune", "--dry-run")["plan"]["repository_bytes"] == 0


class _Hanging(Wrapper):
    """A storage in which the first data pack is never stored, until it is let go."""

    def __init__(self, inner: LocalStorage) -> None:
        super().__init__(inner)
        self.let_go = threading.Event()
        self.reached = threading.Event()

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        if key.startswith("main/p/"):
            self.reached.set()
            self.let_go.wait()
        super().create(key, content)


def _job(repo: Repo, guest: DiskGuest, storage: Wrapper, stop: Callable[[], bool]) -> BackupJob:
    secret = Secret(SlotKind.PASSPHRASE, PASSPHRASE)

    def opened() -> Repository:
        return open_repository(storage, secret)

    domain = find_domain(Connection("qemu:///system", SystemClock()), guest.name)
    wishes = Wishes(Quiesce.NONE, repo.place.overlays, limits=LIMITS, method=Method.OVERLAY)
    return BackupJob(
        domain, opened, repo.path, "lab", repo.place.state_dir / "hints", wishes,
        lambda: errors.Interrupted("it was enough") if stop() else None, lambda *_: None)


def _tools(repo: Repo) -> Tools:
    clock = SystemClock()
    return Tools(Journal(repo.place.state_dir, clock), clock, Watcher(lambda _: None, lambda _: None))


@pytest.mark.parametrize(("by_signal", "kind"), [(True, Kind.RAW), (False, Kind.QCOW2)])
def test_a_storage_that_hangs_does_not_hold_the_guest(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_signal: bool,
    kind: Kind,
) -> None:
    guest = disk_guest(DiskSpec("vda", kind, _SIZE_BYTES))
    # Small packs: the storage hangs while the disk is still being read, and its server holds a lock on it.
    repo = make_repo(repo.place, tmp_path / "small-packs", pack_bytes=256 * 1024)
    storage = _Hanging(LocalStorage(repo.path))
    monkeypatch.setattr(snapshot_module, "STALL_TIMEOUT_S", 600.0 if by_signal else 3.0)
    expected = errors.Interrupted if by_signal else errors.DestinationLost
    try:
        with pytest.raises(expected) as caught:
            backup_guest(
                _job(repo, guest, storage, lambda: by_signal and storage.reached.is_set()), _tools(repo))
        assert caught.value.guest is errors.GuestState.SAFE
        assert storage.reached.is_set()
        assert not overlays_left(repo.place)
        assert guest.disk_source("vda")[0] == str(guest.disks["vda"].path)
        guest.write("vda", MIB, MIB, 0x77)
    finally:
        storage.let_go.set()
    assert repo.json("list")["snapshots"] == []
    repo.backup(guest)
    guest.flush()
    guest.assert_disk_equals_model("vda")


def test_a_target_that_a_running_guest_uses_is_refused(
    disk_guest: MakeGuest, repo: Repo
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES), DiskSpec("vdb", Kind.QCOW2, _SIZE_BYTES))
    snapshot = repo.backup(guest)["snapshot"]
    for target, disk in guest.disks.items():
        for option in ("--force", "--delta"):
            refused(repo, errors.TargetInUse, "restore", f"{snapshot}:{target}", "--to", disk.path, option)
    assert_untouched(repo, guest)
    guest.destroy()
    before = guest.disks["vda"].path.stat()
    guest.model("vda").write(0, b"")
    assert repo.call("restore", f"{snapshot}:vda", "--to", guest.disks["vda"].path, "--delta").returncode == 0
    assert guest.disks["vda"].path.stat().st_uid == before.st_uid
    guest.assert_disk_equals_model("vda")
    guest.start()


def test_a_device_that_is_mounted_or_too_small_is_refused(
    disk_guest: MakeGuest, repo: Repo, tmp_path: Path
) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    snapshot, expected = repo.backup(guest)["snapshot"], guest.model("vda").copy_at_moment()
    backing = tmp_path / "device.img"
    run("truncate", "-s", str(_SIZE_BYTES), backing)
    run("mke2fs", "-q", "-F", backing)
    loop = run("losetup", "--find", "--show", backing).strip()
    try:
        refused(repo, errors.TargetExists, "restore", snapshot, "--to", loop)
        (tmp_path / "mounted").mkdir()
        run("mount", loop, tmp_path / "mounted")
        refused(repo, errors.TargetInUse, "restore", snapshot, "--to", loop, "--force")
        run("umount", tmp_path / "mounted")
        assert repo.call("restore", snapshot, "--to", loop, "--force").returncode == 0
        run("cmp", loop, expected)
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=False, capture_output=True)
        run("losetup", "--detach", loop)
    run("truncate", "-s", str(_SIZE_BYTES - MIB), backing)
    loop = run("losetup", "--find", "--show", backing).strip()
    try:
        refused(repo, errors.TargetSmall, "restore", snapshot, "--to", loop, "--force")
    finally:
        run("losetup", "--detach", loop)


def test_status_and_doctor_show_the_repository(disk_guest: MakeGuest, repo: Repo) -> None:
    guest = disk_guest(DiskSpec("vda", Kind.RAW, _SIZE_BYTES))
    snapshot = repo.backup(guest)["snapshot"]
    found = repo.json("status")
    assert [each["id"] for each in found["snapshots"]] == [snapshot]
    assert found["mirrors"] == []
    host = json.loads(repo.call("doctor", guest.name, "--json").stdout)["host"]
    assert host["repository"]["snapshots"] == 1
    assert repo.json("recover")["guests"][0]["did"] == []
