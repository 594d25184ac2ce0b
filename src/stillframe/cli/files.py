"""`stillframe files`: files and folders of a snapshot, listed and taken out; nothing is mounted here."""

from __future__ import annotations

import contextlib
import shutil
import stat
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec

from stillframe.cli.restore import chosen_disks, split_name
from stillframe.cli.secret import ask_disk_key, read_disk_key
from stillframe.cli.session import Session
from stillframe.cli.snapshots import find, name_body
from stillframe.errors import EXIT_OK, GuestState, StillframeError, TargetExists
from stillframe.repository.catalog import display_name
from stillframe.repository.held import held_snapshot
from stillframe.repository.layout import SnapshotName
from stillframe.restore.appliance import Appliance, Person, started
from stillframe.restore.appliance_wire import Begun, Entry, FileSystem, Found, Listed, Task
from stillframe.restore.archive import Rules, check_absent, hand_on, tar_file, unpacking
from stillframe.restore.export_order import order_for
from stillframe.units import MIB, size_text

_TRIES = 3
_ROOT_NAME = "root"


@dataclass(frozen=True)
class Wish:
    """Which files of which disks. *name* is SNAPSHOT or SNAPSHOT:DISK; *filesystem* a device, or ""."""

    name: str
    paths: tuple[str, ...]
    filesystem: str
    key_files: tuple[Path, ...]
    patience_s: float


def list_files(session: Session, wish: Wish, *, long: bool, recursive: bool) -> int:
    """List the paths, or the file systems if there are none; return the exit code."""
    if not wish.paths:
        return _list_filesystems(session, wish)
    entries: list[Entry] = []
    headed = recursive or len(wish.paths) > 1
    task = _task(session, wish, "list", recursive=recursive)
    with _appliance(session, wish) as (name, appliance):
        for answer in appliance.ask(task):
            if isinstance(answer, Listed):
                _show(session, answer, long=long, headed=headed)
                entries += answer.entries if session.screen.as_json else ()
    session.screen.json({"snapshot": name_body(name), "entries": [_entry_body(entry) for entry in entries]})
    return EXIT_OK


def cat(session: Session, wish: Wish) -> int:
    """Print the content of files; return the exit code."""
    task = _task(session, wish, "cat")
    with _appliance(session, wish) as (_, appliance):
        for answer in appliance.ask(task):
            if isinstance(answer, Begun):
                shutil.copyfileobj(appliance.data(), sys.stdout.buffer, MIB)
    sys.stdout.buffer.flush()
    return EXIT_OK


