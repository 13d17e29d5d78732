"""`fastrerank serve` for a while under honest and hostile traffic and faults: what must hold while it lasts.

Honest clients ask DL19 queries and compare every score with the library's, bit for bit. Beside them clients send what
no honest one would (`bench.serve.hostile`), trickle, vanish, storm a full queue, and make the reranker panic
(`bench.serve.faulty`). /health is asked without a pause. At the end a worker thread is killed: the process must say so
and end, and a new one must answer. Everything runs on loopback and stops by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness.host import host
from bench.serve.faulty import BREAK, DIE, PANIC
from bench.serve.hostile import KINDS, bodies
from bench.serve.load import Connection, Reply, compare, http_request
from bench.serve.servers import NAME, Server

MOST_HEALTH_SECONDS, MOST_GROWTH = 1.0, 50 << 20
QUEUE_TOKENS, BODY_MB = 400_000, 2.0
LAST_SECONDS = 20.0  # for answers that are on their way when the time is over
# What hostile and faulty requests may get. 0: the server closed the connection.
_ALLOWED = {0, 200, 400, 404, 408, 413, 422, 424, 429, 500}


@dataclass(frozen=True)
class Options:
    """What to run; see `python -m bench.run soak --help`."""

    checkpoint: Path
    asked: list[tuple[str, list[str]]]
    minutes: float
    clients: int
    threads: int
    logs: Path
    command: str
    seed: int = 0


@dataclass
class Findings:
    """Everything a run found; memory in bytes, latencies in seconds. `problems`: what did not hold."""

    host: dict[str, Any]
    minutes: float
    honest: dict[str, int] = field(default_factory=dict)  # by status
    hostile: dict[str, dict[str, int]] = field(default_factory=dict)  # kind -> status -> how many
    wrong: int = 0
    health_asked: int = 0
    health_longest: float = 0.0
    resident: dict[str, int] = field(default_factory=dict)
    killed: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _Soak:
    """The clients of one server, until `end`."""

    def __init__(
        self, server: Server, options: Options, expected: list[NDArray[np.float32]], findings: Findings
    ) -> None:
        self.address, self.server, self.options = server.address, server, options
        self.expected, self.findings = expected, findings
        self.random = random.Random(options.seed)
        self.small = [self.body(query, documents) for query, documents in options.asked]
        self.hostile: dict[str, Counter[str]] = {}
        self.honest: Counter[str] = Counter()
        self.end = 0.0

    def body(self, query: str, documents: list[str]) -> bytes:
        asked = {"model": NAME, "query": query, "documents": documents, "raw_scores": True}
        return http_request("/rerank", asked, self.address)

    def over(self) -> bool:
        return time.monotonic() >= self.end

    async def run(self, warm: float, seconds: float) -> None:
        self.end = time.monotonic() + warm + seconds
        jobs = [self.honest_client(i) for i in range(self.options.clients)]
        jobs += [self.health(), self.memory(warm), self.large()]
        jobs += [self.each(one) for one in (self.bad_body, self.fault, self.slow, self.vanish, self.too_large)]
        jobs.append(self.each(self.storm, pause=10.0))
        tasks = [asyncio.ensure_future(job) for job in jobs]
        done, late = await asyncio.wait(tasks, timeout=warm + seconds + LAST_SECONDS)
        for task in late:  # answers of a machine that others use, too
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()
        await asyncio.sleep(2.0)
        self.findings.resident["end"] = self.server.resident_bytes()
        self.findings.honest = dict(self.honest)
        self.findings.hostile = {kind: dict(counts) for kind, counts in self.hostile.items()}

    def problem(self, text: str) -> None:
        if len(self.findings.problems) < 50:
            self.findings.problems.append(text)

    async def honest_client(self, first: int) -> None:
        connection = Connection(self.address)
        for number in itertools.count(first, self.options.clients):
            if self.over():
                break
            number %= len(self.small)
            reply = await connection.ask(number, self.small[number])
            self.honest[str(reply.status)] += 1
            if reply.status == 429 and reply.retry_after:
                await asyncio.sleep(min(reply.retry_after, 2))
            elif reply.status == 200:
                self.check(reply)
            else:
                self.problem(f"an honest request got {reply.status}: {reply.body[:200]!r}")
                await asyncio.sleep(0.1)
        connection.close()

    def check(self, reply: Reply) -> None:
        verdict = compare([reply], self.expected, 0.0)
        if verdict.wrong:
            self.findings.wrong += 1
            self.problem(verdict.first)

    async def large(self) -> None:
        """Many documents in one request: every query's, asked as the first, which must not starve the others."""
        documents = [text for _, texts in self.options.asked for text in texts]
        body = self.body(self.options.asked[0][0], documents)
        connection = Connection(self.address)
        while not self.over():
            reply = await connection.ask(0, body)
            self.count("many documents", reply)
            if reply.status == 200:
                rows = {row["index"]: row["relevance_score"] for row in json.loads(reply.body)["results"]}
                right = self.expected[0]
                if [np.float32(rows[i]) for i in range(len(right))] != list(right):
                    self.findings.wrong += 1
                    self.problem("a large request got other scores")
            await asyncio.sleep(1.0)
        connection.close()

    async def health(self) -> None:
        """Ask /health from a process of its own, whose waits are the server's alone."""
        command = (sys.executable, "-m", "bench.serve.probe", str(self.address.port), str(self.end - time.monotonic()))
        probe = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            out, _ = await probe.communicate()
        finally:
            with suppress(ProcessLookupError):
                probe.kill()
        seen = json.loads(out)
        self.findings.health_asked, self.findings.health_longest = seen["asked"], seen["longest"]
        if seen["other"]:
            self.problem(f"/health got {seen['other']}")

    async def memory(self, warm: float) -> None:
        self.findings.resident["begin"] = self.server.resident_bytes()
        await asyncio.sleep(warm)
        self.findings.resident["warm"] = self.server.resident_bytes()
        while not self.over():
            now = self.server.resident_bytes()
            self.findings.resident["most"] = max(now, self.findings.resident.get("most", 0))
            await asyncio.sleep(0.25)

    async def each(self, one: Callable[[], Awaitable[None]], pause: float = 0.3) -> None:
        while not self.over():
            await one()
            await asyncio.sleep(self.random.uniform(0.5, 1.5) * pause)

    def count(self, kind: str, reply: Reply) -> None:
        self.hostile.setdefault(kind, Counter())[str(reply.status)] += 1
        if reply.status not in _ALLOWED:
            self.problem(f"{kind} got {reply.status}: {reply.body[:200]!r}")

    async def once(self, kind: str, request: bytes) -> Reply:
        connection = Connection(self.address)
        reply = await connection.ask(0, request)
        connection.close()
        self.count(kind, reply)
        return reply

    async def bad_body(self) -> None:
        size = self.random.choice((1_000, 30_000, 300_000, 1_500_000))
        seed, first = self.random.randrange(1 << 30), self.random.randrange(len(KINDS))
        kind, route, raw = await asyncio.to_thread(lambda: next(bodies(1, size, seed, first)))
        await self.once(kind, self.head(route, len(raw)) + raw)

    def head(self, route: str, length: int) -> bytes:
        return (
            f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    async def fault(self) -> None:
        text = self.random.choice((PANIC, BREAK))
        reply = await self.once(text, self.body("q", ["an owl", text]))
        if reply.status not in (429, 500):
            self.problem(f"{text!r} got {reply.status}")

    async def too_large(self) -> None:
        size = int(BODY_MB * 2**20) + 1
        await self.once("a body that is too large", self.head("/rerank", size) + b"x" * size)
        query = "a long query " * 4000
        await self.once("a request beyond its share", self.body(query, ["x"] * 5000))

    async def slow(self) -> None:
        """A client that sends its headers, or its body, byte by byte, and gives up at last."""
        part = self.random.choice((b"POST /rerank HTTP/1.1\r\nHost: x\r\nX-Slow: ", self.head("/rerank", 1000) + b"{"))
        await self.partly(part, b"x", self.random.uniform(0.5, 4.0))

    async def vanish(self) -> None:
        """Clients that go away while their request is computed."""
        for _ in range(3):
            await self.partly(self.random.choice(self.small), b"", 0.0)

    async def partly(self, first: bytes, more: bytes, seconds: float) -> None:
        end = time.monotonic() + seconds
        with suppress(OSError):
            _, writer = await asyncio.open_connection(self.address.host, self.address.port)
            with suppress(OSError):
                writer.write(first)
                await writer.drain()
                while time.monotonic() < end and not writer.is_closing():
                    writer.write(more)
                    await asyncio.sleep(0.1)
            writer.close()
        kind = "slow clients" if more else "clients that vanish"
        self.hostile.setdefault(kind, Counter())["-"] += 1

    async def storm(self) -> None:
        """So many requests at once that the queue is full."""
        documents = [text for _, texts in self.options.asked for text in texts][:100]
        body = self.body("a storm", documents)

        async def one() -> None:
            connection = Connection(self.address)
            with suppress(asyncio.TimeoutError):
                self.count("a storm", await asyncio.wait_for(connection.ask(0, body), 5.0))
            connection.close()  # who has no answer by then goes away

        await asyncio.gather(*(one() for _ in range(60)))


def run(options: Options, log: Any) -> Findings:
    """Equals what the soak found; `log` is a rich console for progress."""
    import fastrerank

    reranker = fastrerank.load(str(options.checkpoint), device="cpu", num_threads=options.threads, dtype="float32")
    expected = reranker.score_many(*map(list, zip(*options.asked, strict=True)))
    del reranker
    findings = Findings(host(options), options.minutes)
    seconds = 60 * options.minutes
    warm = min(120.0, seconds / 3)
    with _server(options) as server:
        log.print(f"[dim]{seconds - warm:.0f} s after {warm:.0f} s to warm up[/dim]")
        asyncio.run(_Soak(server, options, expected, findings).run(warm, seconds - warm))
        log.print("[dim]a worker thread is killed[/dim]")
        asyncio.run(_kill(server, options, findings))
    with _server(options) as server:  # as an orchestrator does
        again = _Soak(server, options, expected, findings)
        reply = asyncio.run(again.once("after the kill", again.small[0]))
        again.check(reply)
        findings.killed["answers_again"] = reply.status == 200
    _judge(findings)
    return findings


def _server(options: Options) -> Server:
    command = [
        sys.executable,
        "-m",
        "bench.serve.faulty",
        "--model",
        f"{NAME}={options.checkpoint}",
        "--max-queue-tokens",
        str(QUEUE_TOKENS),
        "--max-body-mb",
        str(BODY_MB),
        "--header-timeout",
        "2",
        "--body-timeout",
        "2",
    ]
    return Server("bench.serve.faulty", version("fastrerank"), command, options.logs / "soak.log")


async def _kill(server: Server, options: Options, findings: Findings) -> None:
    """Kill a worker thread while honest requests wait; the process must end by itself, and not of a signal."""
    soak = _Soak(server, options, [], findings)
    waiting = [asyncio.ensure_future(Connection(soak.address).ask(0, body)) for body in soak.small[:8]]
    begin = time.monotonic()
    died = await Connection(soak.address).ask(0, soak.body("q", [DIE]))
    statuses = Counter(str(reply.status) for reply in await asyncio.gather(*waiting))
    while server.process.poll() is None and time.monotonic() < begin + 30:
        await asyncio.sleep(0.05)
    findings.killed = {
        "status": died.status,
        "others": dict(statuses),
        "exit_code": server.process.poll(),
        "seconds": time.monotonic() - begin,
    }


def _judge(findings: Findings) -> None:
    """Add to `problems` what did not hold in all."""
    add, resident = findings.problems.append, findings.resident
    if findings.wrong or not findings.honest.get("200"):
        add(f"{findings.wrong} honest answers are wrong, of {findings.honest}")
    if not findings.health_asked:
        add("/health was not asked")
    if findings.health_longest > MOST_HEALTH_SECONDS:
        add(f"/health took {findings.health_longest:.2f} s, at most {MOST_HEALTH_SECONDS:g} s are wanted")
    growth = resident["end"] - resident["warm"]
    if growth > MOST_GROWTH:
        add(f"memory grew by {growth >> 20} MiB since the warm-up, at most {MOST_GROWTH >> 20} are wanted")
    killed = findings.killed
    if killed["status"] != 503 or not killed["exit_code"] or killed["exit_code"] < 0 or not killed["answers_again"]:
        add(f"a killed worker: {killed}")


def show(findings: Findings) -> None:
    """Prints what was found."""
    from rich.console import Console

    console = Console()
    resident = {name: f"{value / 2**20:.0f} MiB" for name, value in findings.resident.items()}
    rows = {
        "honest answers": findings.honest,
        "wrong": findings.wrong,
        "/health": f"{findings.health_asked} answers, the longest after {findings.health_longest:.3f} s",
        "memory": resident,
        "killed worker": findings.killed,
    }
    for name, value in (rows | findings.hostile).items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    for text in findings.problems:
        console.print(f"[red]{text}[/red]", highlight=False, soft_wrap=True)
