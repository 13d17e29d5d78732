"""Batches across requests: many callers share one call of a reranker, and their scores do not know each other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fastrerank.rerankers.base import Reranker, check_top_k, order, ranked
from fastrerank.serve.queue import Piece, Request, Speed, Waiting
from fastrerank.text.tokenizer import check_texts
from fastrerank.types import Hit

__all__ = ["AsyncReranker", "Closed", "DeadlineExceeded", "Overloaded", "Scored"]

Scores = npt.NDArray[np.float32]


class Overloaded(RuntimeError):
    """The queue is full. `retry_after`: seconds after which there should be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(TimeoutError):
    """The request's time was over before all of its documents were scored."""


class Closed(RuntimeError):
    """The reranker takes no more requests, or ended before this one was done."""


@dataclass(frozen=True)
class Scored:
    """A request's scores, float32 (N,), and what it cost.

    `tokens` of its pairs (shared out by bytes over a batch where the method does not count them: `exact` is False),
    seconds it `waited` for a batch, and seconds of the batches that it was in (`compute`). `explained`: of each
    document its tokens and what each gets, if that was asked for.
    """

    scores: Scores
    tokens: int
    exact: bool
    waited: float
    compute: float
    explained: list[list[tuple[str, float]]] | None = None


class AsyncReranker:
    """A reranker for many concurrent callers: their pairs share batches, and a score is what `score` alone would give.

    Requests are split into (query, document) pairs (methods that compare documents take a request whole) and packed by
    a token budget, the longest waiting first; while others wait, one request gets at most half of a batch. A request
    that is cancelled or late is dropped where it has not begun; one whose scoring fails does not fail its neighbours.

    Args:
        reranker: any reranker; it is called from `workers` threads of this object's own.
        max_batch_tokens: tokens of one batch, estimated from the texts' bytes by what earlier batches held.
        max_wait_ms: how long a request may wait for others while a batch is not full.
        max_queue_tokens: tokens that may wait or be computed; a request beyond raises `Overloaded`. One request alone
            is always taken.
        workers: threads that call the reranker; with two, one batch is tokenised while another is computed.

    Example:
        >>> async def main():
        ...     async with AsyncReranker(fastrerank.load("path")) as reranker:       # doctest: +SKIP
        ...         return await reranker.rank("who?", ["the owl", "the cat"])
    """

    def __init__(
        self, reranker: Reranker, *, max_batch_tokens: int = 16384, max_wait_ms: float = 2.0,
        max_queue_tokens: int = 1_000_000, workers: int = 2,
    ) -> None:  # fmt: skip
        if not isinstance(reranker, Reranker):
            raise TypeError(f"reranker must be a loaded reranker, as fastrerank.load returns it, got {reranker!r}")
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_queue_tokens", max_queue_tokens),
                            ("workers", workers)):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if not 0 <= max_wait_ms < float("inf"):
            raise ValueError(f"max_wait_ms must be at least 0 and finite, got {max_wait_ms!r}")
        self.reranker = reranker
        self.max_batch_tokens, self.max_queue_tokens = max_batch_tokens, max_queue_tokens
        self.max_wait = max_wait_ms / 1e3
        self.batches = 0
        self.speed = Speed()
        self._waiting = Waiting()
        self._flying = 0  # bytes of the batches that are being computed
        self._closing = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"fastrerank-batch-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        state = ", closed" if self._closing else ""
        return f"AsyncReranker({self.reranker!r}, workers={len(self._threads)}{state})"

    async def score(self, query: str, documents: Sequence[str], *, timeout: float | None = None) -> Scores:
        """Return `reranker.score(query, documents)`, float32 (N,).

        Args:
            timeout: seconds after which `DeadlineExceeded` is raised and what has not begun is dropped.

        Raises TypeError naming the position of what is not a str, Overloaded, DeadlineExceeded, Closed, and what the
        reranker raises for these texts.
        """
        return (await self.scored(query, documents, timeout=timeout)).scores

    async def scored(
        self, query: str, documents: Sequence[str], *, timeout: float | None = None, explain: bool = False
    ) -> Scored:
        """Like `score`, with what the request cost.

        Args:
            explain: whether the result says what each token of a document gets, as `AttentionReranker.rank` does;
                ValueError for a method that does not read attention.
        """
        request = self._enqueue(query, documents, timeout, explain)
        try:
            await asyncio.wait_for(asyncio.wrap_future(request.future), timeout)
        except DeadlineExceeded:
            raise
        except (asyncio.TimeoutError, TimeoutError):
            raise _late(request) from None
        return _scored(request)

    async def rank(
        self, query: str, documents: Sequence[str], top_k: int | None = None, return_documents: bool = False, *,
        timeout: float | None = None, explain: bool = False,
    ) -> list[Hit]:  # fmt: skip
        """Return documents sorted by `score`, best first, as `Reranker.rank` does; ties keep the order they came in.

        With `explain` each entry carries "tokens": [(text, what it gets), ...]; see `scored`.
        """
        check_top_k(top_k)
        texts = check_texts(documents, "documents")
        result = await self.scored(query, texts, timeout=timeout, explain=explain)
        rows = ranked(order(result.scores), result.scores, texts if return_documents else None, top_k)
        if result.explained is not None:
            for row in rows:
                row["tokens"] = result.explained[row["corpus_id"]]
        return rows

    def submit(self, query: str, documents: Sequence[str], *, timeout: float | None = None) -> Future[Scores]:
        """Like `score` without asyncio: returns a `concurrent.futures.Future`, which may be cancelled."""
        return self._enqueue(query, documents, timeout, False).future

    @property
    def device_name(self) -> str:
        """What the reranker computes on: "cpu" or "gpu"."""
        return "gpu" if "cuda" in str(getattr(self.reranker, "device", "cpu")) else "cpu"

    @property
    def max_length(self) -> int | None:
        """Tokens of a pair, where the reranker names a limit."""
        return getattr(self.reranker, "max_length", None)

    @property
    def explains(self) -> bool:
        """Whether the reranker can say what each token of a document gets."""
        return hasattr(self.reranker, "token_masses")

    def queued_tokens(self) -> int:
        """Return about how many tokens wait or are being computed."""
        with self._changed:
            return self.speed.tokens(self._load())

    def waiting(self) -> int:
        """Return how many requests have documents that no batch has taken."""
        with self._changed:
            return len(self._waiting)

    def close(self, grace: float | None = None) -> None:
        """Take no more requests, finish those accepted, and end the threads; idempotent.

        Args:
            grace: seconds after which requests that are not done end with `Closed`; None waits for all.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        end = None if grace is None else time.monotonic() + grace
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        with self._changed:
            left, self._waiting = self._waiting, Waiting()
        for request in left:
            request.end(Closed("the reranker was closed before this request was scored"))

    async def aclose(self, grace: float | None = None) -> None:
        """`close` without blocking the event loop."""
        await asyncio.to_thread(self.close, grace)

    async def __aenter__(self) -> AsyncReranker:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _enqueue(self, query: str, documents: Sequence[str], timeout: float | None, explain: bool) -> Request:
        (checked,) = check_texts([query], "query", scalar=True)
        texts = check_texts(documents, "documents")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive or None, got {timeout!r}")
        if explain and not self.explains:
            method = self.reranker.method
            raise ValueError(f"explain needs a method that reads attention (icr, qrhead, core), not {method}")
        # A lone surrogate has no UTF-8 form; for a size any will do.
        base = len(checked.encode("utf-8", "replace"))
        sizes = [max(1, base + len(text.encode("utf-8", "replace"))) for text in texts]
        deadline = None if timeout is None else time.monotonic() + timeout
        request = Request(checked, texts, sizes, not self.reranker.independent or explain, deadline, explain)
        size = request.waiting_bytes
        with self._changed:
            if self._closing:
                raise Closed("the reranker takes no more requests: it is closed")
            load = self._load()
            if load and self.speed.tokens(load + size) > self.max_queue_tokens:
                excess = load + size - self.speed.bytes(self.max_queue_tokens)
                raise Overloaded(
                    f"{self.speed.tokens(load)} tokens wait, {self.speed.tokens(size)} more would exceed "
                    f"max_queue_tokens={self.max_queue_tokens}",
                    retry_after=self.speed.seconds(min(excess, load)),
                )
            if not texts:
                request.end()
                return request
            self._waiting.add(request)
            self._changed.notify()
        request.future.add_done_callback(lambda _: self._forget(request))
        return request

    def _load(self) -> int:
        return self._flying + self._waiting.bytes

    def _forget(self, request: Request) -> None:
        """Drop what has not begun of a request that has ended, or was cancelled."""
        with self._changed:
            self._waiting.discard(request)

    def _work(self) -> None:
        while (pieces := self._next()) is not None:
            try:
                self._run(pieces)
            finally:
                with self._changed:
                    self._flying -= sum(piece.bytes for piece in pieces)

    def _next(self) -> list[Piece] | None:
        """Wait for a batch; None when there will be no more."""
        late: list[Request] = []
        pieces: list[Piece] | None = None
        with self._changed:
            while True:
                now = time.monotonic()
                late += self._waiting.late(now)
                if not self._waiting:
                    if self._closing or late:
                        break
                    self._changed.wait()
                    continue
                budget = self.speed.bytes(self.max_batch_tokens)
                left = self._waiting.first.arrived + self.max_wait - now
                if left > 0 and not self._closing and self._waiting.bytes < budget:
                    self._changed.wait(left)
                    continue
                pieces = self._waiting.take(budget)
                for piece in pieces:
                    piece.request.started = piece.request.started or now
                self._flying += sum(piece.bytes for piece in pieces)
                if self._waiting:
                    self._changed.notify()
                break
        for request in late:
            request.end(_late(request))
        if pieces is None and late:
            return []
        return pieces

    def _run(self, pieces: list[Piece]) -> None:
        pieces = [piece for piece in pieces if not piece.request.future.done()]
        together = [piece for piece in pieces if not piece.request.explain]
        alone = [[piece] for piece in pieces if piece.request.explain]
        for batch in [together, *alone] if together else alone:
            self._run_batch(batch)

    def _run_batch(self, pieces: list[Piece]) -> None:
        begin = time.perf_counter()
        try:
            results = self._explained(pieces[0]) if pieces[0].request.explain else self._results(pieces)
            got, wanted = [len(scores) for scores in results], [piece.end - piece.begin for piece in pieces]
            if got != wanted:
                raise RuntimeError(f"the reranker returned {got} scores for {wanted} documents")
            usage = self.reranker.last_usage
        except Exception as error:
            if len(pieces) == 1:
                pieces[0].request.end(error)
            else:
                for piece in pieces:  # one by one, so that only those fail whose own texts do
                    self._run([piece])
            return
        self._note(pieces, results, usage, time.perf_counter() - begin)

    def _results(self, pieces: list[Piece]) -> list[Scores]:
        return self.reranker.score_many(
            [piece.request.query for piece in pieces],
            [piece.request.documents[piece.begin : piece.end] for piece in pieces],
        )

    def _explained(self, piece: Piece) -> list[Scores]:
        request, reranker = piece.request, cast(Any, self.reranker)
        rows = reranker.rank(request.query, request.documents, explain=True)
        scores = np.full(len(request.documents), np.nan, np.float32)
        request.explained = [[] for _ in request.documents]
        for row in rows:
            scores[row["corpus_id"]], request.explained[row["corpus_id"]] = row["score"], row["tokens"]
        return [scores]

    def _note(self, pieces: list[Piece], results: list[Scores], usage: dict[str, Any], seconds: float) -> None:
        """Hand a batch's scores to its requests, and end those that have all of theirs."""
        size = sum(piece.bytes for piece in pieces)
        self.speed.note(size, usage["tokens"], seconds)
        counted = usage["query_tokens"]
        ended = []
        with self._changed:
            self.batches += 1
            for i, (piece, scores) in enumerate(zip(pieces, results, strict=True)):
                request = piece.request
                request.scores[piece.begin : piece.end] = scores
                request.missing -= piece.end - piece.begin
                request.compute += seconds
                request.tokens += counted[i] if counted else round(usage["tokens"] * piece.bytes / size)
                request.exact = request.exact and bool(counted)
                if request.missing == 0:
                    ended.append(request)
        for request in ended:
            request.end()


def _late(request: Request) -> DeadlineExceeded:
    done = len(request.documents) - request.missing
    return DeadlineExceeded(f"the deadline came when {done} of {len(request.documents)} documents were scored")


def _scored(request: Request) -> Scored:
    waited = 0.0 if request.started is None else request.started - request.arrived
    return Scored(request.scores, request.tokens, request.exact, waited, request.compute, request.explained)
