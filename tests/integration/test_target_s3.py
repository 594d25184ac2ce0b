"""docs/TARGET-S3.md, done word for word; and then what somebody does with the host's S3 key.

The attacks are made with plain clients of the protocol (obstore, curl).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError
from obstore.store import S3Store

from lab.daemons import LibvirtDaemons
from stillframe.repository.layout import new_sid
from stillframe.repository.manifest import tombstone
from tests.integration.s3_target import HOST, asked, content_of, page_followed, put, store
from tests.integration.targets import Target

_EXPIRES = ("<LifecycleConfiguration><Rule><ID>x</ID><Status>Enabled</Status><Filter/><Expiration>"
            "<Days>1</Days></Expiration></Rule></LifecycleConfiguration>")

pytestmark = [pytest.mark.timeout(600), pytest.mark.together]


@pytest.fixture(scope="module")
def target(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Follow the page up to the backup, on a bucket that locks nothing."""
    with page_followed(session_daemons, tmp_path_factory.mktemp("target"),
                       without=("object-lock", "retention")) as target:
        yield target


@pytest.fixture(scope="module")
def host(target: Target) -> S3Store:
    """Give a client with the host's key."""
    return store(target, *HOST)


@pytest.fixture(scope="module")
def objects(target: Target) -> dict[str, bytes]:
    """Give what was there before the first attack."""
    return content_of(target)


def test_no_object_is_deleted(target: Target, host: S3Store, objects: dict[str, bytes]) -> None:
    """Not by a request for one, nor by one for many."""
    assert {key.split("/")[1] for key in objects if "/" in key} >= {"m", "p", "t", "keys"}
    for key in objects:
        assert asked(target, HOST, "DELETE", f"/{key}") == "403"
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
    assert asked(target, HOST, "PUT", path, body) == "403"
    assert asked(target, HOST, "DELETE", path) == "403"
    assert asked(target, HOST, "DELETE", "") == "403"


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
        assert asked(target, HOST, "DELETE", f"/{key}?versionId={version}") == "403"
    target.fails("restore web --to /tmp/nowhere/")
    script, bring_back, *rest = target.rest
    for block in (script, bring_back):
        target.machine.follow(block)
    after = content_of(target)
    assert {key: after[key] for key in harmed} == {key: objects[key] for key in harmed}
    for block in rest:
        target.machine.follow(block)
    target.assert_whole(tmp_path)


