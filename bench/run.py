"""`python -m bench.run [--device cuda] SUBJECT`: fastrerank against other engines, in one run on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.harness import models
from bench.harness.results import write_json

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DATA = ROOT.parent / "shared" / "data"


class Model(str, Enum):
    """Names of `bench.harness.models`."""

    minilm = "minilm"
    bge_base = "bge-base"


class Length(str, Enum):
    """How long the pairs are."""

    natural = "natural"
    full = "512"


class Device(str, Enum):
    """Where a subject runs."""

    cpu = "cpu"
    cuda = "cuda"


@app.callback()
def main(
    context: typer.Context,
    device: Annotated[Device, typer.Option(help="cuda for `all`, the comparison on a GPU")] = Device.cpu,
) -> None:
    """Compares fastrerank with other engines, in one run on this machine."""
    context.obj = device.value


@app.command("cross-encoder")
def cross_encoder(
    context: typer.Context,
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

    from bench.cross_encoder import cpu as bench
    from bench.cross_encoder import report

    log = Console(stderr=True)
    if context.obj != "cpu":
        log.print("[red]error:[/red] cross-encoder compares engines on a CPU; on a GPU run `all`", highlight=False)
        raise typer.Exit(2)
    with _said(log, ValueError, FileNotFoundError):
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
            command=_command(),
        )
        findings = bench.run(options, log, lambda found: write_json(found, json_file) if json_file else None)
    report.show(findings, markdown=markdown)
    raise typer.Exit(0 if findings.sound else 1)


@app.command("llm")
def llm(
    context: typer.Context,
    dtype: Annotated[str, typer.Option(help="precisions on a CPU: float32,bfloat16")] = "float32,bfloat16",
    docs: Annotated[int, typer.Option(min=10, max=1000, help="documents per query on a CPU")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="default: the cores of this process")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="peak memory on a CPU too")] = True,
    only: Annotated[str | None, typer.Option(help="models on a GPU: qwen3-0.6b,qwen3-4b,llama-3.1-8b")] = None,
    tiny: Annotated[bool, typer.Option(help="tiny shapes: does the benchmark work?")] = False,
    data: Annotated[Path | None, typer.Option(help="folder with the DL19 file")] = None,
    cache: Annotated[Path | None, typer.Option(help="checkpoints; default ~/.cache")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="on a GPU bench/results/gpu-llm.json")] = None,
    markdown: Annotated[bool, typer.Option(help="print Markdown instead of terminal tables")] = False,
) -> None:
    """LLM rerankers by first-token logits: Qwen3-Reranker's prompts of DL19 passages, one query.

    On a CPU a Qwen3 shape of 8 layers x 512; with --device cuda Qwen3-0.6B, Qwen3-4B and Llama-3.1-8B shapes. A JSON
    file of the same host and workload keeps the precisions that this run does not measure.
    """
    from rich.console import Console

    log = Console(stderr=True)
    elsewhere = (
        {"--only": only}
        if context.obj == "cpu"
        else {
            "--dtype": dtype != "float32,bfloat16",
            "--docs": docs != 100,
            "--threads": threads,
            "--no-memory": not memory,
        }
    )
    if given := [name for name, value in elsewhere.items() if value]:
        place = "GPU" if context.obj == "cpu" else "CPU"
        log.print(f"[red]error:[/red] {', '.join(given)} is for the comparison on a {place}", highlight=False)
        raise typer.Exit(2)
    if context.obj == "cuda":
        everything(
            context,
            parts="ceilings,llm",
            only=None,
            rounds=rounds,
            compiled=False,
            seconds=0.0,
            quick=False,
            tiny=tiny,
            data=data,
            cache=cache,
            json_file=json_file or (None if tiny else RESULTS / "gpu-llm.json"),
            markdown=markdown,
            llms=only,
        )
    from bench.llm import cpu as bench
    from bench.llm import report

    with _said(log, ValueError, FileNotFoundError):
        options = bench.Options(
            dtypes=tuple(dtype.split(",")),
            documents=docs,
            rounds=rounds,
            threads=threads or _cores(),
            memory=memory,
            tiny=tiny,
            data=data or DATA,
            cache=cache or models.default_cache(),
            command=_command(),
        )
        findings = bench.run(options, log, lambda found: report.write_json(found, json_file) if json_file else None)
    report.show(findings, markdown=markdown)
    raise typer.Exit(0 if findings.sound else 1)


@app.command("cur")
def cur(
    context: typer.Context,
    storage: Annotated[str, typer.Option(help="precisions of the index: float32,bfloat16,int8")] = "float32,int8",
    part: Annotated[str, typer.Option(help="recall, time, large (a million items) or all")] = "all",
    data: Annotated[Path, typer.Option(help="folder with cur/ and the SciFact file")] = DATA,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything")] = None,
    picture: Annotated[Path | None, typer.Option(help="write recall against budget to this SVG")] = None,
) -> None:
    """Search with few calls: recall of CURIndex, published ANNCUR and BM25 candidates at equal budget, and its time.

    With --device cuda the scan alone: ops.cur_topk over ten million int8 items against torch, the parts ceilings and
    cur of `all`.
    """
    from rich.console import Console

    log = Console(stderr=True)
    if context.obj == "cuda":
        if part != "all" or picture is not None:
            log.print("[red]error:[/red] --part and --picture are for searches on a CPU", highlight=False)
            raise typer.Exit(2)
        everything(
            context,
            parts="ceilings,cur",
            only=None,
            rounds=15,
            compiled=False,
            seconds=0.0,
            quick=False,
            tiny=False,
            data=data,
            cache=None,
            json_file=json_file or RESULTS / "gpu-cur.json",
            markdown=False,
            llms=None,
        )
    from bench.cur import search as bench

    with _said(log, ValueError, FileNotFoundError):
        if part not in ("recall", "time", "large", "all"):
            raise ValueError(f"--part must be recall, time, large or all, got {part!r}")
        command = _command()
        bench.run(data, tuple(storage.split(",")), json_file, picture, command, part)


@app.command("cur-scan")
def cur_scan(
    items: Annotated[int, typer.Option(min=1000, help="item vectors")] = 1_000_000,
    width: Annotated[int, typer.Option(min=1, help="their width")] = 256,
    k: Annotated[int, typer.Option(min=1, help="neighbours")] = 100,
    queries: Annotated[str, typer.Option(help="queries of a call: 1,32")] = "1,32",
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="default: the cores of this process")] = None,
    against: Annotated[str, typer.Option(help="rivals, of numpy,torch,faiss")] = "numpy,torch,faiss",
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything, raw times included")] = None,
) -> None:
    """Exact top-k of products with stored vectors on a CPU: ops.cur_topk against numpy, torch and FAISS."""
    from rich.console import Console

    from bench.cur import scan as bench

    options = bench.Options(
        items=items,
        width=width,
        k=k,
        queries=tuple(int(n) for n in queries.split(",")),
        rounds=rounds,
        threads=threads or _cores(),
        against=tuple(against.split(",")),
        command=_command(),
    )
    found = bench.run(options, Console(stderr=True))
    bench.show(found, Console())
    if json_file:
        bench.write_json(found, json_file)
    raise typer.Exit(0 if found.sound else 1)


@app.command("icr")
def icr(
    context: typer.Context,
    dtype: Annotated[str, typer.Option(help="precisions on a CPU: float32,bfloat16")] = "float32,bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="default: the cores of this process")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="peak memory too")] = True,
    tiny: Annotated[bool, typer.Option(help="tiny shapes: does the benchmark work?")] = False,
    parts: Annotated[str, typer.Option(help="on a GPU: from token ids, from texts")] = "ids,texts",
    data: Annotated[Path | None, typer.Option(help="folder with the DL19 file; a GPU needs none")] = None,
    cache: Annotated[Path | None, typer.Option(help="checkpoints; default ~/.cache")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="on a GPU bench/results/gpu-icr.json")] = None,
    markdown: Annotated[bool, typer.Option(help="print Markdown instead of terminal tables")] = False,
) -> None:
    """Attention read-outs (ICR, CoRe) of one prompt, against eager attention, two passes and a plain forward.

    On a CPU Qwen2.5-0.5B's shape at 2,048 context tokens; with --device cuda Llama-3.1-8B's with 20, 50 and 100
    documents of 100 tokens, from token ids to masses and from texts to scores.
    """
    from rich.console import Console

    log = Console(stderr=True)
    command = _command()
    if context.obj == "cuda":
        from bench.icr import gpu as gpu_icr

        file = json_file or (None if tiny else RESULTS / "gpu-icr.json")
        options_ = gpu_icr.Options(
            "cuda:0",
            tiny,
            rounds,
            tuple(parts.split(",")),
            (data,) if data else (DATA, ROOT / "shared" / "data"),
            cache or models.default_cache(),
            command,
        )
        with _said(log, ValueError):
            gpu = gpu_icr.run(options_, log, lambda found: write_json(found, file) if file else None)
        gpu_icr.show(gpu, markdown=markdown)
        raise typer.Exit(0 if gpu.sound else 1)
    from bench.icr import cpu as bench

    with _said(log, ValueError, FileNotFoundError):
        options = bench.Options(
            dtypes=tuple(dtype.split(",")),
            rounds=rounds,
            threads=threads or _cores(),
            memory=memory,
            tiny=tiny,
            data=data or DATA,
            cache=cache or models.default_cache(),
            command=command,
        )
        findings = bench.run(options, log, lambda found: bench.write_json(found, json_file) if json_file else None)
    bench.show(findings, markdown=markdown)
    raise typer.Exit(0 if findings.sound else 1)


@app.command("serve")
def serve(
    context: typer.Context,
    dtype: Annotated[str, typer.Option(help="precision: float32, bfloat16 or int8")] = "float32",
    clients: Annotated[int, typer.Option(min=1, help="that wait for their answers")] = 64,
    docs: Annotated[int, typer.Option(min=1, max=100, help="documents per request")] = 25,
    requests: Annotated[int, typer.Option(min=2, help="distinct requests")] = 172,
    seconds: Annotated[float, typer.Option(min=1, help="of the first load")] = 60.0,
    overload: Annotated[float, typer.Option(min=0, help="seconds at twice that throughput; 0 leaves it out")] = 30.0,
    queue_tokens: Annotated[int, typer.Option(min=1, help="--max-queue-tokens of our server")] = 200_000,
    options: Annotated[str, typer.Option(help="further options of our server")] = "",
    infinity_python: Annotated[
        Path | None, typer.Option(help="Python that has infinity-emb[server,torch]: compare with it")
    ] = None,
    infinity_options: Annotated[str, typer.Option(help="further options of its server: --batch-size 8")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="of the library alone; default: the cores")] = None,
    data: Annotated[Path, typer.Option(help="folder with the DL19 file")] = DATA,
    cache: Annotated[Path | None, typer.Option(help="checkpoints; default ~/.cache")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything")] = None,
) -> None:
    """The server under load on loopback: every answer checked, throughput, latency, overload, and infinity-emb."""
    from rich.console import Console

    from bench.serve import throughput as bench
    from bench.serve.servers import ServerError

    log = Console(stderr=True)
    if context.obj != "cpu":
        log.print("[red]error:[/red] serve measures a server on a CPU", highlight=False)
        raise typer.Exit(2)
    with _said(log, ValueError, FileNotFoundError, ServerError):
        found = bench.run(
            bench.Options(
                dtype=dtype,
                clients=clients,
                documents=docs,
                requests=requests,
                seconds=seconds,
                overload=overload,
                queue_tokens=queue_tokens,
                server_options=tuple(options.split()),
                infinity=infinity_python,
                infinity_options=tuple(infinity_options.split()),
                threads=threads or _cores(),
                data=data,
                cache=cache or models.default_cache(),
                command=_command(),
            ),
            log,
        )
    if json_file:
        bench.write_json(found, json_file)
    bench.show(found)
    raise typer.Exit(0 if found.sound else 1)


@app.command("beside")
def beside(
    dtype: Annotated[str, typer.Option(help="precision: float32, bfloat16 or int8")] = "float32",
    clients: Annotated[int, typer.Option(min=1, help="that send small requests")] = 2,
    docs: Annotated[int, typer.Option(min=1, max=100, help="documents of a small request")] = 10,
    large: Annotated[int, typer.Option(min=1, help="documents of a large request")] = 10_000,
    query_bytes: Annotated[int, typer.Option(min=1, help="of the long query")] = 2_000_000,
    seconds: Annotated[float, typer.Option(min=1, help="of each phase")] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, help="of the library alone; default: the cores")] = None,
    data: Annotated[Path, typer.Option(help="folder with the DL19 file")] = DATA,
    cache: Annotated[Path | None, typer.Option(help="checkpoints; default ~/.cache")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything")] = None,
) -> None:
    """The server's small requests, alone and beside large ones: p50 and p99, and p50 over a kept connection."""
    from rich.console import Console

    from bench.serve import beside as bench
    from bench.serve import throughput as serve
    from bench.serve.servers import ServerError

    log, folder = Console(stderr=True), cache or models.default_cache()
    with _said(log, ValueError, FileNotFoundError, ServerError):
        options = bench.Options(
            models.build("minilm", folder).path,
            serve.texts(data, 40, docs),
            dtype,
            clients,
            large,
            query_bytes,
            seconds,
            threads or _cores(),
            folder / "logs",
            _command(),
        )
        found = bench.run(options, log)
    if json_file:
        bench.write_json(found, json_file)
    bench.show(found)
    raise typer.Exit(0 if found.sound else 1)


