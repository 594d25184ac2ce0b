"""The error tree and docs/ERRORS.md say the same, and say enough."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import pytest

from stillframe import errors
from stillframe.errors import GuestState, StillframeError
from tests.style.sources import PACKAGE, ROOT, parsed, python_files

CATALOGUE = ROOT / "docs" / "ERRORS.md"
COMMANDS = {
    "mirror", "doctor", "recover", "status", "version", "init", "backup", "list", "show", "diff", "restore",
    "serve", "verify", "copy", "pin", "unpin", "forget", "prune", "key", "boot", "land", "discard", "files",
    "drill", "config",
}
#: Above this, a shell's own codes begin (126, 127, 128 + signal).
EXIT_CODE_MAX = 125


@dataclass(frozen=True)
class Entry:
    """What an entry of the catalogue says."""

    exit_code: int
    retry: bool
    cause: str
    safe: str
    next: str
    commands: tuple[str, ...]


def error_classes() -> list[type[StillframeError]]:
    """Return every class of the tree in stillframe.errors, the root first."""
    found = [StillframeError]
    for cls in found:
        found.extend(sub for sub in cls.__subclasses__() if sub.__module__.startswith(errors.__name__))
    return found


def success_codes() -> dict[str, int]:
    """Return the exit codes in stillframe.errors that stand for no error class, by name."""
    return {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def tree_problems(classes: list[type[StillframeError]], others: dict[str, int]) -> list[str]:
    """Return what is ambiguous or out of range among the codes of *classes* and the exit codes *others*."""
    problems: list[str] = []
    codes: set[str] = set()
    exit_codes = dict.fromkeys(others.values(), "a success")
    for cls in classes:
        if cls.code in codes:
            problems.append(f"{cls.__name__}: code {cls.code} is taken")
        if cls.exit_code in exit_codes:
            holder = exit_codes[cls.exit_code]
            problems.append(f"{cls.__name__}: exit code {cls.exit_code} is taken by {holder}")
        if not 1 <= cls.exit_code <= EXIT_CODE_MAX:
            problems.append(f"{cls.__name__}: exit code {cls.exit_code} is out of range")
        if not re.fullmatch(r"[a-z]+(-[a-z]+)*", cls.code):
            problems.append(f"{cls.__name__}: code {cls.code} can't be a heading")
        codes.add(cls.code)
        exit_codes[cls.exit_code] = cls.__name__
    return problems


def catalogue(text: str) -> dict[str, Entry]:
    """Return the entries of the catalogue *text* by code; ValueError for one that lacks a part."""
    entries: dict[str, Entry] = {}
    for match in re.finditer(r"^## ([a-z-]+)\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL):
        code, body = match.groups()
        parts = re.fullmatch(
            r"\nExit code (\d+)\. Retry: (yes|no)\.\n\n\*\*Cause\.\*\* (.+?)\n\n"
            r"\*\*Is the guest safe\?\*\* (.+?)\n\n\*\*Next\.\*\* (.+?)\n\n((?:    .+\n)+)\n?\Z",
            body, re.DOTALL,
        )
        if parts is None:
            raise ValueError(f"{code}: the entry lacks a part, or has them in another order")
        if code in entries:
            raise ValueError(f"{code}: there are two entries")
        number, retry, cause, safe, after, commands = parts.groups()
        lines = tuple(line.strip() for line in commands.splitlines() if line)
        entries[code] = Entry(int(number), retry == "yes", cause, safe, after, lines)
    return entries


def entry_problems(classes: list[type[StillframeError]], entries: dict[str, Entry]) -> list[str]:
    """Return where *entries* and the tree's *classes* say different things."""
    known = {cls.code: cls for cls in classes}
    problems = [f"{code}: no entry" for code in known if code not in entries]
    for code, entry in entries.items():
        cls = known.get(code)
        if cls is None:
            problems.append(f"{code}: no such error")
            continue
        if entry.exit_code != cls.exit_code:
            problems.append(f"{code}: exit code {entry.exit_code}, in the tree {cls.exit_code}")
        if entry.retry != cls.retry:
            problems.append(f"{code}: retry {entry.retry}, in the tree {cls.retry}")
        if cls.guest in {GuestState.UNTOUCHED, GuestState.SAFE} and not entry.safe.startswith("Yes"):
            problems.append(f"{code}: the guest is safe, the entry does not say so")
        if cls.guest is GuestState.UNKNOWN and entry.safe.startswith("Yes"):
            problems.append(f"{code}: the entry promises what the error does not know")
        problems.extend(
            f"{code}: `{line}` is no command of stillframe"
            for line in entry.commands
            if (words := line.split())[0] == "stillframe" and words[1] not in COMMANDS
        )
    return problems


def test_each_error_can_be_told_from_any_other() -> None:
    assert len(error_classes()) > 30
    assert tree_problems(error_classes(), success_codes()) == []


