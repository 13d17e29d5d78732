"""`python -m bench.run SUBJECT`: fastrerank against other engines, in one run on this machine."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from bench import models

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class Model(str, Enum):
    """Names of `bench.models`."""

    minilm = "minilm"
    bge_base = "bge-base"


class Length(str, Enum):
    """How long the pairs are."""

    natural = "natural"
    full = "512"


@app.callback()
def main() -> None:
    """Compares fastrerank with other engines, in one run on this machine."""


@app.command("cross-encoder")
def cross_encoder(
    model: Annotated[Model, typer.Option(help="which shape")] = Model.minilm,
    length: Annotated[Length, typer.Option(help="passages as they are, or joined to 512 tokens")] = Length.natural,
    docs: Annotated[int, typer.Option(min=10, max=1000, help="documents per query")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 9,
    against: Annotated[str | None, typer.Option(help="rivals, by name or its beginning: openvino,torch-fp32")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="default: the cores of this process")] = None,
    quick: Annotated[bool, typer.Option(help="3 rounds, batch 8, the main table only")] = False,
    data: Annotated[Path, typer.Option(help="folder with the DL19 file")] = DATA,
    cache: Annotated[Path | None, typer.Option(help="checkpoints and conversions; default ~/.cache")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything, raw times included")] = None,
    markdown: Annotated[bool, typer.Option(help="print Markdown for a README instead of terminal tables")] = False,
) -> None:
    """Cross-encoders on CPU: one query against DL19 passages, the same token ids for every engine."""
    from rich.console import Console

    from bench import cross_encoder as bench
    from bench import report

    log = Console(stderr=True)
    try:
        options = bench.Options(
            model=model.value,
            length=length.value,
            documents=docs,
            rounds=3 if quick else rounds,
            engines=bench.select(against.split(",") if against else []),
            threads=threads or _cores(),
            quick=quick,
            data=data,
            cache=cache or models.default_cache(),
            command="python -m bench.run " + " ".join(sys.argv[1:]),
        )
        findings = bench.run(options, log, lambda found: report.write_json(found, json_file) if json_file else None)
    except (ValueError, FileNotFoundError) as error:
        log.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error
    report.show(findings, markdown=markdown)
    raise typer.Exit(0 if findings.sound else 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    app()
