"""What the commands share: options, loading, progress, and how results are printed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import fastrerank
from fastrerank.text.attention_policy import parse_heads


class Dtype(str, Enum):
    """Precisions that --dtype takes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


def _method(value: str | None) -> str | None:
    if value is not None and value not in (known := list(fastrerank.list_methods())):
        raise typer.BadParameter(f"{value!r} is not a method; one of {', '.join(known)}")
    return value


def _device(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is not a device; one of cpu, cuda, cuda:<number>")
    return value


Model = Annotated[str | None, typer.Option(help="Hugging Face id or local folder of the checkpoint (required).")]
Method = Annotated[
    str | None, typer.Option(callback=_method, help="Ranking method; found from the checkpoint if unsaid.")
]
TemplateOption = Annotated[
    str | None, typer.Option("--template", help="Prompt of a language model: a published one's name, or a TOML file.")
]
Instruction = Annotated[str | None, typer.Option(help="Replaces the prompt's instruction.")]
HeadsOption = Annotated[
    str | None,
    typer.Option(
        "--heads", help="Heads to read: 13-18,14-31, a published list's name, or a file of `fastrerank heads`."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision; auto: float32 on a CPU, bfloat16 on a GPU.")]
Device = Annotated[
    str | None, typer.Option(callback=_device, help="cpu, cuda or cuda:1; a usable GPU, else the CPU, if unsaid.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if unsaid.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def need_model(model: str | None) -> str:
    """Return `--model`'s value; a usage error where there is none."""
    if not model:
        example = "--model cross-encoder/ms-marco-MiniLM-L6-v2"
        raise typer.BadParameter(f"say which checkpoint to use, for example {example}", param_hint="--model")
    return model


def heads_option(value: str | None) -> Any:
    """Pairs where heads are written as such, else the name of a list or a file."""
    return parse_heads(value) if value is not None and re.fullmatch(r"[\d\s,-]+", value) else value


def load_reranker(model: str, method: str | None, dtype: Dtype, **options: Any) -> Any:
    """The reranker, with the options that were given: some methods do not know all of them."""
    given = {name: value for name, value in options.items() if value is not None}
    if dtype is not Dtype.auto:
        given["dtype"] = dtype.value
    return fastrerank.load(model, method=method, **given)


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
    """A table on a terminal, its last column wrapped or, with `crop`, cut to the width; else tab-separated values."""
    console = Console()
    cells = [[one_line(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for row in [columns, *cells]:
            print("\t".join(row))
        return
    table = Table(caption=caption)
    for number, name in enumerate(columns):
        column = [name, *(row[number] for row in cells)]
        if number == len(columns) - 1:  # the only one that gives way on a narrow terminal
            table.add_column(name, overflow="ellipsis" if crop else "fold")
        else:
            numeric = all(re.fullmatch(r"-?[\d.]*", cell) for cell in column[1:])
            table.add_column(name, justify="right" if numeric else "left", min_width=max(map(len, column)))
    for row in cells:
        table.add_row(*(Text(cell, no_wrap=crop) for cell in row))
    console.print(table)


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
    # A lone surrogate cannot be encoded; main() has it written as an escape, which JSON reads back as the same.
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not utf8, indent=2))


def warn(message: str) -> None:
    """Print one line on standard error."""
    print(f"fastrerank: warning: {one_line(message)}", file=sys.stderr)
