"""From a repository's address, as people write it, to its storage."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from stillframe.errors import RepositoryRefused
from stillframe.storage.access import NOBODY, Access
from stillframe.storage.local import LocalStorage
from stillframe.storage.model import Storage

_SERVERS = ("s3",)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def scheme_of(address: str) -> str:
    """Return what kind of address it is: "file" for a folder, however it is written; "s3", …."""
    scheme = _SCHEME.match(address)
    return "file" if scheme is None or Path(address).is_dir() else scheme[0][:-1].lower()


def open_storage(address: str, access: Access = NOBODY, *, make: bool = False) -> Storage:
    """Return the storage at *address*, where *access* lets us in. *make* makes the folder.

    Raises RepositoryRefused for an address that is none.
    """
    kind = scheme_of(address)
    if kind == "s3":
        from stillframe.storage.s3 import S3Storage

        bucket, prefix, access = _in_bucket(address, access)
        return S3Storage(bucket, prefix, access)
    return LocalStorage(local_folder(address), make=make)


def _in_bucket(address: str, access: Access) -> tuple[str, str, Access]:
    """Return bucket, prefix and access of s3://BUCKET/PREFIX?endpoint=URL&region=NAME."""
    parts = urlsplit(address)
    options = parse_qs(parts.query)
    unknown = options.keys() - {"endpoint", "region"}
    if not parts.hostname or parts.username or parts.port or unknown or parts.fragment:
        what = f": what is {', '.join(sorted(unknown))}?" if unknown else "."
        raise RepositoryRefused(
            f"{address} is no address of a bucket{what}",
            "write it as s3://BUCKET/FOLDER?endpoint=https://HOST&region=NAME")
    chosen = {name: values[-1] for name, values in options.items()}
    return parts.netloc, unquote(parts.path).strip("/"), msgspec.structs.replace(access, **chosen)


def folder_of(address: str) -> Path | None:
    """Return the folder of this host that *address* names, None for a server's. Raises RepositoryRefused."""
    return local_folder(address) if scheme_of(address) not in _SERVERS else None


def local_folder(address: str) -> Path:
    """Return the folder that *address* names. Raises RepositoryRefused."""
    scheme = _SCHEME.match(address)
    if scheme is None or Path(address).is_dir():
        if not address.strip():
            raise RepositoryRefused("The address of the repository is empty.", "--repo /srv/repository")
        return Path(address).absolute()
    parts = urlsplit(address)
    if parts.scheme.lower() != "file":
        raise RepositoryRefused(
            f"{address} begins with {scheme[0]}, a kind of address that is not supported (yet).",
            "name a folder, for instance one where the share is mounted: --repo /srv/repository")
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise RepositoryRefused(f"{address} names no folder of this host.", "write it as file:///srv/repository")
    return Path(unquote(parts.path))
