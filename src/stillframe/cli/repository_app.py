"""The commands on a repository: their options."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from stillframe.cli.options import Tag, plain_options, repository_options, run_command, taking
from stillframe.cli.session import Common
from stillframe.config import GuestSettings, RepositorySettings
from stillframe.units import parse_size_bytes

Count = int | None
Snapshot = Annotated[
    str, typer.Argument(metavar="SNAPSHOT", help="the beginning of an ID, GUEST, GUEST@DAY, or latest")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")]
Label = Annotated[str, typer.Option("--label", help="a word for people, to know the key slot by")]
NewKeyFile = Annotated[
    Path | None, typer.Option("--new-key-file", help="make this key file, and let it open the repository")]


class Level(enum.Enum):
    """How far a verification goes."""

    STRUCTURE = "structure"
    STORED = "stored"
    FULL = "full"


_key = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Add, list, remove and export what opens a repository.")


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (init, list_, show, diff, serve, verify, copy, pin, unpin, forget, prune):
        app.command(name=command.__name__.rstrip("_"))(command)
    for command in (key_add, key_list, key_remove, key_export):
        _key.command(name=command.__name__.removeprefix("key_"))(command)
    app.add_typer(_key, name="key")


@taking(plain_options, repository_options)
def init(
    common: Common, repository: RepositorySettings, *,
    address: Annotated[
        str | None,
        typer.Argument(metavar="[REPO]", help="a folder, or s3://…, sftp://… or smb://…; or --repo"),
    ] = None,
    new_key_file: NewKeyFile = None,
    label: Label = "first",
    same_keys_as: Annotated[
        str | None, typer.Option(help="let all that opens this repository open it: copies move as stored"),
    ] = None,
) -> None:
    """Make a repository. What opens it is asked for, or named by an option."""
    from stillframe.cli import keys as keys_command

    if address is not None and repository.repository is not None:
        raise typer.BadParameter("name the repository once: as REPO or with --repo")
    if new_key_file is not None and repository.secrets:
        raise typer.BadParameter("choose one: --new-key-file, or a secret that is there already")
    if new_key_file is not None and same_keys_as is not None:
        raise typer.BadParameter("choose one: --new-key-file, or the keys of another repository")
    chosen = RepositorySettings(address).over(repository)
    if same_keys_as is None:
        run_command(common, lambda session: keys_command.init(session, new_key_file, label), chosen)
        return
    first = RepositorySettings(same_keys_as).over(chosen)
    run_command(common, lambda session: keys_command.init_like(session, session.beside(first)), chosen)


@taking(plain_options, repository_options)
def list_(
    common: Common, repository: RepositorySettings, *,
    guest: Annotated[str | None, typer.Option("--guest", help="only this guest's")] = None,
    tag: Tag = None,
    tags: Annotated[bool, typer.Option("--tags", help="show the tags, too; needs the key")] = False,
) -> None:
    """List the snapshots, the newest last. No key is needed but for tags."""
    from stillframe.cli import snapshots as snapshots_command

    run_command(
        common, lambda session: snapshots_command.list_all(session, guest, tag, with_tags=tags), repository)


@taking(plain_options, repository_options)
def show(
    common: Common, repository: RepositorySettings, *,
    snapshot: Snapshot,
    screenshot: Annotated[
        Path | None, typer.Option("--screenshot", help="write the screen of its last drill there, as PNG")
    ] = None,
) -> None:
    """Show all that is known of one snapshot, and its last drill."""
    from stillframe.cli import snapshots as snapshots_command

    run_command(common, lambda session: snapshots_command.show(session, snapshot, screenshot), repository)


@taking(plain_options, repository_options)
def diff(
    common: Common, repository: RepositorySettings, *,
    old: Annotated[str, typer.Argument(metavar="A", help="the older snapshot")],
    new: Annotated[str, typer.Argument(metavar="B", help="the newer snapshot")],
    extents: Annotated[bool, typer.Option("--extents", help="print each changed stretch")] = False,
) -> None:
    """Say what changed on each disk from snapshot A to snapshot B. No data is read."""
    from stillframe.cli import diff as diff_command

    run_command(common, lambda session: diff_command.diff(session, old, new, extents=extents), repository)


@taking(plain_options, repository_options)
def serve(
    common: Common, repository: RepositorySettings, *,
    snapshot: Annotated[
        str, typer.Argument(metavar="SNAPSHOT[:DISK]", help="a snapshot, and one disk of it if not all")],
    writable: Annotated[
        bool, typer.Option("--writable", help="let clients write; it is thrown away in the end")] = False,
    socket: Annotated[
        str | None, typer.Option("--socket", help="Unix socket to make (else one in a private folder)")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="TCP port, with TLS or on loopback")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="IP address to listen at (with TLS: all)")] = None,
    tls_certificates: Annotated[
        str | None, typer.Option(help="folder with ca-cert.pem, server-cert.pem and server-key.pem; "
                                      "clients need a certificate of the same CA")] = None,
    tls_psk: Annotated[
        str | None, typer.Option(help="file with pre-shared keys, as psktool makes it")] = None,
    cache: Annotated[str, typer.Option("--cache", help="memory for what was read, of each disk")] = "256M",
) -> None:
    """Serve a snapshot's disks over NBD, until Ctrl-C."""
    from stillframe.cli import serve as serve_command
    from stillframe.restore.export import Serving

    if socket is not None and port is not None:
        raise typer.BadParameter("choose one: --socket or --port")
    try:
        tcp = serve_command.tcp_place(port, address, tls_certificates, tls_psk)
        cache_bytes = parse_size_bytes(cache)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    serving = Serving(writable, str(Path(socket).absolute()) if socket else "", tcp)
    wish = serve_command.Wish(snapshot, serving, cache_bytes)
    run_command(common, lambda session: serve_command.serve(session, wish), repository)


