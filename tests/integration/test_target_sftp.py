"""docs/TARGET-SFTP.md, done word for word; and then what somebody does with the host's SSH key.

The attacks are made with a plain client of the protocol. After all of them, the admin's commands find
everything as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import asyncssh
import pytest

from lab.daemons import LibvirtDaemons
from lab.sshaccounts import MachineSshd
from stillframe.repository.layout import new_sid
from stillframe.repository.manifest import tombstone
from tests.integration.targets import Target, followed

_PAGE = "TARGET-SFTP.md"
_ADMIN = '--repo "$(cat /root/stillframe-admin/repository)" --key-file /etc/stillframe/key'
_FOLDER = "/srv/stillframe/repository"
#: Where hosts must not add anything.
_ADMINS = ("main/keys", "main/g", "main/pins", "main", "", "main/v/bad")

_NEW = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL

pytestmark = [pytest.mark.timeout(600), pytest.mark.together]

Attack = Callable[[asyncssh.SFTPClient, str], Awaitable[object]]


@pytest.fixture(scope="module")
def target(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Follow the page up to the backup."""
    folder = tmp_path_factory.mktemp("target")
    with MachineSshd(folder / "sshd") as sshd, followed(
        session_daemons, folder / "machine", _PAGE, {"SERVER": "127.0.0.1", "PORT": str(sshd.port)}, _ADMIN,
        services=sshd.start,
    ) as target:
        yield target


@pytest.fixture(scope="module")
def objects(target: Target) -> dict[str, bytes]:
    """Give what was there before the first attack."""
    return content_of(target)


def content_of(target: Target) -> dict[str, bytes]:
    """Return all objects."""
    root = target.machine.path(_FOLDER)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and not path.name.startswith(".") and ".unfinished" not in path.parts}


@contextlib.asynccontextmanager
async def connected(target: Target) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """Connect with the host's key."""
    async with asyncssh.connect(
        "127.0.0.1", int(target.machine.names["PORT"]), username="sf-host", known_hosts=None, config=[],
        client_keys=[str(target.machine.path("/etc/stillframe/ssh-key"))],
    ) as connection:
        yield connection


def as_host(target: Target, attack: Callable[[asyncssh.SFTPClient], Awaitable[None]]) -> None:
    """Run *attack* with the host's key."""
    async def run() -> None:
        async with connected(target) as connection, connection.start_sftp_client() as client:
            await client.chdir("/repository")
            await attack(client)

    asyncio.run(run())


async def _write(client: asyncssh.SFTPClient, path: str, flags: int) -> None:
    async with client.open(path, flags, encoding=None) as file:
        await file.write(b"harm", 0)


async def _rename_over(client: asyncssh.SFTPClient, path: str) -> None:
    with contextlib.suppress(asyncssh.SFTPError):
        await _write(client, ".unfinished/own", _NEW)
    await client.posix_rename(".unfinished/own", path)


async def _link_over(client: asyncssh.SFTPClient, path: str) -> None:
    with contextlib.suppress(asyncssh.SFTPError):
        await _write(client, ".unfinished/own", _NEW)
    await client.link(".unfinished/own", path)


ATTACKS: dict[str, Attack] = {
    "remove": lambda client, path: client.remove(path),
    "rename": lambda client, path: client.rename(path, ".unfinished/gone"),
    "rename by POSIX": lambda client, path: client.posix_rename(path, ".unfinished/gone"),
    "another over it": _rename_over,
    "a link over it": _link_over,
    "a symlink over it": lambda client, path: client.symlink("/etc/passwd", path),
    "write": lambda client, path: _write(client, path, asyncssh.FXF_WRITE),
    "write anew": lambda client, path: _write(
        client, path, asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_TRUNC),
    "append": lambda client, path: _write(client, path, asyncssh.FXF_WRITE | asyncssh.FXF_APPEND),
    "truncate": lambda client, path: client.truncate(path, 1),
    "make it writable": lambda client, path: client.chmod(path, 0o666),
    "give it away": lambda client, path: client.chown(path, 0, 0),
    "copy over it": lambda client, path: client.remote_copy(".unfinished/own", path),
    "remove its folder": lambda client, path: client.rmdir(path.rpartition("/")[0] or "main"),
    "rename its folder": lambda client, path: client.rename(path.rpartition("/")[0] or "main", "main/m/x"),
}


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_no_object_is_destroyed_or_replaced(target: Target, objects: dict[str, bytes], attack: str) -> None:
    """Snapshots, data, trees and keys, those that the host made itself and those of the admin."""
    async def harm(client: asyncssh.SFTPClient) -> None:
        for path in objects:
            with pytest.raises((asyncssh.SFTPError, FileExistsError)):
                await ATTACKS[attack](client, path)

    assert {path.split("/")[1] for path in objects if "/" in path} >= {"m", "p", "t", "keys"}
    as_host(target, harm)
    assert content_of(target) == objects


def test_nothing_is_added_where_the_admin_alone_adds(target: Target, objects: dict[str, bytes]) -> None:
    """No forged generation, no key slot; and nothing but the repository is to be seen."""
    async def harm(client: asyncssh.SFTPClient) -> None:
        for folder in _ADMINS:
            path = f"{folder}/000000000099".lstrip("/")
            with pytest.raises(asyncssh.SFTPError):
                await _write(client, path, _NEW)
            with pytest.raises(asyncssh.SFTPError):
                await client.mkdir(path)
        assert sorted(await client.listdir("/")) == [".", "..", "repository"]

    as_host(target, harm)
    assert content_of(target) == objects


def test_a_shell_is_no_way_around(target: Target, objects: dict[str, bytes]) -> None:
    async def run() -> None:
        async with connected(target) as connection:
            done = await connection.run("rm -rf /repository/main", input="", timeout=60)
            assert done.exit_status == 1
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.open_connection("127.0.0.1", int(target.machine.names["PORT"]))

    asyncio.run(run())
    assert content_of(target) == objects


def test_a_snapshot_is_not_hidden_unnoticed(target: Target, objects: dict[str, bytes]) -> None:
    """No tombstone in its place; what is put beside it is listed, and the admin is told."""
    (snapshot,) = (path for path in objects if path.startswith("main/m/"))
    garbage, hidden = (f"{snapshot.rpartition('-')[0]}-{new_sid()}" for _ in range(2))

    async def harm(client: asyncssh.SFTPClient) -> None:
        with pytest.raises(asyncssh.SFTPError):
            await _write(client, snapshot, _NEW)
        for path, content in ((hidden, tombstone(new_sid())), (garbage, b"x" * 500)):
            async with client.open(path, _NEW, encoding=None) as file:
                await file.write(content)

    as_host(target, harm)
    listed = target.stillframe("list")
    assert snapshot[-32:][:8] in listed
    assert garbage[-32:][:8] in listed
    target.fails("verify")
    before = content_of(target)
    target.fails("prune --fence-after 24h")
    assert objects.items() <= content_of(target).items()
    assert before.keys() - content_of(target).keys() <= {key for key in before if key.startswith("main/s/")}
    target.stillframe(f"forget {garbage[-32:]}")


def test_everything_is_there_in_the_end(target: Target, tmp_path: Path) -> None:
    """The rest of the page, and every byte."""
    for block in target.rest:
        target.machine.follow(block)
    target.assert_whole(tmp_path)
