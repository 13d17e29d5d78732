"""`fastrerank score`: millions of pairs in files, scored by several processes or machines."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from fastrerank import cli_shared as cli
from fastrerank.cli_shared import AsJson, Device, DtypeOption, Instruction, Method, Model, TemplateOption


def score(
    inputs: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="Parquet or JSONL (.jsonl, .jsonl.gz) file of pairs, or a folder."),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder for the rows with their scores.")],
    model: Model = None,
    method: Method = None,
    template: TemplateOption = None,
    instruction: Instruction = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a model of its own.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a process.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a process; 0.5 for two on one.")] = 0.0,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, host:port or ray://host:port; RAY_ADDRESS, else this machine.")
    ] = None,
    query_field: Annotated[str, typer.Option(help="Column or field of the query.")] = "query",
    document_field: Annotated[str, typer.Option(help="Column or field of the document.")] = "document",
    score_field: Annotated[str, typer.Option(help="Column or field that the score gets.")] = "score",
    keep: Annotated[
        str | None, typer.Option(help="Columns that OUTPUT has beside the score: qid,docid; all if unsaid.")
    ] = None,
    rows_per_part: Annotated[int, typer.Option(min=1, help="Rows of one output file.")] = 4096,
    as_json: AsJson = False,
    dtype: DtypeOption = cli.Dtype.auto,
    device: Device = None,
) -> None:
    """Score the (query, document) pairs of INPUT on Ray; begun again, it does what OUTPUT lacks."""
    checkpoint = cli.need_model(model)
    try:
        import logging

        from fastrerank.integrations.ray import score_files
    except ModuleNotFoundError as error:
        raise ImportError(f"scoring files needs {error.name}: pip install 'fastrerank[ray]'") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    given = {"template": template, "instruction": instruction, "device": device}
    if dtype is not cli.Dtype.auto:
        given["dtype"] = dtype.value
    # Ray prints on standard output what workers print, and that one has died: here that is the result's.
    with redirect_stdout(sys.stderr), cli.progress_bar("scoring pairs", shown=True, total=0) as advance:
        done = score_files(
            inputs, output, checkpoint, method, workers=workers, num_threads=threads, num_gpus=gpus, query=query_field,
            document=document_field, score=score_field, keep=None if keep is None else keep.split(","),
            rows_per_part=rows_per_part, address=address, progress=advance,
            **{name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
    if as_json:
        cli.print_json(done)
    else:
        cli.print_table(("what", "count"), [(name, str(value)) for name, value in done.items()], caption=output)
