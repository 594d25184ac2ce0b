"""From a repository's address, as people write it, to its storage."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stillframe.errors import RepositoryRefused
from stillframe.storage.local import LocalStorage
from stillframe.storage.model import Storage

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def open_storage(address: str, *, make: bool = False) -> Storage:
    """Return the storage at *address*, a folder or a file:// address. *make* makes the folder.

    Raises RepositoryRefused for other kinds of addresses.
    """
    return LocalStorage(local_folder(address), make=make)


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
