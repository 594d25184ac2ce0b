"""docs/TARGET-SMB.md, done word for word; and then what somebody does with the host's account on the share.

The attacks are made with a plain client of the protocol. After all of them, the admin's commands find
everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import smbclient
from smbprotocol.exceptions import SMBException

from lab.daemons import LibvirtDaemons
from lab.smbaccounts import MachineSmbd
from stillframe.storage.access import read_credentials
from tests.integration.targets import Target, followed

_PAGE = "TARGET-SMB.md"
_ADMIN = ('--repo "$(cat /etc/stillframe/repository)" --credentials-file /root/stillframe-admin/smb '
          "--key-file /etc/stillframe/key")
_FOLDER = "/srv/stillframe/repository"
_ADMINS = ("main/keys", "main/g", "main/pins", "main/v", "main", "")

pytestmark = [pytest.mark.timeout(600), pytest.mark.together]


@pytest.fixture(scope="module")
def target(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Follow the page up to the backup."""
    folder = tmp_path_factory.mktemp("target")
    with MachineSmbd(folder / "smbd") as smbd, followed(
        session_daemons, folder / "machine", _PAGE, {"SERVER": "127.0.0.1", "PORT": str(smbd.port)}, _ADMIN,
        services=smbd.start,
    ) as target:
        yield target


def content_of(target: Target) -> dict[str, bytes]:
    """Return all objects, by their names on the share."""
    root = target.machine.path(_FOLDER)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and not path.name.startswith(".") and ".unfinished" not in path.parts}


@pytest.fixture(scope="module")
def objects(target: Target) -> dict[str, bytes]:
    """Give what was there before the first attack."""
    return content_of(target)


class Host:
    """A client with the host's account."""

    def __init__(self, target: Target) -> None:
        found = read_credentials(target.machine.path("/etc/stillframe/smb"))
        self.options: dict[str, Any] = {"port": int(target.machine.names["PORT"]), "connection_cache": {}}
        smbclient.register_session(
            "127.0.0.1", username=found["username"], password=found["password"], **self.options)

    def path(self, path: str) -> str:
        parts = ["stillframe", "repository", *(part for part in path.split("/") if part)]
        return r"\\127.0.0.1" + "".join(f"\\{part}" for part in parts)

    def write(self, path: str, mode: str) -> None:
        with smbclient.open_file(self.path(path), mode=mode, share_access="rwd", **self.options) as file:
            file.write(b"harm")

    def do(self, verb: Callable[..., Any], *paths: str, **options: Any) -> None:
        verb(*(self.path(path) for path in paths), **options, **self.options)


@pytest.fixture(scope="module")
def host(target: Target) -> Iterator[Host]:
    host = Host(target)
    host.write(".unfinished/own", "wb")
    yield host
    smbclient.reset_connection_cache(fail_on_error=False, connection_cache=host.options["connection_cache"])


def _folder(path: str) -> str:
    return path.rpartition("/")[0] or "main"


ATTACKS: dict[str, Callable[[Host, str], None]] = {
    "remove": lambda host, path: host.do(smbclient.remove, path),
    "rename": lambda host, path: host.do(smbclient.rename, path, ".unfinished/gone"),
    "another over it": lambda host, path: host.do(smbclient.replace, ".unfinished/own", path),
    "a link over it": lambda host, path: host.do(smbclient.link, ".unfinished/own", path),
    "write": lambda host, path: host.write(path, "r+b"),
    "write anew": lambda host, path: host.write(path, "wb"),
    "append": lambda host, path: host.write(path, "ab"),
    "truncate": lambda host, path: smbclient.truncate(host.path(path), 1, **host.options),
    "remove its folder": lambda host, path: host.do(smbclient.rmdir, _folder(path)),
    "rename its folder": lambda host, path: host.do(smbclient.rename, _folder(path), "main/m/gone"),
}


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_no_object_is_destroyed_or_replaced(
    target: Target, host: Host, objects: dict[str, bytes], attack: str,
) -> None:
    """Snapshots, data, trees and keys, those that the host made itself and those of the admin."""
    assert {path.split("/")[1] for path in objects if "/" in path} >= {"m", "p", "t", "keys"}
    for path in objects:
        with pytest.raises((SMBException, OSError)):
            ATTACKS[attack](host, path)
    assert content_of(target) == objects


def test_nothing_is_added_where_the_admin_alone_adds(
    target: Target, host: Host, objects: dict[str, bytes],
) -> None:
    for folder in _ADMINS:
        with pytest.raises((SMBException, OSError)):
            host.write(f"{folder}/000000000099", "xb")
        with pytest.raises((SMBException, OSError)):
            host.do(smbclient.mkdir, f"{folder}/000000000099")
    assert content_of(target) == objects


def test_everything_is_there_in_the_end(target: Target, tmp_path: Path) -> None:
    """The rest of the page, and every byte."""
    for block in target.rest:
        target.machine.follow(block)
    target.assert_whole(tmp_path)
