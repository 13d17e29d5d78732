"""Floors of the package: nothing imports upwards, and no modules import one another in a circle, not even lazily."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fastrerank

PACKAGE = Path(fastrerank.__file__).parent
FLOORS = (
    {"_cpu", "_cuda"},
    {"runtime"},
    {"checkpoints", "data"},
    {"ops"},
    {"inputs"},
    {"engine"},
    {"rerankers"},
    {"search"},
    {"evaluation"},
    {"integrations", "serve"},
    {"cli"},
    {"__init__", "__main__", "_moved"},
)
LEVEL = {folder: level for level, folders in enumerate(FLOORS) for folder in folders}
MODULES = {
    ".".join(("fastrerank", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py*")
    if path.suffix in (".py", ".pyi")
}


def imports(path: Path) -> set[str]:
    """The modules of the package that a module imports anywhere but for type checkers."""
    tree = ast.parse(path.read_text("utf-8"))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    hidden = {id(inner) for node in tests for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {name for name in found if name == "fastrerank" or name.startswith("fastrerank.")}


GRAPH = {name: imports(path) - {name} for name, path in MODULES.items() if path.suffix == ".py"}


def level(name: str) -> int:
    return LEVEL[name.split(".")[1] if "." in name else "__init__"]


def test_nothing_imports_upwards() -> None:
    upwards = {
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if level(other) > level(name) and not (level(name) == LEVEL["cli"] and other == "fastrerank")
    }
    assert not upwards


def test_no_modules_import_one_another() -> None:
    # The root holds names alone, and imports them when they are asked for.
    tuple(TopologicalSorter({name: others - {"fastrerank"} for name, others in GRAPH.items()}).static_order())
