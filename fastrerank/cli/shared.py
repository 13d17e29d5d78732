"""What the commands share: options, loading, progress, and how results are printed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastrerank.inputs.prompts.attention_policy import parse_heads
from fastrerank.rerankers.registry import find_method, list_methods

_NUMBER = re.compile(r"|-|[-+]?(\d[\d.,]*(e[-+]?\d+)?|nan|inf)( ?%)?")  # an empty cell too


class Dtype(str, Enum):
    """Precisions that --dtype takes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


class Engine(str, Enum):
    """What --engine takes."""

    native = "native"
    torch = "torch"
    padded = "padded"


def _method(value: str | None) -> str | None:
    try:
        if value is not None:
            find_method(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a method; one of {', '.join(list_methods())}") from None
    return value


def _label(value: str | None) -> Any:
    """The label's number if the value is digits, else its name."""
    return int(value) if value is not None and value.isascii() and value.isdigit() else value


def _device(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is not a device; one of cpu, cuda, cuda:<number>")
    return value


# Panels of --help.
MODEL, COMPUTING, DATA, OUTPUT = "Model", "Computing", "Data", "Output"
FOUND = "found from the checkpoint"


def option(panel: str, metavar: str | None, text: str, *names: str, **more: Any) -> Any:
    """An option of a panel of --help; without a metavar a flag. `names` and `more` are those of `typer.Option`."""
    return typer.Option(*names, rich_help_panel=panel, metavar=metavar, help=text, **more)


Model = Annotated[
    str | None, option(MODEL, "CHECKPOINT", "Hugging Face id or local folder of the checkpoint (required).")
]
Method = Annotated[
    str | None,
    option(
        MODEL, "METHOD", f"How documents are ranked: {', '.join(list_methods())}.", callback=_method, show_default=FOUND
    ),
]
TemplateOption = Annotated[
    str | None,
    option(
        MODEL,
        "NAME",
        "Prompt of a language model: a published one's name, or a TOML file.",
        "--template",
        show_default=FOUND,
    ),
]
Instruction = Annotated[
    str | None, option(MODEL, "TEXT", "Instruction of the prompt.", show_default="the prompt's own")
]
HeadsOption = Annotated[
    str | None,
    option(
        MODEL,
        "HEADS",
        "Heads to read: 13-18,14-31, a published list's name, or a file of `fastrerank heads`.",
        "--heads",
    ),
]
LabelOption = Annotated[
    str | None,
    option(
        MODEL,
        "LABEL",
        "The label that ranks where the head has several, by name or number.",
        "--label",
        callback=_label,
        show_default="the one whose name tells it",
    ),
]
MaxLength = Annotated[
    int | None,
    option(
        MODEL,
        "TOKENS",
        "Tokens of a query and a document together; longer documents are cut.",
        "--max-length",
        min=1,
        show_default="the checkpoint's limit",
    ),
]
EngineOption = Annotated[
    Engine | None,
    option(
        COMPUTING,
        "ENGINE",
        "What computes: native (C++, on CPUs), torch (packed) or padded (torch, any model).",
        "--engine",
        show_default="the fastest that runs the model",
    ),
]
DtypeOption = Annotated[
    Dtype,
    option(
        COMPUTING,
        "DTYPE",
        f"Precision: {', '.join(one.value for one in Dtype)}; auto is float32 on a CPU and bfloat16 on a GPU.",
    ),
]
Device = Annotated[
    str | None,
    option(
        COMPUTING,
        "DEVICE",
        "Where to compute: cpu, cuda or cuda:1.",
        callback=_device,
        show_default="a usable GPU, else the CPU",
    ),
]
Threads = Annotated[
    int | None, option(COMPUTING, "N", "CPU threads that a call may use.", min=1, show_default="all cores")
]
TrecRun = Annotated[
    Path | None, option(DATA, "FILE", "First-stage TREC run: its documents are the candidates.", "--trec-run")
]
Qrels = Annotated[Path | None, option(DATA, "FILE", "Judgements, TREC or BEIR; a BEIR folder has its own.", "--qrels")]
QueriesFile = Annotated[
    Path | None, option(DATA, "FILE", "Queries, JSONL or TSV; a BEIR folder has its own.", "--queries")
]
AsJson = Annotated[bool, option(OUTPUT, None, "Print JSON.", "--json")]


class Interrupted(RuntimeError):
    """Work that Ctrl-C ended; the message says what is kept and what the same command would do."""

    exit_code = 130


@contextmanager
def resumable(kept: str, again: str = "go on") -> Iterator[None]:
    """Raise `Interrupted` if Ctrl-C ends the block; its message says what is kept and how the work goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{kept}; to {again}") from None


def check_file(name: str, path: str | os.PathLike[str] | None, *, folders: bool = False) -> None:
    """Raise a usage error of the argument `name` unless there is a file, or with `folders` a folder, at `path`.

    None and - are no paths and pass.
    """
    if path is None or str(path) == "-":
        return
    found = Path(path)
    if found.is_dir() and not folders:
        raise typer.BadParameter(f"{path} is a folder: name a file in it, such as {_example(found)}", param_hint=name)
    if not found.exists():
        raise typer.BadParameter(f"no such file: {path}", param_hint=name)


def _example(folder: Path) -> str:
    try:
        files = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    except OSError:
        files = []
    return str(files[0] if files else folder / "documents.txt")


def need_model(model: str | None) -> str:
    """Return `--model`'s value; a usage error where there is none."""
    if not model:
        example = "--model cross-encoder/ms-marco-MiniLM-L6-v2"
        raise typer.BadParameter(f"say which checkpoint to use, for example {example}", param_hint="--model")
    return model


def heads_option(value: str | None) -> Any:
    """(layer, head) pairs if the value lists them, else the value: the name of a list, or a file."""
    return parse_heads(value) if value is not None and re.fullmatch(r"[\d\s,-]+", value) else value


@contextmanager
def progress_bar(what: str, *, shown: bool, total: int | None = None) -> Iterator[Any]:
    """A bar (or, without a total, a running clock) on standard error while the block runs, if that is a terminal."""
    console = Console(stderr=True)
    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [BarColumn(), MofNCompleteColumn()] if total is not None else []
    disable = not (shown and console.is_terminal)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None, crop: bool = False
) -> None:
    """A table on a terminal, its last column wrapped or, with `crop`, cut to the width; else tab-separated values.

    Columns of numbers are right-aligned. Words are never broken: where a column is too narrow for one, each cell gets
    a line of its own instead.
    """
    console = Console()
    cells = [[one_line(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for row in [columns, *cells]:
            print("\t".join(row))
        return
    columns_of = [[name, *(row[number] for row in cells)] for number, name in enumerate(columns)]
    widths = [max(map(cell_len, column)) for column in columns_of]
    words = (cell_len(word) for cell in columns_of[-1] for word in cell.split())
    frame = 3 * len(columns) + 1
    least = 8 if crop else max(words, default=0)
    if sum(widths[:-1]) + least + frame > console.width:
        _print_lines(console, columns, cells, caption)
        return
    table = Table(caption=caption)
    for number, (name, column) in enumerate(zip(columns, columns_of, strict=True)):
        side: Literal["left", "right"] = "right" if all(map(_NUMBER.fullmatch, column[1:])) else "left"
        if number == len(columns) - 1:  # only this column shrinks on a narrow terminal
            table.add_column(name, justify=side, overflow="ellipsis" if crop else "fold")
        else:
            table.add_column(name, justify=side, min_width=widths[number], no_wrap=True)
    for row in cells:
        table.add_row(*(Text(cell, no_wrap=crop) for cell in row))
    console.print(table)


def _print_lines(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None) -> None:
    """Lines that the terminal wraps: "name: value" of two columns, else a block of "column: cell" for each row."""
    for row in rows:
        if len(columns) == 2:
            console.print(Text(": ".join(row)), soft_wrap=True)
            continue
        for name, cell in zip(columns, row, strict=True):
            console.print(Text(f"{name}: {cell}"), soft_wrap=True)
        console.print()
    if caption is not None:
        console.print(Text(caption, style="italic"), soft_wrap=True)


def one_line(text: str) -> str:
    """`text` without line breaks, and without the control characters and surrogates that a terminal would act on."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+", " ", text).split())


def plain(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not found" if value is None else str(value)


def print_json(value: Any) -> None:
    """Print a value as JSON, indented."""
    # UTF-8 cannot encode a lone surrogate; main() writes it as an escape, which JSON reads back as the same.
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not utf8, indent=2))


def warn(message: str) -> None:
    """Print one line on standard error."""
    print(f"fastrerank: warning: {one_line(message)}", file=sys.stderr)
