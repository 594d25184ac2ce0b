"""`stillframe restore`: its options, for each of the three ways back."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from stillframe.cli.options import host_options, repository_options, run_command, taking
from stillframe.cli.session import Common
from stillframe.config import RepositorySettings


class Format(enum.Enum):
    """What a disk is restored as."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True)
class GuestOptions:
    """The options of `restore` that are for a whole guest."""

    name: str | None = None
    pool: str = ""
    devices: Mapping[str, str] = field(default_factory=dict)
    keeps_identity: bool = False
    network: str | None = None
    nearest: bool = False
    starts: bool = False

    @property
    def is_asked_for(self) -> bool:
        """Whether a whole guest is wanted. Raises BadParameter for options that are of no use without."""
        if self.name is None and self != GuestOptions():
            raise typer.BadParameter("--pool, --disk, --same-identity, --network, --no-network, --nearest "
                                     "and --start go with --as NAME")
        return self.name is not None


def guest_restore_options(  # typer makes an option of each parameter
    as_: Annotated[
        str | None, typer.Option("--as", help="restore the whole guest as a new one of this name")] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", help="--as: folder or pool of libvirt for disks (else default)")
    ] = None,
    disk: Annotated[
        list[str] | None, typer.Option("--disk", help="--as: write a disk to a block device: vda=/dev/x")
    ] = None,
    same_identity: Annotated[
        bool, typer.Option("--same-identity", help="--as: keep the guest's UUID and MAC addresses")] = False,
    network: Annotated[
        str | None, typer.Option("--network", help="--as: put all interfaces on this network of libvirt")
    ] = None,
    no_network: Annotated[
        bool, typer.Option("--no-network", help="--as: leave all interfaces out")] = False,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="--as: take what the host has instead of what it lacks")
    ] = False,
    start: Annotated[bool, typer.Option("--start", help="--as: start the guest")] = False,
) -> GuestOptions:
    """Return how a whole guest is to be restored."""
    if as_ is not None:
        check_name(as_)
    if network is not None and no_network:
        raise typer.BadParameter("choose one: --network or --no-network")
    devices = {}
    for each in disk or ():
        target, _, path = each.partition("=")
        if not (target and path.startswith("/dev/")) or target in devices:
            raise typer.BadParameter(f"--disk is TARGET=DEVICE, each target once: vda=/dev/x, not {each}")
        devices[target] = path
    chosen_network = "" if no_network else network
    return GuestOptions(as_, pool or "", devices, same_identity, chosen_network, nearest, start)


@dataclass(frozen=True)
class InPlaceOptions:
    """The options of `restore` that are for a restore in place."""

    in_place: bool = False
    guest: str | None = None
    shutdown: bool = False
    shutdown_timeout: str | None = None
    backup_first: bool = True
    with_definition: bool = False
    read_all: bool = False

    @property
    def is_asked_for(self) -> bool:
        """Whether a restore in place is wanted. Raises BadParameter for options of no use without it."""
        if not self.in_place and self != InPlaceOptions():
            raise typer.BadParameter("--guest, --shutdown, --shutdown-timeout, --no-backup-first, "
                                     "--with-definition and --read-all go with --in-place")
        return self.in_place


def in_place_options(  # typer makes an option of each parameter
    in_place: Annotated[
        bool, typer.Option("--in-place", help="over the guest that is there; only what differs is written")
    ] = False,
    guest: Annotated[
        str | None, typer.Option("--guest", help="--in-place: not the snapshot's own guest, but this one")
    ] = None,
    shutdown: Annotated[
        bool, typer.Option("--shutdown", help="--in-place: ask a running guest to shut down first")] = False,
    shutdown_timeout: Annotated[
        str | None, typer.Option("--shutdown-timeout", help="--in-place: longest wait for that (default 2m)")
    ] = None,
    backup_first: Annotated[
        bool, typer.Option("--backup-first/--no-backup-first",
                           help="--in-place: back the present state up before it is overwritten")] = True,
    with_definition: Annotated[
        bool, typer.Option("--with-definition", help="--in-place: the guest's definition, too")] = False,
    read_all: Annotated[
        bool, typer.Option("--read-all", help="--in-place: believe no bitmap, compare all of each disk")
    ] = False,
) -> InPlaceOptions:
    """Return how a guest is to be restored in place."""
    return InPlaceOptions(
        in_place, guest, shutdown, shutdown_timeout, backup_first, with_definition, read_all)


def add_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(restore)


@taking(host_options, repository_options, guest_restore_options, in_place_options)
def restore(
    common: Common, repository: RepositorySettings, guest: GuestOptions, in_place: InPlaceOptions, *,
    snapshot: Annotated[
        str, typer.Argument(metavar="SNAPSHOT[:DISK]", help="a snapshot, and one disk of it if not all")],
    to: Annotated[
        str | None,
        typer.Option("--to", help="file or block device; a folder for a snapshot with several disks")] = None,
    format_: Annotated[
        Format | None, typer.Option("--format", help="else raw, or qcow2 if PATH ends so")] = None,
    delta: Annotated[
        bool, typer.Option("--delta", help="--to: write only what differs into an image that is there")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="overwrite what is there; --in-place: cut the guest's power")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="go on where data is lost, and name each lost range")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="--as, --in-place: say what would be done, and do nothing")
    ] = False,
) -> None:
    """Write a snapshot's disks back (--to), the whole guest as a new one (--as), or over it (--in-place)."""
    if [to is not None, guest.is_asked_for, in_place.is_asked_for].count(True) != 1:
        raise typer.BadParameter("say what is to be restored to: --to PATH, --as NAME for a new guest, or "
                                 "--in-place for the one that is there; one of them")
    if delta and to is None:
        raise typer.BadParameter("--delta goes with --to")
    if dry_run and to is not None:
        raise typer.BadParameter("--dry-run does not go with --to")
    if format_ is not None and in_place.is_asked_for:
        raise typer.BadParameter("--format does not go with --in-place")
    image_format = format_.value if format_ else ""
    if to is not None:
        from stillframe.cli import restore as restore_command

        # Path would drop the slash by which a folder is told from a file.
        wish = restore_command.Wish(
            snapshot, Path(to).absolute(), to.endswith("/"), image_format, delta, force, skip_bad)
        run_command(common, lambda session: restore_command.restore(session, wish), repository)
    elif guest.is_asked_for:
        from stillframe.cli import restore_guest as guest_command

        new = guest_command.Order(snapshot, guest, image_format, force, skip_bad, dry_run)
        run_command(common, lambda session: guest_command.restore_guest(session, new), repository)
    else:
        from stillframe.cli import restore_in_place as in_place_command

        over = in_place_command.Order(snapshot, in_place, force, skip_bad, dry_run)
        run_command(common, lambda session: in_place_command.restore_over(session, over), repository)


def check_name(name: str) -> None:
    """Raise BadParameter if no guest can be called *name*."""
    if not name or "/" in name or name.startswith(".") or not name.isprintable():
        raise typer.BadParameter(f"{name!r} can't be a guest's name")
