"""Small requests to `fastrerank serve`, alone and beside large ones: how much longer they take.

One run: small requests one after the other on kept connections, alone; the same while one client sends requests of ten
thousand documents; the same beside a query of two megabytes. Every answer to a small request is checked. And the time
of the smallest request over a kept connection against the library's own, which shows what the server adds.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness import results
from bench.harness.host import host
from bench.serve import servers
from bench.serve.load import Address, Connection, Phase, compare, http_request

MOST_P50, MOST_P99 = 3.0, 10.0  # times what small requests take alone


@dataclass(frozen=True)
class Options:
    """What to run; see `python -m bench.run beside --help`."""

    checkpoint: Path
    asked: list[tuple[str, list[str]]]
    dtype: str
    clients: int
    large_documents: int
    query_bytes: int
    seconds: float
    threads: int
    logs: Path
    command: str


@dataclass(frozen=True)
class Beside:
    """Small requests of one phase, in seconds; `large`: statuses of the large ones that began meanwhile."""

    p50: float
    p99: float
    longest: float
    answered: int
    other: int  # any status but 200
    wrong: int
    problem: str
    large: dict[str, int]


@dataclass
class Findings:
    """Everything a run found."""

    host: dict[str, Any]
    workload: dict[str, Any]
    kept: dict[str, float] = field(default_factory=dict)
    phases: dict[str, Beside] = field(default_factory=dict)

    def ratio(self, name: str) -> tuple[float, float]:
        """p50 and p99 of a phase over those alone."""
        alone, one = self.phases["alone"], self.phases[name]
        return one.p50 / alone.p50, one.p99 / alone.p99

    @property
    def sound(self) -> bool:
        """Whether every small request had its right answer, within the bounds."""
        fair = all(self.ratio(name)[0] <= MOST_P50 and self.ratio(name)[1] <= MOST_P99 for name in self.phases)
        return fair and all(one.answered and not one.other and not one.wrong for one in self.phases.values())


def run(options: Options, log: Any) -> Findings:
    """Equals the findings of all phases; `log` is a rich console for progress."""
    import fastrerank

    reranker = fastrerank.load(str(options.checkpoint), device="cpu", dtype=options.dtype, num_threads=options.threads)
    expected = reranker.score_many(*map(list, zip(*options.asked, strict=True)))
    findings = Findings(
        host(options),
        {
            "clients": options.clients,
            "documents": len(options.asked[0][1]),
            "large_documents": options.large_documents,
            "query_bytes": options.query_bytes,
            "seconds": options.seconds,
            "dtype": options.dtype,
        },
    )
    texts = [text for _, documents in options.asked for text in documents]
    many = [texts[i % len(texts)] for i in range(options.large_documents)]
    query = (" ".join(texts) + " ") * (1 + options.query_bytes // max(1, sum(map(len, texts))))
    with servers.fastrerank(options.checkpoint, options.dtype, options.logs) as server:
        small = [_body(server.address, query_, documents) for query_, documents in options.asked]
        findings.kept = _kept(server.address, reranker, texts[:50])
        large = {
            "alone": None,
            f"beside {options.large_documents} documents": _body(server.address, options.asked[0][0], many),
            f"beside a query of {options.query_bytes} bytes": _body(
                server.address, query[: options.query_bytes], texts[:100]
            ),
        }
        del reranker
        for name, body in large.items():
            log.print(f"[dim]small requests {name}, {options.seconds:g} s[/dim]")
            findings.phases[name] = asyncio.run(_phase(server.address, small, expected, body, options))
    return findings


def _body(address: Address, query: str, documents: list[str]) -> bytes:
    return http_request("/rerank", {"query": query, "documents": documents, "raw_scores": True}, address)


async def _phase(
    address: Address, small: list[bytes], expected: list[NDArray[np.float32]], large: bytes | None, options: Options
) -> Beside:
    phase = Phase(time.perf_counter())
    statuses: dict[str, int] = {}

    async def ask(first: int) -> None:
        connection, number = Connection(address), first
        while time.perf_counter() < phase.begin + options.seconds:
            phase.replies.append(await connection.ask(number % len(small), small[number % len(small)]))
            number += options.clients
        connection.close()

    async def burden(body: bytes) -> None:
        connection = Connection(address)
        try:
            while True:
                reply = await connection.ask(0, body)
                statuses[str(reply.status)] = statuses.get(str(reply.status), 0) + 1
                if reply.status != 200:
                    await asyncio.sleep(0.5)
        finally:
            connection.close()

    heavy = None if large is None else asyncio.ensure_future(burden(large))
    if heavy is not None:
        await asyncio.sleep(1.0)  # it has begun
        phase.begin = time.perf_counter()
    await asyncio.gather(*(ask(i) for i in range(options.clients)))
    if heavy is not None:
        heavy.cancel()
        await asyncio.gather(heavy, return_exceptions=True)
    verdict = compare(phase.answered(), expected, 0.0)
    others = [reply for reply in phase.replies if reply.status != 200]
    problem = verdict.first or (f"{others[0].status}: {others[0].body[:200]!r}" if others else "")
    return Beside(
        phase.percentile(50),
        phase.percentile(99),
        phase.percentile(100),
        len(phase.answered()),
        len(others),
        verdict.wrong,
        problem,
        statuses,
    )


def _kept(address: Address, reranker: Any, texts: list[str]) -> dict[str, float]:
    """Medians in seconds of one document: by the library, and by the server over one connection that is kept."""

    async def ask() -> list[float]:
        connection = Connection(address)
        seconds = []
        for text in texts:
            reply = await connection.ask(0, _body(address, "how long do fleas live", [text]))
            seconds.append(reply.seconds)
        connection.close()
        return seconds

    own = []
    for text in texts:
        begin = time.perf_counter()
        reranker.score("how long do fleas live", [text])
        own.append(time.perf_counter() - begin)
    asyncio.run(ask())
    kept = asyncio.run(ask())
    return {"library": float(np.median(own)), "kept_connection": float(np.median(kept))}


def write_json(findings: Findings, path: Path) -> None:
    """Write everything to `path`."""
    ratios = {name: dict(zip(("p50", "p99"), findings.ratio(name), strict=True)) for name in findings.phases}
    results.write_json(findings, path, {"ratios": ratios, "sound": findings.sound})


def show(findings: Findings) -> None:
    """Prints a table of the phases."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        "small requests", "p50 s", "p99 s", "longest s", "p50 x", "p99 x", "answered", "other", "wrong", "large ones"
    )
    for name, one in findings.phases.items():
        p50, p99 = findings.ratio(name)
        table.add_row(
            name,
            f"{one.p50:.4f}",
            f"{one.p99:.4f}",
            f"{one.longest:.4f}",
            f"{p50:.2f}",
            f"{p99:.2f}",
            str(one.answered),
            str(one.other),
            str(one.wrong),
            str(one.large),
        )
        if one.problem:
            console.print(f"[red]{name}: {one.problem}[/red]", highlight=False)
    console.print(table)
    kept = findings.kept
    console.print(
        f"one document over a kept connection: {1e3 * kept['kept_connection']:.2f} ms, the library alone "
        f"{1e3 * kept['library']:.2f} ms",
        highlight=False,
    )
