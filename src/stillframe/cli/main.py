"""The `stillframe` command: its options, and from errors to exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from stillframe import __version__
from stillframe.capture.states import Quiesce
from stillframe.cli import doctor as doctor_command
from stillframe.cli import mirror as mirror_command
from stillframe.cli import recover as recover_command
from stillframe.cli import status as status_command
from stillframe.cli.screen import error_body
from stillframe.cli.session import Common, Session
from stillframe.config import GuestSettings
from stillframe.errors import EXIT_USAGE, StillframeError

app = typer.Typer(
    name="stillframe", no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    help="Back up running libvirt/QEMU guests, live and safely.",
)

Connect = Annotated[
    str | None, typer.Option("--connect", "-c", help="libvirt's URI (default qemu:///system)")
]
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
Guests = Annotated[list[str] | None, typer.Argument(metavar="[GUEST]...", help="guests by name or UUID")]


@app.command()
def mirror(
    arguments: Annotated[
        list[str], typer.Argument(metavar="GUEST... DEST", help="guests (none with --all), then the folder")
    ],
    all_guests: Annotated[bool, typer.Option("--all", help="all running guests")] = False,
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
    verify_destination: Annotated[
        bool, typer.Option("--verify-destination", help="read the mirror and compare it, too")
    ] = False,
    freeze_timeout: Annotated[str | None, typer.Option(help="longest freeze (default 10s)")] = None,
    agent_timeout: Annotated[str | None, typer.Option(help="longest wait for the agent (default 5s)")] = None,
    shutdown_timeout: Annotated[
        str | None, typer.Option(help="longest wait for a shutdown (default 2m)")
    ] = None,
    commit_timeout: Annotated[
        str | None, typer.Option(help="longest wait for a commit to converge (default 1h)")
    ] = None,
    connect: Connect = None, state_dir: StateDir = None, config: Config = None,
    as_json: AsJson = False, quiet: Quiet = False,
) -> None:
    """Make and keep a plain image of each disk in DEST/GUEST, while the guest runs on."""
    options = GuestSettings(
        quiesce, overlay_dir, overlay_limit, min_free, freeze_timeout, agent_timeout,
        shutdown_timeout, commit_timeout, tuple(exclude) if exclude else None,
    )
    *guests, destination = arguments
    if bool(guests) == all_guests:
        raise typer.BadParameter("name the guests and then the folder, or --all and the folder")
    _run(
        Common(connect, state_dir, config, as_json, quiet),
        lambda session: mirror_command.mirror(
            session, guests, Path(destination), options, verify_destination
        ),
    )


@app.command()
def doctor(
    guests: Guests = None,
    quiesce: QuiesceOption = None,
    overlay_dir: OverlayDir = None,
    exclude: Exclude = None,
    connect: Connect = None, state_dir: StateDir = None, config: Config = None,
    as_json: AsJson = False, quiet: Quiet = False,
) -> None:
    """Say whether guests can be captured, how, and what is in the way. Changes nothing."""
    _run(
        Common(connect, state_dir, config, as_json, quiet),
        lambda session: doctor_command.doctor(session, guests or [], GuestSettings(
            quiesce=quiesce, overlay_dir=overlay_dir, exclude=tuple(exclude) if exclude else None)),
    )


@app.command()
def recover(
    guests: Guests = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, and do nothing")
    ] = False,
    repair_status: Annotated[
        bool, typer.Option(
            "--repair-status", help="with libvirtd stopped: mend libvirt's status file of the guests"),
    ] = False,
    connect: Connect = None, state_dir: StateDir = None, config: Config = None,
    as_json: AsJson = False, quiet: Quiet = False,
) -> None:
    """After any crash: find what was left, bring the guest back, say what was done."""
    if repair_status and not guests:
        raise typer.BadParameter("name the guests whose status file is to be mended")
    _run(
        Common(connect, state_dir, config, as_json, quiet),
        lambda session: recover_command.recover(
            session, guests or [], dry_run=dry_run, repair_status=repair_status
        ),
    )


@app.command()
def status(
    connect: Connect = None, state_dir: StateDir = None, config: Config = None,
    as_json: AsJson = False, quiet: Quiet = False,
) -> None:
    """Show runs, leftovers, guests on overlays, and the last good mirror of each guest."""
    _run(Common(connect, state_dir, config, as_json, quiet), status_command.status)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _run(common: Common, command: Callable[[Session], int]) -> None:
    session = Session(common)
    session.screen.start()
    try:
        session.check_settings()
        code = command(session)
    except StillframeError as error:
        session.screen.close()
        session.screen.json({"error": error_body(error)})
        session.screen.error(error)
        code = error.exit_code
    finally:
        session.screen.close()
    sys.exit(code)


def main() -> Any:
    """Run the command. No traceback reaches a user."""
    try:
        app()
    except SystemExit:
        raise
    except BrokenPipeError:
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 -- the last resort: a bug still tells the user what to do
        print(
            f"stillframe failed unexpectedly: {type(error).__name__}: {error}\n"
            "The state of the guest was not established.\n"
            "Next: stillframe recover, then report this (error internal; see docs/ERRORS.md)",
            file=sys.stderr,
        )
        sys.exit(1)
