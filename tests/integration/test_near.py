"""What commands have read of a repository on a server, they read on this host the next time."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from typer.testing import CliRunner

from stillframe.cli.main import app
from stillframe.clock import SystemClock
from stillframe.errors import EXIT_OK, RepositoryDamaged
from stillframe.repository.layout import MANIFESTS, PackKind, SnapshotName, packs_prefix
from stillframe.storage.address import open_storage
from stillframe.storage.model import Storage
from tests.contract.drivers import Servers
from tests.unit.repository_disks import CHUNK, SourceDisk, small_repository
from tests.unit.repository_snapshots import World, make_snapshot


def test_what_is_kept_here_is_verified_and_may_be_deleted(servers: Servers, tmp_path: Path) -> None:
    address, access = servers.s3.url(servers.unused), servers.s3.access
    storage = open_storage(address, access)
    repository = small_repository(storage)
    content = bytearray(random.Random(1).randbytes(64 * CHUNK))
    for hours in (1, 2):
        for chunk in range(0, 64, 4):  # all leaves: a tree of which only a few parts are read is not kept
            content[chunk * CHUNK] ^= 1
        name = SnapshotName("lab", "web", World.moment(hours), "")
        make_snapshot(repository, SourceDisk(bytes(content)), name, SystemClock())
    passphrase, image, cache = tmp_path / "passphrase", tmp_path / "web.img", tmp_path / "state" / "cache"
    passphrase.write_bytes(b"secret")
    passphrase.chmod(0o600)
    older, newer = (f"web@{World.moment(hours):%Y-%m-%dT%H:%M:%S}" for hours in (1, 2))

    def call(*words: str, code: int = EXIT_OK) -> str:
        done = CliRunner().invoke(
            app, [*words, "--state-dir", str(tmp_path / "state"), "--json"], catch_exceptions=False, env={
                "STILLFRAME_CONFIG": "/dev/null", "STILLFRAME_REPOSITORY": address,
                "STILLFRAME_PASSPHRASE_FILE": str(passphrase),
                "AWS_ACCESS_KEY_ID": access.user, "AWS_SECRET_ACCESS_KEY": access.secret})
        assert done.exit_code == code, done.stdout + done.stderr
        return done.stdout

    asked = (("show", newer), ("diff", older, newer), ("list", "--tags"))
    said = [call(*words) for words in asked]
    call("restore", newer, "--to", str(image))
    assert image.read_bytes() == content
    image.unlink()

    # Nothing of it is asked of the server any more, which would have it damaged now.
    whole = _spoiled(storage)
    assert [call(*words) for words in asked] == said
    call("restore", newer, "--to", str(image))
    assert image.read_bytes() == content

    # What is damaged here is not believed; nor is there anything once it is gone.
    for path in (each for each in cache.rglob("*") if each.is_file()):
        kept = bytearray(path.read_bytes())
        kept[0] ^= 1
        path.write_bytes(kept)
    call("show", newer, code=RepositoryDamaged.exit_code)
    shutil.rmtree(cache)
    call("show", newer, code=RepositoryDamaged.exit_code)
    for key, stored in whole.items():
        storage.replace(key, stored)
    assert [call(*words) for words in asked] == said


def _spoiled(storage: Storage) -> dict[str, bytes]:
    """Spoil manifests and trees, without changing their sizes; return them as they were."""
    keys = [each.key for prefix in (MANIFESTS, packs_prefix(PackKind.TREE)) for each in storage.list(prefix)]
    whole = {key: storage.get(key) for key in keys}
    for key, stored in whole.items():
        storage.replace(key, bytes(len(stored)))
    return whole
