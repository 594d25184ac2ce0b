"""What opens a repository: read from a file or a program, or asked for at a terminal; never shown.

The secret itself is never an option: other users could read it in the table of processes.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shlex
import stat
import sys
from pathlib import Path

from stillframe import process
from stillframe.cli.screen import Screen
from stillframe.config import RepositorySettings
from stillframe.errors import KeyNeeded, ProgramFailed, ProgramTimedOut, Refused, TargetExists
from stillframe.repository.keyslots import SlotKind
from stillframe.repository.opened import Secret

_COMMAND_TIMEOUT_S = 60.0
_SECRET_LIMIT_BYTES = 1024 * 1024
_KEY_FILE_BYTES = 32
#: Shorter ones are no random bytes but somebody's mistake.
_KEY_FILE_LEAST_BYTES = 16
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read_secret(settings: RepositorySettings, screen: Screen, *, new: bool = False) -> Secret:
    """Return the secret that the settings name, else ask for a passphrase if a terminal is there.

    A *new* one is asked for twice. Raises KeyNeeded.
    """
    if settings.key_file:
        content = _content(Path(settings.key_file), "key file", screen)
        if len(content) < _KEY_FILE_LEAST_BYTES:
            raise KeyNeeded(
                f"The key file {settings.key_file} has {len(content)} bytes; at least "
                f"{_KEY_FILE_LEAST_BYTES} are needed.",
                "name the right file; stillframe key add --new-key-file PATH makes a good one",
            )
        return Secret(SlotKind.KEY_FILE, content)
    if settings.passphrase_file:
        path = Path(settings.passphrase_file)
        return _passphrase(_content(path, "passphrase file", screen), f"The passphrase file {path}")
    if settings.passphrase_command:
        return _passphrase(_printed(settings.passphrase_command), "What --passphrase-command printed")
    return _asked(screen, "new passphrase" if new else "passphrase", twice=new)


def must_be_asked(settings: RepositorySettings) -> bool:
    """Return whether a person has to type the secret."""
    return not settings.secrets


def read_disk_key(path: Path, screen: Screen) -> str:
    """Return the passphrase of an encrypted disk, from a file. Raises KeyNeeded."""
    line = _passphrase(_content(path, "key file", screen), f"The key file {path}").value
    try:
        if b"\0" in line:
            raise ValueError("it has a zero byte")
        return line.decode()
    except ValueError as error:
        # A limit of libguestfs, which takes keys as texts.
        raise KeyNeeded(f"The key file {path} is no text: {error}.",
                        "add a passphrase to the disk, or restore it whole and open that") from error


def ask_disk_key(device: str, screen: Screen) -> str | None:
    """Ask for the passphrase of an encrypted disk; None if nothing is typed."""
    with screen.paused(), contextlib.suppress(EOFError):
        return getpass.getpass(f"passphrase of {device} (none to leave it locked): ") or None
    return None


def make_key_file(path: Path) -> Secret:
    """Write a key file with new random bytes, for this user alone, durably. Raises TargetExists, Refused."""
    content = secrets.token_bytes(_KEY_FILE_BYTES)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError as error:
        raise TargetExists(f"{path} exists already; a key file is never overwritten.",
                           "choose another name, or use it as it is with --key-file") from error
    except OSError as error:
        raise Refused(f"The key file {path} can't be written: {error.strerror}.",
                      f"ls -ld {path.parent}") from error
    return Secret(SlotKind.KEY_FILE, content)


def _content(path: Path, what: str, screen: Screen) -> bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & _OTHERS and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                screen.warn(f"others than its owner have rights on the {what} {path}: chmod 600 {path}")
            content = file.read(_SECRET_LIMIT_BYTES + 1)
    except OSError as error:
        raise KeyNeeded(f"The {what} {path} can't be read: {error.strerror}.", f"ls -l {path}") from error
    if len(content) > _SECRET_LIMIT_BYTES:
        raise KeyNeeded(f"The {what} {path} has more than 1 MiB: that is no secret.", f"ls -l {path}")
    return content


def _printed(command: str) -> bytes:
    advice = "run that program by hand; it must print the passphrase and end with 0"
    try:
        words = shlex.split(command)
        if not words:
            raise ValueError("it is empty")
        return process.run(words, timeout_s=_COMMAND_TIMEOUT_S).stdout.encode()
    except (ValueError, OSError) as error:
        raise KeyNeeded(f"The passphrase command can't be run: {error}.", advice) from error
    except (ProgramFailed, ProgramTimedOut, Refused) as error:
        raise KeyNeeded(f"The passphrase command failed: {error.message}", advice) from error


def _passphrase(content: bytes, whence: str) -> Secret:
    """Return the passphrase without the line's end."""
    line = content.removesuffix(b"\n").removesuffix(b"\r")
    if not line:
        raise KeyNeeded(f"{whence} is empty.", "put the passphrase there")
    return Secret(SlotKind.PASSPHRASE, line)


def _asked(screen: Screen, what: str, *, twice: bool) -> Secret:
    if not sys.stdin.isatty():
        raise KeyNeeded(
            "Nothing says what opens the repository, and there is no terminal to ask at.",
            "use --passphrase-file, --passphrase-command or --key-file, the environment "
            "(STILLFRAME_PASSPHRASE_FILE, …) or the configuration file",
        )
    with screen.paused():
        try:
            typed = getpass.getpass(f"{what}: ")
            if twice and typed != getpass.getpass(f"{what} again: "):
                raise KeyNeeded("The two passphrases differ.", "run the command again")
        except EOFError as error:
            raise KeyNeeded("No passphrase was typed.", "run the command again") from error
    return _passphrase(typed.encode(), "The passphrase")
