"""`fastrerank score`: millions of pairs in files, scored by several processes or machines."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from fastrerank.cli import shared as cli
from fastrerank.cli.model_options import NO_CHOICE, ModelOptions, with_model_options
from fastrerank.cli.shared import AsJson, LabelOption, Model


@with_model_options
def score(
    inputs: Annotated[
        str, typer.Argument(metavar="INPUT", help="Parquet or JSONL (.jsonl, .jsonl.gz) file of pairs, or a folder.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder for the rows with their scores.")],
    model: Model = None,
    options: ModelOptions = NO_CHOICE,
    label: LabelOption = None,
    query_field: Annotated[str, cli.option(cli.DATA, "FIELD", "Column or field of the query.")] = "query",
    document_field: Annotated[str, cli.option(cli.DATA, "FIELD", "Column or field of the document.")] = "document",
    workers: Annotated[int, cli.option(cli.COMPUTING, "N", "Processes, each with a model of its own.", min=1)] = 1,
    threads: Annotated[int, cli.option(cli.COMPUTING, "N", "CPU threads of a process.", min=1)] = 1,
    gpus: Annotated[float, cli.option(cli.COMPUTING, "N", "GPUs of a process; 0.5 for two on one.", min=0)] = 0.0,
    address: Annotated[
        str | None,
        cli.option(
            cli.COMPUTING,
            "HOST:PORT",
            "Ray cluster, host:port or ray://host:port.",
            show_default="RAY_ADDRESS, else this machine",
        ),
    ] = None,
    score_field: Annotated[str, cli.option(cli.OUTPUT, "FIELD", "Column or field that the score gets.")] = "score",
    activated: Annotated[
        bool, cli.option(cli.OUTPUT, None, "Write probabilities, not raw scores.", "--activated")
    ] = False,
    keep: Annotated[
        str | None,
        cli.option(cli.OUTPUT, "FIELDS", "Columns that OUTPUT has beside the score: qid,docid.", show_default="all"),
    ] = None,
    rows_per_part: Annotated[int, cli.option(cli.OUTPUT, "N", "Rows of one output file.", min=1)] = 4096,
    as_json: AsJson = False,
) -> None:
    """Score the (query, document) pairs of INPUT on Ray. The same command again scores what OUTPUT lacks."""
    checkpoint = cli.need_model(model)
    try:
        import logging

        from fastrerank.integrations.ray import score_files
    except ModuleNotFoundError as error:
        raise ImportError(f"scoring files needs {error.name}: pip install 'fastrerank[ray]'") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    given = options.keywords()
    # Ray prints workers' output and their deaths on standard output, which belongs to the result here.
    with (
        cli.resumable(f"the parts that are whole are in {output}"),
        redirect_stdout(sys.stderr),
        cli.progress_bar("scoring pairs", shown=True, total=0) as advance,
    ):
        done = score_files(
            inputs,
            output,
            checkpoint,
            given.pop("method", None),
            workers=workers,
            num_threads=threads,
            num_gpus=gpus,
            query=query_field,
            document=document_field,
            score=score_field,
            keep=None if keep is None else keep.split(","),
            rows_per_part=rows_per_part,
            address=address,
            progress=advance,
            label=label,
            raw=not activated,
            **given,
        )
    if as_json:
        cli.print_json(done)
    else:
        cli.print_table(("what", "count"), [(name, str(value)) for name, value in done.items()], caption=output)