def test_the_exit_codes_of_success_are_different() -> None:
    codes = success_codes()
    assert len(codes) == len(set(codes.values())) >= 5


def test_each_error_has_an_entry_that_agrees_with_it() -> None:
    assert entry_problems(error_classes(), catalogue(CATALOGUE.read_text(encoding="utf-8"))) == []


def test_the_table_at_the_head_has_every_exit_code() -> None:
    head = CATALOGUE.read_text(encoding="utf-8").partition("\n## Exit codes\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| (\d+)(?: \u2013 (\d+))? \|", head, re.MULTILINE)
    ranges = [range(int(low), int(high or low) + 1) for low, high in rows]
    for code in [*success_codes().values(), *(cls.exit_code for cls in error_classes())]:
        assert sum(code in one for one in ranges) == 1, f"exit code {code}"


def test_links_within_the_catalogue_lead_somewhere() -> None:
    text = CATALOGUE.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(#([a-z-]+)\)", text)
    assert targets
    assert set(targets) <= set(catalogue(text))


def test_the_drawn_tree_shows_every_class() -> None:
    drawn = set(re.findall(r"\w+", errors.__doc__ or ""))
    assert [cls.__name__ for cls in error_classes() if cls.__name__ not in drawn] == []


def stray_errors(tree: ast.Module) -> list[str]:
    """Return the classes in *tree* that are made from an error of the tree, or from Exception itself."""
    names = {cls.__name__ for cls in error_classes()} | {"Exception", "BaseException"}
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).rpartition(".")[2] in names for base in node.bases)
    ]


def test_no_error_is_defined_outside_the_tree() -> None:
    assert [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in python_files(PACKAGE)
        if PACKAGE / "errors" not in path.parents
        for name in stray_errors(parsed(path))
    ] == []


def test_an_error_outside_the_tree_is_caught() -> None:
    assert stray_errors(ast.parse("class Mine(errors.Refused): ...")) == ["Mine"]
    assert stray_errors(ast.parse("class Mine(Exception): ...")) == ["Mine"]
    assert stray_errors(ast.parse("class Mine(Protocol): ...")) == []


def _class(code: str, exit_code: int, guest: GuestState = GuestState.UNKNOWN) -> type[StillframeError]:
    # No subclass of the real tree: it would turn up in it.
    body = {"code": code, "exit_code": exit_code, "guest": guest, "retry": False}
    made: type[StillframeError] = type("Made", (), body)
    return made


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([_class("a", 10), _class("a", 11)], "code a is taken"),
        ([_class("a", 10), _class("b", 10)], "exit code 10 is taken by Made"),
        ([_class("a", 3)], "taken by a success"),
        ([_class("a", 130)], "out of range"),
        ([_class("A b", 10)], "can't be a heading"),
    ],
)
def test_an_ambiguous_tree_is_caught(classes: list[type[StillframeError]], words: str) -> None:
    assert any(words in problem for problem in tree_problems(classes, {"EXIT_CRASH_CONSISTENT": 3}))


_GOOD = """\
## a-b

Exit code 10. Retry: no.

**Cause.** It broke.

**Is the guest safe?** Yes: untouched.

**Next.** Look.

    stillframe doctor GUEST
"""


def test_a_good_entry_is_read_and_passes() -> None:
    entries = catalogue(_GOOD)
    commands = ("stillframe doctor GUEST",)
    assert entries["a-b"] == Entry(10, False, "It broke.", "Yes: untouched.", "Look.", commands)
    assert entry_problems([_class("a-b", 10, GuestState.SAFE)], entries) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("a-b", "b-a", "a-b: no entry"),
        ("a-b", "b-a", "b-a: no such error"),
        ("code 10", "code 11", "in the tree 10"),
        ("Retry: no", "Retry: yes", "in the tree False"),
        ("Yes: untouched", "Perhaps", "does not say so"),
        ("doctor", "heal", "no command of stillframe"),
    ],
)
def test_an_entry_that_disagrees_is_caught(old: str, new: str, words: str) -> None:
    problems = entry_problems([_class("a-b", 10, GuestState.SAFE)], catalogue(_GOOD.replace(old, new)))
    assert any(words in problem for problem in problems)


def test_an_entry_that_promises_too_much_is_caught() -> None:
    problems = entry_problems([_class("a-b", 10, GuestState.UNKNOWN)], catalogue(_GOOD))
    assert problems == ["a-b: the entry promises what the error does not know"]


@pytest.mark.parametrize(
    "part", ["Exit code 10. ", "**Cause.** ", "**Is the guest safe?** ", "**Next.** ", "    stillframe"]
)
def test_an_entry_without_a_part_is_caught(part: str) -> None:
    with pytest.raises(ValueError, match="lacks a part"):
        catalogue(_GOOD.replace(part, ""))


def test_a_second_entry_is_caught() -> None:
    with pytest.raises(ValueError, match="two entries"):
        catalogue(_GOOD + "\n" + _GOOD)
