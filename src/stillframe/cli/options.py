"""The options that several commands share, said once.

A *group* is a function whose parameters are options and whose result is what they come to. A command
that is `taking` groups gets those results as its first arguments; its own options follow.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from stillframe.capture.method import Method
from stillframe.capture.states import Quiesce
from stillframe.cli.screen import error_body
from stillframe.cli.session import Common, Session
from stillframe.config import GuestSettings, RepositorySettings
from stillframe.errors import ConfigInvalid, StillframeError
from stillframe.units import parse_duration_s

StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="folder of the journal (default /var/lib/stillframe)")
]
Config = Annotated[
    Path | None, typer.Option("--config", help="configuration file (default /etc/stillframe/stillframe.toml)")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as one JSON object")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="say only results, warnings and errors")]
QuiesceOption = Annotated[
    Quiesce | None,
    typer.Option("--quiesce", help="how the guest is brought to rest: auto takes its agent if it answers"),
]
OverlayDir = Annotated[
    str | None, typer.Option("--overlay-dir", help="folder for overlays (default: beside each disk's image)")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="disk (target) to leave out; may be repeated")
]
Guests = Annotated[
    list[str] | None, typer.Argument(metavar="[GUEST]...", help="guests by name, UUID or qmp:SOCKET")]


Tags = Annotated[
    list[str] | None, typer.Option("--tag", help="mark the snapshot with this word; may be repeated")]
Tag = Annotated[str | None, typer.Option("--tag", help="only snapshots with this tag; needs the key")]


def host_options(
    connect: Annotated[
        str | None, typer.Option("--connect", "-c", help="libvirt's URI (default qemu:///system)")
    ] = None,
    state_dir: StateDir = None, config: Config = None, as_json: AsJson = False, quiet: Quiet = False,
) -> Common:
    """Return what every command that talks to libvirt knows."""
    return Common(connect, state_dir, config, as_json, quiet)


def plain_options(
    state_dir: StateDir = None, config: Config = None, as_json: AsJson = False, quiet: Quiet = False,
) -> Common:
    """Return what every other command knows."""
    return Common(None, state_dir, config, as_json, quiet)


def guest_options(
    quiesce: QuiesceOption = None,
    overlay_dir: OverlayDir = None,
    overlay_limit: Annotated[
        str | None,
        typer.Option(help="give the copy up when overlays grow past this (default: half of what is free)"),
    ] = None,
    min_free: Annotated[
        str | None, typer.Option(help="space that must be free for overlays (default 1G)")
    ] = None,
    exclude: Exclude = None,
    freeze_timeout: Annotated[str | None, typer.Option(help="longest freeze (default 10s)")] = None,
    agent_timeout: Annotated[str | None, typer.Option(help="longest wait for the agent (default 5s)")] = None,
    shutdown_timeout: Annotated[
        str | None, typer.Option(help="longest wait for a shutdown (default 2m)")
    ] = None,
    commit_timeout: Annotated[
        str | None, typer.Option(help="longest wait for a commit to converge (default 1h)")
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option("--method", help="how disks are captured: auto (the default) chooses for each guest"),
    ] = None,
    full_read_every: Annotated[
        str | None, typer.Option(help="read a disk whole when that is longer ago than this (default 30d)")
    ] = None,
) -> GuestSettings:
    """Return how guests are to be captured."""
    return GuestSettings(
        quiesce, overlay_dir, overlay_limit, min_free, freeze_timeout, agent_timeout,
        shutdown_timeout, commit_timeout, tuple(exclude) if exclude else None, method, full_read_every,
    )


CredentialsFile = Annotated[str | None, typer.Option(help="file that says who we are to the server")]
LimitRate = Annotated[str | None, typer.Option(help=(
    "so many bytes a second at most, each way: 50M (64K at least)"))]


def server_options(
    credentials_file: CredentialsFile = None,
    limit_rate: LimitRate = None,
) -> RepositorySettings:
    """Return what options say of the server of a mirror; the environment and the file say the rest."""
    return RepositorySettings(credentials_file=credentials_file, limit_rate=limit_rate)


def repository_options(
    repo: Annotated[
        str | None, typer.Option("--repo", "-r", help="the repository: a folder, or s3://…, sftp://… or smb://…")
    ] = None,
    passphrase_file: Annotated[
        str | None, typer.Option(help="file with the passphrase")
    ] = None,
    passphrase_command: Annotated[
        str | None, typer.Option(help="program, with its arguments, that prints the passphrase")
    ] = None,
    key_file: Annotated[str | None, typer.Option(help="file whose content opens the repository")] = None,
    credentials_file: CredentialsFile = None,
    limit_rate: LimitRate = None,
) -> RepositorySettings:
    """Return where the repository is and what opens it, as far as options say it."""
    return RepositorySettings(
        repo, passphrase_file, passphrase_command, key_file, credentials_file, limit_rate)


def taking(*groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of *groups*: it is called with what each came to, then its own."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = _parameters(function)[len(groups):]
        shared = {group: _parameters(group) for group in groups}

        @functools.wraps(function)
        def command(**given: Any) -> None:
            results = [
                group(**{each.name: given.pop(each.name) for each in parameters})
                for group, parameters in shared.items()
            ]
            function(*results, **given)

        parameters = [*own, *(each for group in groups for each in shared[group])]
        # typer goes by these two; without __wrapped__ it does not look at the bare function.
        vars(command)["__signature__"] = inspect.Signature(parameters)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        del vars(command)["__wrapped__"]
        return command

    return decorate


def run_command(
    common: Common, command: Callable[[Session], int], repository: RepositorySettings | None = None, *,
    settings_first: bool = True,
) -> None:
    """Run a command in a session of its own and end the process with its exit code.

    With *settings_first* nothing is done with a configuration file that is not valid.
    """
    session = Session(common, repository)
    session.screen.start()
    try:
        if settings_first:
            session.check_settings()
        code = command(session)
    except StillframeError as error:
        session.screen.close()
        session.complete(error)
        session.screen.json({"error": error_body(error)})
        session.screen.error(error)
        code = error.exit_code
    finally:
        session.screen.close()
    sys.exit(code)


def seconds_of(name: str, text: str) -> float:
    """Return the duration that option *name* (in Python's spelling) was given. Raises ConfigInvalid."""
    try:
        return parse_duration_s(text)
    except ValueError as error:
        option = f"--{name.replace('_', '-')}"
        raise ConfigInvalid(f"{name} is {error}.", f"correct the option {option}") from error


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of *function*, their annotations resolved, all by name."""
    hints = get_type_hints(function, include_extras=True)
    return [
        each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for each in inspect.signature(function).parameters.values()
    ]
