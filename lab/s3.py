"""A real S3 server on loopback: SeaweedFS, one binary from PyPI.

with S3Server(folder) as server:
storage = S3Storage(BUCKET, "a/folder", server.access)
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Self
from urllib.parse import urlencode

from lab.ports import free_ports
from lab.server import Server
from stillframe.storage.access import Access
from stillframe.storage.s3 import S3Storage

ACCESS_KEY_ID, SECRET_ACCESS_KEY = "labkey", "labsecret12345"
#: Who may only do what the policy says that the server was given, if any.
HOST_KEY_ID, HOST_SECRET = "hostkey", "hostsecret12345"
BUCKET = "lab"
_REGION = "us-east-1"


class S3Server(Server):
    """Runs within the block, with one bucket.

    *host_policy* is IAM's JSON. With *every_address* other hosts of the lab reach it, too. With *anybody*
    a request that is not signed may do all, too: what a proxy changes has no signature any more.
    """

    #: An orderly end takes it 25 s, and nothing of it is kept.
    _END = signal.SIGKILL

    def __init__(
        self, folder: Path, host_policy: str = "", *, every_address: bool = False, anybody: bool = False,
    ) -> None:
        super().__init__(folder)
        self._host_policy = host_policy
        self._anybody = anybody
        self._bound_to = "0.0.0.0" if every_address else "127.0.0.1"

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        data = self._folder / "data"
        data.mkdir(exist_ok=True)
        identity = {"name": "lab", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                    "credentials": [{"accessKey": ACCESS_KEY_ID, "secretKey": SECRET_ACCESS_KEY}]}
        settings = self._folder / "s3.json"
        host = {"name": "host", "actions": [], "policyNames": ["host"],
                "credentials": [{"accessKey": HOST_KEY_ID, "secretKey": HOST_SECRET}]}
        policy = {"name": "host", "content": self._host_policy}
        settings.write_text(json.dumps(
            {"identities": [identity, host], "policies": [policy]} if self._host_policy
            else {"identities": [identity, {**identity, "name": "anonymous", "credentials": []}]}
            if self._anybody else {"identities": [identity]}))
        self.port, master, volume, filer, *grpc = free_ports(8)
        command = [
            str(Path(sys.executable).with_name("weed")), "server", f"-dir={data}", "-ip=127.0.0.1",
            f"-ip.bind={self._bound_to}",
            "-master.volumeSizeLimitMB=512", "-volume.max=50",
            # By itself it refuses to write where less than 1 % of the disk is free, which may be a lot.
            "-volume.minFreeSpace=64MiB", "-filer", "-s3", f"-s3.port={self.port}",
            f"-s3.config={settings}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-master.port={master}",
            f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port.grpc={grpc[0]}",
            f"-master.port.grpc={grpc[1]}", f"-volume.port.grpc={grpc[2]}", f"-filer.port.grpc={grpc[3]}",
        ]
        self._start(command)
        # It makes a bucket of whatever is written to first; only then the bucket can be listed.
        first = S3Storage(BUCKET, "", self.access)
        first.create("first", b"x")
        first.delete(["first"])
        return self

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"

    def url(self, folder: str) -> str:
        """See Server."""
        return f"s3://{BUCKET}/{folder}?{urlencode({'endpoint': self.endpoint, 'region': _REGION})}"

    @property
    def credentials(self) -> str:
        """See Server."""
        return f"aws_access_key_id = {ACCESS_KEY_ID}\naws_secret_access_key = {SECRET_ACCESS_KEY}\n"

    @property
    def access(self) -> Access:
        """What the owner of all buckets says to it."""
        return Access(user=ACCESS_KEY_ID, secret=SECRET_ACCESS_KEY, endpoint=self.endpoint, region=_REGION)