@app.command("soak")
def soak(
    minutes: Annotated[float, typer.Option(min=0.2, help="in all, a third or two minutes of it to warm up")] = 20.0,
    clients: Annotated[int, typer.Option(min=1, help="honest ones")] = 4,
    docs: Annotated[int, typer.Option(min=1, max=100, help="documents of an honest request")] = 10,
    seed: Annotated[int, typer.Option(help="of what hostile clients send")] = 0,
    data: Annotated[Path, typer.Option(help="folder with the DL19 file")] = DATA,
    cache: Annotated[Path | None, typer.Option(help="checkpoints; default ~/.cache")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything")] = None,
) -> None:
    """The server under honest and hostile traffic and faults: right answers, health, memory, a killed worker."""
    from rich.console import Console

    from bench.serve import soak as bench
    from bench.serve import throughput as serve
    from bench.serve.servers import ServerError

    log, folder = Console(stderr=True), cache or models.default_cache()
    with _said(log, ValueError, FileNotFoundError, ServerError):
        options = bench.Options(
            models.build("minilm", folder).path,
            serve.texts(data, 60, docs),
            minutes,
            clients,
            _cores(),
            folder / "logs",
            _command(),
            seed,
        )
        found = bench.run(options, log)
    if json_file:
        write_json(found, json_file)
    bench.show(found)
    raise typer.Exit(1 if found.problems else 0)


@app.command("ray")
def ray(
    rows: Annotated[int, typer.Option(min=1000, help="pairs: DL19's, repeated")] = 200_000,
    workers: Annotated[int, typer.Option(min=1, help="of a local Ray, one thread each")] = 2,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or int8")] = "int8",
    model: Annotated[Model, typer.Option(help="which shape")] = Model.minilm,
    data: Annotated[Path, typer.Option(help="folder with the DL19 file")] = DATA,
    cache: Annotated[Path | None, typer.Option(help="checkpoints and files of pairs; default ~/.cache")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything")] = None,
) -> None:
    """Files of pairs scored on a local Ray: complete and equal to one process, with a worker and a job killed."""
    from rich.console import Console

    from bench import ray as bench

    log = Console(stderr=True)
    with _said(log, ValueError, FileNotFoundError):
        command = _command()
        options = bench.Options(rows, workers, dtype, model.value, data, cache or models.default_cache(), command)
        found = bench.run(options, log)
    bench.show(found)
    if json_file:
        write_json(found, json_file)
    raise typer.Exit(1 if found.problems else 0)


@app.command("all")
def everything(
    context: typer.Context,
    parts: Annotated[
        str | None,
        typer.Option(help="ceilings,attention,attention_mass,label_logits,cur,engines,latency,profile,llm; or all"),
    ] = None,
    only: Annotated[str | None, typer.Option(help="models: xlmr-large,minilm,modernbert-base; default all")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 15,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="engines under torch.compile too")] = True,
    seconds: Annotated[float, typer.Option(help="no further torch.compile is begun that would end later")] = 240.0,
    quick: Annotated[bool, typer.Option(help="5 rounds, no torch.compile")] = False,
    tiny: Annotated[bool, typer.Option(help="tiny shapes, which a CPU runs too: does the benchmark work?")] = False,
    data: Annotated[Path | None, typer.Option(help="folder with the DL19 file; without it, synthetic text")] = None,
    cache: Annotated[Path | None, typer.Option(help="checkpoints; default ~/.cache")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="default bench/results/gpu.json on a GPU")] = None,
    markdown: Annotated[bool, typer.Option(help="print Markdown instead of terminal tables")] = False,
    llms: Annotated[str | None, typer.Option(help="of the part llm: qwen3-0.6b,qwen3-4b,llama-3.1-8b")] = None,
) -> None:
    """Everything on a GPU: engines end to end, kernels alone, bandwidth, and a profile of a forward."""
    from rich.console import Console

    from bench.cross_encoder import gpu_models
    from bench.everything import comparison as bench
    from bench.everything import report as gpu_report
    from bench.llm import models as llm_models

    log = Console(stderr=True)
    if json_file is None and context.obj == "cuda" and not tiny:
        json_file = RESULTS / "gpu.json"
    options = bench.Options(
        device="cuda:0" if context.obj == "cuda" else "cpu",
        tiny=tiny,
        rounds=min(rounds, 5) if quick else rounds,
        parts=tuple(parts.split(",")) if parts else bench.PARTS,
        models=tuple(only.split(",")) if only else tuple(gpu_models.SHAPES),
        llms=tuple(llms.split(",")) if llms else tuple(llm_models.SHAPES),
        compile=compiled and not quick,
        seconds=seconds,
        data=(data,) if data else (DATA, ROOT / "shared" / "data"),
        cache=cache or models.default_cache(),
        command=_command(),
    )
    with _said(log, ValueError, RuntimeError):
        found = bench.run(options, log, lambda found: write_json(found, json_file) if json_file else None)
    gpu_report.show(found, markdown=markdown)
    raise typer.Exit(0 if found.sound else 1)