def get(session: Session, wish: Wish, to: str) -> int:
    """Take files and folders out, into a folder, a tar file or (-) to stdout; return the exit code."""
    unpacked = to != "-" and not to.endswith(".tar")
    names: list[str] = []
    target = Path(to).absolute()
    _check_place(to, target, wish, unpacked=unpacked)
    rules, task = Rules(unpacked), _task(session, wish, "get")
    with (
        _appliance(session, wish) as (name, appliance),
        _sink(to, target, names, unpacked=unpacked) as sink,
        tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for answer in appliance.ask(task):
            if isinstance(answer, Begun):
                names.append(_new_name(answer.path, names, target if unpacked else None))
                report = _reporter(session, answer, rules)
                hand_on(appliance.data(), names[-1], archive, rules, report)
    for left_out in rules.left_out:
        session.screen.warn(f"{left_out} is a device, a socket or a pipe: left out (a .tar has it)")
    if to != "-":
        session.screen.result(f"{target}: {', '.join(names)}: {rules.members} files and folders, "
                              f"{size_text(rules.content_bytes)}")
    session.screen.json({
        "snapshot": name_body(name), "to": str(target), "names": names, "members": rules.members,
        "content_bytes": rules.content_bytes, "left_out": rules.left_out})
    return EXIT_OK


@contextlib.contextmanager
def _appliance(session: Session, wish: Wish) -> Iterator[tuple[SnapshotName, Appliance]]:
    """Give the snapshot that is wished, and an appliance with its disks."""
    text, target = split_name(wish.name)
    name = find(session, text)
    session.kept = "The repository is as it was."
    with held_snapshot(session.repository, name, session.clock, session.host) as manifest:
        disks = chosen_disks(manifest, target, display_name(name))
        orders = [order_for(session.repository, disk.target, disk) for disk in disks]
        with (
            session.signals_as_stop("what is not whole is removed"),
            started(orders, _person(session), session.clock, wish.patience_s) as appliance,
        ):
            yield name, appliance


def _task(session: Session, wish: Wish, verb: str, *, recursive: bool = False) -> Task:
    keys = tuple(read_disk_key(path, session.screen) for path in wish.key_files)
    return Task(verb, wish.paths, wish.filesystem, keys, recursive)


def _person(session: Session) -> Person:
    tries = dict[str, int]()

    def ask(device: str, wrong: bool) -> str | None:
        if wrong:
            session.screen.warn(f"that does not open {device}")
        tries[device] = tries.get(device, 0) + 1
        return ask_disk_key(device, session.screen) if tries[device] <= _TRIES else None

    def stop() -> StillframeError | None:
        error = session.stop()
        if error is not None:
            error.guest = GuestState.UNTOUCHED
        return error

    return Person(session.screen.say, session.screen.warn, ask if sys.stdin.isatty() else None, stop)


def _list_filesystems(session: Session, wish: Wish) -> int:
    found = Found((), ())
    task = _task(session, wish, "filesystems")
    with _appliance(session, wish) as (name, appliance):
        for answer in appliance.ask(task):
            if isinstance(answer, Found):
                found = answer
    for system in found.systems:
        session.screen.result(f"operating system: {system}")
    for each in found.filesystems:
        session.screen.result(_filesystem_line(each))
    session.screen.json({
        "snapshot": name_body(name), "systems": list(found.systems),
        "filesystems": [msgspec.to_builtins(each) for each in found.filesystems]})
    return EXIT_OK


def _filesystem_line(each: FileSystem) -> str:
    words = [f"{each.device:20} {each.disk or '-':6} {each.type:12} {size_text(each.size_bytes):>10}"]
    words += [each.label] if each.label else []
    words += [f"mounted at {each.mounted_at}"] if each.mounted_at else []
    return _plain("  ".join(words))


def _show(session: Session, listed: Listed, *, long: bool, headed: bool) -> None:
    if headed and listed.folder:
        session.screen.result(_plain(f"{listed.folder}:"))
    for entry in listed.entries:
        shown = PurePosixPath(entry.path).name or entry.path
        session.screen.result(_plain(_long_line(entry, shown) if long else shown))


def _long_line(entry: Entry, shown: str) -> str:
    if not entry.mode:
        return f"{'?':>10} {shown}"
    modified = datetime.fromtimestamp(entry.modified_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    facts = f"{stat.filemode(entry.mode)} {entry.uid:>6} {entry.gid:>6} {entry.size_bytes:>12} {modified}"
    return f"{facts} {shown}" + (f" -> {entry.links_to}" if entry.links_to else "")


def _plain(text: str) -> str:
    """Return what a guest named without what a terminal would obey."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode()
                   for each in text)


def _entry_body(entry: Entry) -> dict[str, object]:
    known = bool(entry.mode)
    return {"path": entry.path, "known": known, "kind": stat.filemode(entry.mode)[0] if known else "?",
            "mode": stat.S_IMODE(entry.mode), "uid": entry.uid, "gid": entry.gid,
            "size_bytes": entry.size_bytes, "modified_ns": entry.modified_ns, "links_to": entry.links_to}


def _check_place(to: str, target: Path, wish: Wish, *, unpacked: bool) -> None:
    """Refuse, before anything is started, a place that is taken. Raises TargetExists."""
    if to == "-":
        if sys.stdout.isatty():
            raise TargetExists("A tar archive would be written to the terminal.", "add: | tar -t")
    elif unpacked:
        for path in wish.paths:
            check_absent(target / (PurePosixPath(path).name or _ROOT_NAME))
    else:
        check_absent(target)


def _new_name(path: str, names: Sequence[str], folder: Path | None) -> str:
    """Return what a path is called where it is put. Raises TargetExists."""
    name = PurePosixPath(path).name or _ROOT_NAME
    if name in names:
        raise TargetExists(f"Two of the paths are called {name}.", "get them one at a time")
    if folder is not None:
        check_absent(folder / name)
    return name


@contextlib.contextmanager
def _sink(to: str, target: Path, names: list[str], *, unpacked: bool) -> Iterator[IO[bytes]]:
    if to == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with unpacking(target, names) if unpacked else tar_file(target) as file:
        yield file


def _reporter(session: Session, begun: Begun, rules: Rules) -> Callable[[], None]:
    """Return who draws how far it is: how much a folder holds is not known before."""
    before = rules.content_bytes

    def report() -> None:
        done = rules.content_bytes - before
        session.screen.bar(f"{begun.path}: get", done, begun.size_bytes)

    return report
