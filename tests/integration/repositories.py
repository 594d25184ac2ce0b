"""What tests of backups of real guests share: a repository, runs of the command, and comparing every byte."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lab import forked
from lab.barequemu import BareQemu
from lab.guest import Guest
from lab.images import assert_equal_images
from stillframe.block.reader import DiskReader
from stillframe.cli.main import app
from stillframe.clock import SystemClock, utc_text
from stillframe.repository.hints import ChunkHints
from stillframe.repository.keyslots import Kdf, SlotKind
from stillframe.repository.layout import Parameters, SnapshotName
from stillframe.repository.manifest import DiskEntry, Root, encode_manifest
from stillframe.repository.opened import Repository, Secret, init_repository
from stillframe.repository.places import Places
from stillframe.repository.session import open_session
from stillframe.repository.writer import SnapshotWriter
from stillframe.storage.local import LocalStorage
from tests.fault.driver import PASSPHRASE
from tests.fault.harness import Place, named
from tests.unit.repository_snapshots import manifest_of

ROOT = Path(__file__).resolve().parents[2]
#: A slot that opens fast: what it costs to guess the passphrase is not what these tests are about.
CHEAP = Kdf("", memory_kib=64, iterations=1, lanes=1)
_TIMEOUT_S = 200.0
#: They touch no guest; starting Python for each would be most of what they take. (A `serve` that is not
#: refused never returns here.)
_IN_THIS_PROCESS = {"restore", "serve", "list", "show", "diff", "verify", "forget", "prune"}


@dataclass(frozen=True)
class Repo:
    """A repository, and how the command reaches it: in the folder *path*, or at *address* on a server.

    *settings* are environment variables besides the usual ones.
    """

    path: Path
    place: Place
    root: Path = ROOT
    address: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def call(self, *words: str | Path, secret: bool = True) -> subprocess.CompletedProcess[str]:
        """Run stillframe on the repository and return what came of it, whatever that is."""
        if words[0] in _IN_THIS_PROCESS:
            line = self.command(*words)[3:]
            done = CliRunner().invoke(app, line, env=self.environment(secret=secret), catch_exceptions=False)
            return subprocess.CompletedProcess(line, done.exit_code, done.stdout, done.stderr)
        return forked.run(
            self.command(*words), timeout_s=_TIMEOUT_S, cwd=self.root, env=self.environment(secret=secret))

    def command(self, *words: str | Path) -> list[str]:
        """Return the command line of a call."""
        state = ["--state-dir", str(self.place.state_dir)]
        return [sys.executable, "-m", "stillframe", *map(str, words), *state]

    def environment(self, *, secret: bool = True) -> dict[str, str]:
        """Return the environment that names the repository, and what opens it."""
        named = {"STILLFRAME_REPOSITORY": self.address or str(self.path), "STILLFRAME_CONFIG": "/dev/null",
                 **self.settings}
        if secret:
            named["STILLFRAME_PASSPHRASE_FILE"] = str(self.path.with_suffix(".pass"))
        return {**os.environ, **named}

    def json(self, *words: str | Path, code: int = 0) -> dict[str, Any]:
        """Run stillframe, which must end with that code, and return its JSON."""
        done = self.call(*words, "--json")
        assert done.returncode == code, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def backup(self, guest: Guest | BareQemu, *options: str, code: int = 0) -> dict[str, Any]:
        """Back a guest up and return what is said of it."""
        words = ["backup", named(guest), "--quiesce", "none", "--min-free", "32M", *options]
        found: dict[str, Any] = self.json(*words, code=code)["guests"][0]
        return found

    def assert_restores(self, snapshot: str, expected: dict[str, Path], to: Path) -> None:
        """Restore every disk of a snapshot and compare every byte. Raises ImagesDiffer."""
        folder = to / f"restored-{snapshot}"
        done = self.call("restore", snapshot, "--to", f"{folder}/")
        assert done.returncode == 0, done.stdout + done.stderr
        for target, moment in expected.items():
            assert_equal_images(folder / f"{target}.img", moment)
        shutil.rmtree(folder)


def store_disks(repository: Repository, disks: Mapping[str, DiskReader], guest: str = "web") -> SnapshotName:
    """Make a snapshot of disks that no guest has, and return its name."""
    wanted = SnapshotName("alpha", guest, datetime(2026, 11, 28, tzinfo=UTC), "")

    def key(sid: str) -> str:
        return SnapshotName(wanted.host, wanted.guest, wanted.utc, sid).key

    with (
        open_session(repository.storage, repository.key, SystemClock(), wanted.host, key) as session,
        contextlib.closing(ChunkHints(repository.parameters.id)) as hints,
        SnapshotWriter(repository, session, Places(repository, session.generation), bad={},
                       hints=hints) as writer,
    ):
        entries = []
        for target, disk in disks.items():
            written = writer.write(disk, None)
            entries.append(DiskEntry(
                target=target, format="raw", source="", method="overlay", size_bytes=disk.size_bytes,
                root=Root.of(written.root), read_bytes=0, data_bytes=written.data_bytes, changed_bytes=0,
                stored_bytes=0))
        stored = writer.finish()
        session.commit(encode_manifest(manifest_of(session.sid, wanted, tuple(entries), stored),
                                       session.record.manifest_key, repository.key))
    return SnapshotName(wanted.host, wanted.guest, wanted.utc, session.sid)


def make_repo(place: Place, folder: Path, **sizes: int) -> Repo:
    """Make a repository that PASSPHRASE opens, with other *sizes* than the usual ones (`Parameters`)."""
    folder.mkdir(exist_ok=True)
    path = folder / "repository"
    passphrase = path.with_suffix(".pass")
    passphrase.write_bytes(PASSPHRASE + b"\n")
    passphrase.chmod(0o600)
    secret = Secret(SlotKind.PASSPHRASE, PASSPHRASE)
    parameters = Parameters(secrets.token_hex(16), utc_text(SystemClock().now()), **sizes)  # type: ignore[arg-type]
    init_repository(
        LocalStorage(path, make=True), secret, "test", SystemClock(), costs=CHEAP, parameters=parameters)
    return Repo(path, place)
