"""A module can be read in one sitting, a function fits a screen."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.style.sources import PACKAGE, functions, parsed, python_files

MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60


def long_functions(tree: ast.Module) -> list[str]:
    """Return "name: lines" for each function in *tree* that does not fit a screen."""
    sizes = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions(tree)]
    return [f"{name}: {lines} lines" for name, lines in sizes if lines > FUNCTION_LINES_MAX]


def is_long_module(path: Path) -> bool:
    """Return whether the file *path* has more lines than a module may have."""
    return len(path.read_text(encoding="utf-8").splitlines()) > MODULE_LINES_MAX


def test_no_module_is_too_long() -> None:
    assert [str(path) for path in python_files(PACKAGE) if is_long_module(path)] == []


def test_no_function_is_too_long() -> None:
    assert [
        f"{path.relative_to(PACKAGE)}: {long}"
        for path in python_files(PACKAGE)
        for long in long_functions(parsed(path))
    ] == []


def test_a_long_module_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("x = 1\n" * MODULE_LINES_MAX)
    assert not is_long_module(path)
    path.write_text("x = 1\n" * (MODULE_LINES_MAX + 1))
    assert is_long_module(path)


def test_a_long_function_is_caught() -> None:
    def source(lines: int) -> str:
        return "class C:\n    async def f(self):\n" + "        x = 1\n" * (lines - 1)

    assert long_functions(ast.parse(source(FUNCTION_LINES_MAX))) == []
    assert long_functions(ast.parse(source(FUNCTION_LINES_MAX + 1))) == [f"f: {FUNCTION_LINES_MAX + 1} lines"]
