"""The command line: `fastrerank rank | score | eval | heads | index | bench | serve | doctor | version`.

Results go to standard output: a table on a terminal, tab-separated values elsewhere, JSON with `--json`. Everything
else goes to standard error. Exit codes: 0 ok, 1 the work failed, 2 wrong usage, 130 Ctrl-C; an
error is one line.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import fastrerank
from fastrerank.cli import index as cli_index
from fastrerank.cli import score as cli_score
from fastrerank.cli.doctor import report
from fastrerank.cli.evaluate import evaluate_command
from fastrerank.cli.model_options import NO_CHOICE, ModelOptions, with_model_options
from fastrerank.cli.shared import (
    DATA,
    MODEL,
    OUTPUT,
    AsJson,
    Device,
    Dtype,
    DtypeOption,
    HeadsOption,
    Instruction,
    Interrupted,
    LabelOption,
    Model,
    Qrels,
    QueriesFile,
    Threads,
    TrecRun,
    check_file,
    heads_option,
    need_model,
    one_line,
    option,
    plain,
    print_json,
    print_table,
    progress_bar,
    resumable,
    warn,
)
from fastrerank.data.datasets import load_dataset
from fastrerank.data.documents import read_documents
from fastrerank.rerankers.explain import print_tokens, to_html
from fastrerank.rerankers.refusal import OptionRefused
from fastrerank.runtime.version import VERSION

LONG_WORK = 256  # documents from which one `rank` call may take seconds and gets a progress line

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rerank passages by a query: cross-encoders, late interaction, embeddings and language models.",
)


class Suite(str, Enum):
    """Benchmarks that `bench` runs."""

    cross_encoder = "cross-encoder"
    llm = "llm"
    icr = "icr"
    cur = "cur"
    cur_scan = "cur-scan"
    serve = "serve"
    ray = "ray"


SELECTION, LISTENING, LIMITS = "Selection", "Listening", "Limits"  # panels of --help


class Rule(str, Enum):
    """How `heads` scores a head."""

    ndcg = "ndcg"
    gold = "gold"
    contrast = "contrast"


class Format(str, Enum):
    """How `rank` reads files of documents."""

    auto = "auto"
    lines = "lines"
    paragraphs = "paragraphs"
    jsonl = "jsonl"


app.add_typer(cli_index.app, name="index")
app.command("score")(cli_score.score)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _root(
    show: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@with_model_options
def rank(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The query.")],
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Files of documents; - is standard input.")
    ] = None,
    model: Model = None,
    options: ModelOptions = NO_CHOICE,
    heads: HeadsOption = None,
    label: LabelOption = None,
    format: Annotated[
        Format,
        option(
            DATA,
            "FORMAT",
            "How files hold documents: lines, paragraphs, jsonl; auto: jsonl by file name or content, else lines.",
        ),
    ] = Format.auto,
    text_field: Annotated[str, option(DATA, "FIELD", "Field of a JSONL row that holds the text.")] = "text",
    threads: Threads = None,
    top_k: Annotated[
        int | None, option(OUTPUT, "K", "Print only the best K documents.", min=1, show_default="all")
    ] = None,
    raw: Annotated[bool, option(OUTPUT, None, "Show raw scores, such as logits.", "--raw")] = False,
    explain: Annotated[
        bool, option(OUTPUT, None, "Colour the tokens by the attention that they get (icr, qrhead, core).", "--explain")
    ] = False,
    explain_html: Annotated[
        Path | None, option(OUTPUT, "FILE", "Write a page that shows the same to this file; implies --explain.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rank the documents of FILE... by QUERY and print rank, score and text, best first."""
    checkpoint = need_model(model)
    if not files:
        if sys.stdin.isatty():
            raise typer.BadParameter("name at least one file of documents, or - for standard input", param_hint="FILE")
        files = ["-"]
    for name in files:
        check_file("FILE", name)
    if explain_html is not None and (explain_html.is_dir() or not explain_html.resolve().parent.is_dir()):
        raise typer.BadParameter(
            f"must be a file in a folder that exists, got {explain_html}", param_hint="--explain-html"
        )
    documents, undecodable = read_documents(files, format.value, text_field)
    for name in undecodable:
        warn(f"{name} is not valid UTF-8; bytes that cannot be decoded became U+FFFD")
    if not documents:
        warn("there are no documents to rank")
    reranker = options.load(checkpoint, num_threads=threads, heads=heads_option(heads), label=label)
    explain = explain or explain_html is not None
    if explain and not hasattr(reranker, "token_masses"):
        raise typer.BadParameter("needs --method icr, qrhead or core", param_hint="--explain")
    asked = {name: True for name, wanted in (("explain", explain), ("raw", raw)) if wanted}
    start = time.perf_counter()
    with progress_bar(f"ranking {len(documents)} documents", shown=len(documents) >= LONG_WORK):
        hits = reranker.rank(query, documents, top_k=top_k, return_documents=True, **asked)
    seconds = time.perf_counter() - start
    if explain_html is not None:
        explain_html.write_text(to_html(query, hits), encoding="utf-8", errors="backslashreplace")
    if as_json:
        print_json(hits)
        return
    if explain:
        print_tokens(Console(), hits)
        return
    rows = [(str(place), f"{hit['score']:.4f}", hit["text"]) for place, hit in enumerate(hits, start=1)]
    print_table(
        ("rank", "score", "text"), rows, caption=f"{len(documents)} documents in {1e3 * seconds:.0f} ms", crop=True
    )


