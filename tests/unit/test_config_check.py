"""What `config check` finds in a configuration file, and at which lines."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stillframe import config
from stillframe.cli.main import app
from stillframe.config.check import all_problems
from stillframe.config.lines import key_lines
from stillframe.errors import ConfigInvalid

_MANY = """\
repository = "ftp://host/folder"
passphrase_file = "/nowhere/passphrase"
key_file = "/nowhere/key"
passphrase = "hunter2"

[defaults]
quiesce = "softly"
min_free = [
  "1G",
]
freeze_timeout = "0"
drill_expect = "("
keep_daily = -1
repository = "/srv/repository"
exclude = ["vdb"]
skip = "yes"
overlay_dir = "/nowhere/overlays"

[guests."d b"]
overlay_limit = "much"
keep_within = "3 parsecs"
drill_chek = ["true"]

[copy]
repository = "sftp://host"
limit_rate = "fast"

[default]
"""
_FOUND = [
    (1, "repository", "a kind of address that is not supported"),
    (2, "passphrase_file", "/nowhere/passphrase can't be read: No such file"),
    (3, "key_file", "one secret opens a repository, and passphrase_file names it already"),
    (3, "key_file", "/nowhere/key can't be read"),
    (4, "passphrase", "no such key here; perhaps passphrase_file was meant"),
    (7, "defaults.quiesce", "must be one of auto, agent, shutdown, none, not 'softly'"),
    (8, "defaults.min_free", "must be a text in quotes"),
    (11, "defaults.freeze_timeout", "it must be more than 0"),
    (12, "defaults.drill_expect", "no regular expression"),
    (13, "defaults.keep_daily", "must be a whole number, 0 or more"),
    (14, "defaults.repository", "no such key here; it belongs above the first section"),
    (15, "defaults.exclude", "can't stand in [defaults]"),
    (16, "defaults.skip", "must be true or false"),
    (17, "defaults.overlay_dir", "there is no folder /nowhere/overlays"),
    (20, "guests.d b.overlay_limit", "not a size: 'much'"),
    (21, "guests.d b.keep_within", "not a duration"),
    (22, "guests.d b.drill_chek", "perhaps drill_check was meant"),
    (25, "copy.repository", "not an address of a repository"),
    (26, "copy.limit_rate", "not a size: 'fast'"),
    (28, "default", "perhaps defaults was meant"),
]


def test_all_that_is_wrong_is_found_at_its_line() -> None:
    found = all_problems(_MANY.encode())
    assert [(each.line, each.key) for each in found] == [(line, key) for line, key, _ in _FOUND]
    for each, (_, _, words) in zip(found, _FOUND, strict=True):
        assert words in each.message, each
        assert "hunter2" not in each.text
    assert [each.key for each in found if each.is_warning] == ["defaults.overlay_dir"]


@pytest.mark.parametrize(("text", "line"), [
    (b"a = 1\na = 2\n", 2), (b"x = [\n1,\n", 2), (b"x = [\n1,", 2), (b"\n\n[guests\n", 3),
    (b"a = 1\n\xff\n", 2),
])
def test_what_is_no_toml_is_found_at_its_line(text: bytes, line: int) -> None:
    assert [each.line for each in all_problems(text)] == [line]


@pytest.mark.parametrize("address", [
    "sftp://u@host/srv?identity={}", "sftp://u@host/srv?known_hosts={}", "sftp://u@a..b/srv?identity={}",
    "s3://b/p?endpoint=http://{}:abc",
])
def test_an_address_that_can_reach_nothing(tmp_path: Path, address: str) -> None:
    lacking = str(tmp_path / "none") if address.startswith("sftp") else "host"
    text = f'repository = "{address.format(lacking)}"\nkey_file = "/nowhere/key"\n'
    found = [each for each in all_problems(text.encode()) if each.key == "repository"]
    assert [(each.line, each.is_warning) for each in found] == [(1, False)]
    assert "a..b" in address or lacking in found[0].message


def test_files_with_secrets_are_looked_at(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("username = me\nhunter2\n")
    text = f'repository = "/srv/r"\nkey_file = "{secret}"\ncredentials_file = "{secret}"\n'.encode()
    for mode, words, is_warning in ((0o644, "every user", False), (0o640, "its group", True)):
        secret.chmod(mode)
        found = {each.key: each for each in all_problems(text)}
        assert words in found["key_file"].message
        assert found["key_file"].is_warning is is_warning
        assert "Line 2 of the credentials file" in found["credentials_file"].message
        assert "hunter2" not in found["credentials_file"].text
    secret.chmod(0o600)
    secret.write_text("username = me\npassword = hunter2\n")
    assert all_problems(text) == []


def test_what_opens_the_repository_must_be_there_for_a_timer() -> None:
    (found,) = all_problems(b'repository = "/srv/r"\n')
    assert (found.line, found.is_warning) == (1, True)
    (found,) = all_problems(b'passphrase_command = "no-such-program --print"\nrepository = "/srv/r"\n')
    assert (found.line, found.is_warning) == (1, False)
    assert all_problems(b'passphrase_command = "cat /srv/p"\nrepository = "/srv/r"\n') == []


def test_guests_that_libvirt_does_not_know_are_warned_of() -> None:
    asked = []

    def known(uri: str) -> list[str]:
        asked.append(uri)
        return ["web", "database"]

    text = b'connect = "test:///default"\n[guests.web]\n[guests.databse]\n'
    (found,) = all_problems(text, known)
    assert (found.line, found.key, found.is_warning) == (3, "guests.databse", True)
    assert "perhaps database was meant" in found.message
    assert asked == ["test:///default"]
    assert all_problems(text, lambda _uri: None) == [], "libvirt could not be asked"


def test_the_command_tells_people_and_programs(tmp_path: Path) -> None:
    path = tmp_path / "stillframe.toml"
    path.write_text(_MANY)
    done = CliRunner().invoke(app, ["config", "check", "--config", str(path)])
    assert done.exit_code == ConfigInvalid.exit_code
    assert done.stdout.splitlines()[5].startswith(f"{path}:7: defaults.quiesce: ")
    assert done.stdout.splitlines()[-1] == f"{path}: {len(_FOUND) - 1} errors, 1 warnings"
    body = json.loads(CliRunner().invoke(app, ["config", "check", "--config", str(path), "--json"]).stdout)
    assert (body["file"], body["valid"], len(body["problems"])) == (str(path), False, len(_FOUND))
    assert body["problems"][5] == {
        "line": 7, "key": "defaults.quiesce", "is_warning": False,
        "message": "must be one of auto, agent, shutdown, none, not 'softly'"}
    path.write_text("[defaults]\nquiesce = 'agent'\n")
    done = CliRunner().invoke(app, ["config", "check", "--config", str(path)])
    assert (done.exit_code, done.stdout) == (0, f"{path}: all is well\n")
    done = CliRunner().invoke(app, ["config", "check", "--config", str(tmp_path / "absent")])
    assert done.exit_code == ConfigInvalid.exit_code


def test_every_command_says_the_first_and_counts_the_others(tmp_path: Path) -> None:
    path = tmp_path / "stillframe.toml"
    path.write_text(_MANY)
    done = CliRunner().invoke(app, ["list", "--config", str(path)])
    assert done.exit_code == ConfigInvalid.exit_code
    assert re.search(rf"{path}:4: passphrase: .* 8 more", done.stderr)
    assert f"stillframe config check --config {path}" in done.stderr


_TEXT = '''# a comment
a = 1
b.c = [ # with
  1,

  2]
[d]
"e.f" = """
[no.table]
g = 1
"""
h = { i = 1, j.k = 2 }
[[l]]
m = 1
[[l]]
m = 1
[d.n]
'''


def test_keys_and_their_lines() -> None:
    assert key_lines(_TEXT) == {
        ("a",): 2, ("b",): 3, ("b", "c"): 3, ("d",): 7, ("d", "e.f"): 8, ("d", "h"): 12, ("d", "h", "i"): 12,
        ("d", "h", "j"): 12, ("d", "h", "j", "k"): 12, ("l",): 13, ("l", "m"): 14, ("d", "n"): 17}


_NAMES = st.sampled_from(["a", "b", "c d", "é"])
_VALUES = st.sampled_from(["1", '"x = [1"', "'''\n[t]\n'''", "[\n1,\n\n2\n]", "{ y = 1 }"])


@given(st.lists(st.tuples(_NAMES, _VALUES, st.integers(0, 2)), max_size=6), _NAMES)
def test_each_key_is_found_where_it_was_written(keys: list[tuple[str, str, int]], table: str) -> None:
    wanted: dict[tuple[str, ...], int] = {(table,): 1}
    text = f'["{table}"]\n'
    for number, (name, value, blank) in enumerate(keys):
        text += "\n" * blank
        wanted[(table, f"{name}{number}")] = text.count("\n") + 1
        text += f'"{name}{number}" = {value}   # "[\n'
    assert tomllib.loads(text)
    assert {path: line for path, line in key_lines(text).items() if path[-1] != "y"} == wanted


def test_the_example_at_the_head_of_the_module_has_nothing_wrong_but_what_this_host_lacks() -> None:
    assert config.__doc__ is not None
    example = config.__doc__.split("\n\n", 1)[1]
    found = [each.message for each in all_problems(example.encode())]
    assert [each for each in found if "can't be read" not in each and "no folder" not in each] == []
