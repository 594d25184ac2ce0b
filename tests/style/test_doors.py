"""Time, other programs and the environment are reached through one door each.

What is found is a name's meaning, not its spelling: `import time as t; t.sleep` and
`from time import sleep` are the same thing. A mention is enough, a call is not needed:
`default_factory=time.monotonic` walks past the door as well.
"""

from __future__ import annotations

import ast

import pytest

from tests.style.sources import PACKAGE, parsed, python_files

#: What may be named only in some files (paths in src/stillframe; a trailing slash means a folder).
#: An entry also covers everything below it: `subprocess` covers `subprocess.run`.
DOORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "subprocess", "multiprocessing", "pty.spawn", "os.system", "os.popen", "os.fork", "os.forkpty",
            "os.posix_spawn", "os.posix_spawnp", "asyncio.create_subprocess_exec",
            "asyncio.create_subprocess_shell",
            *(f"os.exec{form}" for form in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
            *(f"os.spawn{form}" for form in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
        ),
        ("process.py",),
    ),
    **dict.fromkeys(
        (
            "time.time", "time.time_ns", "time.sleep", "time.monotonic", "time.monotonic_ns",
            "time.perf_counter", "time.perf_counter_ns", "time.localtime", "time.gmtime",
            "time.clock_gettime", "datetime.datetime.now", "datetime.datetime.utcnow",
            "datetime.datetime.today", "datetime.date.today",
        ),
        ("clock.py",),
    ),
    # process.py passes the environment on to the programs it starts; it reads nothing from it.
    **dict.fromkeys(
        ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"),
        ("process.py", "config.py", "config/"),
    ),
}


def door_breaches(tree: ast.Module, relative: str) -> list[str]:
    """Return "line: name" for each thing that *tree*, the file *relative*, must not name."""
    meanings = _imported(tree)
    found: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        for name in _named(node, meanings):
            door = _door_of(name)
            if door is not None and not _is_in(relative, DOORS[door]):
                found.add((getattr(node, "lineno", 0), door))
    return [f"{line}: {door}" for line, door in sorted(found)]


def _imported(tree: ast.Module) -> dict[str, str]:
    """Return what each imported name in *tree* stands for, as a full dotted name."""
    meanings: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                meanings[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                meanings[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return meanings


def _named(node: ast.AST, meanings: dict[str, str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Name):
        return [meanings[node.id]] if node.id in meanings else []
    parts: list[str] = []
    inner: ast.AST = node
    while isinstance(inner, ast.Attribute):
        parts.insert(0, inner.attr)
        inner = inner.value
    if parts and isinstance(inner, ast.Name) and inner.id in meanings:
        return [".".join([meanings[inner.id], *parts])]
    return []


def _door_of(name: str) -> str | None:
    return next((door for door in DOORS if name == door or name.startswith(f"{door}.")), None)


def _is_in(relative: str, places: tuple[str, ...]) -> bool:
    return any(relative.startswith(place) if place.endswith("/") else relative == place for place in places)


def test_only_the_doors_name_what_is_behind_them() -> None:
    breaches = [
        f"{path.relative_to(PACKAGE)}:{breach}"
        for path in python_files(PACKAGE)
        for breach in door_breaches(parsed(path), str(path.relative_to(PACKAGE)))
    ]
    assert breaches == []


@pytest.mark.parametrize("door", ["process.py", "clock.py"])
def test_each_door_is_in_use(door: str) -> None:
    # A renamed door would leave the rule above without a place where it is allowed.
    assert door_breaches(parsed(PACKAGE / door), "elsewhere.py") != []
    assert door_breaches(parsed(PACKAGE / door), door) == []


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "import subprocess as quietly",
        "from subprocess import run",
        "import os\nos.system('true')",
        "from os import popen as p",
        "import time\ntime.sleep(1)",
        "import time as t\nnow = t.time()",
        "from time import monotonic",
        "import time\nfield(default_factory=time.monotonic)",
        "from datetime import datetime\ndatetime.now()",
        "import datetime as dt\ndt.datetime.now(dt.UTC)",
        "from datetime import date\ndate.today()",
        "import os\nos.environ['HOME']",
        "import os\ndef f():\n    return os.environ.get('HOME')",
        "from os import environ",
        "import os\nos.getenv('HOME')",
        "def f():\n    import time\n    time.sleep(1)",
        "import os\nos.execvp('sh', ['sh'])",
    ],
)
def test_a_way_around_a_door_is_caught(source: str) -> None:
    assert door_breaches(ast.parse(source), "capture/run.py") != []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.replace('a', 'b')",
        "from datetime import datetime\ndatetime.fromisoformat('2024-01-01')",
        "class C:\n    time = 1\nC.time",
        "def f(clock):\n    clock.time.sleep(1)",
        "import time\ntime.struct_time",
    ],
)
def test_what_is_allowed_is_not_caught(source: str) -> None:
    assert door_breaches(ast.parse(source), "capture/run.py") == []
