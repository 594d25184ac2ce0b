"""The pages say what the code does: links, commands, exit codes, settings, formats, names of tests."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from stillframe import errors
from stillframe.backup.run import BackupResult
from stillframe.backup.snapshot import DiskResult as BackedUpDisk
from stillframe.capture.journal import DiskRecord as JournalDisk
from stillframe.capture.journal import RunRecord
from stillframe.cli.main import app
from stillframe.config import DRILL_TIMEOUT_S, GuestSettings, RepositorySettings, Settings, for_guest
from stillframe.config.check import all_problems, type_words
from stillframe.config.settings import READERS
from stillframe.errors import StillframeError
from stillframe.mirror.record import DiskRecord, FolderState, MirrorRecord
from stillframe.mirror.run import MirrorResult
from stillframe.mirror.update import CopyResult
from stillframe.units import parse_size_bytes

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
GUIDE = ROOT / "docs" / "USER-GUIDE.md"
FORMAT = ROOT / "docs" / "FORMAT.md"
#: Where a command begins in a line of shell, and where its words end.
_CALL = re.compile(r"(?:^|[/=-]|[;&|] +|\broot +)stillframe +")
_END = re.compile(r"[;|&#`()<>]|\s(?:then|and)\s")


def commands() -> dict[str, set[str]]:
    """Return the options of each command of the application, by the command's name."""
    group: Any = typer.main.get_command(app)
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        below = getattr(command, "commands", None)
        named = {name: command} if below is None else {f"{name} {word}": each for word, each in below.items()}
        for whole, each in named.items():
            found[whole] = {
                option for parameter in each.params for option in parameter.opts if option.startswith("-")}
    return found


def prose_and_code(text: str) -> tuple[str, list[str]]:
    """Return *text* without its code, and the code: indented or fenced lines, and what is in backticks."""
    prose, code, fenced = [], [], False
    for line in text.splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            code.append(line.strip())
        else:
            code += re.findall(r"`([^`]+)`", line)
            prose.append(re.sub(r"`[^`]+`", "", line))
    return "\n".join(prose), code


