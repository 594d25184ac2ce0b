"""The commands on a repository as a user or a timer calls them, without libvirt and guests."""

from __future__ import annotations

import json
import os
import pty
import re
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillframe import errors
from stillframe.block.reader import DiskReader
from stillframe.cli.main import app
from stillframe.cli.restore import split_name
from stillframe.clock import SystemClock, utc_text
from stillframe.errors import EXIT_OK, EXIT_PARTIAL, EXIT_USAGE
from stillframe.repository.heal import read_bad, write_heals
from stillframe.repository.hints import ChunkHints
from stillframe.repository.keyslots import Kdf, KeySlot, SlotKind
from stillframe.repository.layout import SnapshotName, new_sid
from stillframe.repository.manifest import DiskEntry, FileEntry, Manifest, Root, Versions, encode_manifest
from stillframe.repository.opened import (
    Repository,
    Secret,
    init_repository,
    key_slots,
    open_repository,
    remove_slot,
)
from stillframe.repository.places import Places
from stillframe.repository.scan import BytesSource
from stillframe.repository.session import open_session
from stillframe.repository.snapshots import newest_of
from stillframe.repository.writer import SnapshotWriter, Written
from stillframe.storage.local import LocalStorage

_ROOT = Path(__file__).parents[2]
_PASSPHRASE = "four random words"
_CHEAP = Kdf("", memory_kib=64, iterations=1, lanes=1)
_DAY = datetime(2026, 11, 20, 12, tzinfo=UTC)
_DISK_BYTES = 1024 * 1024 + 512

SECRETS = ("STILLFRAME_PASSPHRASE_FILE", "STILLFRAME_PASSPHRASE_COMMAND", "STILLFRAME_KEY_FILE")
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Call stillframe on the repository, with its passphrase in a file unless *secret* is False."""

    def run(*words: str | Path, secret: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        environment = dict.fromkeys(SECRETS)
        environment |= {
            "COLUMNS": "200", "STILLFRAME_CONFIG": "/dev/null",
            "STILLFRAME_REPOSITORY": str(tmp_path / "repository"), **more}
        if secret and "STILLFRAME_PASSPHRASE_FILE" not in more:
            environment["STILLFRAME_PASSPHRASE_FILE"] = str(tmp_path / "pass")
        # In this process: starting Python a hundred times would be most of these tests.
        line = [*map(str, words), "--state-dir", str(tmp_path / "state")]
        done = CliRunner().invoke(app, line, env=environment, catch_exceptions=False)
        return subprocess.CompletedProcess(line, done.exit_code, done.stdout, done.stderr)

    secret_file(tmp_path / "pass", _PASSPHRASE)
    return run


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Give a repository that the passphrase opens fast."""
    return init_repository(
        LocalStorage(tmp_path / "repository", make=True),
        Secret(SlotKind.PASSPHRASE, _PASSPHRASE.encode()), "first", SystemClock(), costs=_CHEAP)


def secret_file(path: Path, text: str) -> Path:
    path.write_text(f"{text}\n")
    path.chmod(0o600)
    return path


def _nvram(written: Written) -> FileEntry:
    return FileEntry(role="nvram", path="/nvram/web_VARS.fd", mode=0o600, uid=0, gid=0, taken_at="",
                     size_bytes=written.size_bytes, root=Root.of(written.root))


def add_snapshot(
    repository: Repository, guest: str, moment: datetime, *disks: bytes, host: str = "lab",
    nvram: bytes = b"", tags: tuple[str, ...] = (),
) -> str:
    """Store a snapshot of disks vda, vdb, ..., and of an NVRAM file if it is not empty; return its ID."""
    clock = SystemClock()
    found, _ = newest_of(repository, host, guest, guest)
    entries = []
    with open_session(
        repository.storage, repository.key, clock, host,
        lambda sid: SnapshotName(host, guest, moment, sid).key,
    ) as session:
        hints = ChunkHints(repository.parameters.id)
        with SnapshotWriter(
            repository, session, Places(repository, session.generation), bad=read_bad(repository.storage),
            hints=hints,
        ) as writer:
            for number, content in enumerate(disks):
                target = f"vd{'abc'[number]}"
                parents = found[1].disks if found is not None else ()
                parent = next((disk for disk in parents if disk.target == target), None)
                source: DiskReader = BytesSource(content)
                written = writer.write(source, parent)
                entries.append(DiskEntry(
                    target=target, format="raw", source=f"/images/{target}.img", method="overlay",
                    size_bytes=written.size_bytes, root=Root.of(written.root), read_bytes=written.read_bytes,
                    data_bytes=written.data_bytes, changed_bytes=written.changed_bytes,
                    stored_bytes=written.stored_bytes))
            files = () if not nvram else (_nvram(writer.write_bytes(nvram)),)
            stored = writer.finish()
            write_heals(repository, session.sid, writer.healed)
        hints.close()
        manifest = Manifest(
            sid=session.sid, guest=guest, uuid=guest, host=host, captured_at=utc_text(moment),
            began_at=utc_text(moment), ended_at=utc_text(moment), consistency="crash", quiesce="none",
            parent=found[1].sid if found is not None else "", live_xml="<domain/>",
            inactive_xml=f"<domain><name>{guest}</name></domain>", disks=tuple(entries), excluded=(),
            files=files, versions=Versions("9.0.0", "7.2.22", "pc-q35-7.2", "0"), warnings=(), frozen_s=0.0,
            stored_bytes=stored, tags=tags)
        session.commit(encode_manifest(manifest, session.record.manifest_key, repository.key))
        return session.sid


