"""`fastrerank serve` under load: every answer checked, throughput against the library alone, and what overload does.

One run: half of the pairs scored by the library without a server; many clients that wait for their answers; the other
half by the library; clients that come at twice the rate that was reached; a rival server under the first load. Server
and clients share the machine's cores, so the clients' CPU time is counted.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness import data, models, results
from bench.harness.host import host
from bench.serve import servers
from bench.serve.load import Phase, closed, compare, http_request, opened
from bench.serve.servers import Memory, Server

# A rival in float32 has other summation orders and padded batches; the project's own bound against transformers.
RELATIVE = 2e-5
LEAST_SHARE, MOST_SPREAD = 0.9, 3.0  # of throughput against the library alone; of p99 against p50


@dataclass(frozen=True)
class Options:
    """What to run; see `python -m bench.run serve --help`."""

    dtype: str
    clients: int
    documents: int
    requests: int
    seconds: float
    overload: float
    queue_tokens: int
    server_options: tuple[str, ...]
    infinity: Path | None
    infinity_options: tuple[str, ...]
    threads: int
    data: Path
    cache: Path
    command: str


@dataclass(frozen=True)
class Load:
    """What one phase did. Latencies in seconds, `cpu` in seconds of server and of clients, memory in bytes."""

    wall: float
    sent: int
    answered: int
    refused: int
    failed: int
    unannounced: int  # 429 without Retry-After
    wrong: int
    furthest: float
    problem: str
    documents_per_second: float
    p50: float
    p95: float
    p99: float
    longest: float
    server_cpu: float
    client_cpu: float
    resident_before: int
    resident_most: int
    refused_p99: float | None = None

    @property
    def clean(self) -> bool:
        """Whether every request had its answer, and every answer was right."""
        return self.failed == 0 and self.wrong == 0 and self.unannounced == 0 and self.answered > 0


@dataclass
class Findings:
    """Everything a run found; `show` prints it, `write_json` writes it."""

    host: dict[str, Any]
    workload: dict[str, Any]
    offline: dict[str, Any]
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    loads: dict[str, dict[str, Load]] = field(default_factory=dict)  # server -> phase -> what it did

    @property
    def share(self) -> float:
        """Documents per second of our server over the library's own."""
        return self.loads["fastrerank"]["closed"].documents_per_second / float(self.offline["documents_per_second"])

    @property
    def sound(self) -> bool:
        """Whether no server lost or changed an answer. Speed is reported, not judged here."""
        return all(load.clean for loads in self.loads.values() for load in loads.values())


def texts(folder: Path, count: int, documents: int, seed: int = models.SEED) -> list[tuple[str, list[str]]]:
    """Equals `count` requests (query, its next `documents` BM25 passages) of DL19, in a random order.

    Raises
    ------
    FileNotFoundError: no DL19 file in `folder`. ValueError: more requests than the file has.
    """
    path = folder / data.DL19
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the folder that holds {data.DL19} with --data")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    found = [
        (row["query"], [candidate["text"] for candidate in row["candidates"][begin : begin + documents]])
        for row in rows
        for begin in range(0, len(row["candidates"]) - documents + 1, documents)
    ]
    if not 2 <= count <= len(found):
        raise ValueError(f"--requests must be from 2 to {len(found)} with {documents} documents each, got {count}")
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count]]


