"""docs/TARGET-S3.md with object lock, done word for word; and then what a thief of the admin's key does.

What goes by a lifecycle rule is not tested: rules count in days, and the server's clock is the machine's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import obstore
import pytest

from lab.daemons import LibvirtDaemons
from lab.images import KIB, MIB
from stillframe.repository.manifest import is_tombstone
from tests.integration.s3_target import ADMIN, HOST, asked, content_of, keys_of, page_followed, put, store
from tests.integration.targets import Target

_BYPASS = "x-amz-bypass-governance-retention: true"
_NOT_LOCKED = ("<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled>"
               "</ObjectLockConfiguration>")
_SUSPENDED = "<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>"
_OF_A_SNAPSHOT = ("repo.json", "main/keys/", "main/m/", "main/p/", "main/t/")
_MANY = 1100

pytestmark = [pytest.mark.timeout(600), pytest.mark.together]


@pytest.fixture(scope="module")
def target(session_daemons: LibvirtDaemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Follow the page up to the backup, on a bucket that locks; and make its script."""
    with page_followed(session_daemons, tmp_path_factory.mktemp("target")) as target:
        target.machine.follow(step(target, "cat > /root/stillframe-admin/versions"))
        yield target


@dataclass(frozen=True)
class Version:
    """A version of an object. *path* is how a request names it."""

    key: str
    id: str

    @property
    def path(self) -> str:
        return f"/{self.key}?versionId={self.id}"


def versions_of(target: Target) -> list[Version]:
    """Return all versions of what snapshots are made of; the server has fewer than a page of them."""
    said = target.machine.run('/root/stillframe-admin/s3 GET "?versions="')
    assert "<IsTruncated>false" in said
    found = re.findall(r"<Version><Key>(.*?)</Key><VersionId>(.*?)</VersionId>", said)
    return [Version(*each) for each in found if each[0].startswith(_OF_A_SNAPSHOT)]


def locked_until(target: Target, version: Version) -> datetime:
    path = version.path.replace("?", "?retention=&")
    said = target.machine.run(f'/root/stillframe-admin/s3 GET "{path}"')
    assert "<Mode>COMPLIANCE</Mode>" in said
    (until,) = re.findall(r"<RetainUntilDate>(.*)Z</RetainUntilDate>", said)
    return datetime.fromisoformat(until).replace(tzinfo=UTC)


def snapshots_of(target: Target) -> list[str]:
    """Return the snapshots, as the admin sees them."""
    return [each["id"] for each in json.loads(target.stillframe("list --json"))["snapshots"]]


def step(target: Target, word: str) -> str:
    """Return the page's block after the backup that has this word."""
    (found,) = (block for block in target.rest if word in block)
    return found


def test_what_is_sent_has_a_checksum(target: Target) -> None:
    """Amazon refuses every PUT without one where objects are locked; this server keeps what it is sent."""
    for key, content in content_of(target).items():
        said = target.machine.run(
            f'/root/stillframe-admin/s3 GET "/{key}" "" -H "x-amz-checksum-mode: ENABLED" -o /dev/null -D -')
        checksum = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert f"X-Amz-Checksum-Sha256: {checksum}\n" in said


def test_a_prune_puts_markers_and_the_rest_stays_whole(target: Target, tmp_path: Path) -> None:
    """Of two snapshots one is dropped; what it alone needed is still there for who asks by version."""
    target.guest.write("vda", 8 * MIB, 300 * KIB, 0xB2)
    target.guest.flush()
    backup = ('stillframe backup web --repo "$(cat /etc/stillframe/repository)" --credentials-file '
              "/etc/stillframe/s3-key --key-file /etc/stillframe/key")
    target.machine.follow(backup)
    before, versions = content_of(target), versions_of(target)
    first, second = snapshots_of(target)
    target.stillframe(f"forget {second}")
    for _ in range(2):  # what the first one condemns, the second one deletes
        target.stillframe("prune --fence-after 24h")
    after = content_of(target)
    assert snapshots_of(target) == [first]
    assert {key for key in before if key not in after and key.startswith(("main/p/", "main/t/"))}
    assert set(versions) <= set(versions_of(target))
    target.assert_whole(tmp_path)


