"""Addresses of repositories as people write them: in a folder, and on each of the servers.

An address comes with the environment variables by which the command learns who we are there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

from lab.s3 import BUCKET
from tests.contract.drivers import Servers

Address = tuple[str, dict[str, str]]


def _folder(_servers: Servers, folder: Path) -> Address:
    return str(folder / "repository"), {}


def _s3(servers: Servers, _folder: Path) -> Address:
    access = servers.s3.access
    query = urlencode({"endpoint": access.endpoint, "region": access.region})
    return f"s3://{BUCKET}/{servers.unused}?{query}", {
        "AWS_ACCESS_KEY_ID": access.user, "AWS_SECRET_ACCESS_KEY": access.secret}


def _sftp(servers: Servers, _folder: Path) -> Address:
    place = servers.sftp.place(servers.unused)
    query = urlencode({"identity": place.identity, "known_hosts": place.known_hosts})
    return f"sftp://{place.user}@{place.host}:{place.port}{place.path}?{query}", {}


def _smb(servers: Servers, folder: Path) -> Address:
    place, access = servers.smb.place(servers.unused), servers.smb.access
    credentials = folder / "credentials"
    credentials.write_text(f"username={access.user}\npassword={access.secret}\n")
    credentials.chmod(0o600)
    return (f"smb://{place.host}:{place.port}/{place.share}/{place.folder}",
            {"STILLFRAME_CREDENTIALS_FILE": str(credentials)})


ADDRESSES: dict[str, Callable[[Servers, Path], Address]] = {
    "folder": _folder, "s3": _s3, "sftp": _sftp, "smb": _smb}