@taking(plain_options, repository_options)
def verify(
    common: Common, repository: RepositorySettings, *,
    level: Annotated[
        Level, typer.Option(
            "--level", help="structure: all is there; stored: as it was stored; full: opened and compared"),
    ] = Level.STORED,
    subset: Annotated[
        str | None, typer.Option("--subset", help="only the longest unverified part: 1/30, 5%, 20G")] = None,
) -> None:
    """Check that what is stored is there and whole. Damage is written down, and the next backup heals it."""
    from stillframe.cli import verify as verify_command

    run_command(common, lambda session: verify_command.verify(session, level.value, subset), repository)


@taking(plain_options, repository_options)
def copy(
    common: Common, repository: RepositorySettings, *,
    from_: Annotated[
        str | None, typer.Option("--from", help="the repository to copy from (default: the configured one)")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="the repository to copy to; or --repo (default without --from: "
                                              "that of [copy] in the configuration file)")] = None,
    from_passphrase_file: Annotated[
        str | None, typer.Option(help="file with the passphrase of the first (default: as the other)")
    ] = None,
    from_passphrase_command: Annotated[
        str | None, typer.Option(help="program that prints the passphrase of the first")] = None,
    from_key_file: Annotated[str | None, typer.Option(help="key file of the first")] = None,
    from_credentials_file: Annotated[
        str | None, typer.Option(help="file that says who we are to the server of the first")] = None,
    guest: Annotated[str | None, typer.Option("--guest", help="only this guest's")] = None,
    dry_run: DryRun = False,
) -> None:
    """Copy the snapshots that another repository lacks: a second site, another key, another storage."""
    from stillframe.cli import copy as copy_command

    if to is not None and repository.repository is not None:
        raise typer.BadParameter("name the repository to copy to once: with --to or with --repo")
    target = RepositorySettings(to).over(repository)
    first = RepositorySettings(
        from_, from_passphrase_file, from_passphrase_command, from_key_file, from_credentials_file)
    run_command(
        common, lambda session: copy_command.copy(
            session, copy_command.Way(first, target), guest, dry_run=dry_run))


@taking(plain_options, repository_options)
def pin(
    common: Common, repository: RepositorySettings, *,
    snapshot: Snapshot,
    why: Annotated[str, typer.Option("--why", help="a word for people, shown by show")] = "",
) -> None:
    """Keep a snapshot whatever the rules of forget say, until it is unpinned."""
    from stillframe.cli import snapshots as snapshots_command

    run_command(common, lambda session: snapshots_command.pin_snapshot(session, snapshot, why), repository)


@taking(plain_options, repository_options)
def unpin(common: Common, repository: RepositorySettings, *, snapshot: Snapshot) -> None:
    """Let the rules of forget decide on a snapshot again."""
    from stillframe.cli import snapshots as snapshots_command

    run_command(common, lambda session: snapshots_command.unpin_snapshot(session, snapshot), repository)