def test_objects_are_locked_anew(target: Target) -> None:
    """By the page's step, with a later date: a week is not waited for here."""
    there = set(content_of(target))
    newest_first = versions_of(target)
    firsts = {each.key: each for each in newest_first if each.key in there}.values()
    assert firsts
    again = step(target, "?retention=")
    for days in (30, 40):
        if days != 30:
            target.machine.follow(again.replace("+30 days", f"+{days} days"))
        expected = datetime.now(UTC) + timedelta(days=days)
        assert all(abs(expected - locked_until(target, each)) < timedelta(hours=1) for each in firsts)


@pytest.mark.parametrize("thief", [HOST, ADMIN], ids=["host", "admin"])
def test_no_version_goes_before_its_time(target: Target, thief: tuple[str, str]) -> None:
    """Neither by its own deletion, nor one of many, nor with the bucket, nor by making its time shorter."""
    versions = versions_of(target)
    for each in versions:
        assert asked(target, thief, "DELETE", each.path) == "403"
        assert asked(target, thief, "DELETE", each.path, "", _BYPASS) == "403"
        for mode in ("COMPLIANCE", "GOVERNANCE"):
            shorter = (f"<Retention><Mode>{mode}</Mode><RetainUntilDate>"
                       f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}</RetainUntilDate></Retention>")
            path = each.path.replace("?", "?retention=&")
            assert asked(target, thief, "PUT", path, shorter, _BYPASS) in ("400", "403")
    many = "".join(f"<Object><Key>{each.key}</Key><VersionId>{each.id}</VersionId></Object>"
                   for each in versions)
    body = f"<Delete>{many}</Delete>"
    checksum = base64.b64encode(hashlib.md5(body.encode(), usedforsecurity=False).digest()).decode()
    said = asked(target, thief, "POST", "?delete=", body, f"content-md5: {checksum}", _BYPASS)
    assert said in ("200", "403")  # 200 with an error for each
    assert asked(target, thief, "PUT", "?versioning=", _SUSPENDED) in ("403", "409")
    assert asked(target, thief, "DELETE", "") in ("403", "409")
    assert versions_of(target) == versions


def test_what_a_thief_of_the_admins_key_hides_is_brought_back(target: Target, tmp_path: Path) -> None:
    """All is overwritten, marked as deleted, or both in either order; and new objects are locked no more."""
    there, before = snapshots_of(target), content_of(target)
    assert asked(target, ADMIN, "PUT", "?object-lock=", _NOT_LOCKED) == "200"
    admin = store(target, *ADMIN)
    for number, key in enumerate(key for key in before if key.startswith(_OF_A_SNAPSHOT)):
        if number % 3 != 0:
            put(admin, key, b"x" * 100, "overwrite")
        if number % 3 != 1:
            obstore.delete(admin, [key])
        if number % 5 == 0:
            put(admin, key, b"y" * 100, "overwrite")
    target.fails("list")
    target.machine.follow(step(target, "versions later |"))
    after = content_of(target)
    # What was forgotten is back as well: of its manifest, and not of what fenced its session.
    was_forgotten = {key for key, content in before.items() if is_tombstone(len(content))}
    assert was_forgotten
    assert {key: after.get(key) for key in before.keys() - was_forgotten} == {
        key: content for key, content in before.items() if key not in was_forgotten}
    first, second = snapshots_of(target)
    assert [first] == there
    target.stillframe(f"forget {second}")
    target.assert_whole(tmp_path)


def test_a_listing_of_several_pages(target: Target) -> None:
    """What the page's script says is there, is what is there, and is true of each object."""
    admin = store(target, *ADMIN)
    names = [f"another/{number:04}" for number in range(_MANY)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: put(admin, name, b"x", "create"), names))
    said = target.machine.run("/root/stillframe-admin/versions there").splitlines()
    expected = {key for key in keys_of(admin) if not key.startswith(("main/s/", "main/v/", "probe/"))}
    assert len(said) == len(expected)
    assert {line.split()[0].removeprefix("/") for line in said} == expected >= set(names)


def test_the_other_steps_of_the_page(target: Target) -> None:
    """Forget, prune, verify; the lifecycle's rule is taken as it is."""
    for word in ("stillframe forget", "?lifecycle="):
        target.machine.follow(step(target, word))
    assert "<NoncurrentDays>30<" in target.machine.run('/root/stillframe-admin/s3 GET "?lifecycle="')
