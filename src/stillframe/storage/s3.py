"""Objects in a bucket of S3, or of a server that speaks its language.

obstore moves the bytes. It is told not to try anything again: a create whose reply was lost is a question
that only Retried (wrappers.py) may answer. What a request ended with is told by S3's own error codes
(`<Code>NoSuchBucket</Code>`), which are part of the protocol.

A listing is held in memory (some 150 bytes an object) and sorted here: S3 sorts by key, but not every
server that speaks its language does (SeaweedFS sorts each folder on its own).
"""

from __future__ import annotations

import email.utils
import http.client
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from stillframe.errors import (
    ObjectExists,
    ObjectMissing,
    ObjectTruncated,
    StorageFull,
    StorageLost,
    StorageRefused,
)
from stillframe.storage.access import Access
from stillframe.storage.model import (
    Capabilities,
    Content,
    Listed,
    Stat,
    check_key,
    check_prefix,
    check_range,
    readable_bytes,
    view_of,
)
from stillframe.storage.patience import CALL_TIMEOUT_S, call_timeout_s
from stillframe.units import MIB

if TYPE_CHECKING:
    from obstore.store import S3Config  # it exists for type checkers alone

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 10
#: Packs of the usual size are somewhat smaller; the client has one time limit for all of its requests.
_LARGEST_BYTES = 36 * MIB
_TIME_TIMEOUT_S = 10.0
#: DeleteObjects takes no more.
_DELETE_KEYS_MAX = 1000
_CODE = re.compile(r"<Code>(\w+)</Code>")
_RANGE_CODES = ("InvalidRange",)
_FULL_CODES = ("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "EntityTooLarge")
#: Signatures hold for a quarter of an hour.
_CLOCK_CODES = ("RequestTimeTooSkewed", "RequestExpired")
_DENIED_CODES = (
    "AccessDenied", "AllAccessDisabled", "AuthorizationHeaderMalformed", "ExpiredToken", "InvalidAccessKeyId",
    "InvalidToken", "NoSuchBucket", "PermanentRedirect", "SignatureDoesNotMatch", *_CLOCK_CODES)


class S3Storage:
    """See Storage. It is in the folder *prefix* of a bucket, "" for all of it.

    *address* is how people write it.
    Keys that *access* lacks are asked for at the metadata service of the machine; an endpoint that it lacks
    is Amazon's own.
    """

    def __init__(self, bucket: str, prefix: str, access: Access, address: str = "") -> None:
        self._address = address or f"s3://{bucket}{'/' if prefix else ''}{prefix}"
        self._endpoint = access.endpoint or f"https://s3.{access.region}.amazonaws.com"
        self._bucket, self._prefix = bucket, prefix
        given: dict[str, Any] = {
            "region": access.region, "access_key_id": access.user, "endpoint": access.endpoint,
            "secret_access_key": access.secret, "session_token": access.token,
            # Amazon takes no PUT without one where the bucket locks objects. It is what is signed anyway.
            "checksum_algorithm": "SHA256"}
        self._config = cast("S3Config", {name: value for name, value in given.items() if value})
        self._store = self._store_for(CALL_TIMEOUT_S)

    @cached_property
    def _store_of_packs(self) -> S3Store:
        # Made when it is needed: a client takes 12 ms to make, and most commands store no pack.
        return self._store_for(call_timeout_s(_LARGEST_BYTES))

    def _store_for(self, timeout_s: float) -> S3Store:
        return S3Store(
            self._bucket, prefix=self._prefix or None, config=self._config,
            client_options={
                "allow_http": self._endpoint.startswith("http://"), "timeout": f"{timeout_s:.0f}s",
                "connect_timeout": f"{_CONNECT_TIMEOUT_S}s",
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)})

    @property
    def address(self) -> str:
        """See Storage."""
        return self._address

    @property
    def capabilities(self) -> Capabilities:
        """See Storage."""
        return Capabilities(
            create_if_absent=True, atomic_replace=True, lists_sizes=True, server_time=True, delete_many=True)

    def get(self, key: str, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Storage."""
        check_key(key)
        check_range(offset_bytes, length_bytes)
        if length_bytes == 0 or (length_bytes is None and offset_bytes):
            # No request for nothing, or for all from there on, is refused beyond the end by every server.
            length_bytes = readable_bytes(key, self.stat(key).size_bytes, offset_bytes, length_bytes)
            if length_bytes == 0:
                return b""
        if length_bytes is None:
            content = self._asked(key, lambda: bytes(obstore.get(self._store, key).bytes()))
            readable_bytes(key, len(content), 0, None)
            return content
        return self._get_range(key, offset_bytes, length_bytes)

    def create(self, key: str, content: Content) -> None:
        """See Storage."""
        self._put(key, content, "create")

    def replace(self, key: str, content: Content) -> None:
        """See Storage."""
        self._put(key, content, "overwrite")

    def list(self, prefix: str) -> Iterator[Listed]:
        """See Storage. Held in memory as a whole."""
        check_prefix(prefix)
        return self._list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        """See Storage."""
        for key in keys:
            check_key(key)
        for first in range(0, len(keys), _DELETE_KEYS_MAX):
            batch = [*dict.fromkeys(keys[first:first + _DELETE_KEYS_MAX])]

            def once(batch: Sequence[str] = batch) -> None:
                obstore.delete(self._store, batch)

            try:
                self._asked(batch[0], once)
            except ObjectMissing:  # some servers say so of keys that are gone, and stop there
                for key in batch:
                    self._delete_one(key)

    def stat(self, key: str) -> Stat:
        """See Storage."""
        check_key(key)
        try:
            facts = self._asked(key, lambda: obstore.head(self._store, key))
        except ObjectMissing:
            next(self._list(key), None)  # the reply to a HEAD can't say that there is no such bucket
            raise
        return Stat(facts["size"], facts["last_modified"].astimezone(UTC))

    def now(self) -> datetime:
        """See Storage. It is the date of a reply, which is the server's own whether it answers yes or no."""
        url = urlsplit(self._endpoint)
        kind = http.client.HTTPConnection if url.scheme == "http" else http.client.HTTPSConnection
        connection = kind(url.hostname or "", url.port, timeout=_TIME_TIMEOUT_S)
        try:
            connection.request("HEAD", f"/{self._bucket}")
            date = connection.getresponse().getheader("Date", "")
            return email.utils.parsedate_to_datetime(date).astimezone(UTC)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._lost(f"asking {url.hostname} for its time", str(error)) from error
        finally:
            connection.close()

    def _get_range(self, key: str, offset_bytes: int, length_bytes: int) -> bytes:
        try:
            content = self._asked(key, lambda: bytes(obstore.get_range(
                self._store, key, start=offset_bytes, length=length_bytes)))
        except ObjectTruncated:
            content = b""
        if len(content) != length_bytes:  # a range that ends behind the object is answered with what there is
            readable_bytes(key, self.stat(key).size_bytes, offset_bytes, length_bytes)
            raise self._lost(f"reading {key}", f"{len(content)} bytes came instead of {length_bytes}")
        return content

    def _put(self, key: str, content: Content, mode: Any) -> None:
        check_key(key)
        view = view_of(content)
        store = self._store if call_timeout_s(view.nbytes) <= CALL_TIMEOUT_S else self._store_of_packs
        # One request: of several parts, not every server makes one object only where there is none.
        self._asked(key, lambda: obstore.put(store, key, view, mode=mode, use_multipart=False))

    def _list(self, prefix: str) -> Iterator[Listed]:
        # obstore takes a prefix for a folder's name: what lies in the folder above is chosen from here.
        folder = prefix[:prefix.rfind("/") + 1]

        def found() -> list[Listed]:
            return [Listed(entry["path"], entry["size"])
                    for batch in obstore.list(self._store, folder or None, chunk_size=1000) for entry in batch
                    if entry["path"].startswith(prefix)]

        yield from sorted(self._asked(prefix, found), key=lambda listed: listed.key)

    def _delete_one(self, key: str) -> None:
        try:
            self._asked(key, lambda: obstore.delete(self._store, key))
        except ObjectMissing:
            return

    def _asked(self, key: str, request: Callable[[], T]) -> T:
        """Return what *request* returns, its errors as those of a storage."""
        try:
            return request()
        except AlreadyExistsError:
            raise ObjectExists(f"There is an object {key} in {self.address} already.") from None
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise self._refused(key, error) from error
            raise ObjectMissing(f"There is no object {key} in {self.address}.") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise self._refused(key, error) from error
        except (BaseError, OSError, TimeoutError) as error:
            raise self._meaning(key, error) from error

    def _meaning(self, key: str, error: Exception) -> Exception:
        code = _code(error)
        if code in _RANGE_CODES:
            return ObjectTruncated(f"The object {key} in {self.address} is shorter than what is read of it.")
        if code in _FULL_CODES:
            return StorageFull(
                f"The storage {self.address} takes no more ({code}): {key}. What was stored before is whole.",
                "free some space or raise the quota, then run again")
        if code in _DENIED_CODES:
            return self._refused(key, error)
        return self._lost(key, code or _first_line(error))

    def _lost(self, what: str, why: str) -> StorageLost:
        return StorageLost(
            f"The storage {self.address} failed ({why}): {what}. What was stored before is whole.",
            f"curl -sI {self._endpoint}   # then run again")

    def _refused(self, key: str, error: Exception) -> StorageRefused:
        code = _code(error)
        return StorageRefused(
            f"The storage {self.address} refuses ({code or _first_line(error)}): {key}.",
            f"timedatectl; curl -sI {self._endpoint} | grep -i ^date   # they differ: set this host's clock"
            if code in _CLOCK_CODES else "check the bucket's name, the credentials and what they may do")


def _code(error: Exception) -> str:
    found = _CODE.search(str(error))
    return found[1] if found else ""


def _first_line(error: Exception) -> str:
    """Return what happened, without the request's address and what is for the library's makers."""
    return str(error).partition("\n")[0].rpartition(" - ")[2][:200]
