"""The second half of the demo: three snapshots of the live guest, the middle one restored, one drilled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lab.dbguest import DbGuest, boot_and_check
from lab.show import Show
from stillframe.errors import EXIT_OK
from stillframe.units import duration_text, size_text

_SNAPSHOTS = 3
_ROWS_BETWEEN = 60
_CHECK = "sqlite3 /data/rows.db 'pragma integrity_check'"


class DemoFailed(RuntimeError):
    """The demo can't go on."""


def show_snapshots(
    show: Show, guest: DbGuest, place: Path, settings: Path, repository: tuple[str, Path | None],
) -> list[str]:
    """Show init, backups, list, verify, a restore and a drill; return what to say in the end.

    *repository* is an address, and a credentials file if it needs one. *place* is for files, *settings* the
    configuration file.
    """
    _init(show, place, settings, *repository)
    acknowledged = [_backup(show, guest, number) for number in range(_SNAPSHOTS)]
    snapshots = _list_and_verify(show)
    _read_what_changed(show, snapshots)
    image = place / "restored.img"
    show.step("Restore the middle one, boot it and let SQLite check the database")
    middle = str(snapshots[1]["name"])
    ran = show.run("stillframe", "restore", f"{middle}:vda", "--to", str(image))
    show.promise(ran.code == EXIT_OK, f"exit code {ran.code} after {duration_text(ran.seconds)}")
    check = boot_and_check(image, "raw")
    show.promise(check.integrity == "ok", f"pragma integrity_check: {check.integrity}")
    show.promise(check.whole, f"rows {check.first} to {check.last} are contiguous: {check.rows} of them")
    show.promise(acknowledged[1] <= check.last < acknowledged[2],
                 f"it ends with row {check.last}: {acknowledged[1]} were acknowledged before its freeze, "
                 f"{acknowledged[2]} before that of the next one")
    image.unlink()
    drilled = _drill(show, guest)
    return [
        (f"{_SNAPSHOTS} snapshots of the live guest take {size_text(_stored_bytes(show))}, "
        "encrypted; all of it was verified."),
        f"The middle one was restored and booted: {check.rows} rows, not one is missing.",
        drilled,
    ]


def _drill(show: Show, guest: DbGuest) -> str:
    """Drill the newest snapshot while the original writes on; return what to say in the end."""
    show.step("Drill the newest one: boot it apart from everything, and have its own database checked")
    before = guest.acknowledged()
    ran = show.run("stillframe", "drill", guest.name, "--check", _CHECK)
    show.promise(ran.code == EXIT_OK, f"exit code {ran.code} after {duration_text(ran.seconds)}; "
                                      f"the original wrote {guest.acknowledged() - before} rows meanwhile")
    show.run("stillframe", "list")
    last = json.loads(show.ask("stillframe", "show", guest.name, "--json").said)["last_drill"]
    show.promise(last["passed"] and last["checks"][0]["output"].strip() == "ok",
                 f"the repository says so: {'passed' if last['passed'] else 'failed'}, "
                 f"{last['checks'][0]['command']}: {last['checks'][0]['output'].strip()}")
    return (f"Drill report: the newest snapshot boots in {duration_text(last['boot_s'])} straight from the "
            f"repository, and its database is {last['checks'][0]['output'].strip()}.")


def _init(show: Show, place: Path, settings: Path, address: str, credentials: Path | None) -> None:
    show.step("Make a repository: many snapshots, deduplicated and encrypted")
    passphrase = place / "passphrase"
    passphrase.touch(0o600)
    passphrase.write_text("four words nobody guesses\n")
    named = {"passphrase_file": passphrase, **({"credentials_file": credentials} if credentials else {})}
    options = [word for name, file in named.items() for word in (f"--{name.replace('_', '-')}", str(file))]
    ran = show.run("stillframe", "init", address, *options)
    if ran.code != EXIT_OK:
        raise DemoFailed("the repository could not be made")
    with settings.open("a") as written:
        for name, value in {"repository": address, **named}.items():
            written.write(f'{name} = "{value}"\n')
    show.tell("All of it stands in the configuration file from now on, so that commands are short.")


def _backup(show: Show, guest: DbGuest, number: int) -> int:
    """Back the guest up; return the last row that was acknowledged before."""
    show.step(f"Back it up while it runs ({number + 1} of {_SNAPSHOTS})")
    before = guest.wait_more_rows(_ROWS_BETWEEN)
    ran = show.run("stillframe", "backup", guest.name)
    show.promise(ran.code == EXIT_OK, f"exit code {ran.code} after {duration_text(ran.seconds)}; "
                                      f"the guest wrote {guest.acknowledged() - before} rows meanwhile")
    return before


def _list_and_verify(show: Show) -> list[dict[str, object]]:
    show.step("List the snapshots, and verify every byte that is stored")
    show.run("stillframe", "list")
    snapshots: list[dict[str, object]] = json.loads(
        show.ask("stillframe", "list", "--json").said)["snapshots"]
    if len(snapshots) != _SNAPSHOTS:
        raise DemoFailed(f"there are {len(snapshots)} snapshots in the repository")
    ran = show.run("stillframe", "verify", "--level", "full")
    show.promise(ran.code == EXIT_OK, f"exit code {ran.code} after {duration_text(ran.seconds)}")
    ran = show.run("stillframe", "diff", str(snapshots[0]["name"]), str(snapshots[2]["name"]))
    show.promise(ran.code == EXIT_OK, "what changed is known from the trees; no data was read")
    return snapshots


def _read_what_changed(show: Show, snapshots: list[dict[str, object]]) -> None:
    show.step("Look at the last backup: it read only what changed since the one before")
    first, last = (_disk(show, str(snapshots[number]["name"])) for number in (0, -1))
    show.run("stillframe", "show", str(snapshots[-1]["name"]))
    show.promise(last["method"] == "bitmap" and int(last["read_bytes"]) * 2 < int(first["read_bytes"]),
                 f"{size_text(int(last['read_bytes']))} read; "
                 f"the first backup had read {size_text(int(first['read_bytes']))}")


def _disk(show: Show, snapshot: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        show.ask("stillframe", "show", snapshot, "--json").said)["snapshot"]["disks"][0]
    return found


def _stored_bytes(show: Show) -> int:
    plan = json.loads(show.ask("stillframe", "prune", "--dry-run", "--json").said)["plan"]
    return int(plan["repository_bytes"])