def disk(*changes: tuple[int, bytes], size_bytes: int = _DISK_BYTES) -> bytes:
    content = bytearray(size_bytes)
    content[: 256 * 1024] = bytes(range(256)) * 1024
    for offset, data in changes:
        content[offset : offset + len(data)] = data
    return bytes(content)


def body(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object that is all there is on standard output."""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_error(done: subprocess.CompletedProcess[str], error: type[errors.StillframeError]) -> str:
    assert done.returncode == error.exit_code, done.stdout + done.stderr
    assert f"(error {error.code}; see docs/ERRORS.md)" in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


# --- init and what opens it ---------------------------------------------------------------------


def test_a_repository_is_made_and_opened(call: Call, tmp_path: Path) -> None:
    made = call("init", tmp_path / "repository", "--json", STILLFRAME_REPOSITORY="")
    assert made.returncode == EXIT_OK, made.stderr
    assert [slot["kind"] for slot in body(made)["key_slots"]] == ["passphrase"]
    assert body(call("list", "--json")) == {
        "repository": str(tmp_path / "repository"), "snapshots": [], "standing": {}, "drills": []}
    named = call("list", "--repo", f"file://{tmp_path}/repository", STILLFRAME_REPOSITORY="")
    assert named.returncode == EXIT_OK
    assert_error(call("init"), errors.RepositoryExists)


def test_init_leaves_a_folder_alone_that_holds_something_else(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "letter.txt").touch()
    assert_error(call("init"), errors.RepositoryExists)
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


def test_a_key_file_opens_the_repository(call: Call, tmp_path: Path) -> None:
    key = tmp_path / "key"
    assert call("init", "--new-key-file", key, secret=False).returncode == EXIT_OK
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32
    assert_error(call("show", "latest", "--key-file", key, secret=False), errors.SnapshotUnknown)
    assert call("prune", "--dry-run", "--key-file", key, secret=False).returncode == EXIT_OK
    assert_error(call("prune", "--dry-run"), errors.KeyNeeded)
    before = key.read_bytes()
    assert_error(call("key", "add", "--new-key-file", key, "--key-file", key), errors.TargetExists)
    assert key.read_bytes() == before


@pytest.mark.parametrize(("options", "more"), [
    ((), {}),
    (("--passphrase-command", "printf 'four random words\\n'"), {"STILLFRAME_PASSPHRASE_FILE": "/none"}),
    ((), {"STILLFRAME_PASSPHRASE_FILE": "", "STILLFRAME_PASSPHRASE_COMMAND": "echo four random words"}),
])
def test_a_secret_comes_from_wherever_it_is_named(
    call: Call, repository: Repository, options: tuple[str, ...], more: dict[str, str]
) -> None:
    done = call("prune", "--dry-run", *options, **more)
    assert done.returncode == EXIT_OK, done.stderr


def test_the_configuration_file_names_repository_and_secret(
    call: Call, repository: Repository, tmp_path: Path
) -> None:
    config = tmp_path / "stillframe.toml"
    config.write_text(f'repository = "{repository.address}"\npassphrase_file = "{tmp_path / "pass"}"\n')
    done = call("prune", "--dry-run", "--config", config, secret=False, STILLFRAME_REPOSITORY="")
    assert done.returncode == EXIT_OK, done.stderr
    config.write_text(f'passphrase_file = "{tmp_path / "pass"}"\nkey_file = "/x"\n')
    said = assert_error(call("prune", "--config", config, secret=False), errors.ConfigInvalid)
    assert "passphrase_file and key_file" in said


@pytest.mark.parametrize(("more", "options"), [
    ({"STILLFRAME_PASSPHRASE_FILE": ""}, ()),
    ({"STILLFRAME_PASSPHRASE_FILE": "/nonexistent"}, ()),
    ({"STILLFRAME_PASSPHRASE_FILE": "/dev/null"}, ()),
    ({}, ("--passphrase-command", "false")),
    ({}, ("--passphrase-command", "true")),
    ({}, ("--passphrase-command", "/nonexistent/program")),
    ({}, ("--passphrase-command", "'")),
    ({}, ("--key-file", "/dev/null")),
    ({}, ("--key-file", "/")),
])
def test_a_secret_that_can_not_be_had(
    call: Call, repository: Repository, more: dict[str, str], options: tuple[str, ...]
) -> None:
    assert_error(call("prune", "--dry-run", *options, **more), errors.KeyNeeded)


def test_a_wrong_secret_is_one_clear_error_and_never_shown(
    call: Call, repository: Repository, tmp_path: Path
) -> None:
    wrong = secret_file(tmp_path / "wrong", "hunter2")
    said = assert_error(call("prune", "--passphrase-file", wrong, "--json"), errors.KeyWrong)
    assert "hunter2" not in said


def test_a_secret_that_others_may_read_is_warned_of(
    call: Call, repository: Repository, tmp_path: Path
) -> None:
    (tmp_path / "pass").chmod(0o644)
    assert "chmod 600" in call("prune", "--dry-run").stderr


def test_at_a_terminal_the_passphrase_is_asked_for(repository: Repository, tmp_path: Path) -> None:
    environment = {**os.environ, "STILLFRAME_CONFIG": "/dev/null"}
    for name in SECRETS:
        environment.pop(name, None)
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-m", "stillframe", "prune", "--dry-run", "--repo",
         repository.address, "--state-dir", str(tmp_path / "state")],
        stdin=follower, stdout=subprocess.PIPE, stderr=follower, env=environment, cwd=_ROOT)
    os.close(follower)
    said = b""
    while b"passphrase: " not in said:
        said += os.read(leader, 1024)
    os.write(leader, f"{_PASSPHRASE}\n".encode())
    out, _ = process.communicate(timeout=60)
    os.close(leader)
    assert process.returncode == EXIT_OK
    assert b"nothing to do" in out
    assert _PASSPHRASE.encode() not in said + out


def test_key_slots_are_added_listed_and_removed(call: Call, repository: Repository, tmp_path: Path) -> None:
    second = secret_file(tmp_path / "second", "another passphrase")
    added = call("key", "add", "--new-passphrase-file", second, "--label", "admins", "--json")
    assert added.returncode == EXIT_OK, added.stderr
    slots = body(call("key", "list", "--json", secret=False))["key_slots"]
    assert sorted((slot["kind"], slot["label"]) for slot in slots) == [
        ("passphrase", "admins"), ("passphrase", "first")]
    first = next(slot["id"] for slot in slots if slot["label"] == "first")
    assert call("key", "remove", first[:6], "--dry-run").returncode == EXIT_OK
    assert call("prune", "--dry-run").returncode == EXIT_OK
    assert call("key", "remove", first[:6]).returncode == EXIT_OK
    assert_error(call("prune", "--dry-run"), errors.KeyWrong)
    last = body(added)["key_slot"]["id"]
    said = assert_error(call("key", "remove", last, "--passphrase-file", second), errors.RepositoryRefused)
    assert "last key slot" in said
    assert_error(call("key", "remove", "ffffffffff", "--passphrase-file", second), errors.RepositoryRefused)
    assert call("prune", "--dry-run", "--passphrase-file", second).returncode == EXIT_OK


def test_a_damaged_key_slot_is_listed_left_out_and_removed(
    call: Call, repository: Repository, tmp_path: Path,
) -> None:
    (good,) = (listed.key for listed in repository.storage.list("main/keys/"))
    added = call("key", "add", "--new-passphrase-file", secret_file(tmp_path / "second", "other"), "--json")
    damaged = body(added)["key_slot"]["id"]
    content = bytearray(repository.storage.get(f"main/keys/{damaged}"))
    content[-20] ^= 1
    repository.storage.replace(f"main/keys/{damaged}", content)
    listed = call("key", "list", "--json", secret=False)
    assert listed.returncode == EXIT_OK
    assert {slot["id"]: slot["kind"] for slot in body(listed)["key_slots"]} == {
        good.rpartition("/")[2]: "passphrase", damaged: "damaged"}
    assert f"stillframe key remove {damaged} --repo {repository.address}" in listed.stderr
    wrong = secret_file(tmp_path / "wrong", "wrong")
    new = ("init", tmp_path / "new", "--same-keys-as", repository.address)
    said = assert_error(call(*new, "--passphrase-file", wrong), errors.RepositoryDamaged)
    assert f"stillframe key list --repo {repository.address} " in said
    made = call(*new, "--json")
    assert [slot["kind"] for slot in body(made)["key_slots"]] == ["passphrase"]
    assert damaged in made.stderr
    # The one that is whole is the last.
    assert_error(call("key", "remove", good.rpartition("/")[2]), errors.RepositoryRefused)
    [whole] = (slot for slot in key_slots(repository.storage) if isinstance(slot, KeySlot))
    with pytest.raises(errors.RepositoryRefused):  # as if another had removed the other one that is whole
        remove_slot(repository.storage, whole)
    assert call("key", "remove", damaged).returncode == EXIT_OK
    assert [slot["kind"] for slot in body(call("key", "list", "--json"))["key_slots"]] == ["passphrase"]


def test_a_recovery_key_opens_the_repository_as_people_type_it(
    call: Call, repository: Repository, tmp_path: Path
) -> None:
    exported = call("key", "export", "--json")
    key = body(exported)["recovery_key"]
    assert len(key.replace("-", "")) == 52
    typed = secret_file(tmp_path / "typed", key.lower().replace("-", " "))
    assert call("prune", "--dry-run", "--passphrase-file", typed).returncode == EXIT_OK


# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [
    "file://other-host/x", "https://x", "ftp://host/x", "s3:///x", "s3://bucket/x?profile=y", "s3://user@bucket/x",
    "s3://bucket:1/x", "sftp://host", "sftp://host/~", "sftp://host/x?port=1", "sftp://host:port/x", "smb://host/",
    "sftp://u@a..b/x", "sftp://a b/x", "smb://a..b/share", "s3://b/p?endpoint=http://h:abc",
    "s3://b/p?endpoint=http://", "s3://b/p?endpoint=ftp://h", "s3://b/p?endpoint=h:80",
    "s3://b/p?endpoint=http://h%20h/", "s3://b/p?endpoint=http://h/a%20b",
    "smb:///share"])
def test_other_kinds_of_addresses_are_refused(call: Call, address: str) -> None:
    assert_error(call("list", "--repo", address), errors.RepositoryRefused)


@pytest.mark.parametrize("address", ["sftp://me:s3cret@host/x", "smb://me:s3cret@host/share"])
def test_a_password_in_an_address_is_refused_and_not_repeated(call: Call, address: str) -> None:
    done = call("list", "--repo", address)
    assert_error(done, errors.RepositoryRefused)
    assert "s3cret" not in done.stdout + done.stderr


def test_a_folder_that_is_no_repository(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    assert_error(call("list"), errors.StorageLost)  # absent: perhaps not mounted
    folder.mkdir()
    assert_error(call("list"), errors.StorageLost)  # empty: a mount point
    (folder / "letter.txt").touch()
    assert_error(call("list"), errors.RepositoryUnknown)
    (folder / "repo.json").write_text('{"format": "something-else", "version": 1}')
    assert_error(call("list"), errors.RepositoryUnknown)
    (folder / "repo.json").write_text('{"format": "stillframe-repository", "version": 99}')
    assert_error(call("list"), errors.RepositoryNewer)
    (folder / "repo.json").write_text("{")
    assert_error(call("list"), errors.RepositoryDamaged)


def test_no_repository_is_named(call: Call) -> None:
    assert_error(call("list", STILLFRAME_REPOSITORY=""), errors.ConfigInvalid)


# --- snapshots ----------------------------------------------------------------------------------


def test_snapshots_are_listed_and_shown(call: Call, repository: Repository) -> None:
    ids = [add_snapshot(repository, "web", _DAY + timedelta(days=day), disk()) for day in range(3)]
    other = add_snapshot(repository, "db", _DAY, disk(), disk())
    listed = body(call("list", "--json", secret=False))["snapshots"]
    assert {each["id"] for each in listed} == {*ids, other}
    assert [each["id"] for each in body(call("list", "--guest", "web", "--json"))["snapshots"]] == ids
    shown = body(call("show", "web@2026-11-21", "--json"))["snapshot"]
    assert shown["id"] == ids[1]
    assert shown["parent"] == ids[0]
    assert [entry["target"] for entry in shown["disks"]] == ["vda"]
    assert ids[1] in call("show", ids[1][:8]).stdout


@pytest.mark.parametrize("name", ["web@2020-01-01", "nobody", "ffff0000ffff", "web@yesterday"])
def test_a_name_that_fits_nothing(call: Call, repository: Repository, name: str) -> None:
    add_snapshot(repository, "web", _DAY, disk())
    assert_error(call("show", name), errors.SnapshotUnknown)


def test_a_name_that_fits_two_things(call: Call, repository: Repository) -> None:
    add_snapshot(repository, "web", _DAY, disk(), host="one")
    add_snapshot(repository, "web", _DAY, disk(), host="two")
    assert_error(call("show", "web"), errors.SnapshotAmbiguous)
    assert call("show", "two/web").returncode == EXIT_OK


def test_diff_tells_changes_and_sizes(call: Call, repository: Repository) -> None:
    chunk = 64 * 1024
    old = add_snapshot(repository, "web", _DAY, disk(), disk())
    changed = disk(
        (chunk + 5, b"x"), (2 * chunk, bytes(chunk)), (7 * chunk, b"new"), size_bytes=2 * _DISK_BYTES)
    new = add_snapshot(repository, "web", _DAY + timedelta(days=1), changed)
    vda, vdb = body(call("diff", old, new, "--json"))["disks"]
    assert vda["extents"] == [
        {"offset": chunk, "length": chunk, "kind": "data"},
        {"offset": 2 * chunk, "length": chunk, "kind": "zero"},
        {"offset": 7 * chunk, "length": chunk, "kind": "data"}]
    assert (vda["changed_bytes"], vda["cleared_bytes"]) == (3 * chunk, chunk)
    assert (vda["old_size_bytes"], vda["new_size_bytes"]) == (_DISK_BYTES, 2 * _DISK_BYTES)
    assert vdb["change"] == "removed"
    said = call("diff", old, new, "--extents").stdout
    assert f"{7 * chunk} +{chunk} data" in said
    back = body(call("diff", new, old, "--json"))["disks"]
    assert back[0]["changed_bytes"] == 3 * chunk
    assert back[1]["change"] == "added"
    assert body(call("diff", old, old, "--json"))["disks"][0]["extents"] == []


# --- restore ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [
    ("web", ("web", "")), ("web:vda", ("web", "vda")), ("web@2026-11-20T15:14", ("web@2026-11-20T15:14", "")),
    ("web@2026-11-20T15:14:30:vdb", ("web@2026-11-20T15:14:30", "vdb")), ("3f9a12:sda", ("3f9a12", "sda")),
    ("web@2026-11-20T15:14Z", ("web@2026-11-20T15:14Z", "")),
])
def test_the_disk_is_told_from_the_time(text: str, expected: tuple[str, str]) -> None:
    assert split_name(text) == expected


def test_a_disk_is_restored_to_a_file(call: Call, repository: Repository, tmp_path: Path) -> None:
    content = disk((300_000, b"hello"))
    add_snapshot(repository, "web", _DAY, content)
    image = tmp_path / "vda.img"
    done = call("restore", "web", "--to", image, "--json")
    assert done.returncode == EXIT_OK, done.stderr
    assert body(done)["whole"] is True
    assert image.read_bytes() == content
    assert_error(call("restore", "web", "--to", image), errors.TargetExists)
    image.write_bytes(bytes(_DISK_BYTES))
    assert call("restore", "web:vda", "--to", image, "--delta").returncode == EXIT_OK
    assert image.read_bytes() == content
    image.write_bytes(b"short")
    assert_error(call("restore", "web", "--to", image, "--delta"), errors.TargetSmall)
    assert call("restore", "web", "--to", image, "--force").returncode == EXIT_OK
    assert image.read_bytes() == content
    assert_error(call("restore", "web:vdz", "--to", tmp_path / "x"), errors.SnapshotUnknown)
    assert_error(call("restore", "web", "--to", tmp_path / "none" / "x"), errors.DestinationUnwritable)


def test_a_folder_needs_room_for_all_disks(
    call: Call, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_snapshot(repository, "web", _DAY, disk(), disk((5, b"second")))

    class RoomForOne:
        f_bavail, f_frsize = 100, 4096  # each disk has 256 KiB of data

    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda _: RoomForOne)
        assert_error(call("restore", "web", "--to", tmp_path / "out"), errors.TargetSmall)
        assert list((tmp_path / "out").iterdir()) == []
        assert call("restore", "web:vdb", "--to", tmp_path / "vdb.img").returncode == EXIT_OK
    assert call("restore", "web", "--to", tmp_path / "out").returncode == EXIT_OK


def test_several_disks_are_restored_to_a_folder(call: Call, repository: Repository, tmp_path: Path) -> None:
    contents = disk(), disk((5, b"second"))
    add_snapshot(repository, "web", _DAY, *contents)
    folder = tmp_path / "out"
    done = call("restore", "web", "--to", folder)
    assert done.returncode == EXIT_OK, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["domain.xml", "vda.img", "vdb.img"]
    assert tuple((folder / name).read_bytes() for name in ("vda.img", "vdb.img")) == contents
    assert "<name>web</name>" in (folder / "domain.xml").read_text()
    (tmp_path / "file").touch()
    assert_error(call("restore", "web", "--to", tmp_path / "file"), errors.TargetExists)


@pytest.mark.parametrize(("name", "files"), [("web", ["domain.xml", "vda.img"]), ("web:vda", ["vda.img"])])
def test_a_slash_at_the_end_means_a_folder(
    call: Call, repository: Repository, tmp_path: Path, name: str, files: list[str],
) -> None:
    add_snapshot(repository, "web", _DAY, disk())
    done = call("restore", name, "--to", f"{tmp_path}/out/")
    assert done.returncode == EXIT_OK, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    (tmp_path / "file").touch()
    assert_error(call("restore", name, "--to", f"{tmp_path}/file/"), errors.TargetExists)


def test_what_to_do_next_names_this_repository(call: Call, repository: Repository) -> None:
    add_snapshot(repository, "web", _DAY, disk())
    for words in (("show", "nobody"), ("restore", "web:vdz", "--to", "x")):
        said = call(*words).stderr
        assert f"--repo {repository.address}\n" in said
        assert "REPO" not in said


def test_what_is_lost_is_named_and_never_made_up(
    call: Call, repository: Repository, tmp_path: Path
) -> None:
    content = disk()
    add_snapshot(repository, "web", _DAY, content)
    pack = next((tmp_path / "repository" / "main" / "p").glob("*/0*"))
    stored = bytearray(pack.read_bytes())
    stored[100] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(stored)
    image = tmp_path / "vda.img"
    assert "--skip-bad" in assert_error(call("restore", "web", "--to", image), errors.SlotDamaged)
    assert not image.exists()
    done = call("restore", "web", "--to", image, "--skip-bad", "--json")
    assert done.returncode == errors.RepositoryDamaged.exit_code
    lost = body(done)["disks"][0]["lost"]
    assert sum(each["length_bytes"] for each in lost) == 256 * 1024
    assert image.read_bytes() == bytes(_DISK_BYTES)
    for level in ("stored", "full"):
        found = call("verify", "--level", level, "--json")
        assert found.returncode == errors.RepositoryDamaged.exit_code
        assert body(found)["hurt"][0]["snapshot"]["guest"] == "web"
    bare = call("verify", "--level", "stored", "--json", secret=False)
    assert bare.returncode == errors.RepositoryDamaged.exit_code
    assert body(bare)["findings"]


def test_a_lost_file_does_not_keep_the_rest_from_a_folder(
    call: Call, repository: Repository, tmp_path: Path
) -> None:
    content = disk()
    add_snapshot(repository, "web", _DAY, content)  # so that the disk is in another pack than the file
    add_snapshot(repository, "web", _DAY + timedelta(hours=1), content, nvram=bytes(range(256)) * 100)
    packs = sorted((tmp_path / "repository/main/p").glob("*/0*"), key=lambda path: path.stat().st_mtime_ns,
                   reverse=True)
    assert len(packs) == 2
    stored = bytearray(packs[0].read_bytes())
    stored[100] ^= 1
    packs[0].chmod(0o600)
    packs[0].write_bytes(stored)
    done = call("restore", "web", "--to", f"{tmp_path / 'folder'}/", "--skip-bad", "--json")
    assert done.returncode == errors.RepositoryDamaged.exit_code, done.stderr
    assert body(done)["lost_files"][0].startswith("/nvram/web_VARS.fd")
    assert not body(done)["whole"]
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["domain.xml", "vda.img"]
    assert (tmp_path / "folder" / "vda.img").read_bytes() == content


# --- forget, prune, verify ----------------------------------------------------------------------


def test_a_pinned_snapshot_is_not_forgotten(call: Call, repository: Repository) -> None:
    for day in (_DAY, _DAY + timedelta(days=1)):
        add_snapshot(repository, "web", day, disk())
    older = body(call("list", "--guest", "web", "--json", secret=False))["snapshots"][0]["id"]
    assert body(call("pin", older, "--why", "audit 2026", "--json", secret=False))["changed"]
    assert not body(call("pin", older, "--json", secret=False))["changed"]
    listed = body(call("list", "--guest", "web", "--json", secret=False))["snapshots"]
    assert [each["pinned"] for each in listed] == [True] + [False] * (len(listed) - 1)
    assert "audit 2026" in call("show", older).stdout
    assert_error(call("forget", older, secret=False), errors.SnapshotPinned)
    kept = body(call("forget", "--keep-last", "1", "--guest", "web", "--json", secret=False))["kept"]
    assert {each["id"]: each["reasons"] for each in kept}[older] == ["pinned"]
    assert body(call("unpin", older, "--json", secret=False))["changed"]
    assert call("forget", older, secret=False).returncode == EXIT_OK


def test_rules_in_the_configuration_file_are_those_of_forget(
    call: Call, repository: Repository, tmp_path: Path,
) -> None:
    for day in range(4):
        for guest in ("web", "db", "old"):
            add_snapshot(repository, guest, _DAY + timedelta(days=day), disk())
    settings = tmp_path / "stillframe.toml"
    settings.write_text(
        "[defaults]\nkeep_last = 1\n[guests.db]\nkeep_daily = 3\n[guests.old]\nkeep_last = 0\n")
    named = {"STILLFRAME_CONFIG": str(settings)}
    said = call("forget", "--dry-run", secret=False, **named).stdout
    assert re.search(r"would drop  \w+  web@.* \(no rule keeps it\)", said)
    assert re.search(r"keep        \w+  db@2026-11-21.* \(daily\)", said)
    planned = body(call("forget", "--dry-run", "--json", secret=False, **named))
    assert Counter(each["guest"] for each in planned["kept"]) == {"web": 1, "db": 3, "old": 4}, (
        "a section completes and overrides the defaults")
    assert {tuple(each["reasons"]) for each in planned["dropped"]} == {("no rule keeps it",)}
    by_option = body(call("forget", "--keep-last", "2", "--dry-run", "--json", secret=False, **named))
    assert len(by_option["kept"]) == 6, "options take the place of all rules of the file"
    assert len(body(call("forget", "--json", secret=False, **named))["dropped"]) == len(planned["dropped"])
    assert body(call("forget", "--json", secret=False, **named))["dropped"] == []


def test_copies_go_where_the_configuration_file_says(
    call: Call, repository: Repository, tmp_path: Path,
) -> None:
    add_snapshot(repository, "web", _DAY, disk(), tags=("audit",))
    init_repository(
        LocalStorage(tmp_path / "second", make=True), Secret(SlotKind.PASSPHRASE, b"other words"), "second",
        SystemClock(), costs=_CHEAP)
    settings = tmp_path / "stillframe.toml"
    settings.write_text(f'[copy]\nrepository = "{tmp_path}/second"\n'
                        f'passphrase_file = "{secret_file(tmp_path / "other", "other words")}"\n')
    named = {"STILLFRAME_CONFIG": str(settings)}
    assert len(body(call("copy", "--json", "--dry-run", **named))["missing"]) == 1
    assert [each["guest"] for each in body(call("copy", "--json", **named))["copied"]] == ["web"]
    assert body(call("copy", "--json", **named))["copied"] == []
    second = ("--repo", tmp_path / "second", "--passphrase-file", tmp_path / "other")
    assert body(call("list", "--tags", "--json", *second))["snapshots"][0]["tags"] == ["audit"]
    assert_error(call("copy"), errors.ConfigInvalid)


def test_a_fresh_repository_has_nothing_to_forget(call: Call, repository: Repository, tmp_path: Path) -> None:
    settings = tmp_path / "stillframe.toml"
    settings.write_text("[defaults]\nkeep_last = 1\n")
    assert call("forget", secret=False, STILLFRAME_CONFIG=str(settings)).returncode == EXIT_OK
    settings.write_text("")
    assert call("forget", secret=False, STILLFRAME_CONFIG=str(settings)).returncode == EXIT_USAGE


def test_tags_are_listed_and_forgotten_by(call: Call, repository: Repository) -> None:
    tagged = {day: add_snapshot(repository, "web", _DAY + timedelta(days=day), disk(), tags=tags)
              for day, tags in enumerate([("weekly", "audit"), (), ("weekly",), ("weekly",), ()])}
    listed = body(call("list", "--tag", "weekly", "--json"))["snapshots"]
    assert [(each["id"], each["tags"]) for each in listed] == [
        (tagged[0], ["weekly", "audit"]), (tagged[2], ["weekly"]), (tagged[3], ["weekly"])]
    assert body(call("list", "--tag", "week", "--json"))["snapshots"] == []
    said = call("list", "--tags").stdout.splitlines()
    assert said[0].endswith("  tags: weekly, audit")
    assert "tags" not in said[1]
    assert "tags" not in call("list", secret=False).stdout, "without asking for tags no key is needed"
    assert_error(call("list", "--tags", secret=False), errors.KeyNeeded)
    assert "tags: weekly, audit" in call("show", tagged[0]).stdout
    done = body(call("forget", "--tag", "weekly", "--keep-last", "1", "--json"))
    assert [each["id"] for each in done["dropped"]] == [tagged[2], tagged[0]]
    left = body(call("list", "--json", secret=False))["snapshots"]
    assert [each["id"] for each in left] == [tagged[1], tagged[3], tagged[4]]


def test_the_newest_one_that_is_whole_stays(call: Call, repository: Repository) -> None:
    """Once verifying has found the newest ones damaged, the rules count whole ones; a backup heals."""
    part = os.urandom(200_000)
    for day in range(3):
        add_snapshot(repository, "web", _DAY + timedelta(days=day), disk((0, os.urandom(100_000))))
    for day in (3, 4):
        add_snapshot(repository, "web", _DAY + timedelta(days=day), disk((0, part)))
    whole, newest = (body(call("list", "--json"))["snapshots"][at]["id"] for at in (2, 4))
    storage, other = repository.storage, body(call("list", "--json"))["snapshots"][3]["id"]
    for pack in list(storage.list(f"main/p/{other}/")):
        content = bytearray(storage.get(pack.key))
        content[100] ^= 1
        storage.replace(pack.key, content)
    rules = ("forget", "--keep-last", "1", "--dry-run", "--json")
    assert [each["id"] for each in body(call(*rules, secret=False))["kept"]] == [newest], "not known yet"
    assert call("verify").returncode == errors.RepositoryDamaged.exit_code
    assert_error(call(*rules, secret=False), errors.KeyNeeded)
    planned = body(call(*rules))
    assert {each["id"]: each["reasons"] for each in planned["kept"]} == {
        newest: ["last", "damaged"], whole: ["last"]}
    assert sorted(each["reasons"][-1] for each in planned["dropped"]) == [
        "damaged", "no rule keeps it", "no rule keeps it"]
    healed = add_snapshot(repository, "web", _DAY + timedelta(days=5), disk((0, part)))
    assert [each["id"] for each in body(call(*rules))["kept"]] == [healed]


def test_forget_and_prune_give_space_back(call: Call, repository: Repository) -> None:
    for day in range(4):
        add_snapshot(repository, "web", _DAY + timedelta(days=day), disk((500_000, os.urandom(100_000))))
    add_snapshot(repository, "db", _DAY, disk())
    planned = body(call("forget", "--keep-last", "1", "--guest", "web", "--dry-run", "--json", secret=False))
    assert len(planned["dropped"]) == 3
    assert len(body(call("list", "--json"))["snapshots"]) == 5
    done = body(call("forget", "--keep-last", "1", "--guest", "web", "--json", secret=False))
    assert done["dropped"] == planned["dropped"]
    left = body(call("list", "--json"))["snapshots"]
    assert sorted(each["guest"] for each in left) == ["db", "web"]
    plan = body(call("prune", "--dry-run", "--json"))["plan"]
    assert plan["condemned_bytes"] > 0
    pruned = body(call("prune", "--json"))["done"]
    assert pruned["deleted_packs"] >= len(plan["condemned"])
    assert "nothing to do" in call("prune").stdout
    assert call("verify", "--level", "full").returncode == EXIT_OK
    assert call("forget", "web", "db").returncode == EXIT_OK
    assert body(call("list", "--json"))["snapshots"] == []


def test_a_second_site_with_the_same_keys(call: Call, repository: Repository, tmp_path: Path) -> None:
    content, second, image = disk((4096, b"one")), tmp_path / "second", tmp_path / "out.img"
    first = add_snapshot(repository, "web", _DAY, content)
    assert call("init", second, "--same-keys-as", repository.address).returncode == EXIT_OK
    (copied,) = body(call("copy", "--from", repository.address, "--to", second, "--json"))["copied"]
    assert (copied["moved"], copied["origin"]) == (True, first)
    assert call("restore", copied["id"], "--to", image, "--repo", second).returncode == EXIT_OK
    assert image.read_bytes() == content


def test_what_is_no_copy_does_not_keep_a_snapshot_from_being_copied(
    call: Call, repository: Repository, tmp_path: Path,
) -> None:
    """Neither what who may only add puts beside it, nor a copy that is damaged."""
    add_snapshot(repository, "web", _DAY, disk(), tags=("audit",))
    second, image = tmp_path / "second", tmp_path / "out.img"
    assert call("init", second).returncode == EXIT_OK
    storage = LocalStorage(second)
    name = SnapshotName("lab", "web", _DAY, new_sid())
    storage.create(name.key, b"x" * 200)
    words = ("copy", "--from", repository.address, "--to", second, "--json")
    wrong = name.sid
    for _ in range(2):
        shown = body(call(*words, "--dry-run"))
        assert (len(shown["missing"]), len(shown["unreadable"])) == (1, 1)
        done = call(*words)
        (copied,) = body(done)["copied"]
        (unreadable,) = body(done)["unreadable"]
        assert unreadable["id"] == wrong
        forget = f"forget {wrong} --repo {second}"
        assert f"stillframe {forget}" in done.stderr
        assert call(*forget.split()).returncode == EXIT_OK
        again = body(call(*words))
        assert (again["copied"], again["unreadable"]) == ([], [])
        assert call("restore", copied["id"], "--to", image, "--repo", second).returncode == EXIT_OK
        assert image.read_bytes() == disk()
        image.unlink()
        wrong = copied["id"]
        (listed,) = storage.list("main/m/")
        storage.replace(listed.key, storage.get(listed.key)[:-1] + b"?")


def test_what_is_wrong_with_the_source_of_a_copy_is_said_of_it(
    call: Call, repository: Repository, tmp_path: Path,
) -> None:
    """The commands that errors give name the repository that they are about."""
    add_snapshot(repository, "web", _DAY, disk((0, os.urandom(300_000))))
    second = tmp_path / "second"
    assert call("init", second).returncode == EXIT_OK
    words = ("copy", "--from", repository.address, "--to", second)
    (pack,) = (listed for listed in repository.storage.list("main/p/"))
    content = bytearray(repository.storage.get(pack.key))
    content[5000] ^= 1
    repository.storage.replace(pack.key, content)
    done = call(*words)
    assert done.returncode == EXIT_PARTIAL
    assert f"stillframe verify --repo {repository.address} " in done.stderr
    (slot,) = (listed for listed in repository.storage.list("main/keys/"))
    repository.storage.replace(slot.key, b"x" * slot.size_bytes)
    assert f" --repo {repository.address}" in assert_error(call(*words), errors.RepositoryDamaged)


def test_verify_in_parts(call: Call, repository: Repository) -> None:
    for day in range(3):
        add_snapshot(repository, "web", _DAY + timedelta(days=day), disk((0, os.urandom(300_000))))
    found = body(call("verify", "--level", "stored", "--subset", "1/30", "--json"))
    assert 0 < found["checked_packs"] < found["packs"]
    assert body(call("verify", "--level", "structure", "--json"))["checked_packs"] == 0


@pytest.mark.parametrize("words", [
    ("forget",), ("forget", "web", "--keep-last", "1"), ("forget", "web", "--guest", "web"),
    ("forget", "--keep-last", "0"), ("restore", "web"), ("restore", "--to", "x"), ("diff", "a"),
    ("key",), ("key", "remove"), ("backup",), ("backup", "web", "--all"), ("verify", "--level", "deep"),
    ("init", "x", "--repo", "y"), ("init", "--new-key-file", "x", "--key-file", "y"), ("list", "extra"),
    ("key", "add", "--new-key-file", "x", "--new-passphrase-file", "y"), ("files",),
    ("files", "cat", "web", "/x", "--json"), ("files", "get", "web", "/x"),
    ("files", "get", "web", "--to", "x"), ("files", "get", "web", "/x", "--to", "-", "--json"),
    ("files", "ls", "web", "--timeout", "soon"),
])
def test_a_call_that_makes_no_sense_shows_its_usage(call: Call, words: tuple[str, ...]) -> None:
    done = call(*words)
    assert done.returncode == EXIT_USAGE
    assert "Usage: " in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [
    ("verify", "--subset", "much"), ("verify", "--subset", "0/3"), ("prune", "--fence-after", "soon"),
    ("prune", "--compact-below", "300%"), ("forget", "--keep-within", "long"),
])
def test_a_value_that_makes_no_sense_is_named(
    call: Call, repository: Repository, words: tuple[str, ...]
) -> None:
    said = assert_error(call(*words), errors.ConfigInvalid)
    assert words[1] in said


def test_the_repository_opens_again_in_this_process(repository: Repository) -> None:
    secret = Secret(SlotKind.PASSPHRASE, _PASSPHRASE.encode())
    assert open_repository(repository.storage, secret).key.secret == repository.key.secret
