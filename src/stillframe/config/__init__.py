"""The configuration file: TOML in, typed structs out. With the CLI, the only reader of environment.

repository = "/srv/repository"
passphrase_file = "/etc/stillframe/passphrase"   # or passphrase_command, or key_file
credentials_file = "/etc/stillframe/credentials" # who we are to the repository's server
limit_rate = "50M"         # bytes a second, to the server and from it

[copy]                     # where `copy` copies to, with the same keys
repository = "sftp://backup@far.example.net/srv/second-site"

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
tags = ["production"]      # words that snapshots are marked with
keep_last = 3              # what `forget` keeps, and so on: hourly, daily, weekly, monthly, yearly
keep_hourly = 24
keep_daily = 7
keep_weekly = 5
keep_monthly = 12
keep_yearly = 3
keep_within = "2d"

[guests.NAME]              # the same keys, for one guest, and
exclude = ["vdb"]          # its disks to leave out
skip = true                # `--all` leaves it out
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from stillframe.capture.limits import Limits
from stillframe.capture.method import Method
from stillframe.capture.states import Quiesce
from stillframe.clock import Clock
from stillframe.config.settings import READERS, GuestSettings, RepositorySettings, Settings
from stillframe.errors import ConfigInvalid
from stillframe.retention import Policy
from stillframe.storage.access import NOBODY, Access, read_credentials, s3_access, smb_access
from stillframe.storage.address import folder_of, open_storage, scheme_of
from stillframe.storage.model import Storage
from stillframe.storage.wrappers import RateLimited

if TYPE_CHECKING:
    from stillframe.capture.plan import Wishes

__all__ = [
    "GuestSettings", "RepositorySettings", "Settings", "access_to", "chosen_file", "drill_settings",
    "for_guest", "policy_of", "read_file", "read_settings", "repository_settings", "storage_of", "wishes",
]

T = TypeVar("T")

DEFAULT_FILE = Path("/etc/stillframe/stillframe.toml")
DRILL_TIMEOUT_S = 600.0


def chosen_file(path: Path | None) -> Path:
    """Return the configuration file that counts: *path*, else the environment's, else the default."""
    return path or Path(os.environ.get("STILLFRAME_CONFIG", str(DEFAULT_FILE)))


def read_file(path: Path) -> bytes:
    """Return what a configuration file says. Raises ConfigInvalid."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigInvalid(f"There is no configuration file {path}.", f"ls -l {path}") from error
    except OSError as error:
        raise ConfigInvalid(f"{path} can't be read: {error.strerror}.", f"ls -l {path}") from error


def read_settings(path: Path | None) -> Settings:
    """Return the settings of *path*, or of the default file if it exists.

    Raises ConfigInvalid, with the line and the key that are wrong.
    """
    chosen = chosen_file(path)
    if path is None and not chosen.exists():
        return Settings()
    content = read_file(chosen)
    try:
        settings = msgspec.toml.decode(content, type=Settings)
    except (msgspec.DecodeError, ValueError) as error:
        raise _invalid(chosen, content) from error
    if settings.defaults.exclude:
        raise _invalid(chosen, content)
    return settings


def _invalid(path: Path, content: bytes) -> ConfigInvalid:
    """Return the error that says what is wrong first, and where."""
    # Looked for only if something is wrong: most commands have nothing to look for.
    from stillframe.config.check import structure_problems

    _, (first, *others) = structure_problems(content)
    more = f" There are {len(others)} more problems." if others else ""
    return ConfigInvalid(f"{path}:{first.text}.{more}", f"stillframe config check --config {path}")


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
        rate: int = READERS["limit_rate"](settings.limit_rate)
    except ValueError as error:
        raise ConfigInvalid(
            f"limit_rate is {error}.", "correct the option --limit-rate or the configuration file") from error
    return rate


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
        settings, "standing_limit", (plain.standing_bytes, plain.standing_share))
    return Wishes(
        quiesce=settings.quiesce or Quiesce.AUTO,
        overlay_folder=Path(settings.overlay_dir) if settings.overlay_dir else None,
        exclude=settings.exclude or (),
        method=settings.method or Method.AUTO,
        full_read_every_s=_read(settings, "full_read_every", FULL_READ_EVERY_S),
        limits=Limits(
            freeze_s=_read(settings, "freeze_timeout", plain.freeze_s),
            agent_s=_read(settings, "agent_timeout", plain.agent_s),
            shutdown_s=_read(settings, "shutdown_timeout", plain.shutdown_s),
            commit_s=_read(settings, "commit_timeout", plain.commit_s),
            overlay_bytes=_read(settings, "overlay_limit", plain.overlay_bytes),
            min_free_bytes=_read(settings, "min_free", plain.min_free_bytes),
            standing_bytes=standing_bytes,
            standing_share=standing_share,
        ),
    )


def for_guest(settings: Settings, name: str, options: GuestSettings) -> Wishes:
    """Return the wishes for guest *name*: options over its own section over the defaults."""
    return wishes(settings.of_guest(name, options))


@dataclass(frozen=True, slots=True)
class DrillSettings:
    """What is to show that a guest works. Without *expect* and a script, its agent must answer."""

    checks: tuple[str, ...]
    expect: re.Pattern[str] | None
    timeout_s: float


def drill_settings(settings: Settings, name: str, options: GuestSettings) -> DrillSettings:
    """Return how guest *name* is drilled, by the rules of `for_guest`. Raises ConfigInvalid."""
    chosen = settings.of_guest(name, options)
    return DrillSettings(
        chosen.drill_check or (), _read(chosen, "drill_expect", None),
        _read(chosen, "drill_timeout", DRILL_TIMEOUT_S))


def policy_of(settings: GuestSettings) -> Policy:
    """Return the rules for which snapshots to keep. Raises ConfigInvalid."""
    within_s: float | None = _read(settings, "keep_within", None)
    return Policy(
        settings.keep_last or 0, settings.keep_hourly or 0, settings.keep_daily or 0,
        settings.keep_weekly or 0, settings.keep_monthly or 0, settings.keep_yearly or 0,
        None if within_s is None else timedelta(seconds=within_s))


def _read(settings: GuestSettings, name: str, otherwise: T) -> T:
    """Return what a setting's text stands for. Raises ConfigInvalid."""
    text: str | None = getattr(settings, name)
    if text is None:
        return otherwise
    try:
        found: T = READERS[name](text)
    except ValueError as error:
        raise ConfigInvalid(
            f"{name} is {error}.", f"correct the option --{name.replace('_', '-')} or the configuration file"
        ) from error
    return found
