"""Where a mirror is: a folder of this host, or one on a server. What differs is here, and in their Files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from stillframe.capture.apart import refuse_inside_images, refuse_overlays_at
from stillframe.capture.plan import Plan
from stillframe.clock import Clock
from stillframe.errors import DestinationUnwritable
from stillframe.mirror.copy import THREADS
from stillframe.mirror.far_files import FarFiles
from stillframe.mirror.files import Files, OsFiles, sync_folder
from stillframe.mirror.lock import far_lock, folder_lock
from stillframe.mirror.trouble import destination_errors
from stillframe.storage.access import Access
from stillframe.storage.address import below, file_server

#: Copies at a time, each with a request in flight: a server is some way off.
_FAR_THREADS = 8


class MirrorPlace(Protocol):
    """DEST/GUEST. Its text is how people write it."""

    @property
    def files(self) -> Files:
        """The files in the folder."""
        ...

    @property
    def threads(self) -> int:
        """How many copy at a time."""
        ...

    def make(self) -> None:
        """Make the folder unless it is there. Raises DestinationUnwritable if DEST is not there, OSError."""
        ...

    def lock(self, holder: str, keep: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
        """Hold the folder for the length of the block. See lock.folder_lock."""
        ...


class Destination(Protocol):
    """DEST, which has a folder for each guest. Its text is how people write it."""

    def place_for(self, plan: Plan) -> MirrorPlace:
        """Return the place for the guest of *plan*. Raises what says that it can't be there."""
        ...

    def text_for(self, guest: str) -> str:
        """Return the place of *guest* as people write it."""
        ...


class LocalPlace:
    """See MirrorPlace."""

    threads = THREADS

    def __init__(self, path: Path, files: Files | None = None) -> None:
        self._path = path
        self.files: Files = files or OsFiles(path)

    def __str__(self) -> str:
        return str(self._path)

    def make(self) -> None:
        """See MirrorPlace."""
        parent = self._path.parent
        if not parent.is_dir():
            raise DestinationUnwritable(
                f"The destination {parent} does not exist.",
                f"mkdir -p {parent}   # or mount the share that should be there, then run again",
            )
        if not self._path.is_dir():
            self._path.mkdir(mode=0o700)
            sync_folder(os.fspath(parent))

    def lock(self, holder: str, keep: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
        """See MirrorPlace."""
        return folder_lock(self._path, holder, keep)


class LocalDestination:
    """See Destination."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def text_for(self, guest: str) -> str:
        """See Destination."""
        return str(self._path / guest)

    def place_for(self, plan: Plan) -> MirrorPlace:
        """See Destination."""
        try:
            destination = self._path.resolve(strict=True)
        except OSError as error:
            raise DestinationUnwritable(
                f"The destination {self._path} is not there: {error.strerror}.",
                f"mkdir -p {self._path}   # or mount it, then run again",
            ) from error
        if not destination.is_dir() or not os.access(destination, os.W_OK | os.X_OK):
            raise DestinationUnwritable(
                f"The destination {destination} is not a folder that you can write to.",
                f"ls -ld {destination}",
            )
        path = destination / plan.domain.name
        refuse_inside_images(path, plan)
        refuse_overlays_at(destination, path, plan)
        return LocalPlace(path)


class FarPlace:
    """See MirrorPlace. *address* is one of a server's (storage/address.py: FILE_SERVERS)."""

    threads = _FAR_THREADS

    def __init__(
        self, address: str, access: Access, clock: Clock, bytes_per_s: float | None = None,
    ) -> None:
        self._address = address
        self._server = file_server(address, access, clock)
        self.files = FarFiles(self._server, clock, bytes_per_s)

    def __str__(self) -> str:
        return self._address

    def make(self) -> None:
        """See MirrorPlace."""
        self._server.make_folder("")

    def lock(self, holder: str, keep: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
        """See MirrorPlace."""
        return far_lock(self._server, str(self), holder, keep)


class FarDestination:
    """See Destination. *place_at* gives the place of a folder on that server by its address."""

    def __init__(self, address: str, place_at: Callable[[str], MirrorPlace]) -> None:
        self._address = address
        self._place_at = place_at

    def __str__(self) -> str:
        return self._address

    def text_for(self, guest: str) -> str:
        """See Destination."""
        return below(self._address, guest)

    def place_for(self, plan: Plan) -> MirrorPlace:
        """See Destination. Raises DestinationUnwritable, RepositoryRefused, StorageError."""
        with destination_errors(self._address):
            try:
                self._place_at(self._address).files.names()
            except FileNotFoundError as error:
                # As with a share that is not mounted: what is missing may only be elsewhere just now.
                raise DestinationUnwritable(
                    f"The destination {self._address} is not there.", "make the folder there, then run again",
                ) from error
        return self._place_at(self.text_for(plan.domain.name))
