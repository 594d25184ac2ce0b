"""All that is wrong with a configuration file, each with its line: not only the first thing.

Three depths: what it is made of (without that, there are no settings), what its values stand for, and
whether the files that it names are as they should be.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import stat
import tomllib
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from stillframe.config.lines import key_lines
from stillframe.config.settings import READERS, SECRETS, GuestSettings, RepositorySettings, Settings
from stillframe.errors import StillframeError
from stillframe.storage.access import read_credentials

_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
#: How people are told what a value must be.
_WORDS: Mapping[type, str] = {
    msgspec.inspect.StrType: "a text in quotes", msgspec.inspect.BoolType: "true or false",
    msgspec.inspect.IntType: "a whole number, 0 or more", msgspec.inspect.VarTupleType: "a list of texts"}
#: Where a key belongs that stands in a wrong place.
_PLACES = ((Settings, "above the first section"), (GuestSettings, "in [defaults] or [guests.NAME]"),
           (RepositorySettings, "in [copy]"))
_FILES = ("credentials_file", "passphrase_file", "key_file")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong, at a *line* of the file. A warning if the file may be used as it is."""

    line: int
    key: str
    message: str
    is_warning: bool = False

    @property
    def text(self) -> str:
        """What to tell people, behind the file's name."""
        named = f"{self.key}: " if self.key else ""
        return f"{self.line}: {'warning: ' if self.is_warning else ''}{named}{self.message}"


class File:
    """A configuration file whose text is TOML: from keys to lines. Raises TOMLDecodeError."""

    def __init__(self, text: str) -> None:
        self.table = tomllib.loads(text)
        self._text = text

    def problem(self, path: tuple[str, ...], message: str, *, is_warning: bool = False) -> Problem:
        """Return the problem at the line of the key *path*."""
        return Problem(self._lines.get(path, 1), ".".join(path), message, is_warning)

    def sections(self) -> Iterator[tuple[tuple[str, ...], Mapping[str, object]]]:
        """Yield each table that has settings, with its path."""
        guests = self.table.get("guests")
        named = guests if isinstance(guests, dict) else {}
        every = [((), self.table), *(((name,), self.table.get(name)) for name in ("copy", "defaults")),
                 *((("guests", name), table) for name, table in named.items())]
        yield from ((path, table) for path, table in every if isinstance(table, dict))

    @cached_property
    def _lines(self) -> Mapping[tuple[str, ...], int]:
        return key_lines(self._text)


