"""`fastrerank eval`: one model on a judged data set, or several systems side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fastrerank.cli import shared as cli
from fastrerank.cli.model_options import NO_CHOICE, ModelOptions, with_model_options
from fastrerank.cli.shared import AsJson, HeadsOption, LabelOption, Qrels, QueriesFile, Threads, TrecRun
from fastrerank.data.datasets import JudgedQuery, load_dataset, write_trec_run
from fastrerank.evaluation import Evaluation, System, compare, evaluate
from fastrerank.evaluation.comparison import dataset_name
from fastrerank.evaluation.measures import DEFAULT_MEASURES
from fastrerank.evaluation.systems import FIRST_STAGE, parse_run, parse_system, read_systems
from fastrerank.evaluation.table import print_comparison

__all__ = ["evaluate_command"]

SYSTEMS, MEASURING = "Systems", "Measuring"  # panels of --help


@with_model_options
def evaluate_command(
    datasets: Annotated[
        list[Path], typer.Argument(metavar="DATASET", help="JSONL rows, a BEIR folder, or the texts of a TREC run.")
    ],
    model: Annotated[
        list[str] | None,
        cli.option(
            SYSTEMS,
            "SYSTEM",
            "[NAME=]CHECKPOINT[,KEY=VALUE...]: Hugging Face id or local folder; several are compared. KEY: "
            "method, dtype, engine, device, threads, template or another keyword of the method. The options of the "
            "panels Model and Computing hold for models that do not say theirs.",
        ),
    ] = None,
    systems: Annotated[
        Path | None,
        cli.option(SYSTEMS, "FILE", "TOML file of systems to compare: tables systems.NAME, with model or run."),
    ] = None,
    with_run: Annotated[
        list[str] | None, cli.option(SYSTEMS, "[NAME=]FILE", "Compare with this TREC run, too.")
    ] = None,
    baseline: Annotated[
        str | None, cli.option(SYSTEMS, "NAME", "System that the others are tested against.", show_default=FIRST_STAGE)
    ] = None,
    options: ModelOptions = NO_CHOICE,
    label: LabelOption = None,
    heads: HeadsOption = None,
    trec_run: TrecRun = None,
    qrels: Qrels = None,
    queries: QueriesFile = None,
    top_k: Annotated[
        int | None,
        cli.option(
            MEASURING, "K", "Rerank only the first K candidates of each query.", min=1, show_default="all of them"
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        cli.option(
            MEASURING,
            "MEASURE",
            "By ir_measures' name, e.g. P@5; the first is plotted; compares.",
            show_default=f"{', '.join(DEFAULT_MEASURES)}",
        ),
    ] = None,
    min_relevance: Annotated[
        int, cli.option(MEASURING, "GRADE", "Smallest grade that counts as relevant (not for nDCG).", min=1)
    ] = 1,
    warmup: Annotated[int, cli.option(MEASURING, "N", "Queries that are ranked before the clock starts.", min=0)] = 1,
    threads: Threads = None,
    out: Annotated[
        Path | None,
        cli.option(
            cli.OUTPUT,
            "FOLDER",
            "Write report.html, results.json and TREC runs to this folder; compares. "
            "Interrupted, the same command goes on behind the systems that were finished.",
        ),
    ] = None,
    run: Annotated[
        Path | None, cli.option(cli.OUTPUT, "FILE", "Write a single model's order to this file, as a TREC run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rerank the judged candidates of DATASET; print nDCG@10, MRR@10, Recall and latency, of several systems if asked.

    Compared systems run one after the other, each in a process of its own, on the same candidates.
    """
    several = bool(systems or with_run or baseline or out or measure or len(datasets) > 1 or len(model or []) > 1)
    if not (model or systems or with_run):
        cli.need_model(None)
    _check_files(datasets, trec_run, qrels, queries, systems)
    beside = {"num_threads": threads, "label": label, "heads": cli.heads_option(heads)}
    defaults = options.keywords(**beside)
    listed = _listed(model or [], systems, with_run or [], defaults)
    checkpoint = None if several or listed[0].options != defaults else listed[0].model
    if checkpoint is None:
        if run is not None:
            raise typer.BadParameter(
                "is for a single model; with several, --out FOLDER writes all runs", param_hint="--run"
            )
        pools = _pools(datasets, trec_run, qrels, queries)
        _compare(
            listed,
            pools,
            out,
            as_json,
            baseline=baseline or FIRST_STAGE,
            top_k=top_k,
            min_relevance=min_relevance,
            warmup=warmup,
            **({"measures": measure} if measure else {}),
        )
        return
    if run is not None and not run.resolve().parent.is_dir():
        raise typer.BadParameter(f"no such folder: {run.parent}", param_hint="--run")
    judged = load_dataset(datasets[0], run=trec_run, qrels=qrels, queries=queries)
    reranker = options.load(checkpoint, **beside)
    ending = cli.resumable("nothing is kept of a single model without --out FOLDER", again="begin again")
    with ending, cli.progress_bar("reranking", total=len(judged), shown=True) as advance:
        result = evaluate(reranker, judged, top_k=top_k, min_relevance=min_relevance, warmup=warmup, progress=advance)
    if run is not None:
        write_trec_run(run, result.run)
    if as_json:
        cli.print_json(_evaluation_json(result, datasets[0], checkpoint, options))
        return
    rows = [(name, f"{result.first_stage[name]:.4f}", f"{value:.4f}") for name, value in result.metrics.items()]
    rows += [("latency p50 [ms]", "", f"{1e3 * result.latency_p50:.1f}")]
    rows += [("latency p95 [ms]", "", f"{1e3 * result.latency_p95:.1f}")]
    caption = f"{len(judged)} queries, {result.judged} judged; {options.dtype.value}"
    cli.print_table(("measure", "first stage", "reranked"), rows, caption=caption)


