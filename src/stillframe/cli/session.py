"""What every command needs: settings, the journal, libvirt, a repository, and signals turned into a stop.

What only some commands need is loaded when it is asked for: loading all takes longer than most commands do.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from stillframe.cli.screen import Screen
from stillframe.clock import SystemClock
from stillframe.config import (
    RepositorySettings,
    Settings,
    access_to,
    chosen_file,
    read_settings,
    repository_settings,
    storage_of,
)
from stillframe.errors import ConfigInvalid, Interrupted, StillframeError

if TYPE_CHECKING:
    from stillframe.capture.journal import Journal
    from stillframe.capture.run import Tools
    from stillframe.hypervisor.connection import Connection
    from stillframe.repository.opened import Repository, Secret
    from stillframe.restore.boot_record import BootStore
    from stillframe.storage.access import Access
    from stillframe.storage.model import Storage


@dataclass(frozen=True)
class Common:
    """The options that all commands share."""

    connect: str | None
    state_dir: Path | None
    config: Path | None
    as_json: bool
    quiet: bool


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Session:
    """One call of the command."""

    def __init__(self, common: Common, repository: RepositorySettings | None = None) -> None:
        self._common = common
        self._repository = repository or RepositorySettings()
        self.screen = Screen(as_json=common.as_json, quiet=common.quiet)
        self.clock = SystemClock()
        self._interrupted: str = ""
        self._announced = False
        self._then = ""
        self._address = ""
        #: What a run that is ended leaves as it was.
        self.kept = "The last good mirror is as it was."

    def beside(self, repository: RepositorySettings) -> Session:
        """Return a session on another repository, for the same person."""
        other = Session(self._common, repository)
        other.screen = self.screen
        return other

    @cached_property
    def settings(self) -> Settings:
        """The configuration file. Raises ConfigInvalid."""
        return read_settings(self._common.config)

    def check_settings(self) -> None:
        """Raise ConfigInvalid if the configuration file is not valid, whether it is needed or not."""
        _ = self.settings

    @property
    def settings_file(self) -> Path:
        """The configuration file, whether it is there or not."""
        return chosen_file(self._common.config)

    @cached_property
    def state_folder(self) -> Path:
        """The folder with the journal, absolute: servers are told apart by the files that they have in it."""
        return (self._common.state_dir or Path(self.settings.state_dir)).absolute()

    @cached_property
    def journal(self) -> Journal:
        """The journal. Raises StateFolderUnusable."""
        from stillframe.capture.journal import Journal

        return Journal(self.state_folder, self.clock)

    @cached_property
    def boot_store(self) -> BootStore:
        """The records of guests that were booted from a snapshot."""
        from stillframe.restore.boot_record import BootStore

        return BootStore(self.state_folder)

    @cached_property
    def connection(self) -> Connection:
        """The connection to libvirt. Raises NoHypervisor, NotPermitted."""
        from stillframe.hypervisor.connection import Connection

        return Connection(self._common.connect or self.settings.connect, self.clock)

    @cached_property
    def tools(self) -> Tools:
        """What runs work with."""
        from stillframe.capture.run import Tools

        return Tools(self.journal, self.clock, self.screen.watcher())

    @property
    def host(self) -> str:
        """This host's name, which its snapshots are filed under."""
        return socket.gethostname()

    @property
    def hints_folder(self) -> Path:
        """The folder where a backup remembers which chunks are stored already."""
        return self.state_folder / "hints"

    @cached_property
    def repository_settings(self) -> RepositorySettings:
        """Where the repository is and what opens it, whoever said so. Raises ConfigInvalid."""
        return repository_settings(self.settings, self._repository)

    @property
    def address(self) -> str:
        """The repository's address. Raises ConfigInvalid if nobody said it."""
        address = self.repository_settings.repository
        if address is None:
            raise ConfigInvalid(
                "Which repository is not said.",
                'add --repo REPO, set STILLFRAME_REPOSITORY, or write repository = "REPO" into the '
                "configuration file")
        self._address = address
        return address

    def complete(self, error: StillframeError) -> None:
        """Write this repository's address into the command that *error* gives: it is pasted, not edited."""
        if self._address:
            error.next_command = error.next_command.replace(
                "--repo REPO", f"--repo {shlex.quote(self._address)}")

    @contextlib.contextmanager
    def completing(self) -> Iterator[None]:
        """Complete what errors leave the block: what is done in it is done to this repository."""
        try:
            yield
        except StillframeError as error:
            self.complete(error)
            raise

    @cached_property
    def access(self) -> Access:
        """Who we are to the repository's server. Raises ConfigInvalid."""
        return access_to(self.repository_settings, self.address)

    @cached_property
    def storage(self) -> Storage:
        """The storage of the repository. Raises ConfigInvalid, RepositoryRefused."""
        return storage_of(self.repository_settings, self.address, self.access, self.clock)

    @cached_property
    def secret(self) -> Secret:
        """What opens the repository; asked for if it must be. Raises KeyNeeded."""
        from stillframe.cli.secret import read_secret

        return read_secret(self.repository_settings, self.screen)

    @cached_property
    def repository(self) -> Repository:
        """The repository, open. Raises RepositoryRefused, RepositoryDamaged, StorageError."""
        from stillframe.repository.opened import open_repository

        return open_repository(self.storage, self.secret, self.access)

    def repository_at(self, address: str) -> Repository:
        """Return the repository at another address, opened by what opens this session's. See `repository`."""
        return self.beside(RepositorySettings(address).over(self._repository)).repository

    @cached_property
    def near_repository(self) -> Repository:
        """The repository, open; on a server, with what never changes kept on this host: see with_cache."""
        from stillframe.repository.opened import with_cache
        from stillframe.storage.address import folder_of

        if folder_of(self.address) is not None:
            return self.repository
        return with_cache(self.repository, self.state_folder / "cache")

    def ask_for_secret(self) -> None:
        """Ask for the secret now, if a person must type it; else it is read when it is needed."""
        from stillframe.cli.secret import must_be_asked

        if must_be_asked(self.repository_settings):
            _ = self.secret

    def stop(self) -> StillframeError | None:
        """Return the error to end runs with once a signal came."""
        if not self._interrupted:
            return None
        self._announce()
        return Interrupted(
            f"{self._interrupted} ended the run. {self.kept}",
            "run the same command again when you like",
        )

    @contextlib.contextmanager
    def signals_as_stop(self, then: str = "the guest is being brought back") -> Iterator[None]:
        """Within the block, SIGINT, SIGTERM and SIGHUP end the run cleanly instead of killing it.

        *then* tells the person what happens next.
        """
        self._then = then
        before = {number: signal.getsignal(number) for number in _ENDING}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # Nothing is printed here: a signal handler runs between any two instructions of the run.
        self._interrupted = signal.Signals(number).name

    def _announce(self) -> None:
        if self._announced:
            return
        self._announced = True
        self.screen.say(f"{self._interrupted}: ending; {self._then}…")
