"""Imports inside functions, which no test on a CPU may run, name what exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for folder in ("fastrerank", "bench", "examples", "deploy") for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of each import of our own packages, wherever it stands in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("fastrerank", "bench"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_what_a_file_imports_of_ours_exists(path: Path) -> None:
    for module, name in imports(path):
        if module == "fastrerank._cuda" or name == "_cuda":  # compiled with CUDA only
            continue
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            if error.name is None or error.name.split(".")[0] in ("fastrerank", "bench"):
                raise
            continue  # a package that an adapter needs
        assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module} has no {name}"
