"""docs/TARGET-S3.md, done word for word; and then what somebody does with the host's S3 key.

The attacks are made with plain clients of the protocol (obstore, curl). SeaweedFS does not know the condition
of the page's policy that keeps the host from overwriting: what it does instead is what is tested here.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError
from obstore.store import S3Store

from lab.daemons import LibvirtDaemons
from lab.s3 import ACCESS_KEY_ID, HOST_KEY_ID, HOST_SECRET, SECRET_ACCESS_KEY, S3Server
from stillframe.repository.layout import new_sid
from stillframe.repository.manifest import tombstone
from tests.integration.repositories import ROOT
from tests.integration.targets import Target, followed

_PAGE = "TARGET-S3.md"
_BUCKET, _REGION = "backups", "us-east-1"
_ADMIN = ('--repo "$(cat /etc/stillframe/repository)" --credentials-file /root/stillframe-admin/s3-key '
          "--key-file /etc/stillframe/key")
_EXPIRES = ("<LifecycleConfiguration><Rule><ID>x</ID><Status>Enabled</Status><Filter/><Expiration>"
            "<Days>1</Days></Expiration></Rule></LifecycleConfiguration>")

pytestmark = [pytest.mark.timeout(600), pytest.mark.together]


def policy() -> str:
    """Return the page's policy as this server takes it: without the condition, and for this bucket."""
    text = (ROOT / "docs" / _PAGE).read_text(encoding="utf-8").partition("```json\n")[2].partition("```")[0]
    found = json.loads(text.replace("my-backups", _BUCKET))
    assert found["Statement"][1].pop("Condition") == {"Null": {"s3:if-none-match": "false"}}
    return json.dumps(found)


def key_file(name: str, secret: str) -> str:
    return f"aws_access_key_id = {name}\naws_secret_access_key = {secret}\n"


@pytest.fixture(scope="module")
def target(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Follow the page up to the backup."""
    folder = tmp_path_factory.mktemp("target")
    with S3Server(folder / "s3", policy()) as server, followed(
        session_daemons, folder / "machine", _PAGE,
        {"ENDPOINT": server.endpoint, "REGION": _REGION, "BUCKET": _BUCKET}, _ADMIN,
        files={"/root/stillframe-admin/s3-key": key_file(ACCESS_KEY_ID, SECRET_ACCESS_KEY),
               "/etc/stillframe/s3-key": key_file(HOST_KEY_ID, HOST_SECRET)},
    ) as target:
        yield target


def store(target: Target, key_id: str, secret: str) -> S3Store:
    return S3Store(
        _BUCKET, config={"access_key_id": key_id, "secret_access_key": secret, "region": _REGION,
                         "endpoint": target.machine.names["ENDPOINT"]},
        client_options={"allow_http": True}, retry_config={"max_retries": 0})


@pytest.fixture(scope="module")
def host(target: Target) -> S3Store:
    """Give a client with the host's key."""
    return store(target, HOST_KEY_ID, HOST_SECRET)


def content_of(target: Target) -> dict[str, bytes]:
    """Return all objects."""
    admin = store(target, ACCESS_KEY_ID, SECRET_ACCESS_KEY)
    keys = [entry["path"] for batch in obstore.list(admin) for entry in batch]
    return {key: bytes(obstore.get(admin, key).bytes()) for key in sorted(keys)}


@pytest.fixture(scope="module")
def objects(target: Target) -> dict[str, bytes]:
    """Give what was there before the first attack."""
    return content_of(target)


def as_host(target: Target, method: str, path: str, body: str = "") -> str:
    """Make a request with the host's key; return the reply's code."""
    endpoint = target.machine.names["ENDPOINT"]
    return subprocess.run(
        ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-X", method, "--aws-sigv4",
         f"aws:amz:{_REGION}:s3", "--user", f"{HOST_KEY_ID}:{HOST_SECRET}", "-H",
         "x-amz-content-sha256: UNSIGNED-PAYLOAD", "--data-binary", body, f"{endpoint}/{_BUCKET}{path}"],
        capture_output=True, text=True, check=True, timeout=60).stdout


def put(client: S3Store, key: str, content: bytes, mode: str) -> None:
    obstore.put(client, key, content, mode=mode, use_multipart=False)  # type: ignore[arg-type]


def test_no_object_is_deleted(target: Target, host: S3Store, objects: dict[str, bytes]) -> None:
    """Not by a request for one, nor by one for many."""
    assert {key.split("/")[1] for key in objects if "/" in key} >= {"m", "p", "t", "keys"}
    for key in objects:
        assert as_host(target, "DELETE", f"/{key}") == "403"
        with pytest.raises(BaseError, match="AccessDenied"):
            obstore.delete(host, [key])
        with pytest.raises(BaseError):
            obstore.rename(host, key, "main/p/elsewhere")
        with pytest.raises((AlreadyExistsError, PermissionDeniedError)):
            put(host, key, b"another", "create")
    assert objects.items() <= content_of(target).items()


@pytest.mark.parametrize("key", ["repo.json", "main/keys/00000000", "main/g/000000000099", "main/pins/x",
                                 "main/v/bad/x", "main/v/verified"])
def test_nothing_is_added_where_the_admin_alone_adds(host: S3Store, key: str) -> None:
    """No forged generation, no key slot; no copy to there, no upload in parts."""
    for mode in ("create", "overwrite"):
        with pytest.raises(PermissionDeniedError):
            put(host, key, b"harm", mode)
    with pytest.raises(BaseError):
        obstore.put(host, key, b"x" * (6 << 20), use_multipart=True, chunk_size=5 << 20)
    (manifest,) = (entry["path"] for batch in obstore.list(host, "main/m") for entry in batch)
    with pytest.raises(BaseError):
        obstore.copy(host, manifest, key)


@pytest.mark.parametrize(("path", "body"), [
    ("?versioning=", "<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>"),
    ("?policy=", json.dumps({"Version": "2012-10-17", "Statement": []})),
    ("?lifecycle=", _EXPIRES)])
def test_the_bucket_stays_as_the_admin_set_it(target: Target, path: str, body: str) -> None:
    assert as_host(target, "PUT", path, body) == "403"
    assert as_host(target, "DELETE", path) == "403"
    assert as_host(target, "DELETE", "") == "403"


def test_what_is_overwritten_is_found_and_brought_back(
    target: Target, host: S3Store, objects: dict[str, bytes], tmp_path: Path,
) -> None:
    """This server lets the host overwrite: earlier versions stay, and the page brings them back."""
    (snapshot,) = (key for key in objects if key.startswith("main/m/"))
    harmed = [key for key in objects if key.startswith(("main/m/", "main/p/", "main/t/"))]
    for key in harmed:
        put(host, key, tombstone(new_sid()) if key == snapshot else b"x" * len(objects[key]), "overwrite")
    versions = target.machine.run('/root/stillframe-admin/s3 GET "?versions="')
    for key, version in re.findall(r"<Key>(main/[mpt]/.*?)</Key><VersionId>(.*?)</VersionId>", versions):
        assert as_host(target, "DELETE", f"/{key}?versionId={version}") == "403"
    target.fails("restore web --to /tmp/nowhere/")
    bring_back, *rest = target.rest
    target.machine.follow(bring_back)
    after = content_of(target)
    assert {key: after[key] for key in harmed} == {key: objects[key] for key in harmed}
    for block in rest:
        target.machine.follow(block)
    target.assert_whole(tmp_path)


