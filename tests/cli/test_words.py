"""Messages, docstrings and pages name only options and keywords that exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from bench.run import app as bench_app
from fastrerank.cli import app
from fastrerank.rerankers import compat

ROOT = Path(__file__).resolve().parents[2]
STYLED = ("plots.py", "report.py")  # their strings are style sheets, where -- begins a variable
SOURCES = sorted(path for path in (ROOT / "fastrerank").rglob("*.py") if path.name not in STYLED)
PAGES = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
KEYWORD = re.compile(r"(?<![\w.$\[-])([a-z_][a-z0-9_]*)=(?![=~])")
# Options of other programs that texts name on their own, each with the program.
FOREIGN = {
    "--query-gpu": "nvidia-smi",
    "--format": "nvidia-smi",
    "--plat": "auditwheel",
    "--address": "ray",
    "--gpus": "docker",
    "--local-dir": "huggingface-cli",
    "--cuda": "gpu_unattended",
}
# Programs whose command lines are their own affair.
PROGRAMS = (
    "pip",
    "docker",
    "kubectl",
    "git",
    "make",
    "cmake",
    "ray",
    "curl",
    "pytest",
    "nvcc",
    "nvidia-smi",
    "serve",
    "taskset",
    "numactl",
    "auditwheel",
    "hf",
    "huggingface-cli",
    "perf",
    "sudo",
    "helm",
    "vllm",
    "text-embeddings-router",
)


def commands(group: object = None, name: str = "") -> Iterator[tuple[str, set[str]]]:
    """Each command's name and its options."""
    group = typer.main.get_command(app) if group is None else group
    yield name, {o for parameter in group.params for o in parameter.opts if o[0] == "-"} | {"--help"}
    for part, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {part}".strip())


COMMANDS = dict(commands())
ALL = set().union(*COMMANDS.values())


BENCH = set().union(*dict(commands(typer.main.get_command(bench_app))).values())  # of `python -m bench.run`


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string constant and docstring of a Python file, f-strings joined."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def spans(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of a page's code: lines of its blocks, and what is between backquotes."""
    block = False
    joined = ""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            block = not block
        elif block:
            joined += line.rstrip("\\")
            if not line.endswith("\\"):
                yield number, joined
                joined = ""
        else:
            yield from ((number, span) for span in re.findall(r"`([^`]+)`", line))


def words_of(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return text.split()


def wrong_options(text: str) -> list[str]:
    """Options in a piece of code that the command it calls does not have."""
    named = OPTION.findall(text)
    if not named:
        return []
    words = words_of(text)
    for place, word in enumerate(words):
        program = word.rsplit("/", 1)[-1]
        if program == "fastrerank" and place + 1 < len(words) and not words[place + 1].startswith("-"):
            known = next(
                (COMMANDS[name] for n in (2, 1) if (name := " ".join(words[place + 1 : place + 1 + n])) in COMMANDS),
                ALL,
            )
            return [option for option in OPTION.findall(text.split("fastrerank", 1)[1]) if option not in known]
        if program.startswith("bench."):
            return [option for option in named if option not in BENCH]
        if program in PROGRAMS:
            return []
        if program.startswith("-"):
            break
    return [option for option in named if option not in ALL | BENCH | FOREIGN.keys()]


def test_the_check_itself_finds_what_is_wrong() -> None:
    assert len(COMMANDS) > 12
    assert wrong_options("fastrerank rank q f.txt --model m --max-length 8") == []
    assert wrong_options("fastrerank doctor --model m") == ["--model"]
    assert wrong_options("--no-such-thing") == ["--no-such-thing"]
    assert wrong_options("pip install --no-deps x") == []
    assert wrong_keywords("load(model, methud='icr')", parameters()) == ["methud"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_names_options_that_exist(path: Path) -> None:
    wrong = [(number, option, text) for number, text in spans(path) for option in wrong_options(text)]
    assert wrong == []


def test_messages_and_docstrings_name_options_that_exist() -> None:
    wrong = []
    for path in SOURCES:
        for number, text in strings(path):
            pieces = (
                [text, *re.findall(r"`([^`]+)`", text)] if "fastrerank " not in text else re.findall(r"`([^`]+)`", text)
            )
            wrong += [
                (f"{path.relative_to(ROOT)}:{number}", option)
                for piece in pieces
                for option in wrong_options(piece if piece is not text else " ".join(OPTION.findall(text)))
            ]
    assert wrong == []


@cache
def parameters() -> set[str]:
    """Every parameter and field name of the package, and the keywords of other releases that it maps."""
    names = {
        "processing_kwargs",
        *compat._RENAMED,
        *compat._DICTIONARIES,
        *compat._WITHOUT_EFFECT,
        *compat._PREDICT_WITHOUT_EFFECT,
    }
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                arguments = node.args
                names |= {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def wrong_keywords(text: str, known: set[str]) -> list[str]:
    return [name for name in KEYWORD.findall(text) if name not in known]


def test_messages_name_keywords_that_exist() -> None:
    known = parameters()
    wrong = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    wrong += [
                        (f"{path.relative_to(ROOT)}:{part.lineno}", name) for name in wrong_keywords(part.value, known)
                    ]
    assert wrong == []


def calls(path: Path) -> Iterator[tuple[int, ast.Call]]:
    """Calls in a page's Python blocks and in its spans that are Python."""
    text = path.read_text("utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        line = text[: block.start()].count("\n") + 2
        yield from _calls(block[1], line)
    for number, span in spans(path):
        if "(" in span:
            yield from _calls(span, number)


def _calls(code: str, line: int) -> Iterator[tuple[int, ast.Call]]:
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield line + node.lineno - 1, node


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_s_calls_use_keywords_that_exist(path: Path) -> None:
    """Only calls of this package's functions are checked."""
    known = parameters()
    functions = {
        node.name
        for source in SOURCES
        for node in ast.walk(tree(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    wrong = []
    for number, call in calls(path):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in functions:
            wrong += [(number, name, k.arg) for k in call.keywords if k.arg is not None and k.arg not in known]
    assert wrong == []
