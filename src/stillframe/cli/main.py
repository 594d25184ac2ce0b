"""The `stillframe` command: its options, and from errors to exit codes."""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from stillframe import __version__
from stillframe.cli import files_app, repository_app, restore_app
from stillframe.cli.options import (
    Exclude,
    Guests,
    OverlayDir,
    QuiesceOption,
    Tags,
    guest_options,
    host_options,
    plain_options,
    repository_options,
    run_command,
    server_options,
    taking,
)
from stillframe.cli.repository_app import DryRun, Snapshot
from stillframe.cli.restore_app import Format, check_name
from stillframe.cli.session import Common
from stillframe.config import GuestSettings, RepositorySettings
from stillframe.config.settings import is_tag
from stillframe.errors import EXIT_OK, EXIT_USAGE


class OnError(enum.Enum):
    """What comes of a booted guest while its repository can't be read."""

    PAUSE = "pause"
    REPORT = "report"


app = typer.Typer(
    name="stillframe", no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    help="Back up running libvirt/QEMU guests, live and safely.",
)

_config = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check the configuration file.")

# How long the process waits in the end for a thread that may only be slow.
_LAST_WAIT_S = 5.0

BootedName = Annotated[str, typer.Argument(metavar="NAME", help="a guest that was booted from a snapshot")]
AllGuests = Annotated[bool, typer.Option("--all", help="all guests, running and shut off")]


@app.command()
@taking(host_options, guest_options, server_options)
def mirror(
    common: Common, options: GuestSettings, server: RepositorySettings, *,
    arguments: Annotated[
        list[str], typer.Argument(metavar="GUEST... DEST",
                              help="guests (none with --all), then the folder, or sftp://… or smb://…")
    ],
    all_guests: AllGuests = False,
    verify_destination: Annotated[
        bool, typer.Option("--verify-destination", help="read the mirror and compare it, too")
    ] = False,
) -> None:
    """Make and keep a plain image of each disk in DEST/GUEST, while the guest runs on or is shut off."""
    from stillframe.cli import mirror as mirror_command

    *guests, destination = arguments
    if bool(guests) == all_guests:
        raise typer.BadParameter("name the guests and then the folder, or --all and the folder")
    run_command(
        common,
        lambda session: mirror_command.mirror(
            session, guests, destination, options, verify_destination
        ),
        server,
    )


@app.command()
@taking(host_options, guest_options, repository_options)
def backup(
    common: Common, options: GuestSettings, repository: RepositorySettings, *,
    guests: Guests = None,
    all_guests: AllGuests = False,
    tag: Tags = None,
) -> None:
    """Make a snapshot of each guest in a repository, while the guest runs on or is shut off."""
    from stillframe.cli import backup as backup_command

    if bool(guests) == all_guests:
        raise typer.BadParameter("name the guests, or --all")
    for each in tag or []:
        if not is_tag(each):
            raise typer.BadParameter(f"{each!r} is no tag: no spaces, no commas, and 64 characters at most")
    tagged = msgspec.structs.replace(options, tags=tuple(tag) if tag else None)
    run_command(
        common, lambda session: backup_command.backup(session, guests or [], tagged), repository)


@app.command()
@taking(host_options, repository_options)
def doctor(
    common: Common, repository: RepositorySettings, *,
    guests: Guests = None,
    quiesce: QuiesceOption = None,
    overlay_dir: OverlayDir = None,
    exclude: Exclude = None,
) -> None:
    """Say whether guests can be captured, how, and what is in the way. Changes nothing."""
    from stillframe.cli import doctor as doctor_command

    options = GuestSettings(
        quiesce=quiesce, overlay_dir=overlay_dir, exclude=tuple(exclude) if exclude else None)
    run_command(
        common, lambda session: doctor_command.doctor(session, guests or [], options), repository)