def run(options: Options, log: Any) -> Findings:
    """Equals the findings of all phases; `log` is a rich console for progress.

    Raises
    ------
    servers.ServerError: a server did not start.
    """
    import fastrerank

    model = models.build("minilm", options.cache)
    asked = texts(options.data, options.requests, options.documents)
    reranker = fastrerank.load(str(model.path), device="cpu", dtype=options.dtype, num_threads=options.threads)
    reranker.score_many(*_columns(asked[:2]))  # threads and weights are there before the clock starts
    half = len(asked) // 2
    log.print(f"[dim]the library alone: {half} requests[/dim]")
    first, seconds_first, tokens_first = _offline(reranker, asked[:half])
    findings = Findings(
        host=host(options),
        workload={
            "model": model.note,
            "dtype": options.dtype,
            "clients": options.clients,
            "documents": options.documents,
            "distinct_requests": len(asked),
            "seconds": options.seconds,
            "queue_tokens": options.queue_tokens,
        },
        offline={},
    )
    logs = options.cache / "logs"
    queue = ("--max-queue-tokens", str(options.queue_tokens), *options.server_options)
    with servers.fastrerank(model.path, options.dtype, logs, queue) as server:
        findings.servers[server.name] = _about(server)
        bodies = [_request(server, query, documents) for query, documents in asked]
        closed(server.address, bodies, 4, 0.5)
        log.print(f"[dim]{server.name}: {options.clients} clients, {options.seconds:g} s[/dim]")
        steady = _Measured(server, lambda: closed(server.address, bodies, options.clients, options.seconds))
        log.print(f"[dim]the library alone: {len(asked) - half} requests[/dim]")
        second, seconds_second, tokens_second = _offline(reranker, asked[half:])
        expected = [*first, *second]
        total = sum(len(documents) for _, documents in asked)
        findings.offline = {
            "seconds": [seconds_first, seconds_second],
            "documents": total,
            "tokens": tokens_first + tokens_second,
            "documents_per_second": total / (seconds_first + seconds_second),
        }
        found = findings.loads[server.name] = {"closed": steady.load(options, expected, 0.0)}
        if options.overload:
            rate = 2 * found["closed"].documents_per_second / options.documents
            log.print(f"[dim]{server.name}: {rate:.1f} requests/s, {options.overload:g} s[/dim]")
            flood = _Measured(server, lambda: opened(server.address, bodies, rate, options.overload))
            found["overload"] = flood.load(options, expected, 0.0)
    del reranker
    if options.infinity is not None:
        wanted = options.dtype if options.dtype in ("float32", "bfloat16") else "float32"
        with servers.infinity(model.path, wanted, logs, options.infinity, options.infinity_options) as server:
            findings.servers[server.name] = _about(server) | {"dtype": wanted}
            bodies = [_request(server, query, documents) for query, documents in asked]
            closed(server.address, bodies, 4, 2.0)
            log.print(f"[dim]{server.name}: {options.clients} clients, {options.seconds:g} s[/dim]")
            steady = _Measured(server, lambda: closed(server.address, bodies, options.clients, options.seconds))
            largest = max(float(np.abs(scores).max()) for scores in expected)
            spread = min(float(np.std(scores)) for scores in expected)
            allowed = RELATIVE * largest if options.dtype == wanted == "float32" else spread
            findings.loads[server.name] = {"closed": steady.load(options, expected, allowed)}
    return findings


class _Measured:
    """A phase with what the server's process took while it ran."""

    def __init__(self, server: Server, work: Callable[[], Phase]) -> None:
        before = server.cpu_seconds()
        with Memory(server) as self._memory:
            self._phase = work()
        self._cpu = server.cpu_seconds() - before

    def load(self, options: Options, expected: list[NDArray[np.float32]], allowed: float) -> Load:
        """Equals the phase's figures; answers are read and compared here, when nothing is timed."""
        phase = self._phase
        verdict = compare(phase.answered(), expected, allowed)
        refused = [reply for reply in phase.replies if reply.status == 429]
        failed = [reply for reply in phase.replies if reply.status not in (200, 429)]
        problem = verdict.first
        if failed:
            problem = problem or f"status {failed[0].status}: {failed[0].body[:200]!r}"
        return Load(
            wall=phase.end - phase.begin,
            sent=len(phase.replies),
            answered=len(phase.answered()),
            refused=len(refused),
            failed=len(failed),
            unannounced=sum(reply.retry_after is None for reply in refused),
            wrong=verdict.wrong,
            furthest=verdict.furthest,
            problem=problem,
            documents_per_second=phase.rate * options.documents,
            p50=phase.percentile(50),
            p95=phase.percentile(95),
            p99=phase.percentile(99),
            longest=phase.percentile(100),
            server_cpu=self._cpu,
            client_cpu=phase.cpu,
            resident_before=self._memory.first,
            resident_most=self._memory.most,
            refused_p99=float(np.percentile([reply.seconds for reply in refused], 99)) if refused else None,
        )


