"""Many HTTP clients in one event loop, lean enough to share its cores with the server that it asks.

Requests are bytes made beforehand and answers are kept as bytes: everything that can wait until the clock has stopped
does. Two ways to ask: `closed`, where each client sends its next request when it has its answer, and `opened`, where
requests come at a rate that does not wait for answers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_CLOSE = re.compile(rb"(?i)\r\nconnection: *close")
_RETRY = re.compile(rb"(?i)\r\nretry-after: *(\d+)")
PATIENCE = 300.0  # seconds for an answer


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str
    port: int


@dataclass(frozen=True)
class Reply:
    """What came back for request `number`: HTTP status (0: no answer, and `body` says why), and when, in seconds."""

    number: int
    begin: float
    end: float
    status: int
    retry_after: int | None
    body: bytes

    @property
    def seconds(self) -> float:
        """From sending to the last byte of the answer."""
        return self.end - self.begin


@dataclass
class Phase:
    """All replies of a phase and its bounds: `end` is when the last answer came; `cpu`: seconds of these clients."""

    begin: float
    end: float = 0.0
    cpu: float = 0.0
    replies: list[Reply] = field(default_factory=list)

    def answered(self) -> list[Reply]:
        """The replies with status 200."""
        return [reply for reply in self.replies if reply.status == 200]

    def percentile(self, q: float) -> float:
        """Seconds within which q percent of the answered requests had their answer; NaN without any."""
        seconds = [reply.seconds for reply in self.answered()]
        return float(np.percentile(seconds, q)) if seconds else float("nan")

    @property
    def rate(self) -> float:
        """Answered requests per second, from the first request to the last answer."""
        return len(self.answered()) / (self.end - self.begin)


def http_request(path: str, body: object, address: Address) -> bytes:
    """Equals the bytes of a POST of `body` as JSON."""
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address.host}:{address.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


class Connection:
    """One kept-alive connection, opened when it is first used and whenever the server has closed it."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, number: int, request: bytes) -> Reply:
        begin = time.perf_counter()
        try:
            head, body = await asyncio.wait_for(self._exchange(request), PATIENCE)
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            self.close()
            why = f"{type(error).__name__}: {error}".encode()
            return Reply(number, begin, time.perf_counter(), 0, None, why)
        retry = _RETRY.search(head)
        if _CLOSE.search(head):
            self.close()
        status = int(head[9:12])
        return Reply(number, begin, time.perf_counter(), status, int(retry[1]) if retry else None, body)

    async def _exchange(self, request: bytes) -> tuple[bytes, bytes]:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._address.host, self._address.port)
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is None:
            raise OSError(f"an answer without a length: {head!r}")
        return head, await self._reader.readexactly(int(length[1]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def closed(address: Address, requests: Sequence[bytes], clients: int, seconds: float) -> Phase:
    """Equals what `clients` get that each send their next request when they have an answer, for `seconds`.

    Requests are taken in turn, whoever sends them. What was sent in time is waited for.
    """
    numbers = itertools.count()

    async def client(phase: Phase) -> None:
        connection = Connection(address)
        while time.perf_counter() < phase.begin + seconds:
            number = next(numbers) % len(requests)
            phase.replies.append(await connection.ask(number, requests[number]))
        connection.close()

    async def run() -> Phase:
        phase = Phase(time.perf_counter())
        await asyncio.gather(*(client(phase) for _ in range(clients)))
        return phase

    return _timed(run)


def opened(address: Address, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0) -> Phase:
    """Equals what clients get that come at `rate` requests per second for `seconds`, whether or not others wait.

    The times between them are exponential, as those of independent clients are. A refused one does not come again.
    """
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * seconds) + 10)
    times = [float(moment) for moment in np.cumsum(gaps) if moment < seconds]

    async def run() -> Phase:
        phase = Phase(time.perf_counter())
        idle: list[Connection] = []

        async def one(number: int) -> None:
            connection = idle.pop() if idle else Connection(address)
            phase.replies.append(await connection.ask(number, requests[number]))
            idle.append(connection)

        tasks = []
        for i, moment in enumerate(times):
            if (wait := phase.begin + moment - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.ensure_future(one(i % len(requests))))
        await asyncio.gather(*tasks)
        for connection in idle:
            connection.close()
        return phase

    return _timed(run)


def _timed(run: object) -> Phase:
    cpu = time.process_time()
    phase: Phase = asyncio.run(run())  # type: ignore[operator]
    phase.cpu = time.process_time() - cpu
    phase.end = max((reply.end for reply in phase.replies), default=phase.begin)
    return phase


@dataclass(frozen=True)
class Verdict:
    """How answers compare with the scores that they should hold.

    `wrong`: answers that are not what was asked for: other positions, another order, or scores further off than
    `allowed`. `furthest`: the largest difference of a score. `first`: what is wrong with the first wrong one.
    """

    wrong: int
    furthest: float
    first: str


def compare(replies: Sequence[Reply], expected: Sequence[NDArray[np.float32]], allowed: float) -> Verdict:
    """Equals the verdict on answered replies in the dialect of `results`, `index`, `relevance_score`.

    With `allowed` 0 every score is the float32 of `expected`, bit for bit.
    """
    wrong, furthest, first = 0, 0.0, ""
    for reply in replies:
        right = expected[reply.number]
        problem = ""
        try:
            rows = json.loads(reply.body)["results"]
            positions = [row["index"] for row in rows]
            scores = np.array([row["relevance_score"] for row in rows], np.float64)
        except (ValueError, KeyError, TypeError) as error:
            problem = f"not an answer: {error!r}"
        else:
            if sorted(positions) != list(range(len(right))):
                problem = f"positions {positions}"
            else:
                off = float(np.abs(scores - right[positions].astype(np.float64)).max())
                furthest = max(furthest, off)
                if not off <= allowed:
                    problem = f"a score is off by {off:.3g}"
                elif np.any(np.diff(scores) > 0):
                    problem = "not sorted"
        if problem:
            wrong += 1
            first = first or f"request {reply.number}: {problem}"
    return Verdict(wrong, furthest, first)