@app.command("unattended")
def unattended(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(min=30, help="all steps end within so many seconds")] = 570.0,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds of each comparison")] = 7,
    only: Annotated[str | None, typer.Option(help="steps: build,cur,icr,llm,engines,kernels,tests,compiled")] = None,
    tiny: Annotated[bool, typer.Option(help="tiny shapes, which a CPU runs too: does the command work?")] = False,
    data: Annotated[Path | None, typer.Option(help="folder with the DL19 file; without it, synthetic text")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="written anew after each step")] = RESULTS / "gpu-run.json",
) -> None:
    """On a GPU: every comparison and `make test-gpu`, each in a process of its own, ended when its time is up."""
    from rich.console import Console

    from bench.everything import unattended as bench

    log = Console(stderr=True)
    todo = bench.steps(context.obj, rounds, data, tiny=tiny)
    wanted = only.split(",") if only else [step.name for step in todo]
    if unknown := set(wanted) - {step.name for step in todo}:
        log.print(f"[red]error:[/red] step {', '.join(sorted(unknown))} is unknown", highlight=False)
        raise typer.Exit(2)
    if context.obj == "cpu" and not tiny:
        log.print("[red]error:[/red] a CPU runs tiny shapes only: give --tiny, or --device cuda", highlight=False)
        raise typer.Exit(2)
    outcomes = bench.run([step for step in todo if step.name in wanted], seconds, json_file, log)
    bench.show(outcomes, json_file)
    raise typer.Exit(0 if all(one.state == "ok" for one in outcomes) else 1)


@contextmanager
def _said(log: Any, *errors: type[Exception]) -> Iterator[None]:
    """Print one of `errors` and exit: with code 2 for a ValueError, which says that the command was wrong, else 1."""
    try:
        yield
    except errors as error:
        log.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


def _command() -> str:
    return "python -m bench.run " + " ".join(sys.argv[1:])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    app()
