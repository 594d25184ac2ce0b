"""Which line of a TOML file brings a key: neither tomllib nor msgspec says it, and tomlkit keeps no lines.

The text is cut into statements (a table's header, or a key with its value) by the parser itself: a statement
ends with the first line at which tomllib takes it, and each can be parsed on its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping

Path = tuple[str, ...]


def key_lines(text: str) -> Mapping[Path, int]:
    """Return the line, from 1, of each key and table of *text*, which is valid TOML. The first one counts."""
    found: dict[Path, int] = {}
    table: Path = ()
    statement, begins = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += f"{line}\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # its value goes on in the next line
        is_header = statement.lstrip().startswith("[")
        paths = [path if is_header else table + path for path in _paths(parsed)]
        for path in paths:
            found.setdefault(path, begins)
        if is_header:
            table = paths[-1]
        statement, begins = "", number + 1
    return found


def _paths(value: object) -> Iterator[Path]:
    """Yield the path of each key in a parsed value, the outer ones first. Places in a list are left out."""
    if isinstance(value, list):
        for each in value:
            yield from _paths(each)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield (name,)
            yield from ((name, *path) for path in _paths(inner))
