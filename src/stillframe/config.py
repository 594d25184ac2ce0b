"""The configuration file: TOML in, typed structs out. With the CLI, the only reader of environment.

repository = "/srv/repository"
passphrase_file = "/etc/stillframe/passphrase"   # or passphrase_command, or key_file
credentials_file = "/etc/stillframe/credentials" # who we are to the repository's server
limit_rate = "50M"         # bytes a second, to the server and from it

[defaults]                 # for all guests
quiesce = "auto"
overlay_dir = "/var/lib/libvirt/images"
overlay_limit = "20G"
min_free = "1G"
freeze_timeout = "10s"
agent_timeout = "5s"
shutdown_timeout = "2m"
commit_timeout = "1h"
method = "auto"
full_read_every = "30d"
standing_limit = "50%"
drill_check = ["systemctl is-system-running --wait"]     # commands inside the guest, for `drill`
drill_expect = "login:"
drill_timeout = "10m"

[guests.NAME]              # the same keys, for one guest, and
exclude = ["vdb"]          # its disks to leave out
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from stillframe.capture.limits import Limits
from stillframe.capture.method import Method
from stillframe.capture.states import Quiesce
from stillframe.clock import Clock
from stillframe.errors import ConfigInvalid
from stillframe.storage.access import NOBODY, Access, read_credentials, s3_access, smb_access
from stillframe.storage.address import folder_of, open_storage, scheme_of
from stillframe.storage.model import Storage
from stillframe.storage.wrappers import RateLimited
from stillframe.units import parse_duration_s, parse_share, parse_size_bytes

if TYPE_CHECKING:
    from stillframe.capture.plan import Wishes

T = TypeVar("T")

DEFAULT_FILE = Path("/etc/stillframe/stillframe.toml")
DEFAULT_STATE_FOLDER = Path("/var/lib/stillframe")
DEFAULT_URI = "qemu:///system"
DRILL_TIMEOUT_S = 600.0


class GuestSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings for a guest; None where nothing was said. Sizes and times as people write them."""

    quiesce: Quiesce | None = None
    overlay_dir: str | None = None
    overlay_limit: str | None = None
    min_free: str | None = None
    freeze_timeout: str | None = None
    agent_timeout: str | None = None
    shutdown_timeout: str | None = None
    commit_timeout: str | None = None
    exclude: tuple[str, ...] | None = None
    method: Method | None = None
    full_read_every: str | None = None
    standing_limit: str | None = None
    drill_check: tuple[str, ...] | None = None
    drill_expect: str | None = None
    drill_timeout: str | None = None

    def over(self, other: GuestSettings) -> GuestSettings:
        """Return these settings, completed by *other* where nothing was said."""
        mine = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(other, **mine)


class RepositorySettings(msgspec.Struct, frozen=True):
    """Where the repository is, and what opens it; None where nothing was said."""

    repository: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None
    key_file: str | None = None
    credentials_file: str | None = None
    limit_rate: str | None = None

    @property
    def secrets(self) -> dict[str, str]:
        """What is said about what opens the repository, by the setting's name."""
        named = {name: getattr(self, name) for name in ("passphrase_file", "passphrase_command", "key_file")}
        return {name: value for name, value in named.items() if value}

    def over(self, other: RepositorySettings) -> RepositorySettings:
        """Return these settings, completed by *other*. Whoever names a secret names all of it."""
        secret = self if self.secrets else other
        return msgspec.structs.replace(
            secret, repository=self.repository or other.repository,
            credentials_file=self.credentials_file or other.credentials_file,
            limit_rate=self.limit_rate or other.limit_rate)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    connect: str = DEFAULT_URI
    state_dir: str = str(DEFAULT_STATE_FOLDER)
    repository: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None
    key_file: str | None = None
    credentials_file: str | None = None
    limit_rate: str | None = None
    defaults: GuestSettings = GuestSettings()
    guests: Mapping[str, GuestSettings] = {}


def read_settings(path: Path | None) -> Settings:
    """Return the settings of *path*, or of the default file if it exists.

    Raises ConfigInvalid, with the line or the key that is wrong.
    """
    chosen = path or Path(os.environ.get("STILLFRAME_CONFIG", str(DEFAULT_FILE)))
    try:
        data = chosen.read_bytes()
    except FileNotFoundError as error:
        if path is None:
            return Settings()
        raise ConfigInvalid(f"There is no configuration file {chosen}.", f"ls -l {chosen}") from error
    except OSError as error:
        raise ConfigInvalid(f"{chosen} can't be read: {error.strerror}.", f"ls -l {chosen}") from error
    try:
        settings = msgspec.toml.decode(data, type=Settings)
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigInvalid(f"{chosen} is not valid: {error}.", f"edit {chosen}") from error
    if settings.defaults.exclude:
        # A disk that one guest has and another has not: for the other it would be an error.
        raise ConfigInvalid(
            f"{chosen}: exclude can't stand in [defaults], only in [guests.NAME].", f"edit {chosen}")
    return settings


