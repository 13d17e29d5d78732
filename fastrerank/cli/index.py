"""`fastrerank index build | search | info | tune | report`: searching many texts with few calls of a reranker."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastrerank.cli import shared as cli
from fastrerank.cli.model_options import NO_CHOICE, ModelOptions, with_model_options
from fastrerank.cli.shared import AsJson, LabelOption, Model, Threads
from fastrerank.data.documents import read_documents
from fastrerank.search import CURIndex
from fastrerank.search.tuning import as_rows, chart, hold_out, recall_curve

app = typer.Typer(add_completion=False, help="Search many texts with few calls of a reranker.")

SEARCH = "Search"  # a panel of --help
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the index.")]
K = Annotated[int, cli.option(SEARCH, "K", "How many items to find.", "--top-k", min=1)]
Budget = Annotated[int, cli.option(SEARCH, "N", "Calls of the reranker per query.", min=1)]
Queries = Annotated[
    int, cli.option(SEARCH, "N", "Anchor queries to hold out, at most half of them.", "--queries", min=1)
]


class Storage(str, Enum):
    """Precisions of item vectors."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


def _read(name: str, path: Path) -> list[str]:
    cli.check_file(name, path)
    texts, undecodable = read_documents([str(path)], "auto", "text")
    for some in undecodable:
        cli.warn(f"{some} is not valid UTF-8; bytes that cannot be decoded became U+FFFD")
    if not texts:
        raise ValueError(f"{path} holds no texts")
    return texts


@app.command()
@with_model_options
def build(
    folder: Folder,
    items: Annotated[
        Path, cli.option(cli.DATA, "FILE", "File of the texts to search: lines, or JSONL with a field text.")
    ],
    queries: Annotated[
        Path,
        cli.option(cli.DATA, "FILE", "File of anchor queries; they should look like the queries of later searches."),
    ],
    model: Model = None,
    options: ModelOptions = NO_CHOICE,
    label: LabelOption = None,
    storage: Annotated[
        Storage,
        cli.option(cli.OUTPUT, "DTYPE", f"Precision of the item vectors: {', '.join(one.value for one in Storage)}."),
    ] = Storage.float32,
    threads: Threads = None,
) -> None:
    """Score every item for every anchor query and save the index to FOLDER. An interrupted run resumes."""
    checkpoint = cli.need_model(model)
    texts, anchors = _read("--items", items), _read("--queries", queries)
    reranker = options.load(checkpoint, num_threads=threads, label=label)
    with cli.resumable(f"the scores made so far are in {folder / 'build'}"):
        index = CURIndex.build(reranker, texts, anchors, checkpoint=folder / "build", storage=storage.value)
        index.save(folder)
    cli.print_table(("what", "found"), [(name, cli.plain(value)) for name, value in index.info().items()])


@app.command()
@with_model_options
def search(
    folder: Folder,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The query.")],
    model: Model = None,
    options: ModelOptions = NO_CHOICE,
    label: LabelOption = None,
    top_k: K = 10,
    budget: Budget = 200,
    rounds: Annotated[
        int | None,
        cli.option(SEARCH, "N", "Rounds over which the calls are spread.", min=1, show_default="the index's own"),
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find the best texts of FOLDER for QUERY with at most --budget calls of the reranker."""
    index = CURIndex.load(folder)
    reranker = options.load(cli.need_model(model), num_threads=threads, label=label)
    ids, scores = index.search_reranker(reranker, query, k=top_k, budget=budget, rounds=rounds)
    texts = index.texts(ids)
    usage = index.last_usage
    hits = [{"id": int(i), "score": float(s), "text": t} for i, s, t in zip(ids, scores, texts, strict=True)]
    if as_json:
        cli.print_json({"hits": hits, "usage": usage})
        return
    rows = [(str(hit["id"]), f"{hit['score']:.4f}", str(hit["text"])) for hit in hits]
    caption = f"{usage['calls']} of {index.count} items scored in {usage['rounds']} rounds"
    cli.print_table(("id", "score", "text"), rows, caption=caption, crop=True)


@app.command()
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Print what the index in FOLDER holds; its files are checked."""
    found = CURIndex.load(folder).info()
    if as_json:
        cli.print_json(found)
    else:
        cli.print_table(("what", "found"), [(name, cli.plain(value)) for name, value in found.items()])


@app.command()
def tune(
    folder: Folder,
    top_k: K = 10,
    budget: Budget = 200,
    queries: Queries = 48,
    dry_run: Annotated[
        bool, cli.option(cli.OUTPUT, None, "Print only; leave the index's settings.", "--dry-run")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Choose rounds, first share and ridge on held-out anchor queries, and save them in the index."""
    index = CURIndex.load(folder)
    trials = index.tune(top_k, budget, queries=queries)
    if not dry_run:
        index.save(folder)
    rows = as_rows(trials)
    if as_json:
        cli.print_json(rows)
        return
    cells = [(str(r["rounds"]), f"{r['first']:g}", f"{r['ridge']:g}", f"{r['recall']:.4f}") for r in rows]
    cli.print_table(("rounds", "first", "ridge", f"recall@{top_k}"), cells, caption="the first line was chosen")


@app.command()
def report(
    folder: Folder,
    top_k: K = 10,
    budgets: Annotated[
        str, cli.option(SEARCH, "N,N,...", "Calls per query, separated by commas.")
    ] = "25,50,100,200,500",
    queries: Queries = 48,
    out: Annotated[Path | None, cli.option(cli.OUTPUT, "FILE", "Write the plot to this file, an SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print recall against the budget, on held-out anchor queries, whose scores of all items are in the index."""
    try:
        wanted = sorted({int(part) for part in budgets.split(",")})
    except ValueError as error:
        raise typer.BadParameter(f"{budgets!r} is not a list of whole numbers", param_hint="--budgets") from error
    rest, exact = hold_out(CURIndex.load(folder), queries)
    curves = [
        recall_curve(rest, exact, top_k, wanted),
        _named(recall_curve(rest, exact, top_k, wanted, rounds=2, first=0.5), "anchors, then rerank"),
    ]
    if out is not None:
        out.write_text(chart(curves, f"Recall of the exact best {top_k} of {rest.count} items"), encoding="utf-8")
    if as_json:
        cli.print_json([asdict(curve) for curve in curves])
        return
    rows = [
        (str(budget), *(f"{curve.recalls[place]:.4f}" for curve in curves))
        for place, budget in enumerate(curves[0].budgets)
    ]
    cli.print_table(("budget", *(curve.name for curve in curves)), rows, caption=f"{curves[0].queries} queries")


def _named(curve: Any, name: str) -> Any:
    from dataclasses import replace

    return replace(curve, name=name)
