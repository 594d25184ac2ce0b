"""Where the demo's repository is: in the lab's folder, on a server of the lab, or at an address of yours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lab.s3 import S3Server
from lab.server import Server
from lab.sftp import SftpDaemon
from lab.smb import SmbDaemon

SERVERS: dict[str, type[Server]] = {"s3": S3Server, "sftp": SftpDaemon, "smb": SmbDaemon}


@contextlib.contextmanager
def repository_for(where: str, place: Path) -> Iterator[tuple[str, Path | None]]:
    """Give the address of a repository, and a credentials file if it needs one.

    *where* is "" for a folder in *place*, the name of a kind of server, which runs within the block, or the
    address itself: who we are there is up to the environment.
    """
    if where not in SERVERS:
        yield where or str(place / "repository"), None
        return
    with SERVERS[where](place / where) as server:
        file = place / "credentials" if server.credentials else None
        if file is not None:
            file.touch(0o600)
            file.write_text(server.credentials)
        yield server.url("demo"), file
