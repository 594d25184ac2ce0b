"""docs/TARGET-SFTP.md, done word for word; and then what somebody does with the host's SSH key and repository key.

The attacks are made with a plain client of the protocol. After all of them, the admin's commands find
everything as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import asyncssh
import pytest

from lab.daemons import LibvirtDaemons
from lab.diskguest import DiskGuest
from lab.disks import DiskSpec, Kind
from lab.enter import IMAGES_DIR
from lab.images import KIB, MIB, assert_equal_images
from lab.sshaccounts import MachineSshd
from stillframe.repository.layout import new_sid
from stillframe.repository.manifest import tombstone
from tests.integration.pages import OwnMachine, blocks

_PAGE = "TARGET-SFTP.md"
_ADMIN = '--repo "$(cat /root/stillframe-admin/repository)" --key-file /etc/stillframe/key'
_FOLDER = "/srv/stillframe/repository"
#: Where hosts must not add anything.
_ADMINS = ("main/keys", "main/g", "main/pins", "main", "", "main/v/bad")

pytestmark = [pytest.mark.timeout(600), pytest.mark.together]

Attack = Callable[[asyncssh.SFTPClient, str], Awaitable[object]]


class Target:
    """The server of the page with a backup of a guest, and what the disk held then."""

    def __init__(self, machine: OwnMachine, port: int, moment: Path) -> None:
        self.machine = machine
        self.port = port
        self.moment = moment
        self.objects = self.content()

    def content(self) -> dict[str, bytes]:
        """Return all objects."""
        root = self.machine.path(_FOLDER)
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
                if path.is_file() and not path.name.startswith(".") and ".unfinished" not in path.parts}

    def as_host(self, attack: Callable[[asyncssh.SFTPClient], Awaitable[None]]) -> None:
        """Run *attack* with the host's key."""
        async def run() -> None:
            async with asyncssh.connect(
                "127.0.0.1", self.port, username="sf-host", known_hosts=None, config=[],
                client_keys=[str(self.machine.path("/etc/stillframe/ssh-key"))],
            ) as connection, connection.start_sftp_client() as client:
                await client.chdir("/repository")
                await attack(client)

        asyncio.run(run())


@pytest.fixture(scope="module")
def target(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Follow the page up to the backup."""
    folder = tmp_path_factory.mktemp("target")
    session_daemons.start()
    guest = DiskGuest(session_daemons, IMAGES_DIR, "web", [DiskSpec("vda", Kind.QCOW2, 24 * MIB)])
    with contextlib.ExitStack() as stack:
        stack.callback(guest.remove)
        guest.define()
        guest.start()
        guest.write("vda", MIB, 300 * KIB, 0xA1)
        guest.flush()
        sshd = stack.enter_context(MachineSshd(folder / "sshd"))
        machine = stack.enter_context(OwnMachine(
            folder / "machine", {"SERVER": "127.0.0.1", "PORT": str(sshd.port)}, sshd.start))
        steps = blocks(_PAGE)
        for block in steps[:-1]:
            machine.follow(block)
        yield Target(machine, sshd.port, guest.model("vda").copy_at_moment())
        # The page's last step: the admin finds everything as it was.
        machine.follow(steps[-1])


async def _write(client: asyncssh.SFTPClient, path: str, flags: int) -> None:
    async with client.open(path, flags, encoding=None) as file:
        await file.write(b"harm", 0)


async def _rename_over(client: asyncssh.SFTPClient, path: str) -> None:
    with contextlib.suppress(asyncssh.SFTPError):
        await _write(client, ".unfinished/own", asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL)
    await client.posix_rename(".unfinished/own", path)


async def _link_over(client: asyncssh.SFTPClient, path: str) -> None:
    with contextlib.suppress(asyncssh.SFTPError):
        await _write(client, ".unfinished/own", asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL)
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
def test_no_object_is_destroyed_or_replaced(target: Target, attack: str) -> None:
    """Snapshots, data, trees and keys, those that the host made itself and those of the admin."""
    async def harm(client: asyncssh.SFTPClient) -> None:
        for path in target.objects:
            with pytest.raises((asyncssh.SFTPError, FileExistsError)):
                await ATTACKS[attack](client, path)

    assert {path.split("/")[1] for path in target.objects if "/" in path} >= {"m", "p", "t", "keys"}
    target.as_host(harm)
    assert target.objects.items() <= target.content().items()


def test_nothing_is_added_where_the_admin_alone_adds(target: Target) -> None:
    """A forged generation or key slot; another AuthorizedKeysFile can't be reached at all."""
    async def harm(client: asyncssh.SFTPClient) -> None:
        for folder in _ADMINS:
            path = f"{folder}/000000000099".lstrip("/")
            with pytest.raises(asyncssh.SFTPError):
                await _write(client, path, asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL)
            with pytest.raises(asyncssh.SFTPError):
                await client.mkdir(path)
        assert sorted(await client.listdir("/")) == [".", "..", "repository"]

    target.as_host(harm)
    assert target.content() == target.objects


def test_a_shell_is_no_way_around(target: Target) -> None:
    async def run() -> None:
        async with asyncssh.connect(
            "127.0.0.1", target.port, username="sf-host", known_hosts=None, config=[],
            client_keys=[str(target.machine.path("/etc/stillframe/ssh-key"))],
        ) as connection:
            done = await connection.run("rm -rf /repository/main", input="", timeout=60)
            assert done.exit_status == 1
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.open_connection("127.0.0.1", target.port)

    asyncio.run(run())
    assert target.content() == target.objects


def test_a_snapshot_is_not_hidden_unnoticed(target: Target) -> None:
    """No tombstone in its place; what is put beside it is listed, and the admin is told."""
    (snapshot,) = (path for path in target.objects if path.startswith("main/m/"))
    new = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL
    garbage = f"{snapshot.rpartition('-')[0]}-{new_sid()}"

    async def harm(client: asyncssh.SFTPClient) -> None:
        with pytest.raises(asyncssh.SFTPError):
            await _write(client, snapshot, new)
        for path, content in ((f"{snapshot[:-32]}{new_sid()}", tombstone(new_sid())), (garbage, b"x" * 500)):
            async with client.open(path, new, encoding=None) as file:
                await file.write(content)

    target.as_host(harm)
    listed = target.machine.run(f"stillframe list {_ADMIN}")
    assert snapshot[-32:][:8] in listed
    assert garbage[-32:][:8] in listed
    assert target.machine.run(f"stillframe verify {_ADMIN} || test $? -ge 64")
    before = target.content()
    assert target.machine.run(f"stillframe prune --fence-after 24h {_ADMIN} && exit 1; test $? -ge 64") == ""
    assert target.content() == before
    target.machine.run(f"stillframe forget {garbage[-32:]} {_ADMIN}")


def test_everything_is_there_in_the_end(target: Target, tmp_path: Path) -> None:
    target.machine.run(f"stillframe prune --fence-after 24h {_ADMIN}")
    assert '"findings": []' in target.machine.run(f"stillframe verify --level full --json {_ADMIN}")
    target.machine.run(f"stillframe restore web --to {tmp_path}/back/ {_ADMIN}")
    assert_equal_images(tmp_path / "back" / "vda.img", target.moment)
