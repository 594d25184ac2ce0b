"""The commands on the files of a snapshot: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillframe.cli.options import plain_options, repository_options, run_command, taking
from stillframe.cli.session import Common
from stillframe.config import RepositorySettings
from stillframe.units import parse_duration_s

Name = Annotated[
    str, typer.Argument(metavar="SNAPSHOT[:DISK]", help="a snapshot, and one disk of it if not all")]
Paths = Annotated[list[str], typer.Argument(metavar="PATH...", help="paths as they are in the guest")]
Inside = tuple[str, tuple[Path, ...], float]

_files = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None,
    help="List files of a snapshot and take them out. Nothing is mounted on this host.")


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (ls, cat, get):
        _files.command(name=command.__name__)(command)
    app.add_typer(_files, name="files")


def inside_options(
    filesystem: Annotated[
        str | None, typer.Option("--filesystem", help="mount this one alone (ls without a PATH lists them)")
    ] = None,
    luks_key_file: Annotated[
        list[Path] | None,
        typer.Option("--luks-key-file", help="file with an encrypted disk's passphrase; may be repeated"),
    ] = None,
    timeout: Annotated[
        str, typer.Option("--timeout", help="give up when the appliance says nothing for so long")] = "2m",
) -> Inside:
    """Return how the disks are looked into."""
    try:
        return filesystem or "", tuple(luks_key_file or ()), parse_duration_s(timeout)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@taking(plain_options, repository_options, inside_options)
def ls(
    common: Common, repository: RepositorySettings, inside: Inside, *,
    snapshot: Name,
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH]...", help="none: list the file systems")] = None,
    long: Annotated[bool, typer.Option("-l", "--long", help="mode, owner, size and time, too")] = False,
    recursive: Annotated[bool, typer.Option("-R", "--recursive", help="all that is below, too")] = False,
) -> None:
    """List folders and files of a snapshot, or its file systems."""
    from stillframe.cli import files as files_command

    wish = files_command.Wish(snapshot, tuple(paths or ()), *inside)
    run_command(
        common, lambda session: files_command.list_files(session, wish, long=long, recursive=recursive),
        repository)


@taking(plain_options, repository_options, inside_options)
def cat(
    common: Common, repository: RepositorySettings, inside: Inside, *, snapshot: Name, paths: Paths,
) -> None:
    """Print the content of files of a snapshot."""
    from stillframe.cli import files as files_command

    if common.as_json:
        raise typer.BadParameter("files cat prints the files themselves; for JSON use files get")
    wish = files_command.Wish(snapshot, tuple(paths), *inside)
    run_command(common, lambda session: files_command.cat(session, wish), repository)


@taking(plain_options, repository_options, inside_options)
def get(
    common: Common, repository: RepositorySettings, inside: Inside, *, snapshot: Name, paths: Paths,
    to: Annotated[str, typer.Option("--to", help="a folder, FILE.tar, or - for a tar archive on stdout")],
) -> None:
    """Take files and folders out of a snapshot, into a folder or a tar archive."""
    from stillframe.cli import files as files_command

    if common.as_json and to == "-":
        raise typer.BadParameter("--to - prints the archive, and --json the result: choose one")
    wish = files_command.Wish(snapshot, tuple(paths), *inside)
    run_command(common, lambda session: files_command.get(session, wish, to), repository)
