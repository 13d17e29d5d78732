"""Batches across requests: many callers share one call of a reranker, and no score depends on the others."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fastrerank.inputs.tokenizer import check_texts
from fastrerank.rerankers.base import Reranker, check_number, check_threshold, check_top_k
from fastrerank.rerankers.call import CallOptions
from fastrerank.runtime.types import Hit
from fastrerank.serve.batching.admission import HEAVY_BYTES, Overloaded, TooLarge, admit, measure
from fastrerank.serve.batching.outcome import (
    Closed,
    DeadlineExceeded,
    Scored,
    Scores,
    ScoringFailed,
    deadline_error,
    for_callers,
    scored_of,
)
from fastrerank.serve.batching.queue import LARGEST_SHARE, Piece, Request, Speed, Waiting
from fastrerank.serve.batching.workers import Step, make_workers, start

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.rerankers.call import Options

__all__ = ["AsyncReranker", "Closed", "DeadlineExceeded", "Overloaded", "Scored", "ScoringFailed", "TooLarge"]

log = logging.getLogger("fastrerank.serve")

# Slices without a new small request after which all workers may take slices of large ones; before, one stays free.
QUIET_SLICES = 64


class AsyncReranker:
    """A reranker for many concurrent callers: their pairs share batches, and a score is what `score` alone would give.

    Requests are split into (query, document) pairs (methods that compare documents take a request whole) and packed by
    a token budget, the longest waiting first. A request of more than half a batch is large: it is scored in short
    slices, in turn with other large ones, and small ones pass between them. A request that is cancelled or late is
    dropped where it has not begun; one whose scoring fails, whatever the reranker raises, does not fail its neighbours.

    Args:
        reranker: any reranker; it is called from `workers` threads of this object's own.
        max_batch_tokens: tokens of one batch, estimated from the texts' bytes by what earlier batches held.
        max_wait_ms: how long a request may wait for others while a batch is not full.
        max_queue_tokens: tokens that may wait or be computed; a request beyond raises `Overloaded`. Large requests
            take at most three quarters of it, and one that alone is more than that raises `TooLarge`. A pair counts
            its query and its document, but no more than the reranker's `max_length`.
        workers: threads that call the reranker; with two, one batch is tokenised while another is computed, and small
            requests need not wait for a slice of a large one.

    Example:
        >>> async def main():
        ...     async with AsyncReranker(fastrerank.load("path")) as reranker:       # doctest: +SKIP
        ...         return await reranker.rank("who?", ["the owl", "the cat"])
    """

    def __init__(
        self,
        reranker: Reranker,
        *,
        max_batch_tokens: int = 16384,
        max_wait_ms: float = 2.0,
        max_queue_tokens: int = 2_000_000,
        workers: int = 2,
    ) -> None:
        if not isinstance(reranker, Reranker):
            raise TypeError(f"reranker must be a loaded reranker, as fastrerank.load returns it, got {reranker!r}")
        for name, value in (
            ("max_batch_tokens", max_batch_tokens),
            ("max_queue_tokens", max_queue_tokens),
            ("workers", workers),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        check_number("max_wait_ms", max_wait_ms)
        if not 0 <= max_wait_ms < float("inf"):
            raise ValueError(f"max_wait_ms must be at least 0 and finite, got {max_wait_ms!r}")
        if not isinstance(getattr(reranker, "independent", None), bool):
            name = type(reranker).__name__
            raise TypeError(f"{name} must state whether its documents are independent: independent = True, or False")
        self.reranker = reranker
        self.max_batch_tokens, self.max_queue_tokens = max_batch_tokens, max_queue_tokens
        self.max_wait = max_wait_ms / 1e3
        self.batches = 0
        self.speed = Speed()
        self._waiting = Waiting()
        self._taken: set[Piece] = set()  # pieces that are being computed
        self._flying = 0  # bytes of the batches that are being computed
        self._flying_large = 0  # bytes of those batches that belong to large requests
        self._slices = 0  # slices of large requests that are being computed
        self._large_next = False  # whether a slice is due before the next batch of small requests
        self._quiet = 0  # slices since the last small request came
        self._closing = False
        self._failure: BaseException | None = None  # the error that ended a worker
        self._changed = threading.Condition()
        self._threads = make_workers(self, self._changed, workers)
        start(self)

    def __repr__(self) -> str:
        state = ", closed" if self._closing else ""
        return f"AsyncReranker({self.reranker!r}, workers={len(self._threads)}{state})"

    async def score(
        self, query: str, documents: Sequence[str], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Scores:
        """Return `reranker.score(query, documents, **options)`, float32 (N,): raw scores.

        Args:
            timeout: seconds after which `DeadlineExceeded` is raised and what has not begun is dropped.
            options: as in `Reranker.score`, for this request alone; requests with equal ones share calls.

        Raises TypeError naming the position of what is not a str, Overloaded, TooLarge, DeadlineExceeded, Closed,
        ValueError for options that the method cannot honour, and what the reranker raises for these texts.
        """
        return (await self.scored(query, documents, timeout=timeout, options=options)).scores

    async def scored(
        self,
        query: str | Sequence[str],
        documents: Sequence[str],
        *,
        timeout: float | None = None,
        explain: bool = False,
        options: CallOptions | Options | None = None,
    ) -> Scored:
        """Like `score`, with what the request cost.

        Args:
            query: the query; or one for each document, where a method scores documents one by one: ValueError for
                others, and where there are fewer or more. It is one request, however many queries it has.
            explain: whether the result says what each token of a document gets, as `AttentionReranker.rank` does;
                ValueError for a method that does not read attention.
            options: those of `score`, as a mapping or as `CallOptions`.
        """
        request = self._enqueue(query, documents, timeout, explain, options)
        try:
            await asyncio.wait_for(asyncio.wrap_future(request.future), timeout)
        except DeadlineExceeded:
            raise
        except (asyncio.TimeoutError, TimeoutError):  # a timeout of the reranker itself is converted by `for_callers`
            raise deadline_error(request) from None
        return scored_of(request)

    async def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        raw: bool = False,
        score_threshold: float | None = None,
        timeout: float | None = None,
        explain: bool = False,
        **options: Unpack[Options],
    ) -> list[Hit]:
        """Return `reranker.rank(query, documents, ...)`: best first, activated scores unless `raw`.

        With `explain` each entry carries "tokens": [(text, what it gets), ...]; see `scored`. `timeout` and errors are
        those of `score`.
        """
        check_top_k(top_k)
        check_threshold(score_threshold)
        texts = check_texts(documents, "documents")
        result = await self.scored(query, texts, timeout=timeout, explain=explain, options=options)
        shown = texts if return_documents else None
        rows = self.reranker._ranked(result.scores, shown, top_k, raw, score_threshold)
        if result.explained is not None:
            for row in rows:
                row["tokens"] = result.explained[row["corpus_id"]]
        return rows

    def submit(
        self, query: str, documents: Sequence[str], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Future[Scores]:
        """Like `score` without asyncio: returns a `concurrent.futures.Future`, which may be cancelled."""
        return self._enqueue(query, documents, timeout, False, options).future

    @property
    def device_name(self) -> str:
        """What the reranker computes on: "cpu" or "gpu"."""
        return "gpu" if "cuda" in str(getattr(self.reranker, "device", "cpu")) else "cpu"

    @property
    def max_length(self) -> int | None:
        """Tokens of a pair, where the reranker names a limit."""
        return getattr(self.reranker, "max_length", None)

    @property
    def workers(self) -> int:
        """How many threads call the reranker."""
        return len(self._threads)

    @property
    def explains(self) -> bool:
        """Whether the reranker can say what each token of a document gets."""
        return hasattr(self.reranker, "token_masses")

    @property
    def failure(self) -> BaseException | None:
        """What ended a worker thread, which no request can: None while all are well or were closed."""
        if self._failure is None and not self._closing and not all(thread.is_alive() for thread in self._threads):
            return RuntimeError("a worker thread is gone")
        return self._failure

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
            begun = {piece.request for piece in self._taken}
        for request in (*left, *begun):
            request.end(Closed("the reranker was closed before this request was scored"))

    def _drop(self, reason: str) -> None:
        """Take no more requests, and end those that no batch has begun."""
        with self._changed:
            self._closing = True
            left, self._waiting = self._waiting, Waiting()
            self._changed.notify_all()
        for request in left:
            request.end(Closed(f"the reranker takes no more requests: {reason}"))

    async def aclose(self, grace: float | None = None) -> None:
        """Run `close` without blocking the event loop."""
        await asyncio.to_thread(self.close, grace)

    async def __aenter__(self) -> AsyncReranker:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _enqueue(
        self,
        query: str | Sequence[str],
        documents: Sequence[str],
        timeout: float | None,
        explain: bool,
        options: CallOptions | Options | None,
    ) -> Request:
        given = options.keywords() if isinstance(options, CallOptions) else dict(options or {})
        call = self.reranker.check_options(**given)
        texts = check_texts(documents, "documents")
        checked = self._queries(query, len(texts), explain)
        check_number("timeout", timeout, none=True)
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive or None, got {timeout!r}")
        if explain and not self.explains:
            method = self.reranker.method
            raise ValueError(f"explain needs a method that reads attention (icr, qrhead, core), not {method}")
        request = self._request(checked, texts, timeout, explain, call)
        with self._changed:
            if self._closing:
                raise Closed("the reranker takes no more requests: it is closed")
            if self.failure is not None:
                raise Closed(f"the reranker takes no more requests: {self.failure}")
            large = self._flying_large + self._waiting.large.bytes if request.large else 0
            admit(request.waiting_bytes, self._load(), large, self.speed, self.max_queue_tokens)
            if not texts:
                request.end()
                return request
            self._waiting.add(request)
            if not request.large:
                self._quiet = 0
            self._changed.notify()
        request.future.add_done_callback(lambda _: self._forget(request))
        return request

    def _queries(self, query: str | Sequence[str], count: int, explain: bool) -> str | list[str]:
        if isinstance(query, str) or not isinstance(query, Sequence):
            return check_texts([query], "query", scalar=True)[0]
        queries = check_texts(query, "query")
        if explain or not self.reranker.independent:
            raise ValueError(f"method {self.reranker.method!r} ranks the documents of one query, got a list of queries")
        if len(queries) != count:
            raise ValueError(f"query must be one, or one for each of {count} documents, got {len(queries)}")
        return queries

    def _request(
        self, query: str | list[str], texts: list[str], timeout: float | None, explain: bool, call: CallOptions
    ) -> Request:
        whole = not self.reranker.independent or explain
        measured = measure(query, texts, call.limits, self.max_length, self.speed, call.instruction, whole)
        large = measured.effort > LARGEST_SHARE * self.speed.bytes(self.max_batch_tokens)
        heavy = large and (whole or measured.longest > HEAVY_BYTES)
        deadline = None if timeout is None else time.monotonic() + timeout
        return Request(query, texts, measured.sizes, whole, deadline, explain, large, heavy, call, measured.overhead)

    def _load(self) -> int:
        return self._flying + self._waiting.bytes

    def _forget(self, request: Request) -> None:
        """Drop the documents of an ended or cancelled request that no batch has taken."""
        with self._changed:
            self._waiting.discard(request)

    def _compute(self, pieces: list[Piece]) -> None:
        large = any(piece.request.large for piece in pieces)
        try:
            self._run(pieces)
        except BaseException:
            self._end(pieces, Closed("the worker that scored this request died"))
            raise
        finally:
            with self._changed:
                size = sum(piece.bytes for piece in pieces)
                self._taken.difference_update(pieces)
                self._flying -= size
                self._flying_large -= size if large else 0
                self._slices -= large

    def _fail(self, error: BaseException) -> None:
        """Record that a worker died, and end all requests: with a dead worker nothing can be relied on."""
        log.critical("a worker thread died, no more requests are taken", exc_info=error)
        with self._changed:
            self._failure = error
            left, self._waiting = self._waiting, Waiting()
            self._changed.notify_all()
        for request in left:
            request.end(Closed(f"a worker thread died of {type(error).__name__}"))

    @staticmethod
    def _end(pieces: list[Piece], error: BaseException) -> None:
        for piece in pieces:
            piece.request.end(error)

    def _next(self) -> Step:
        """Return what a worker does next; the caller holds `_changed`."""
        now = time.monotonic()
        late = self._waiting.late(now)
        if late:
            return Step(late=late)
        if not self._waiting and (self._closing or self._failure is not None):
            self._changed.notify_all()  # another worker may be waiting for this one to end
            return Step(over=True)
        wait = None
        if self._waiting.small and not (self._large_next and self._may_slice()):
            budget = self.speed.bytes(self.max_batch_tokens)
            wait = self._waiting.small.first.arrived + self.max_wait - now
            if wait <= 0 or self._closing or self._waiting.small.bytes >= budget:
                self._large_next = True
                return Step(self._begun(self._waiting.take(budget), now))
        elif self._may_slice():
            self._large_next = False
            self._slices += 1
            self._quiet += 1
            return Step(self._begun(self._waiting.slice(self.speed.slice(self.max_batch_tokens)), now))
        return Step(wait=wait)

    def _may_slice(self) -> bool:
        """Whether a slice of a large request may begin. With several workers, one is kept for small requests."""
        if not self._waiting.large:
            return False
        all_busy = self._slices >= max(1, len(self._threads) - 1)
        return not all_busy or (self._quiet >= QUIET_SLICES and not self._waiting.large.first.heavy)

    def _begun(self, pieces: list[Piece], now: float) -> list[Piece]:
        self._taken.update(pieces)
        for piece in pieces:
            piece.request.started = piece.request.started or now
            self._flying += piece.bytes
            self._flying_large += piece.bytes if piece.request.large else 0
        if self._waiting:
            self._changed.notify()
        return pieces

    def _run(self, pieces: list[Piece]) -> None:
        pieces = [piece for piece in pieces if not piece.request.future.done()]
        batches: dict[Any, list[Piece]] = {}
        for piece in pieces:
            key = id(piece) if piece.request.explain else piece.request.options
            batches.setdefault(key, []).append(piece)
        for batch in batches.values():
            self._run_batch(batch)

    def _run_batch(self, pieces: list[Piece]) -> None:
        begin = time.perf_counter()
        try:
            asked = [piece.request.asked(piece.begin, piece.end) for piece in pieces]
            results = self._explained(pieces[0]) if pieces[0].request.explain else self._results(pieces, asked)
            got, wanted = [len(scores) for scores in results], [piece.end - piece.begin for piece in pieces]
            if got != wanted:
                raise RuntimeError(f"the reranker returned {got} scores for {wanted} documents")
            results = [np.asarray(scores, np.float32).reshape(n) for scores, n in zip(results, wanted, strict=True)]
            usage = self.reranker.last_usage
            tokens, counted = int(usage["tokens"]), list(usage["query_tokens"])
            tokenized = float(usage["seconds"].get("tokenize", 0.0))
            count = sum(map(len, asked))
            if len(counted) not in (0, count):
                raise RuntimeError(f"the reranker counted tokens of {len(counted)} queries, not of {count}")
            left = iter(counted)
            counted = [sum(islice(left, len(one))) for one in asked] if counted else []
        except BaseException as error:  # a panic of native code too, or the thread would end
            if len(pieces) == 1:
                pieces[0].request.end(for_callers(error))
            else:
                for piece in pieces:  # one by one, so that only pieces with failing texts fail
                    self._run([piece])
            return
        for piece in pieces:
            piece.request.tokenized += tokenized
        self._note(pieces, results, tokens, counted, time.perf_counter() - begin)

    def _results(self, pieces: list[Piece], asked: list[list[tuple[str, list[str]]]]) -> list[Scores]:
        """Scores of each piece, whose queries with their documents are `asked`."""
        rows = self.reranker.score_many(
            [query for one in asked for query, _ in one],
            [texts for one in asked for _, texts in one],
            **pieces[0].request.options.keywords(),
        )
        if len(rows) != sum(map(len, asked)):
            raise RuntimeError(f"the reranker returned scores of {len(rows)} queries, not of {sum(map(len, asked))}")
        left = iter(rows)
        taken = [list(islice(left, len(one))) for one in asked]
        return [one[0] if len(one) == 1 else np.concatenate(one) for one in taken]

    def _explained(self, piece: Piece) -> list[Scores]:
        request, reranker = piece.request, cast(Any, self.reranker)
        options = request.options.keywords()
        rows = reranker.rank(request.query, request.documents, explain=True, raw=True, **options)
        scores = np.full(len(request.documents), np.nan, np.float32)
        request.explained = [[] for _ in request.documents]
        for row in rows:
            scores[row["corpus_id"]], request.explained[row["corpus_id"]] = row["score"], row["tokens"]
        return [scores]

    def _note(
        self, pieces: list[Piece], results: list[Scores], tokens: int, counted: list[int], seconds: float
    ) -> None:
        """Hand a batch's scores to its requests, and end those that have all of theirs."""
        size = sum(piece.bytes for piece in pieces)
        pairs = sum(piece.end - piece.begin for piece in pieces)
        text = size - sum((piece.end - piece.begin) * piece.request.overhead for piece in pieces)
        self.speed.note(max(1, text), tokens, seconds, pairs)
        ended = []
        with self._changed:
            self.batches += 1
            for i, (piece, scores) in enumerate(zip(pieces, results, strict=True)):
                request = piece.request
                request.scores[piece.begin : piece.end] = scores
                request.missing -= piece.end - piece.begin
                request.compute += seconds
                request.tokens += counted[i] if counted else round(tokens * piece.bytes / size)
                request.exact = request.exact and bool(counted)
                if request.missing == 0:
                    ended.append(request)
        for request in ended:
            request.end()