@taking(plain_options, repository_options)
def forget(
    common: Common, repository: RepositorySettings, *,
    snapshots: Annotated[
        list[str] | None, typer.Argument(metavar="[SNAPSHOT]...", help="snapshots to drop; or rules")] = None,
    keep_last: Annotated[Count, typer.Option(min=1, help="keep the newest so many")] = None,
    keep_hourly: Annotated[Count, typer.Option(min=1, help="keep one for each of so many hours")] = None,
    keep_daily: Annotated[Count, typer.Option(min=1, help="keep one for each of so many days")] = None,
    keep_weekly: Annotated[Count, typer.Option(min=1, help="keep one for each of so many weeks")] = None,
    keep_monthly: Annotated[Count, typer.Option(min=1, help="keep one for each of so many months")] = None,
    keep_yearly: Annotated[Count, typer.Option(min=1, help="keep one for each of so many years")] = None,
    keep_within: Annotated[
        str | None, typer.Option(help="keep all of so long (30d) before the newest")] = None,
    guest: Annotated[str | None, typer.Option("--guest", help="rules: only this guest's")] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", help="rules: only those with this tag; needs the key")] = None,
    dry_run: DryRun = False,
) -> None:
    """Drop snapshots, by name or by rules (for each guest of each host). Prune gives their space back.

    Without names and rules, the rules of the configuration file count.
    """
    from stillframe.cli import forget as forget_command

    rules = GuestSettings(
        keep_last=keep_last, keep_hourly=keep_hourly, keep_daily=keep_daily, keep_weekly=keep_weekly,
        keep_monthly=keep_monthly, keep_yearly=keep_yearly, keep_within=keep_within)
    if snapshots and (rules != GuestSettings() or guest or tag):
        raise typer.BadParameter("name the snapshots to drop, or rules (--keep-…) for those to keep")
    chosen = forget_command.Rules(rules, guest, tag)
    run_command(
        common, lambda session: forget_command.forget(session, snapshots or [], chosen, dry_run=dry_run),
        repository)


@taking(plain_options, repository_options)
def prune(
    common: Common, repository: RepositorySettings, *,
    dry_run: DryRun = False,
    fence_after: Annotated[
        str, typer.Option(help="take a run elsewhere for dead after so long without a sign of life")] = "1h",
    compact_below: Annotated[
        str, typer.Option(help="copy packs of which less than this is used, and drop them")] = "50%",
) -> None:
    """Delete what no snapshot needs. Safe while backups run."""
    from stillframe.cli import forget as forget_command

    run_command(
        common,
        lambda session: forget_command.prune(session, fence_after, compact_below, dry_run=dry_run),
        repository)


@taking(plain_options, repository_options)
def key_add(
    common: Common, repository: RepositorySettings, *,
    label: Label = "",
    new_passphrase_file: Annotated[
        Path | None, typer.Option("--new-passphrase-file", help="file with the new passphrase")] = None,
    new_key_file: NewKeyFile = None,
) -> None:
    """Add a key slot: a passphrase (asked for, or from a file), or a new key file."""
    from stillframe.cli import keys as keys_command

    if new_key_file is not None and new_passphrase_file is not None:
        raise typer.BadParameter("choose one: a passphrase or a key file")
    run_command(
        common, lambda session: keys_command.add(session, label, new_passphrase_file, new_key_file),
        repository)


@taking(plain_options, repository_options)
def key_list(common: Common, repository: RepositorySettings) -> None:
    """List the key slots. No key is needed."""
    from stillframe.cli import keys as keys_command

    run_command(common, keys_command.list_all, repository)


@taking(plain_options, repository_options)
def key_remove(
    common: Common, repository: RepositorySettings, *,
    slot: Annotated[str, typer.Argument(metavar="SLOT", help="the slot's ID, or its beginning")],
    dry_run: DryRun = False,
) -> None:
    """Remove a key slot. The last one stays."""
    from stillframe.cli import keys as keys_command

    run_command(common, lambda session: keys_command.remove(session, slot, dry_run=dry_run), repository)


@taking(plain_options, repository_options)
def key_export(common: Common, repository: RepositorySettings, *, label: Label = "recovery") -> None:
    """Make a recovery key and print it once, to be kept on paper."""
    from stillframe.cli import keys as keys_command

    run_command(common, lambda session: keys_command.export(session, label), repository)
