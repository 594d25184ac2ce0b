"""What the tests of docs/TARGET-S3.md share: the page, followed on SeaweedFS, and plain clients of S3.

SeaweedFS does not know the condition of the page's policy that keeps the host from overwriting: what it does
instead is what is tested here.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import obstore
from obstore.store import S3Store

from lab.daemons import LibvirtDaemons
from lab.s3 import ACCESS_KEY_ID, HOST_KEY_ID, HOST_SECRET, SECRET_ACCESS_KEY, S3Server
from tests.integration.repositories import ROOT
from tests.integration.targets import Target, followed

_PAGE = "TARGET-S3.md"
_BUCKET, _REGION = "backups", "us-east-1"
_ADMIN = ('--repo "$(cat /etc/stillframe/repository)" --credentials-file /root/stillframe-admin/s3-key '
          "--key-file /etc/stillframe/key")
#: A key and its secret.
HOST, ADMIN = (HOST_KEY_ID, HOST_SECRET), (ACCESS_KEY_ID, SECRET_ACCESS_KEY)


@contextlib.contextmanager
def page_followed(
    daemons: LibvirtDaemons, folder: Path, *, without: tuple[str, ...] = (),
) -> Iterator[Target]:
    """Follow the page up to the backup, without the blocks that have such words."""
    with S3Server(folder / "s3", _policy()) as server, followed(
        daemons, folder / "machine", _PAGE,
        {"ENDPOINT": server.endpoint, "REGION": _REGION, "BUCKET": _BUCKET}, _ADMIN,
        files={"/root/stillframe-admin/s3-key": _key_file(*ADMIN),
               "/etc/stillframe/s3-key": _key_file(*HOST)}, without=without,
    ) as target:
        yield target


def _policy() -> str:
    """Return the page's policy as this server takes it: without the condition, and for this bucket."""
    text = (ROOT / "docs" / _PAGE).read_text(encoding="utf-8").partition("```json\n")[2].partition("```")[0]
    found = json.loads(text.replace("my-backups", _BUCKET))
    assert found["Statement"][1].pop("Condition") == {"Null": {"s3:if-none-match": "false"}}
    return json.dumps(found)


def _key_file(name: str, secret: str) -> str:
    return f"aws_access_key_id = {name}\naws_secret_access_key = {secret}\n"


def store(target: Target, key_id: str, secret: str) -> S3Store:
    """Return a client with a key."""
    return S3Store(
        _BUCKET, config={"access_key_id": key_id, "secret_access_key": secret, "region": _REGION,
                         "endpoint": target.machine.names["ENDPOINT"]},
        client_options={"allow_http": True}, retry_config={"max_retries": 0})


def content_of(target: Target) -> dict[str, bytes]:
    """Return all objects."""
    admin = store(target, *ADMIN)
    return {key: bytes(obstore.get(admin, key).bytes()) for key in keys_of(admin)}


def keys_of(client: S3Store) -> list[str]:
    """Return the keys of all objects."""
    return sorted(entry["path"] for batch in obstore.list(client) for entry in batch)


def asked(
    target: Target, who: tuple[str, str], method: str, path: str, body: str = "", *headers: str,
) -> str:
    """Make a request with a key; return the reply's code."""
    given = ["x-amz-content-sha256: UNSIGNED-PAYLOAD", *headers]
    return subprocess.run(
        ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-X", method, "--aws-sigv4",
         f"aws:amz:{_REGION}:s3", "--user", ":".join(who), *(word for each in given for word in ("-H", each)),
         "--data-binary", body, f"{target.machine.names['ENDPOINT']}/{_BUCKET}{path}"],
        capture_output=True, text=True, check=True, timeout=60).stdout


def put(client: S3Store, key: str, content: bytes, mode: str) -> None:
    """Store an object; *mode* is obstore's."""
    obstore.put(client, key, content, mode=mode, use_multipart=False)  # type: ignore[arg-type]
