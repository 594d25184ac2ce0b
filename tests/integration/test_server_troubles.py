"""Servers that lie, fill up, have odd names or another time: what the command makes of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from msgspec.structs import replace as replace_struct

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import KIB, MIB, run
from lab.proxy import Chances, HttpProxy, unconditional
from lab.s3 import S3Server
from lab.server import Server
from lab.sftp import SftpDaemon
from lab.smb import SmbDaemon
from lab.waiting import PATIENCE_S, wait_for
from stillframe.clock import SystemClock
from stillframe.errors import ObjectExists, RepositoryUnsafe, StorageFull, StorageLost, StorageRefused
from stillframe.storage import sftp, smb
from stillframe.storage.files import FileStorage
from stillframe.storage.patience import call_timeout_s
from stillframe.storage.sftp import SftpServer
from stillframe.storage.smb import SmbServer
from tests.contract.addresses import ADDRESSES, Address
from tests.contract.drivers import Servers
from tests.fault.driver import PASSPHRASE
from tests.fault.harness import Place
from tests.integration.repositories import Repo

#: What libvirt takes as a name, and what addresses escape.
_ODD = "Büro №1 50%41#a"
_KINDS = ("s3", "sftp", "smb")

MakeGuest = Callable[..., DiskGuest]
_DISK = DiskSpec("vda", Kind.QCOW2, 16 * MIB)

pytestmark = pytest.mark.together


def moment_of(guest: DiskGuest, number: int) -> dict[str, Path]:
    """Write something, and return what the disk holds now."""
    guest.write("vda", number * MIB, 200 * KIB, number)
    guest.flush()
    return {"vda": guest.model("vda").copy_at_moment()}


def repo_at(address: Address, place: Place, folder: Path) -> Repo:
    """Return a repository that is not made yet."""
    where, settings = address
    repo = Repo(folder / "repository", place, address=where, settings=settings)
    passphrase = repo.path.with_suffix(".pass")
    passphrase.write_bytes(PASSPHRASE)
    passphrase.chmod(0o600)
    return repo


def made(repo: Repo) -> Repo:
    done = repo.call("init")
    assert done.returncode == 0, done.stdout + done.stderr
    return repo


def behind(repo: Repo, server: S3Server, proxy: HttpProxy) -> Repo:
    """Return *repo* as it is reached through a proxy."""
    return replace(repo, address=repo.address.replace(str(server.port), str(proxy.port)))


def test_a_server_that_overwrites_all_the_same_is_refused(place: Place, tmp_path: Path) -> None:
    """A real server that never hears of the condition; where it does hear of it, it is taken."""
    with S3Server(tmp_path / "s3", anybody=True) as server, HttpProxy(
        server.port, Chances(), asked=unconditional,
    ) as proxy:
        keys = {"AWS_ACCESS_KEY_ID": server.access.user, "AWS_SECRET_ACCESS_KEY": server.access.secret}
        repo = repo_at((server.url("lies"), keys), place, tmp_path)
        done = behind(repo, server, proxy).call("init")
        assert done.returncode == RepositoryUnsafe.exit_code, done.stdout + done.stderr
        assert "accepted a second object" in done.stderr
        made(repo)


@pytest.mark.parametrize("kind", ["sftp", "smb"])
def test_a_server_that_fills_up_loses_nothing(
    disk_guest: MakeGuest, servers: Servers, place: Place, tmp_path: Path, kind: str,
) -> None:
    """The run ends with a word on room, what was there is there, and with more room the next run goes on."""
    repo = repo_at(ADDRESSES[kind](servers, tmp_path), place, tmp_path)
    guest = disk_guest(_DISK)
    root = servers.sftp.root if kind == "sftp" else servers.smb.share
    folder = root / repo.address.partition("?")[0].rpartition("/")[2]
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", folder)
    try:
        made(repo)
        first = moment_of(guest, 1)
        snapshot = repo.backup(guest)["snapshot"]
        guest.write_bytes("vda", 4 * MIB, os.urandom(8 * MIB))
        run("mount", "-o", f"remount,size={_used_bytes(folder) + 3 * MIB}", folder)
        done = repo.call("backup", guest.name, "--quiesce", "none", "--min-free", "32M")
        assert done.returncode == StorageFull.exit_code, done.stdout + done.stderr
        assert [each["id"] for each in repo.json("list")["snapshots"]] == [snapshot]
        repo.assert_restores(snapshot, first, tmp_path)
        run("mount", "-o", "remount,size=64M", folder)
        second = moment_of(guest, 2)
        repo.assert_restores(repo.backup(guest)["snapshot"], second, tmp_path)
        assert repo.call("prune").returncode == 0
        assert repo.json("verify", "--level", "full")["findings"] == []
    finally:
        run("umount", "--lazy", folder)


def _used_bytes(folder: Path) -> int:
    return int(run("df", "--output=used", "--block-size=1", folder).split()[-1])


@pytest.mark.parametrize("kind", _KINDS)
def test_odd_names(
    disk_guest: MakeGuest, servers: Servers, place: Place, tmp_path: Path, kind: str,
) -> None:
    """The guest's name and the repository's folder have what addresses, shells and servers escape."""
    guest = disk_guest(_DISK, name=_ODD)
    where, settings = ADDRESSES[kind](servers, tmp_path)
    path, question, options = where.partition("?")
    repo = made(repo_at((f"{path}/{quote(_ODD)}{question}{options}", settings), place, tmp_path))
    moment = moment_of(guest, 3)
    snapshot = repo.backup(guest, "--tag", "a")["snapshot"]
    (listed,) = repo.json("list")["snapshots"]
    assert (listed["id"], listed["guest"]) == (snapshot, _ODD)
    repo.assert_restores(_ODD, moment, tmp_path)
    assert repo.json("verify", "--level", "full")["findings"] == []


@pytest.mark.parametrize("off", ["+5h", "-5h"])
def test_a_host_whose_clock_is_off_is_told(servers: Servers, place: Place, tmp_path: Path, off: str) -> None:
    """The server doesn't take signatures of another time; the hint is at the clock."""
    repo = repo_at(ADDRESSES["s3"](servers, tmp_path), place, tmp_path)
    done = subprocess.run(
        ["faketime", "-f", off, *repo.command("init")], env=repo.environment(), cwd=repo.root,
        capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == StorageRefused.exit_code, done.stdout + done.stderr
    assert "RequestTimeTooSkewed" in done.stderr
    assert "timedatectl" in done.stderr


@pytest.mark.parametrize("refused", ["rename", "hardlink"])
def test_sftp_names_files_by_what_the_account_may_do(tmp_path: Path, refused: str) -> None:
    """By links where renaming is refused; but a folder that refuses both says nothing of the others."""
    with SftpDaemon(tmp_path / "sftp", refused) as server:
        storage = FileStorage(SftpServer(server.place("r")), make=True)
        storage.create("main/g/one", b"1")
        folder = server.root / "r" / "main" / "g"
        run("chattr", "+i", folder)
        try:
            with pytest.raises(StorageRefused):
                storage.create("main/g/two", b"2")
        finally:
            run("chattr", "-i", folder)
        for key in ("main/g/two", "main/p/one"):
            storage.create(key, key.encode())
            with pytest.raises(ObjectExists):
                storage.create(key, b"again")
            assert storage.get(key) == key.encode()


@pytest.mark.parametrize("kind", ["sftp", "smb"])
def test_a_pack_may_take_as_long_as_its_size_asks_for(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, kind: str,
) -> None:
    module, server = (sftp, SftpServer(servers.sftp.place(""))) if kind == "sftp" else (
        smb, SmbServer(servers.smb.place(""), servers.smb.access, SystemClock()))
    asked: list[float] = []

    def timeout_s(size_bytes: int) -> float:
        asked.append(size_bytes)
        return call_timeout_s(size_bytes)

    monkeypatch.setattr(module, "call_timeout_s", timeout_s)
    name = servers.unused
    server.write(name, memoryview(bytes(MIB)))
    assert server.read(name, 0, MIB)[0] == bytes(MIB)
    assert asked == [MIB, MIB]


def test_no_connection_stays_where_sftp_does_not_start(tmp_path: Path) -> None:
    with SftpDaemon(tmp_path / "sftp", "rename -Z") as server:  # an option that it does not know ends it
        storage = SftpServer(server.place(""))
        for _ in range(3):
            with pytest.raises(StorageLost):
                storage.stat("x")
        wait_for("all connections are gone", lambda: not children(server), PATIENCE_S)


def test_a_share_that_hangs_is_given_up_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a request, and in a pack that it does not take in; no thread stays in there."""
    with SmbDaemon(tmp_path / "smb") as server:
        shares = SmbServer(server.place(""), server.access, SystemClock())
        shares.write("first", memoryview(b"1"))
        with stopped(server), monkeypatch.context() as patched:
            patched.setattr(smb, "call_timeout_s", lambda _size: 0.5)
            with pytest.raises(StorageLost, match="no answer"):
                shares.stat("first")
        assert shares.read("first", 0, None) == (b"1", 1)
        with stopped(server), monkeypatch.context() as patched:
            patched.setattr(smb, "call_timeout_s", lambda _size: 0.5)
            with pytest.raises(StorageLost, match="no answer"):
                shares.write("second", memoryview(bytes(32 * MIB)))
            shares._threads.shutdown(wait=True)


def children(server: Server) -> list[int]:
    """Return the processes that a server has for its connections, among others."""
    return [int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]


@contextlib.contextmanager
def stopped(server: SmbDaemon) -> Iterator[None]:
    """Let a server answer nothing within the block, on the connections that it has."""
    pids = children(server)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


_KEY = "127.0.0.1 ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGqWHJLTe1R1P4oVgP8wZ0aR6lTgb3q0z3yYQYyTgY8G"


@pytest.mark.parametrize(("file", "content", "said"), [
    ("none", "", "/none'"), ("identity", "", "/none'"), ("known_hosts", "field\n", "field"),
    ("known_hosts", f"@trusted {_KEY}\n", "trusted"), (".ssh/config", "Port abc\n", "config"),
    (".ssh/config", "ProxyCommand /nowhere/program\n", "/nowhere/program"),
])
def test_a_wrong_file_of_ssh_is_told_and_is_no_missing_repository(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str, said: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / file).write_text(content)
    place = servers.sftp.place(servers.unused)
    if file == "identity":
        place = replace_struct(place, identity=str(tmp_path / "none"))
    elif not file.startswith("."):
        place = replace_struct(place, known_hosts=str(tmp_path / file))
    if file == "none":
        (tmp_path / file).unlink()
    with pytest.raises(StorageRefused, match=said):
        SftpServer(place).read("repo.json", 0, None)
