"""From a repository's address, as people write it, to its storage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

import msgspec

from stillframe.clock import Clock, SystemClock
from stillframe.errors import RepositoryRefused
from stillframe.storage.access import NOBODY, Access
from stillframe.storage.files import FileStorage
from stillframe.storage.local import LocalStorage
from stillframe.storage.model import Storage
from stillframe.storage.open_files import RangeServer

if TYPE_CHECKING:
    from stillframe.storage.sftp import SftpPlace
    from stillframe.storage.smb import SmbPlace

#: The servers that have folders with files.
FILE_SERVERS = ("sftp", "smb")
_SERVERS = ("s3", *FILE_SERVERS)
#: Of a host's name as a resolver gets it, or of an IP address.
_HOST = re.compile(rb"[A-Za-z0-9._:%-]+")
#: Neither blanks nor what would have to be escaped: obstore panics over them.
_URL = re.compile(r"[!-~]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def scheme_of(address: str) -> str:
    """Return what kind of address it is: "file" for a folder, however it is written; "s3", …."""
    scheme = _SCHEME.match(address)
    return "file" if scheme is None or Path(address).is_dir() else scheme[0][:-1].lower()


def open_storage(
    address: str, access: Access = NOBODY, *, make: bool = False, clock: Clock | None = None,
) -> Storage:
    """Return the storage at *address*, where *access* lets us in. *make* makes the folder.

    Raises RepositoryRefused for an address that is none, StorageError.
    """
    kind = scheme_of(address)
    # What reaches a server takes long to load: each on its own, and only when it is wanted.
    if kind == "s3":
        from stillframe.storage.s3 import S3Storage

        bucket, prefix, access = _in_bucket(address, access)
        return S3Storage(bucket, prefix, access, address)
    if kind in FILE_SERVERS:
        return FileStorage(file_server(address, access, clock or SystemClock()), make=make, address=address)
    return LocalStorage(local_folder(address), make=make)


def file_server(address: str, access: Access, clock: Clock) -> RangeServer:
    """Return the folder on a server that *address*, one of FILE_SERVERS, names. Raises RepositoryRefused."""
    if scheme_of(address) == "sftp":
        from stillframe.storage.sftp import SftpServer

        return SftpServer(_on_host(address))
    from stillframe.storage.smb import SmbServer

    place, access = _on_share(address, access)
    return SmbServer(place, access, clock)


def below(address: str, name: str) -> str:
    """Return the address of the folder *name* in the folder on a server that *address* names."""
    parts = urlsplit(address)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name, safe='')}").geturl()


def check_address(address: str) -> None:
    """Raise RepositoryRefused if *address* is none of a repository, or names a file that is not here.

    No server is reached.
    """
    kind = scheme_of(address)
    if kind == "s3":
        _in_bucket(address, NOBODY)
    elif kind == "sftp":
        place = _on_host(address)
        for name in ("identity", "known_hosts"):
            if (file := getattr(place, name)) and not Path(file).expanduser().exists():
                raise RepositoryRefused(
                    f"There is no file {file}, the {name} of {place.address}.", f"ls -l {file}")
    elif kind == "smb":
        _on_share(address, NOBODY)
    else:
        local_folder(address)


def _in_bucket(address: str, access: Access) -> tuple[str, str, Access]:
    """Return bucket, prefix and access of s3://BUCKET/FOLDER?endpoint=URL&region=NAME."""
    how = "s3://BUCKET/FOLDER?endpoint=https://HOST&region=NAME"
    parts, options = _parts(address, how, "endpoint", "region")
    if parts.username or parts.port:
        raise _no_address(address, how)
    access = msgspec.structs.replace(access, **options)
    if access.endpoint and not _is_endpoint(access.endpoint):
        shown = access.endpoint.rpartition("@")[2]  # a password before it would end up in a log
        raise RepositoryRefused(
            f"The endpoint {shown} of {address.partition('?')[0]} is not the address of a server.",
            "write it as https://HOST or https://HOST:PORT")
    return parts.netloc, unquote(parts.path).strip("/"), access


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(_URL.fullmatch(text)) and _has_host(parts)
    except ValueError:
        return False


def _has_host(parts: SplitResult) -> bool:
    """Return whether *parts* have a host that a resolver takes. Raises ValueError, also for a wrong port."""
    _ = parts.port
    return bool(parts.hostname and _HOST.fullmatch(parts.hostname.encode("idna")))


def _on_host(address: str) -> SftpPlace:
    """Return the place of sftp://USER@HOST:PORT/FOLDER; a folder /~/NAME is below where the user begins."""
    from stillframe.storage.sftp import SftpPlace

    how = "sftp://USER@HOST/FOLDER?identity=FILE&known_hosts=FILE"
    parts, options = _parts(address, how, "identity", "known_hosts")
    path = unquote(parts.path).rstrip("/")
    if parts.password or path in ("", "/~"):
        raise _no_address(address, how)
    return SftpPlace(host=parts.hostname or "", path=path.removeprefix("/~/"), port=parts.port or 0,
                     user=unquote(parts.username or ""), **options)


def _on_share(address: str, access: Access) -> tuple[SmbPlace, Access]:
    """Return the place of smb://DOMAIN;USER@HOST:PORT/SHARE/FOLDER, and who we are there."""
    from stillframe.storage.smb import SmbPlace

    how = "smb://USER@HOST/SHARE/FOLDER"
    parts, _ = _parts(address, how)
    share, _, folder = unquote(parts.path).strip("/").partition("/")
    if parts.password or not share:
        raise _no_address(address, how)
    domain, semicolon, user = unquote(parts.username or "").rpartition(";")
    if user:
        access = msgspec.structs.replace(access, user=user)
    if semicolon:
        access = msgspec.structs.replace(access, domain=domain)
    port = {"port": parts.port} if parts.port else {}
    return SmbPlace(host=parts.hostname or "", share=share, folder=folder, **port), access


def _parts(address: str, how: str, *known: str) -> tuple[SplitResult, dict[str, str]]:
    """Return the parts of an address, and its options, which must be *known*. Raises RepositoryRefused."""
    try:
        parts = urlsplit(address)
        has_host = _has_host(parts)
    except ValueError as error:
        raise _no_address(address, how) from error
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if not has_host or parts.fragment or options.keys() - set(known):
        raise _no_address(address, how)
    return parts, options


def _no_address(address: str, how: str) -> RepositoryRefused:
    # A password in it would end up in a log.
    shown = address if "@" not in address else f"{address.partition('://')[0]}://…@{address.rpartition('@')[2]}"
    return RepositoryRefused(f"{shown} is not an address of a repository.", f"write it as {how}")


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
            f"{address} begins with {scheme[0]}, a kind of address that is not supported.",
            "name a folder, or s3://BUCKET/FOLDER, sftp://HOST/FOLDER, smb://HOST/SHARE/FOLDER")
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise RepositoryRefused(f"{address} names no folder of this host.", "write it as file:///srv/repository")
    return Path(unquote(parts.path))