@app.command()
@taking(host_options, repository_options)
def recover(
    common: Common, repository: RepositorySettings, *,
    guests: Guests = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, and do nothing")
    ] = False,
    repair_status: Annotated[
        bool, typer.Option(
            "--repair-status", help="with libvirtd stopped: mend libvirt's status file of the guests"),
    ] = False,
) -> None:
    """After any crash: find what was left, bring the guest back, say what was done."""
    from stillframe.cli import recover as recover_command

    if repair_status and not guests:
        raise typer.BadParameter("name the guests whose status file is to be mended")
    run_command(
        common,
        lambda session: recover_command.recover(
            session, guests or [], dry_run=dry_run, repair_status=repair_status
        ),
        repository,
    )


@app.command()
@taking(host_options, repository_options)
def boot(
    common: Common, repository: RepositorySettings, *,
    snapshot: Snapshot,
    name: Annotated[str | None, typer.Option("--as", help="the new guest's name")] = None,
    pool: Annotated[
        str | None,
        typer.Option("--pool", help="folder, or libvirt's pool, for what it writes (default: default)"),
    ] = None,
    network: Annotated[
        str | None, typer.Option("--network", help="put all interfaces on this network of libvirt")] = None,
    no_network: Annotated[bool, typer.Option("--no-network", help="leave all interfaces out")] = False,
    same_identity: Annotated[
        bool, typer.Option("--same-identity", help="keep UUID and MACs; the original must not be here"),
    ] = False,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="take what the host has instead of what it lacks")] = False,
    on_error: Annotated[
        OnError, typer.Option("--on-error", help="where the repository can't be read: pause the guest, or "
                                                 "report I/O errors to it")] = OnError.PAUSE,
    patience: Annotated[
        str, typer.Option(help="how long a read waits for a repository that can't be read")] = "60s",
    dry_run: DryRun = False,
) -> None:
    """Run a snapshot as a new guest at once: it reads from the repository what it did not write itself."""
    from stillframe.cli import boot as boot_command
    from stillframe.restore.boot_plan import BootWish
    from stillframe.restore.guest_plan import GuestWish

    if network and no_network:
        raise typer.BadParameter("choose one: --network or --no-network")
    if name is not None:
        check_name(name)
    guest = GuestWish(
        name or "", pool or "", format="qcow2", keeps_identity=same_identity,
        network="" if no_network else network, nearest=nearest)
    wish = BootWish(guest, on_error is OnError.PAUSE)
    run_command(
        common, lambda session: boot_command.boot(session, snapshot, wish, patience, dry_run=dry_run),
        repository)