def repository_settings(settings: Settings, options: RepositorySettings) -> RepositorySettings:
    """Return where the repository is: options over the environment over the file.

    Raises ConfigInvalid where several secrets are named in one place.
    """
    environment = RepositorySettings(*(
        os.environ.get(f"STILLFRAME_{name.upper()}") or None for name in RepositorySettings.__struct_fields__
    ))
    file = RepositorySettings(*(getattr(settings, name) for name in RepositorySettings.__struct_fields__))
    found = options.over(environment.over(file))
    named = found.secrets
    if len(named) > 1:
        raise ConfigInvalid(f"{' and '.join(named)} are both given; one secret opens a repository.",
                            "keep one of them in the options, the environment or the configuration file")
    return found


def storage_of(
    settings: RepositorySettings, address: str, access: Access, clock: Clock, *, make: bool = False,
) -> Storage:
    """Return the storage of the repository at *address*, for *access*; *make* makes its folder.

    Raises ConfigInvalid, RepositoryRefused, StorageError.
    """
    storage = open_storage(address, access, make=make, clock=clock)
    rate = rate_of(settings)
    limited = storage if rate is None else RateLimited(
        storage, clock, write_bytes_per_s=rate, read_bytes_per_s=rate)
    if folder_of(address) is not None:
        return limited
    # What only servers need is loaded for them alone.
    from stillframe.repository.opened import retried

    return retried(limited, clock)


def rate_of(settings: RepositorySettings) -> int | None:
    """Return how many bytes a second may be moved each way, None for any. Raises ConfigInvalid."""
    if settings.limit_rate is None:
        return None
    try:
        return parse_size_bytes(settings.limit_rate)
    except ValueError as error:
        raise ConfigInvalid(
            f"limit_rate is {error}.", "correct the option --limit-rate or the configuration file") from error


def access_to(settings: RepositorySettings, address: str) -> Access:
    """Return who we are to the server of *address*: the credentials file's, else the field's own places.

    Raises ConfigInvalid.
    """
    given = read_credentials(Path(settings.credentials_file)) if settings.credentials_file else {}
    kind = scheme_of(address)
    if kind == "s3":
        return s3_access(given, os.environ, Path.home())
    return smb_access(given, os.environ) if kind == "smb" else NOBODY


def wishes(settings: GuestSettings) -> Wishes:
    """Return what the settings ask for. Raises ConfigInvalid for a value that is no size or time."""
    # It brings all of the capture with it, which only commands on guests need.
    from stillframe.capture.plan import FULL_READ_EVERY_S, Wishes

    plain = Limits()
    standing_bytes, standing_share = _read(
        settings, "standing_limit", _size_or_share, (plain.standing_bytes, plain.standing_share))
    return Wishes(
        quiesce=settings.quiesce or Quiesce.AUTO,
        overlay_folder=Path(settings.overlay_dir) if settings.overlay_dir else None,
        exclude=settings.exclude or (),
        method=settings.method or Method.AUTO,
        full_read_every_s=_read(settings, "full_read_every", _positive_s, FULL_READ_EVERY_S),
        limits=Limits(
            freeze_s=_read(settings, "freeze_timeout", _positive_s, plain.freeze_s),
            agent_s=_read(settings, "agent_timeout", _positive_s, plain.agent_s),
            shutdown_s=_read(settings, "shutdown_timeout", _positive_s, plain.shutdown_s),
            commit_s=_read(settings, "commit_timeout", _positive_s, plain.commit_s),
            overlay_bytes=_read(settings, "overlay_limit", parse_size_bytes, plain.overlay_bytes),
            min_free_bytes=_read(settings, "min_free", parse_size_bytes, plain.min_free_bytes),
            standing_bytes=standing_bytes,
            standing_share=standing_share,
        ),
    )


def for_guest(settings: Settings, name: str, options: GuestSettings) -> Wishes:
    """Return the wishes for guest *name*: options over its own section over the defaults."""
    own = settings.guests.get(name, GuestSettings())
    return wishes(options.over(own.over(settings.defaults)))


@dataclass(frozen=True, slots=True)
class DrillSettings:
    """What is to show that a guest works. Without *expect* and a script, its agent must answer."""

    checks: tuple[str, ...]
    expect: re.Pattern[str] | None
    timeout_s: float


def drill_settings(settings: Settings, name: str, options: GuestSettings) -> DrillSettings:
    """Return how guest *name* is drilled, by the rules of `for_guest`. Raises ConfigInvalid."""
    chosen = options.over(settings.guests.get(name, GuestSettings()).over(settings.defaults))
    return DrillSettings(
        chosen.drill_check or (), _read(chosen, "drill_expect", _pattern, None),
        _read(chosen, "drill_timeout", _positive_s, DRILL_TIMEOUT_S))


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"no regular expression: {text!r} ({error})") from error


def _positive_s(text: str) -> float:
    seconds = parse_duration_s(text)
    if seconds <= 0:
        raise ValueError(f"not a time to wait: {text!r} (it must be more than 0)")
    return seconds


def _size_or_share(text: str) -> tuple[int | None, float]:
    """Return bytes, or None and a share of the disk: "20G", "50%"."""
    if text.endswith("%"):
        return None, parse_share(text)
    return parse_size_bytes(text), 1.0


def _read(settings: GuestSettings, name: str, parse: Callable[[str], T], otherwise: T) -> T:
    text: str | None = getattr(settings, name)
    if text is None:
        return otherwise
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigInvalid(
            f"{name} is {error}.", f"correct the option --{name.replace('_', '-')} or the configuration file"
        ) from error