def _check_files(
    datasets: list[Path], trec_run: Path | None, qrels: Path | None, queries: Path | None, systems: Path | None
) -> None:
    for path in datasets:
        cli.check_file("DATASET", path, folders=True)
    files = {"--trec-run": trec_run, "--qrels": qrels, "--queries": queries, "--systems": systems}
    for name, file in files.items():
        cli.check_file(name, file)
    if len(datasets) > 1 and (trec_run or qrels or queries):
        raise typer.BadParameter("go with one data set; write several as JSONL rows", param_hint="--trec-run, --qrels")


def _listed(models: list[str], file: Path | None, runs: list[str], defaults: dict[str, Any]) -> list[System]:
    """The systems of the command line, in the order of models, file and runs; a usage error where one is wrong."""
    listed: list[System] = []
    hint = "--model"
    try:
        listed += [parse_system(text, defaults) for text in models]
        hint = "--systems"
        listed += [] if file is None else read_systems(file, defaults)
        hint = "--with-run"
        listed += [parse_run(text) for text in runs]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None
    for system in listed:
        if isinstance(system.run, (str, Path)):
            cli.check_file(f"--with-run {system.name}", system.run)
    return listed


def _pools(
    datasets: list[Path], trec_run: Path | None, qrels: Path | None, queries: Path | None
) -> dict[str, Path | list[JudgedQuery]]:
    """Data set name -> path, or queries where more than one file makes them."""
    pools: dict[str, Path | list[JudgedQuery]] = {}
    for path in datasets:
        name = dataset_name(path)
        if name in pools:
            raise typer.BadParameter(f"two data sets are named {name!r}; rename one of the files", param_hint="DATASET")
        pools[name] = path
        if trec_run or qrels or queries:
            pools[name] = load_dataset(path, run=trec_run, qrels=qrels, queries=queries)
    return pools


def _compare(
    listed: list[System], pools: dict[str, Path | list[JudgedQuery]], out: Path | None, as_json: bool, **options: Any
) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    keep = None if out is None else out / "unfinished"
    if keep is None:
        ending = cli.resumable("nothing is kept without --out FOLDER", again="begin again")
    else:
        ending = cli.resumable(f"the systems that were finished are in {keep}")
    with ending, _progress(len(listed)) as advance:
        found = compare(listed, pools, progress=advance, keep=keep, **options)
    if as_json:
        cli.print_json(found.to_json())
    else:
        print_comparison(found, Console())
    if out is not None:
        found.save(out)
        Console(stderr=True).print(f"report: {out / 'report.html'}", soft_wrap=True, highlight=False)
    for failure in found.failures:
        where = f" on {failure.dataset}" if failure.dataset else ""
        cli.warn(f"system {failure.system!r} failed{where}: {failure.error}")
    if found.failures:
        names = ", ".join(repr(failure.system) for failure in found.failures)
        raise RuntimeError(f"{len(found.failures)} of {len(listed)} systems failed: {names}")


@contextmanager
def _progress(systems: int) -> Iterator[Any]:
    """A bar for the system that runs, on standard error, if that is a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        tasks: dict[tuple[str, str], Any] = {}

        def advance(system: str, dataset: str, done: int, of: int) -> None:
            if (system, dataset) not in tasks:
                for task in tasks.values():
                    progress.stop_task(task)
                number = len({name for name, _ in tasks} | {system})
                text = f"{number}/{systems} {cli.one_line(system)}: {dataset}".replace("[", r"\[")
                tasks[system, dataset] = progress.add_task(text, total=of)
            progress.update(tasks[system, dataset], completed=done)

        yield advance


def _evaluation_json(result: Evaluation, dataset: Path, model: str, options: ModelOptions) -> dict[str, Any]:
    return {
        "dataset": str(dataset),
        "model": model,
        "method": options.method,
        "dtype": options.dtype.value,
        "queries": len(result.latencies),
        "judged": result.judged,
        "first_stage": result.first_stage,
        "reranked": result.metrics,
        "latency_ms": {"p50": 1e3 * result.latency_p50, "p95": 1e3 * result.latency_p95},
    }