@app.command()
@taking(host_options, repository_options)
def land(
    common: Common, repository: RepositorySettings, *,
    name: BootedName,
    pool: Annotated[
        str | None, typer.Option("--pool", help="folder, or libvirt's pool, that its images are to be in; "
                                                "else they stay where boot put them")] = None,
    format_: Annotated[
        Format | None, typer.Option("--format", help="--pool: what its images are to be (default qcow2)")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Bring a booted guest home while it runs: from then on it needs neither snapshot nor repository."""
    from stillframe.cli import boot as boot_command
    from stillframe.restore.land_plan import LandWish

    if format_ is not None and pool is None:
        raise typer.BadParameter("--format goes with --pool")
    wish = LandWish(pool or "", format_.value if format_ else "")
    run_command(common, lambda session: boot_command.land(session, name, wish, dry_run=dry_run), repository)


@app.command()
@taking(host_options)
def discard(common: Common, *, name: BootedName, dry_run: DryRun = False) -> None:
    """Throw a booted guest away, with everything that it wrote, and with nothing else."""
    from stillframe.cli import boot as boot_command

    run_command(common, lambda session: boot_command.discard(session, name, dry_run=dry_run))


@app.command()
@taking(host_options, repository_options)
def drill(
    common: Common, repository: RepositorySettings, *,
    snapshot: Annotated[
        str | None, typer.Argument(metavar="[SNAPSHOT]", help="a snapshot as for restore; or --all-latest")
    ] = None,
    all_latest: Annotated[
        bool, typer.Option("--all-latest", help="the newest snapshot of each guest of each host")] = False,
    script: Annotated[
        Path | None, typer.Option("--script", help="program on this host that must end with 0")] = None,
    check: Annotated[
        list[str] | None, typer.Option("--check", help="command in the guest, by its agent, that must end "
                                                       "with 0; may be repeated")] = None,
    expect: Annotated[
        str | None, typer.Option("--expect", help="regular expression that its first serial port must print")
    ] = None,
    timeout: Annotated[str | None, typer.Option(help="longest wait for the guest (default 10m)")] = None,
    check_timeout: Annotated[str, typer.Option(help="longest wait for a check, or for the script")] = "5m",
    network: Annotated[
        str | None, typer.Option("--network", help="isolated network of libvirt (else none)")] = None,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="take what the host has instead of what it lacks")] = False,
    screenshot: Annotated[
        Path | None, typer.Option("--screenshot", help="write the screen there, as PNG")] = None,
    dry_run: DryRun = False,
) -> None:
    """Boot a snapshot, apart from everything, and see that it works. What was found is written down."""
    from stillframe.cli import drill as drill_command

    if (snapshot is None) is not all_latest:
        raise typer.BadParameter("name a snapshot, or --all-latest")
    if script is not None and not (script.is_file() and os.access(script, os.X_OK)):
        raise typer.BadParameter(f"{script} is no program that could be run")
    if screenshot is not None and all_latest:
        raise typer.BadParameter("--screenshot goes with one snapshot (later: stillframe show --screenshot)")
    options = GuestSettings(
        drill_check=tuple(check) if check else None, drill_expect=expect, drill_timeout=timeout)
    order = drill_command.Order(
        snapshot, options, str(script.absolute()) if script else "", check_timeout, network or "", nearest,
        screenshot, dry_run)
    run_command(common, lambda session: drill_command.drill(session, order), repository)


@app.command()
@taking(host_options)
def settle(
    common: Common, *,
    guests: Guests = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, and do nothing")
    ] = False,
    past_limit: Annotated[
        bool, typer.Option("--past-limit", help="only where an overlay has grown past its limit: for timers")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="stay, and do so as soon as one has: for a service")
    ] = False,
    standing_limit: Annotated[
        str | None, typer.Option(help="that limit, as a size or a share of the disk (default 50%)")
    ] = None,
) -> None:
    """Bring guests that stand on overlays back onto their own images."""
    from stillframe.cli import settle as settle_command

    options = GuestSettings(standing_limit=standing_limit)
    if watch and (guests or dry_run):
        raise typer.BadParameter("--watch looks at all guests and goes with neither names nor --dry-run")
    run_command(
        common,
        lambda session: settle_command.watch(session, options) if watch else settle_command.settle_guests(
            session, guests or [], options, dry_run=dry_run, past=past_limit))


@app.command()
@taking(host_options)
def status(common: Common) -> None:
    """Show runs, leftovers, guests on overlays, the last mirror and the last snapshot of each guest."""
    from stillframe.cli import status as status_command

    run_command(common, status_command.status)


@_config.command()
@taking(plain_options)
def check(common: Common) -> None:
    """Say all that is wrong with the configuration file, by line; guests and repository are left alone."""
    from stillframe.cli import config_check

    run_command(common, config_check.check, settings_first=False)


app.add_typer(_config, name="config")
repository_app.add_to(app)
restore_app.add_to(app)
files_app.add_to(app)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> Any:
    """Run the command and end with its exit code. No traceback reaches a user."""
    code = _run()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(_LAST_WAIT_S)
            if thread.is_alive():
                # It hangs in a share that is dead, where nothing reaches it, and Python would wait for it for
                # ever. The command is over, the guest is back, and what is to be known is written down.
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
    sys.exit(code)


def _run() -> int:
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_OK if end.code is None else EXIT_USAGE
    except BrokenPipeError:
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130
    # The last resort: a bug still tells the user what to do. A panic of a library in Rust is no Exception.
    except BaseException as error:  # noqa: BLE001
        print(
            f"stillframe failed unexpectedly: {type(error).__name__}: {error}\n"
            "The state of the guest was not established.\n"
            "Next: stillframe recover, then report this (error internal; see docs/ERRORS.md)",
            file=sys.stderr,
        )
        return 1
    return EXIT_OK
