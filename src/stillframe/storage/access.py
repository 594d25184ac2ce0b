"""Who we are to a storage server: found where the field keeps such things, never on a command line.

S3: AWS's environment variables, then a profile in AWS's own two files. SMB: a credentials file as
mount.cifs takes it. SFTP needs nothing here: keys, agent and known hosts are OpenSSH's. A *credentials file*
of the user's comes before all of that; it has one `name = value` a line, in AWS's or mount.cifs's words.
"""

from __future__ import annotations

import configparser
from collections.abc import Mapping
from pathlib import Path

import msgspec

from stillframe.errors import ConfigInvalid

_AWS_DEFAULT_PROFILE = "default"
_DEFAULT_REGION = "us-east-1"


class Access(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server must be told, and where it is if its address does not say so; "" where nothing is known.

    *user* and *secret* are the user's name and password, or AWS's access key ID and secret access key.
    """

    user: str = ""
    secret: str = ""
    token: str = ""
    domain: str = ""
    endpoint: str = ""
    region: str = ""


#: What is known of nobody.
NOBODY = Access()


def s3_access(given: Mapping[str, str], environment: Mapping[str, str], home: Path) -> Access:
    """Return the access to S3: of *given* (a credentials file), the *environment*, AWS's files below *home*.

    Keys come from one of these as a whole. None at all leaves them "": obstore asks the machine's
    metadata service then. Raises ConfigInvalid.
    """
    profile = _profile(environment, home)
    sources = ({name.lower(): value for name, value in given.items()},
               {name.lower(): value for name, value in environment.items() if value}, profile)
    keys = next((source for source in sources if source.get("aws_access_key_id")), {})
    places = {name: value for source in reversed(sources) for name, value in source.items()}
    return Access(
        user=keys.get("aws_access_key_id", ""), secret=keys.get("aws_secret_access_key", ""),
        token=keys.get("aws_session_token", ""),
        endpoint=_first(places, "aws_endpoint_url_s3", "aws_endpoint_url", "endpoint_url"),
        region=_first(places, "aws_region", "aws_default_region", "region") or _DEFAULT_REGION)


def smb_access(given: Mapping[str, str], environment: Mapping[str, str]) -> Access:
    """Return the access to a share: of *given* (a credentials file), else of mount.cifs's variables."""
    return Access(
        user=_first(given, "username", "user") or environment.get("USER", ""),
        secret=_first(given, "password", "pass") or environment.get("PASSWD", ""),
        domain=_first(given, "domain", "dom", "workgroup"))


def read_credentials(path: Path) -> dict[str, str]:
    """Return what a credentials file says. Raises ConfigInvalid."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(
            f"The credentials file {path} can't be read: {error}.", f"ls -l {path}") from error
    found = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith(("#", ";", "[")):
            continue
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigInvalid(  # the line itself may hold the secret
                f"Line {number} of the credentials file {path} is not of the form NAME = VALUE.",
                f"edit {path}")
        found[name.strip().lower()] = value.strip()
    return found


def _profile(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return what AWS's files say of the profile that is chosen."""
    name = environment.get("AWS_PROFILE") or _AWS_DEFAULT_PROFILE
    files = ((environment.get("AWS_CONFIG_FILE") or home / ".aws/config",
              name if name == _AWS_DEFAULT_PROFILE else f"profile {name}"),
             (environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws/credentials", name))
    found: dict[str, str] = {}
    for path, section in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(path)
        except (configparser.Error, OSError, UnicodeDecodeError) as error:
            raise ConfigInvalid(f"AWS's file {path} is not valid: {error}.", f"edit {path}") from error
        if parser.has_section(section):
            found |= dict(parser.items(section))
    if not found and environment.get("AWS_PROFILE"):
        raise ConfigInvalid(
            f"There is no AWS profile {name}.", "aws configure list-profiles; or unset AWS_PROFILE")
    return found


def _first(source: Mapping[str, str], *names: str) -> str:
    return next((source[name] for name in names if source.get(name)), "")