def structure_problems(content: bytes) -> tuple[File | None, list[Problem]]:
    """Return the file, None if it is no TOML, and what stands between it and settings."""
    try:
        file = File(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return None, [Problem(line, "", "this is not text in UTF-8")]
    except tomllib.TOMLDecodeError as error:
        place = _PLACE.search(str(error))
        line = int(place[1]) if place and place[1] else content.count(b"\n") + (not content.endswith(b"\n"))
        return None, [Problem(line, "", _PLACE.sub("", str(error)))]
    return file, [*_of_struct(file, (), file.table, Settings), *_in_wrong_section(file)]


def all_problems(
    content: bytes, guests_of: Callable[[str], Collection[str] | None] = lambda _uri: None,
) -> list[Problem]:
    """Return all that is wrong with the file, by line.

    *guests_of* is asked which guests libvirt at an address knows, if any is named; None: it can't be asked.
    """
    file, problems = structure_problems(content)
    if file is None:
        return problems
    if not problems:
        problems = list(_guest_problems(file, msgspec.convert(file.table, Settings), guests_of))
    problems += [*_value_problems(file), *_secret_problems(file), *_place_problems(file)]
    return sorted(problems, key=lambda each: each.line)


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return words that name what of *known* was probably meant, "" if nothing is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; perhaps {near[0]} was meant" if near else ""


def type_words(wanted: typing.Any) -> str:
    """Return how people are told what a value of a field must be."""
    kind = msgspec.inspect.type_info(wanted)
    if isinstance(kind, msgspec.inspect.UnionType):  # with None, which no TOML can say
        kind = next(each for each in kind.types if not isinstance(each, msgspec.inspect.NoneType))
    if isinstance(kind, msgspec.inspect.EnumType):
        return f"one of {', '.join(each.value for each in kind.cls)}"
    item = kind.item_type if isinstance(kind, msgspec.inspect.VarTupleType) else None
    if isinstance(item, msgspec.inspect.Metadata):
        return f"a list of {(item.extra_json_schema or {})['description']}"
    return _WORDS[type(kind)]


def _of_struct(
    file: File, path: tuple[str, ...], value: object, struct: type[msgspec.Struct],
) -> Iterator[Problem]:
    """Yield what keeps *value* from being such a struct."""
    if not isinstance(value, dict):
        yield file.problem(path, f"must be a section: [{'.'.join(path)}]")
        return
    known = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for name, inner in value.items():
        at, wanted = (*path, name), known.get(name)
        if wanted is None:
            yield file.problem(at, f"no such key here{_belongs(name, struct)}")
        elif isinstance(wanted, type) and issubclass(wanted, msgspec.Struct):
            yield from _of_struct(file, at, inner, wanted)
        elif name == "guests":
            guests = inner if isinstance(inner, dict) else {}
            if not isinstance(inner, dict):
                yield file.problem(at, "must be sections: [guests.NAME]")
            for guest, section in guests.items():
                yield from _of_struct(file, (*at, guest), section, GuestSettings)
        else:
            yield from _of_type(file, at, inner, wanted)


def _of_type(file: File, path: tuple[str, ...], value: object, wanted: typing.Any) -> Iterator[Problem]:
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        # A text is shown only where it must be one of a few words: elsewhere, it may be a secret.
        words = type_words(wanted)
        got = f", not {value!r}" if words.startswith("one of") else ""
        yield file.problem(path, f"must be {words}{got}")


def _belongs(name: str, struct: type[msgspec.Struct]) -> str:
    places = [words for other, words in _PLACES if other is not struct and name in other.__struct_fields__]
    return f"; it belongs {places[0]}" if places else _nearest(name, struct.__struct_fields__)


def _in_wrong_section(file: File) -> Iterator[Problem]:
    defaults = file.table.get("defaults")
    if isinstance(defaults, dict) and defaults.get("exclude"):
        # A disk that one guest has and another has not: for the other it would be an error.
        yield file.problem(
            ("defaults", "exclude"), "exclude can't stand in [defaults], only in [guests.NAME]")


def _value_problems(file: File) -> Iterator[Problem]:
    for path, table in file.sections():
        for name, value in table.items():
            if name not in READERS or not isinstance(value, str):
                continue
            try:
                READERS[name](value)
            except ValueError as error:
                yield file.problem((*path, name), str(error))
            except StillframeError as error:
                yield file.problem((*path, name), f"{error.message} To do: {error.next_command}")


def _secret_problems(file: File) -> Iterator[Problem]:
    """Yield what is wrong with how many secrets are named."""
    for path, table in file.sections():
        named = [name for name in SECRETS if table.get(name)]
        for name in named[1:]:
            yield file.problem(
                (*path, name), f"one secret opens a repository, and {named[0]} names it already")
        if not path and "repository" in table and not named:
            yield file.problem(
                ("repository",), "nothing here says what opens it (passphrase_file, passphrase_command, "
                "key_file): a timer can't be asked", is_warning=True)


def _guest_problems(
    file: File, settings: Settings, guests_of: Callable[[str], Collection[str] | None],
) -> Iterator[Problem]:
    known = guests_of(settings.connect) if settings.guests else None
    for name in settings.guests if known is not None else ():
        if name not in (known or ()):
            yield file.problem(
                ("guests", name), f"libvirt knows no guest of that name{_nearest(name, known or ())}",
                is_warning=True)


def _place_problems(file: File) -> Iterator[Problem]:
    """Yield what is wrong with files, folders and programs that are named."""
    for path, table in file.sections():
        for name, value in table.items():
            if not isinstance(value, str):
                continue
            at = (*path, name)
            if name in _FILES:
                yield from _file_problems(file, at, Path(value))
            elif name == "overlay_dir" and not Path(value).is_dir():
                yield file.problem(at, f"there is no folder {value}", is_warning=True)
            elif name == "passphrase_command":
                yield from _command_problems(file, at, value)


def _file_problems(file: File, at: tuple[str, ...], named: Path) -> Iterator[Problem]:
    """Yield what is wrong with a file that holds a secret."""
    try:
        with named.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
        if at[-1] == "credentials_file":
            read_credentials(named)
    except OSError as error:
        yield file.problem(at, f"{named} can't be read: {error.strerror}")
        return
    except StillframeError as error:
        yield file.problem(at, error.message)
        return
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        all_may = bool(mode & stat.S_IRWXO)
        who = "every user of this host has" if all_may else "its group has"
        yield file.problem(at, f"{who} rights on {named}: chmod 600 {named}", is_warning=not all_may)


def _command_problems(file: File, at: tuple[str, ...], command: str) -> Iterator[Problem]:
    try:
        program = next(iter(shlex.split(command)), "")
    except ValueError as error:
        yield file.problem(at, f"can't be split into words: {error}")
        return
    if shutil.which(program) is None:
        yield file.problem(at, f"there is no program {program!r}")