def slug(heading: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page."""
    return {slug(found) for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def broken_links(page: Path, text: str) -> list[str]:
    """Return the relative links of the page that lead nowhere."""
    prose, _ = prose_and_code(text)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        to = page.parent / name if name else page
        there = to.exists() and (
            not anchor or anchor in anchors(text if to == page else to.read_text(encoding="utf-8")))
        if not there:
            broken.append(target)
    return broken


def wrong_commands(text: str, known: dict[str, set[str]]) -> list[str]:
    """Return the calls of stillframe in the page's code that the application does not have."""
    wrong = []
    for line in prose_and_code(text)[1]:
        for call in _CALL.finditer(line):
            words = _END.split(line[call.end():])[0].split()
            if not words:
                continue
            options = {word.partition("=")[0] for word in words[1:] if word.startswith("-")}
            name = words[0] if words[0] in known else " ".join(words[:2])
            if name not in known or not options <= known[name]:
                wrong.append(f"stillframe {' '.join(words)}")
    return wrong


def rows(text: str, header: str) -> list[list[str]]:
    """Return the cells of every table in *text* whose header row begins with *header*."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif inside:
            found.append(cells)
        elif cells[0] == header:
            inside = True
    return [cells for cells in found if not set(cells[0]) <= {"-"}]


def section(text: str, heading: str) -> str:
    """Return what stands under *heading*, up to the next heading of any level."""
    return text.partition(f"\n{heading}\n")[2].partition("\n#")[0]


def code_block(text: str, begins: str) -> str:
    """Return the indented block of *text* whose first line begins with *begins*."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"    {begins}"))
    block = itertools.takewhile(lambda line: not line or line.startswith("    "), lines[first:])
    return "\n".join(line[4:] for line in block)


def ticked(cells: list[str]) -> list[str]:
    """Return what is in backticks in the cells."""
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def tree() -> list[type[StillframeError]]:
    """Return every class of errors.py."""
    found = [StillframeError]
    for cls in found:
        found.extend(sub for sub in cls.__subclasses__() if sub.__module__.startswith(errors.__name__))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_caught() -> None:
    text = "# A b\n[a](#a-b) [b](#c) [c](README.md) [d](none.md) [e](https://x.y/z) `[f](g.md)`\n"
    assert broken_links(ROOT / "README.md", text) == ["#c", "none.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_as_they_are_written(page: Path) -> None:
    assert wrong_commands(page.read_text(encoding="utf-8"), commands()) == []


@pytest.mark.parametrize("call", ["stillframe heal GUEST", "x; .venv/bin/stillframe mirror --fast GUEST DEST",
                                  "stillframe status --dry-run"])
def test_a_command_that_does_not_exist_is_caught(call: str) -> None:
    assert len(wrong_commands(f"    {call}\n", commands())) == 1
    assert len(wrong_commands(f"Type `{call}`.\n", commands())) == 1


def test_the_guide_shows_every_command_and_every_option_and_no_other() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    known = commands()
    shown = {" ".join(re.findall(r"(?<= )[a-z]+", name))
             for name in ticked([cells[0] for cells in rows(text, "command")])}
    assert shown == set(known)
    general = {
        word.split()[0] for word in ticked([row[0] for row in rows(section(text, "## Commands"), "option")])
    }
    assert general == known["status"] - known["version"]
    of_repository = {word.split()[0] for word in ticked([row[0] for row in rows(text, "repository option")])}
    assert of_repository == known["key list"] - known["status"]
    for command in known.keys() - {"status", "version"}:
        below = section(text, f"### {command}")
        own = {word.split()[0] for word in ticked([row[0] for row in rows(below, "option")])}
        assert own == known[command] - known["status"] - of_repository, command


def test_exit_codes_are_those_of_the_error_tree() -> None:
    for page in PAGES:
        table = rows(page.read_text(encoding="utf-8"), "exit code")
        if not table:
            assert page != GUIDE
            continue
        shown = {(int(code), name.strip("`"), again) for code, name, _, again in table}
        expected = {(cls.exit_code, cls.code, "yes" if cls.retry else "no") for cls in tree()}
        expected |= {(code, "\u2013", "no" if code == errors.EXIT_USAGE else "\u2013")
                     for name, code in vars(errors).items() if name.startswith("EXIT_")}
        assert shown == expected
        assert [int(row[0]) for row in table] == sorted(int(row[0]) for row in table)


def test_settings_are_those_of_the_structs() -> None:
    table = rows(GUIDE.read_text(encoding="utf-8"), "key")
    structs: dict[str, type[msgspec.Struct]] = {
        "top": Settings, "copy": RepositorySettings, "section": GuestSettings}
    shown = {place: [(row[0].strip("`"), row[2]) for row in table if row[1] == place] for place in structs}
    assert shown == {place: [(field.name, _type_of(field)) for field in msgspec.structs.fields(struct)]
                     for place, struct in structs.items()}
    defaults = {row[0].strip("`"): row[3].strip("`") for row in table if row[1] == "section"}
    stated = {name: value for name, value in defaults.items() if value[:1].isdigit() and name in READERS}
    given = for_guest(Settings(), "web", GuestSettings())
    assert for_guest(Settings(), "web", GuestSettings(**{  # type: ignore[arg-type]
        name: value for name, value in stated.items() if name != "drill_timeout"})) == given
    assert READERS["drill_timeout"](stated["drill_timeout"]) == DRILL_TIMEOUT_S
    assert len(stated) == 8


def _type_of(field: msgspec.structs.FieldInfo) -> str:
    """Return what the guide calls the type of a key."""
    readers = {"repository": "address", "standing_limit": "size, or a share like `\"50%\"`",
               "drill_expect": "regular expression", "guests": "sections", "copy": "section",
               "defaults": "section", "tags": "list of words", "limit_rate": "size"}
    if field.name in readers:
        return readers[field.name]
    if field.name in READERS:
        return "size" if READERS[field.name] is parse_size_bytes else "time"
    words = type_words(field.type)
    if words.startswith("one of "):
        *others, last = words.removeprefix("one of ").split(", ")
        return f"{', '.join(f'`{each}`' for each in others)} or `{last}`"
    return {"a text in quotes": "text", "true or false": "true or false",
            "a whole number, 0 or more": "whole number", "a list of texts": "list of texts"}[words]


def test_the_example_of_a_configuration_is_valid() -> None:
    text = code_block(GUIDE.read_text(encoding="utf-8"), "connect = ")
    settings = msgspec.toml.decode(text, type=Settings)
    lacking = ("can't be read", "no folder")
    found = [each.text for each in all_problems(text.encode())]
    assert [each for each in found if not any(word in each for word in lacking)] == []
    assert for_guest(settings, "web", GuestSettings()).exclude == ("vdb",)


def _example(command: str) -> dict[str, Any]:
    text = GUIDE.read_text(encoding="utf-8")
    below = re.split(rf"\n`{command}`(?: \(.*\))?:\n", section(text, "## JSON"), maxsplit=1)[1]
    block = code_block(below, "{")
    found: dict[str, Any] = json.loads(block.replace("ERROR", "{}"))
    return found


def test_the_json_of_a_mirror_has_the_fields_that_are_shown() -> None:
    guest, failed = _example("mirror")["guests"]
    assert set(guest) == {field.name for field in fields(MirrorResult)} | {"ok", "fell_back"}
    assert set(guest["disks"][0]) == {field.name for field in fields(CopyResult)}
    assert set(failed) == {"guest", "ok", "error"}


def test_the_json_of_a_backup_has_the_fields_that_are_shown() -> None:
    guest, failed = _example("backup")["guests"]
    assert set(guest) == {field.name for field in fields(BackupResult)} | {"ok", "fell_back"}
    assert set(guest["disks"][0]) == {field.name for field in fields(BackedUpDisk)}
    assert set(failed) == {"guest", "ok", "error"}


@pytest.mark.parametrize(("command", "keys"), [
    ("list", {"repository", "snapshots", "drills"}), ("diff", {"old", "new", "disks"}),
    ("restore", {"snapshot", "whole", "files", "lost_files", "disks"}),
    ("config check", {"file", "valid", "problems"}),
    ("forget", {"dry_run", "kept", "dropped"}), ("prune", {"dry_run", "plan", "done"}),
    ("verify", {
        "level", "sound", "complete", "snapshots", "packs", "checked_packs", "checked_slots", "checked_bytes",
        "findings", "hurt", "healed", "unreadable"}),
    ("doctor", {"host", "guests"}), ("recover", {"dry_run", "guests", "drills", "restores"}),
    ("status", {
        "open_runs", "guests_on_overlays", "standing", "restoring", "restores", "mirrors", "snapshots",
        "libvirt_error", "repository_error"}),
])
def test_the_other_examples_are_json(command: str, keys: set[str]) -> None:
    assert set(_example(command)) == keys


def test_the_states_of_a_mirror_are_explained() -> None:
    cells = [row[0] for row in rows(GUIDE.read_text(encoding="utf-8"), "state of a mirror")]
    assert set(ticked(cells)) == {state.value for state in FolderState}


def test_the_fields_of_the_record_and_of_the_journal_are_described() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    record = section(text, "## mirror.json")
    assert set(ticked([row[0] for row in rows(record, "field")])) == set(MirrorRecord.__struct_fields__)
    of_disk = ticked([row[0] for row in rows(record, "field of a disk")])
    assert set(of_disk) == set(DiskRecord.__struct_fields__)
    journal = set(ticked(section(text, "## The journal").splitlines()))
    assert {*RunRecord.__struct_fields__, *JournalDisk.__struct_fields__} <= journal


def test_tests_that_are_named_exist() -> None:
    named = {
        name for page in PAGES
        for name in re.findall(r"tests/[\w/]+\.py(?:::\w+)?", page.read_text(encoding="utf-8"))
    }
    assert any("::" in name for name in named)
    for name in sorted(named):
        file, _, function = name.partition("::")
        assert (ROOT / file).exists(), name
        parsed = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)}
        assert not function or function in defined, name


