"""Addresses of repositories as people write them: in a folder, and on each of the servers.

An address comes with the environment variables by which the command learns who we are there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.contract.drivers import Servers

Address = tuple[str, dict[str, str]]


def _folder(_servers: Servers, folder: Path) -> Address:
    return str(folder / "repository"), {}


def _s3(servers: Servers, _folder: Path) -> Address:
    access = servers.s3.access
    return servers.s3.url(servers.unused), {
        "AWS_ACCESS_KEY_ID": access.user, "AWS_SECRET_ACCESS_KEY": access.secret}


def _sftp(servers: Servers, _folder: Path) -> Address:
    return servers.sftp.url(servers.unused), {}


def _smb(servers: Servers, folder: Path) -> Address:
    credentials = folder / "credentials"
    credentials.write_text(servers.smb.credentials)
    credentials.chmod(0o600)
    return servers.smb.url(servers.unused), {"STILLFRAME_CREDENTIALS_FILE": str(credentials)}


ADDRESSES: dict[str, Callable[[Servers, Path], Address]] = {
    "folder": _folder, "s3": _s3, "sftp": _sftp, "smb": _smb}