app.command("eval")(evaluate_command)


@app.command()
def heads(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Labelled queries: JSONL rows, or a BEIR folder.")],
    save: Annotated[Path, option(OUTPUT, "FILE", "Write the heads to this file (.toml), for rank's --heads.")],
    model: Model = None,
    instruction: Instruction = None,
    rule: Annotated[
        Rule,
        option(
            SELECTION,
            "RULE",
            "How a head is scored: ndcg, gold (QRHead's rules) or contrast (CoRe's).",
            case_sensitive=False,
        ),
    ] = Rule.ndcg,
    top: Annotated[
        int | None, option(SELECTION, "N", "Heads to keep.", min=1, show_default="as published: 16, of contrast 8")
    ] = None,
    temperature: Annotated[
        float, option(SELECTION, "T", "For the rule contrast; its paper takes 0.001 for Mistral and Granite.")
    ] = 0.1,
    trec_run: TrecRun = None,
    qrels: Qrels = None,
    queries: QueriesFile = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find the heads of MODEL that retrieve, on the labelled queries of DATASET. An interrupted run resumes."""
    from fastrerank.rerankers.attention_heads import score_heads

    checkpoint = need_model(model)
    check_file("DATASET", dataset, folders=True)
    for name, path in {"--trec-run": trec_run, "--qrels": qrels, "--queries": queries}.items():
        check_file(name, path)
    if save.suffix != ".toml" or not save.resolve().parent.is_dir():
        raise typer.BadParameter(f"must be a .toml file in a folder that exists, got {save}", param_hint="--save")
    labelled = load_dataset(dataset, run=trec_run, qrels=qrels, queries=queries)
    state = save.with_suffix(".progress.jsonl")
    kept_in = f"the heads' scores of the queries so far are in {state}"
    with resumable(kept_in), progress_bar("scoring heads", total=len(labelled), shown=True) as advance:
        found = score_heads(
            checkpoint,
            labelled,
            rule=rule.value,
            temperature=temperature,
            instruction=instruction,
            state=state,
            progress=advance,
            device=device,
            dtype=dtype.value,
            num_threads=threads,
        )
    kept = found.save(save, top)
    state.unlink()
    if as_json:
        scores = [{"layer": layer, "head": head, "score": float(found.scores[layer, head])} for layer, head in kept]
        print_json({**found.about, "queries": found.queries, "skipped": found.skipped, "heads": scores})
        return
    rows = [(f"{layer}-{head}", f"{found.scores[layer, head]:.4f}") for layer, head in kept]
    print_table(("head", "score"), rows, caption=f"{found.queries} queries; written to {save}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    suite: Annotated[
        Suite, typer.Argument(metavar="SUITE", help=f"What to measure: {', '.join(suite.value for suite in Suite)}.")
    ] = Suite.cross_encoder,
) -> None:
    """Compare with rival engines on this machine; further options go to `python -m bench.run`."""
    clone = Path(fastrerank.__file__).resolve().parent.parent
    folder = next((root for root in (Path.cwd(), clone) if (root / "bench" / "run.py").is_file()), None)
    if folder is None:
        raise RuntimeError(
            "the benchmarks are not part of the installed package: run this in a clone of the repository"
        )
    command = [sys.executable, "-m", "bench.run", suite.value, *context.args]
    if subprocess.run(command, cwd=folder, check=False).returncode != 0:
        raise RuntimeError(f"the benchmark failed: {' '.join(command[1:])}")


@app.command()
@with_model_options
def serve(
    model: Annotated[
        list[str] | None,
        option(
            MODEL,
            "CHECKPOINT",
            "Hugging Face id or local folder, or NAME=CHECKPOINT; several are served by name (required).",
        ),
    ] = None,
    options: ModelOptions = NO_CHOICE,
    threads: Threads = None,
    label: Annotated[
        list[str] | None,
        option(
            MODEL,
            "[NAME=]LABEL",
            "The label that ranks where the head has several, by name or number.",
            show_default="the one whose name tells it",
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, option(LISTENING, "ALIAS=NAME", "A further name of a model.", show_default="none")
    ] = None,
    host: Annotated[str, option(LISTENING, "HOST", "Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option(LISTENING, "PORT", "Port; 0 takes a free one.", min=0, max=65535)] = 8080,
    api_flavor: Annotated[
        str,
        option(
            LISTENING,
            "FLAVOR",
            "Pins what dialects do differently: auto, tei, cohere, jina, vllm, infinity, sglang, voyage.",
        ),
    ] = "auto",
    api_key_file: Annotated[
        Path | None,
        option(LISTENING, "FILE", "File of API keys, one a line.", show_default="those of FASTRERANK_API_KEY"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, option(LISTENING, "ORIGIN", "Origin that browsers may call from.", show_default="none")
    ] = None,
    max_batch_tokens: Annotated[
        int, option(LIMITS, "N", "The most tokens of one batch across requests.", min=1)
    ] = 16384,
    max_queue_tokens: Annotated[
        int, option(LIMITS, "N", "Tokens that may wait; more get 429. One request may be 3/4 of it, else 413.", min=1)
    ] = 2_000_000,
    max_wait_ms: Annotated[
        float, option(LIMITS, "MS", "How long a request waits for others to share a batch.", min=0)
    ] = 2.0,
    max_documents: Annotated[int, option(LIMITS, "N", "The most documents of one request.", min=1)] = 10_000,
    max_body_mb: Annotated[float, option(LIMITS, "MB", "The most megabytes of one request.", min=0.001)] = 8.0,
    max_bodies_mb: Annotated[
        float | None,
        option(
            LIMITS, "MB", "The most megabytes of all unanswered requests.", min=0.001, show_default="4 x --max-body-mb"
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        option(LIMITS, "SECONDS", "How long a request may take; then it gets 504.", min=0.001, show_default="no bound"),
    ] = None,
    header_timeout: Annotated[float, option(LIMITS, "SECONDS", "Time for its headers to arrive.", min=0.001)] = 10.0,
    body_timeout: Annotated[float, option(LIMITS, "SECONDS", "Time for a request's body to arrive.", min=0.001)] = 30.0,
    grace: Annotated[float, option(LIMITS, "SECONDS", "Time that running requests get after SIGTERM.", min=1)] = 30.0,
) -> None:
    """Serve rerankers over HTTP: TEI's, Cohere's, Jina's, vLLM's and Infinity's routes, and a page to try them on."""
    try:
        from fastrerank.serve.api.errors import Flavor
        from fastrerank.serve.app import Settings, create_app
        from fastrerank.serve.names import hub_names, parse_aliases, parse_labels
        from fastrerank.serve.run import parse_models, read_keys
        from fastrerank.serve.run import serve as run_server
    except ModuleNotFoundError as error:
        raise ImportError(f"the server needs {error.name}: pip install 'fastrerank[serve]'") from None
    if api_flavor not in (flavors := [flavor.value for flavor in Flavor]):
        raise typer.BadParameter(f"{api_flavor!r} is no flavor; one of {', '.join(flavors)}", param_hint="--api-flavor")
    need_model(model[0] if model else None)
    check_file("--api-key-file", api_key_file)
    named, keys = parse_models(model or []), read_keys(api_key_file)
    labels, aliases = parse_labels(label or [], named), hub_names(named) | parse_aliases(alias or [], named)
    rerankers = {
        name: fastrerank.AsyncReranker(
            options.load(checkpoint, num_threads=threads, label=labels.get(name)),
            max_batch_tokens=max_batch_tokens,
            max_wait_ms=max_wait_ms,
            max_queue_tokens=max_queue_tokens,
        )
        for name, checkpoint in named.items()
    }
    settings = Settings(
        keys=keys,
        flavor=Flavor(api_flavor),
        max_body_bytes=int(max_body_mb * 2**20),
        max_documents=max_documents,
        max_bodies_bytes=None if max_bodies_mb is None else int(max_bodies_mb * 2**20),
        body_seconds=body_timeout,
        timeout=timeout,
        origins=tuple(cors_origin or ()),
        aliases=aliases,
    )
    run_server(create_app(rerankers, settings), host, port, grace=grace, header_seconds=header_timeout)


@app.command()
def doctor(
    as_json: AsJson = False,
    torch: Annotated[
        bool, option(OUTPUT, None, "Import torch and ask it for its GPUs (takes seconds).", "--torch")
    ] = False,
) -> None:
    """Print what was found: versions, CPU level, threads, kernels, GPU, optional packages."""
    found = report(ask_torch=torch)
    if as_json:
        print_json(found)
    else:
        print_table(("what", "found"), [(name, plain(value)) for name, value in found.items()])


@app.command()
def version() -> None:
    """Print the version."""
    print(VERSION)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 ok, 1 the work failed, 2 wrong usage, 130 Ctrl-C.

    Args:
        arguments: what follows the program's name; None takes `sys.argv`.

    An exception becomes one line on standard error; with FASTRERANK_TRACEBACK=1 in the environment it is raised.

    Example:
        >>> main(["version"])                                                            # doctest: +SKIP
        0
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(args=given, prog_name="fastrerank", standalone_mode=False)
        if code == Interrupted.exit_code:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader of the output has closed the pipe; Python must not flush into it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        kept = f"; {error}: {shlex.join(['fastrerank', *given])}" if isinstance(error, Interrupted) else ""
        print(f"fastrerank: interrupted{one_line(kept)}", file=sys.stderr)
        return Interrupted.exit_code
    except Exception as error:
        if os.environ.get("FASTRERANK_TRACEBACK") == "1":
            raise
        return _fail(error)
    return int(code or 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    warn(str(message))


# The command line's advice where a checkpoint refuses or lacks an option.
_ADVICE = {"label": "--label takes a name or a number", "instruction": "leave out --instruction"}


def _fail(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if isinstance(error, OptionRefused):
        message = f"{error.reason}: {_ADVICE.get(error.option, error.advice)}"
    if context is not None:
        message = f"{message.rstrip('.')} (see {context.command_path} --help)"
    expected = isinstance(error, (ValueError, TypeError, ArithmeticError, OSError, RuntimeError, ImportError))
    if not message or not (expected or hasattr(error, "exit_code")):
        message = f"{type(error).__name__}: {message} (FASTRERANK_TRACEBACK=1 shows where)"
    print(f"fastrerank: error: {one_line(message)}", file=sys.stderr)
    return int(getattr(error, "exit_code", 1))
