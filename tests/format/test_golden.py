"""Repositories of every version of the format are read: by the package, and from the page alone."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import pytest

from stillframe.clock import SystemClock
from stillframe.errors import RepositoryNewer
from stillframe.repository.catalog import list_snapshots
from stillframe.repository.generation import latest_generation
from stillframe.repository.hurt import read_manifest
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.layout import FORMAT_VERSION, REPOSITORY_KEY
from stillframe.repository.opened import Secret, open_repository
from stillframe.repository.verify import Level, verify
from stillframe.storage.local import LocalStorage
from tests.format.make_golden import HERE, PASSPHRASE
from tests.unit.repository_snapshots import read_snapshot

_READER = HERE / "reader.py"
_READER_LINES_MAX = 300
_SECRET = Secret(SlotKind.PASSPHRASE, PASSPHRASE.encode())


@pytest.fixture(params=sorted(path.name for path in HERE.glob("golden-*")))
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Give the folder of a golden repository, and the SHA-256 of the disk of each of its snapshots."""
    source = HERE / str(request.param)
    with tarfile.open(source / "repository.tar.gz") as archive:
        archive.extractall(tmp_path / "repository")
    return tmp_path / "repository", json.loads((source / "sha256.json").read_text())


def test_there_is_one_of_this_version() -> None:
    assert (HERE / f"golden-{FORMAT_VERSION}" / "sha256.json").exists()


def test_this_version_reads_it(golden: tuple[Path, dict[str, str]]) -> None:
    folder, expected = golden
    repository = open_repository(LocalStorage(folder), _SECRET)
    found = {name.sid: hashlib.sha256(read_snapshot(repository, name)).hexdigest()
             for name in list_snapshots(repository.storage)}
    assert found == expected
    assert verify(repository, SystemClock(), Level.FULL).is_sound


def test_nobody_vouches_for_snapshots_of_before_there_was_marked(golden: tuple[Path, dict[str, str]]) -> None:
    folder, expected = golden
    repository = open_repository(LocalStorage(folder), _SECRET)
    generation = latest_generation(repository.storage, repository.key)
    assert not generation.marked & set(expected)
    for name in list_snapshots(repository.storage):
        manifest = read_manifest(repository, name)
        assert manifest is not None
        assert manifest.generation is None
        assert all(disk.read_whole_at == "" for disk in manifest.disks)


def test_the_reader_that_knows_only_the_page_reads_it(golden: tuple[Path, dict[str, str]]) -> None:
    folder, expected = golden
    for sid, digest in expected.items():
        done = subprocess.run([sys.executable, _READER, folder, PASSPHRASE, sid, "vda"], capture_output=True,
                              check=True)
        assert hashlib.sha256(done.stdout).hexdigest() == digest
    listing = subprocess.run([sys.executable, _READER, folder, PASSPHRASE], capture_output=True, check=True,
                             text=True)
    assert {line.split()[0] for line in listing.stdout.splitlines()} == set(expected)


def test_that_reader_notices_damage(golden: tuple[Path, dict[str, str]]) -> None:
    folder, expected = golden
    for pack in (folder / "main/p").glob("*/*"):
        content = bytearray(pack.read_bytes())
        content[40] ^= 1
        pack.write_bytes(content)
    codes = [
        subprocess.run([sys.executable, _READER, folder, PASSPHRASE, sid, "vda"], capture_output=True,
                       check=False).returncode for sid in expected
    ]
    assert any(codes)


def test_that_reader_is_short_and_knows_nothing_of_the_package() -> None:
    text = _READER.read_text(encoding="utf-8")
    assert len(text.splitlines()) < _READER_LINES_MAX
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("stillframe") for name in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith(("stillframe", "tests"))


def test_a_newer_repository_is_refused(golden: tuple[Path, dict[str, str]]) -> None:
    folder, _ = golden
    path = folder / REPOSITORY_KEY
    path.write_bytes(msgspec.json.encode({**json.loads(path.read_bytes()), "version": FORMAT_VERSION + 1}))
    with pytest.raises(RepositoryNewer) as refused:
        open_repository(LocalStorage(folder), _SECRET)
    assert "newer stillframe" in refused.value.next_command