def _columns(asked: list[tuple[str, list[str]]]) -> tuple[list[str], list[list[str]]]:
    return [query for query, _ in asked], [documents for _, documents in asked]


def _offline(reranker: Any, asked: list[tuple[str, list[str]]]) -> tuple[list[NDArray[np.float32]], float, int]:
    begin = time.perf_counter()
    scores = reranker.score_many(*_columns(asked))
    return scores, time.perf_counter() - begin, int(reranker.last_usage["tokens"])


def _request(server: Server, query: str, documents: list[str]) -> bytes:
    body = {"model": servers.NAME, "query": query, "documents": documents, "raw_scores": True}
    return http_request("/rerank", body, server.address)


def _about(server: Server) -> dict[str, Any]:
    return {"version": server.version, "command": " ".join(Path(part).name for part in server.command)}


def write_json(findings: Findings, path: Path) -> None:
    """Write everything to `path`."""
    summary = {"share_of_offline": findings.share, "sound": findings.sound}
    results.write_json(findings, path, {"summary": summary})


def show(findings: Findings) -> None:
    """Prints a table of the phases and what they say."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    work, offline = findings.workload, findings.offline
    console.print(
        f"{work['model']}, {work['dtype']}; {work['distinct_requests']} requests of {work['documents']} DL19 passages, "
        f"{offline['tokens'] / offline['documents']:.0f} tokens a pair; the library alone: "
        f"{offline['documents_per_second']:.1f} documents/s",
        highlight=False,
        soft_wrap=True,
    )
    names = (
        "server",
        "load",
        "documents/s",
        "p50 s",
        "p95 s",
        "p99 s",
        "longest s",
        "answered",
        "429",
        "failed",
        "wrong",
        "CPU s",
        "clients' CPU s",
        "MiB before",
        "MiB most",
    )
    table = Table(*names)
    for server, loads in findings.loads.items():
        for phase, load in loads.items():
            table.add_row(
                server,
                phase,
                f"{load.documents_per_second:.1f}",
                f"{load.p50:.3f}",
                f"{load.p95:.3f}",
                f"{load.p99:.3f}",
                f"{load.longest:.3f}",
                str(load.answered),
                str(load.refused),
                str(load.failed),
                str(load.wrong),
                f"{load.server_cpu:.1f}",
                f"{load.client_cpu:.1f}",
                f"{load.resident_before / 2**20:.0f}",
                f"{load.resident_most / 2**20:.0f}",
            )
            if load.problem:
                console.print(f"[red]{server}, {phase}: {load.problem}[/red]", highlight=False)
    console.print(table)
    ours = findings.loads["fastrerank"]["closed"]
    console.print(
        f"{findings.share:.3f} of the library alone (at least {LEAST_SHARE:g} wanted); p99 is "
        f"{ours.p99 / ours.p50:.2f} times p50 (at most {MOST_SPREAD:g} wanted)",
        highlight=False,
    )
    flood = findings.loads["fastrerank"].get("overload")
    if flood is not None:
        pair = offline["tokens"] / offline["documents"]
        full = work["queue_tokens"] / (flood.documents_per_second * pair)
        refused = f", refused within {flood.refused_p99:.3f} s (p99)" if flood.refused_p99 is not None else ""
        console.print(
            f"at twice the rate: a full queue of {work['queue_tokens']} tokens takes {full:.1f} s; accepted requests "
            f"waited {flood.p99:.1f} s (p99){refused}; {flood.unannounced} of {flood.refused} refusals lacked "
            "Retry-After",
            highlight=False,
        )
    for server, loads in findings.loads.items():
        if server != "fastrerank":
            ratio = ours.documents_per_second / loads["closed"].documents_per_second
            about = findings.servers[server]
            console.print(
                f"{ratio:.2f} times the throughput of {server} {about['version']} in {about['dtype']}; largest "
                f"difference of a score {loads['closed'].furthest:.2g}",
                highlight=False,
            )
