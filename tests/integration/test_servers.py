"""Repositories on real servers, from `init` to a restored disk, by the command alone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest

from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.images import KIB, MIB, run
from lab.waiting import PATIENCE_S, wait_for
from stillframe.errors import RepositoryExists, StorageRefused
from tests.contract.addresses import ADDRESSES
from tests.contract.drivers import Servers
from tests.fault.driver import PASSPHRASE
from tests.fault.harness import Place
from tests.integration.repositories import Repo, make_repo

MakeGuest = Callable[..., DiskGuest]
_SIZE_BYTES = 24 * MIB


@pytest.fixture(params=["s3", "sftp", "smb"])
def repo(request: pytest.FixtureRequest, servers: Servers, place: Place, tmp_path: Path) -> Repo:
    address, settings = ADDRESSES[request.param](servers, tmp_path)
    repo = Repo(tmp_path / "repository", place, address=address, settings=settings)
    passphrase = repo.path.with_suffix(".pass")
    passphrase.write_bytes(PASSPHRASE + b" of the server\n")
    passphrase.chmod(0o600)
    made = repo.call("init")
    assert made.returncode == 0, made.stdout + made.stderr
    return repo


def test_a_chain_of_snapshots_on_a_server(disk_guest: MakeGuest, repo: Repo, tmp_path: Path) -> None:
    """Two snapshots are made, checked and restored; one is dropped, the other stays whole."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    links = {}
    for number in (1, 2):
        guest.write("vda", number * MIB, 200 * KIB, 0xA0 + number)
        guest.write_zeroes("vda", 8 * MIB, 128 * KIB)
        guest.flush()
        moment = {"vda": guest.model("vda").copy_at_moment()}
        links[repo.backup(guest, "--tag", f"round-{number}")["snapshot"]] = moment
    assert [each["id"] for each in repo.json("list")["snapshots"]] == list(links)
    assert [each["id"] for each in repo.json("list", "--tag", "round-2")["snapshots"]] == list(links)[1:]
    assert repo.json("verify", "--level", "full")["findings"] == []
    for snapshot, moment in links.items():
        repo.assert_restores(snapshot, moment, tmp_path)
    first, second = links
    assert repo.call("forget", first).returncode == 0
    assert repo.call("prune").returncode == 0
    repo.assert_restores(second, links[second], tmp_path)
    assert repo.call("init").returncode == RepositoryExists.exit_code


def test_a_disk_is_served_from_a_server(disk_guest: MakeGuest, repo: Repo, tmp_path: Path) -> None:
    """What serves it is another process, which is told who we are to the repository's server."""
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    guest.write("vda", 2 * MIB, 200 * KIB, 0xC1)
    guest.flush()
    moment = guest.model("vda").copy_at_moment()
    snapshot = repo.backup(guest)["snapshot"]
    socket = tmp_path / "s"
    command = repo.command("serve", f"{snapshot}:vda", "--socket", socket)
    with subprocess.Popen(command, env=repo.environment(), cwd=repo.root) as server:
        try:
            wait_for("the disk is served", socket.exists, PATIENCE_S)
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", f"nbd+unix:///vda?socket={socket}", moment)
        finally:
            server.terminate()
    assert server.returncode == 0


def test_a_second_site(disk_guest: MakeGuest, repo: Repo, place: Place, tmp_path: Path) -> None:
    """Snapshots of a repository in a folder are copied to a server, with another passphrase."""
    first = make_repo(place, tmp_path / "first-site")
    guest = disk_guest(DiskSpec("vda", Kind.QCOW2, _SIZE_BYTES))
    links = []
    for number in (1, 2):
        guest.write("vda", number * MIB, 200 * KIB, 0xB0 + number)
        guest.flush()
        links.append({"vda": guest.model("vda").copy_at_moment()})
        first.backup(guest)
    passphrase = first.path.with_suffix(".pass")
    words = ["copy", "--from", str(first.path), "--from-passphrase-file", str(passphrase)]
    assert len(repo.json(*words, "--dry-run")["missing"]) == 2
    copied = repo.json(*words)["copied"]
    assert copied[1]["read_bytes"] < copied[0]["read_bytes"] / 2
    for each, moment in zip(copied, links, strict=True):
        repo.assert_restores(each["id"], moment, tmp_path)
    assert repo.json(*words)["copied"] == []


def test_secrets_of_a_server_are_in_no_message(repo: Repo) -> None:
    wrong = {"AWS_SECRET_ACCESS_KEY": "not-this-one", "AWS_ACCESS_KEY_ID": "labkey"}
    if repo.address.startswith("s3"):
        done = Repo(repo.path, repo.place, address=repo.address, settings=wrong).call("list")
    elif repo.address.startswith("smb"):
        file = repo.path.with_suffix(".wrong")
        file.write_text("username=root\npassword=not-this-one\n")
        settings = {"STILLFRAME_CREDENTIALS_FILE": str(file)}
        done = Repo(repo.path, repo.place, address=repo.address, settings=settings).call("list")
    else:
        key = repo.path.with_suffix(".key")
        words = "OPENSSH PRIVATE KEY-----"
        key.write_text(f"-----BEGIN {words}\nnot-this-one\n-----END {words}\n")
        address = f"{repo.address.partition('?')[0]}?{urlencode({'identity': key})}"
        done = Repo(repo.path, repo.place, address=address).call("list")
    assert done.returncode == StorageRefused.exit_code, done.stdout + done.stderr
    assert "not-this-one" not in done.stdout + done.stderr


def test_another_key_of_the_host_is_refused(servers: Servers, place: Place, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known_hosts"
    kind, key, *_ = servers.sftp.other_key().read_text().split()
    known_hosts.write_text(f"[127.0.0.1]:{servers.sftp.port} {kind} {key}\n")
    where = servers.sftp.url(servers.unused).partition("known_hosts=")[0]
    address = where + urlencode({"known_hosts": known_hosts})
    done = Repo(tmp_path / "repository", place, address=address).call("list")
    assert done.returncode == StorageRefused.exit_code, done.stdout + done.stderr