def cells_without_a_test(text: str, collected: set[str]) -> list[str]:
    """Return the cells of the table of storage that no collected test has the row's storage for.

    *text* has the table and, below it, the one that names the tests of each cell.
    """
    shown = {row[0]: ticked(row[1:]) for row in rows(text, "cell")}
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| storage of the disk"))
    methods = [cell.strip() for cell in head.strip("|").split("|")][2:]
    wrong = []
    for name, storage, *cells in rows(text, "storage of the disk"):
        for method, cell in zip(methods, cells, strict=True):
            for word in [] if cell == "not tested" else cell.split(", "):
                tests = shown.get(f"{method}: {word}", [])
                have = {test for test in tests for node in collected
                        if node.startswith(f"{test}[") and storage.strip("`") in kinds_of(node)}
                if not tests or have != set(tests):
                    wrong.append(f"{name}, {method}: {word}")
    return wrong


def kinds_of(node: str) -> list[str]:
    """Return the kinds of storage in a test's parameters (tests/kinds.py)."""
    return re.split(r"[+\-]", node.partition("[")[2].rstrip("]"))


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Give every integration test there is, whatever it needs."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "tests/integration"],
        cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_each_cell_of_the_table_of_storage_has_its_test(collected: set[str]) -> None:
    text = section(GUIDE.read_text(encoding="utf-8"), "## Methods")
    assert len(rows(text, "storage of the disk")) > 6
    assert cells_without_a_test(text, collected) == []


def test_a_cell_without_a_test_is_caught(collected: set[str]) -> None:
    text = section(GUIDE.read_text(encoding="utf-8"), "## Methods")
    assert cells_without_a_test(text.replace("`NBD` | whole |", "`LV` | whole |"), collected)
    assert cells_without_a_test(text.replace("| whole beside, refused |", "| changed |", 1), collected) == [
        "raw file, `bitmap`: changed"]


def test_rooms_and_modules_that_are_named_exist() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "stillframe"
    named = {name for name in ticked(text.splitlines()) if re.fullmatch(r"(\w+/)?\w+\.py", name)}
    assert len(named) > 10
    known = {path.name for path in package.rglob("*.py")}
    assert [name for name in sorted(named)
            if not ((package / name).exists() or ("/" not in name and name in known))] == []
