"""What the configuration file can say: its keys, their types, and what a value must be besides."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from stillframe.capture.method import Method
from stillframe.capture.states import Quiesce
from stillframe.storage.address import check_address
from stillframe.units import KIB, parse_duration_s, parse_share, parse_size_bytes

DEFAULT_STATE_FOLDER = Path("/var/lib/stillframe")
DEFAULT_URI = "qemu:///system"
#: What opens a repository; one of them may be named.
SECRETS = ("passphrase_file", "passphrase_command", "key_file")
#: A pack waits for its turn without a sign of life; below this, longer than a storage may give none.
LEAST_RATE = 64 * KIB

_TAG = r"^[^\s,]{1,64}\Z"

Count = Annotated[int, msgspec.Meta(ge=0)]
Tag = Annotated[str, msgspec.Meta(
    pattern=_TAG, description="words of 64 characters at most, without spaces and commas")]


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
    skip: bool | None = None
    tags: tuple[Tag, ...] | None = None
    keep_last: Count | None = None
    keep_hourly: Count | None = None
    keep_daily: Count | None = None
    keep_weekly: Count | None = None
    keep_monthly: Count | None = None
    keep_yearly: Count | None = None
    keep_within: str | None = None

    def over(self, other: GuestSettings) -> GuestSettings:
        """Return these settings, completed by *other* where nothing was said."""
        mine = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(other, **mine)


class RepositorySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a repository is, and what opens it; None where nothing was said."""

    repository: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None
    key_file: str | None = None
    credentials_file: str | None = None
    limit_rate: str | None = None

    @property
    def secrets(self) -> dict[str, str]:
        """What is said about what opens the repository, by the setting's name."""
        named = {name: getattr(self, name) for name in SECRETS}
        return {name: value for name, value in named.items() if value}

    def over(self, other: RepositorySettings) -> RepositorySettings:
        """Return these settings, completed by *other*. Whoever names a secret names all of it."""
        secret = self if self.secrets else other
        return msgspec.structs.replace(
            secret, repository=self.repository or other.repository,
            credentials_file=self.credentials_file or other.credentials_file,
            limit_rate=self.limit_rate or other.limit_rate)


class Settings(RepositorySettings, frozen=True, forbid_unknown_fields=True):
    """The whole file: a repository, and *copy*, the one that `copy` copies to."""

    connect: str = DEFAULT_URI
    state_dir: str = str(DEFAULT_STATE_FOLDER)
    copy: RepositorySettings = RepositorySettings()
    defaults: GuestSettings = GuestSettings()
    guests: Mapping[str, GuestSettings] = {}

    def of_guest(self, name: str, options: GuestSettings) -> GuestSettings:
        """Return what is said for guest *name*: options over its own section over the defaults."""
        return options.over(self.guests.get(name, GuestSettings()).over(self.defaults))


def is_tag(text: str) -> bool:
    """Return whether *text* can be a tag."""
    return re.match(_TAG, text) is not None


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


def _rate(text: str) -> int:
    rate = parse_size_bytes(text)
    if rate < LEAST_RATE:
        raise ValueError(f"too slow a rate: {text!r} (64K at least: a pack must go through in ten minutes)")
    return rate


def _size_or_share(text: str) -> tuple[int | None, float]:
    """Return bytes, or None and a share of the disk: "20G", "50%"."""
    if text.endswith("%"):
        return None, parse_share(text)
    return parse_size_bytes(text), 1.0


#: What the texts of these keys stand for; each function raises ValueError for one that stands for nothing.
#: Where it matters is where it is read, so that a guest's wrong value does not stop the others.
READERS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("overlay_limit", "min_free"), parse_size_bytes),
    "limit_rate": _rate,
    **dict.fromkeys(("freeze_timeout", "agent_timeout", "shutdown_timeout", "commit_timeout",
                     "full_read_every", "drill_timeout"), _positive_s),
    "keep_within": parse_duration_s,
    "standing_limit": _size_or_share,
    "drill_expect": _pattern,
    "repository": check_address,
}
