"""What a reranker may raise or return, and a worker that dies: who is told, and that the others go on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from serve_fakes import Explaining, Lengths, held

from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.serve.batching.batcher import AsyncReranker, Closed, ScoringFailed
from fastrerank.serve.health import dead


class PanicException(BaseException):
    """As a panic of a Rust library arrives: no Exception."""


class Raising(Lengths):
    """Raises `error` where a document is `bad`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def _score_many(self, queries: list[str], documents: list[list[str]], usage: Any) -> Any:
        result = super()._score_many(queries, documents, usage)
        if any("bad" in texts for texts in documents):
            raise self.error
        return result


ERRORS = [
    (PanicException("stack"), ScoringFailed),
    (SystemExit(3), ScoringFailed),
    (KeyboardInterrupt(), ScoringFailed),
    (GeneratorExit(), ScoringFailed),
    (StopIteration(), ScoringFailed),
    (asyncio.CancelledError(), ScoringFailed),
    (concurrent.futures.CancelledError(), ScoringFailed),
    (TimeoutError("of a socket"), ScoringFailed),
    (MemoryError(), MemoryError),
    (ValueError("no"), ValueError),
    (RecursionError(), RecursionError),
]


@pytest.mark.parametrize(("error", "seen"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
def test_whatever_scoring_raises_fails_its_request_alone(error: BaseException, seen: type[Exception]) -> None:
    reranker = Raising(error)
    reranker.gate.clear()

    async def run() -> list[Any]:
        async with AsyncReranker(reranker, workers=1) as shared:
            first = asyncio.ensure_future(shared.score("q", ["first"]))
            await asyncio.to_thread(reranker.entered.acquire)
            others = [asyncio.ensure_future(shared.score("q", [text], timeout=20)) for text in ("good", "bad", "well")]
            await asyncio.sleep(0.02)  # all three wait for one batch
            reranker.gate.set()
            found = await asyncio.gather(first, *others, return_exceptions=True)
            assert shared.failure is None
            assert (await shared.score("q", ["after"])).tolist() == [4.0]
            return found

    first, good, bad, well = asyncio.run(run())
    assert [one.tolist() for one in (first, good, well)] == [[4.0], [3.0], [3.0]]
    assert type(bad) is seen
    assert seen is not ScoringFailed or type(error).__name__ in str(bad)
    assert seen is not ScoringFailed or bad.__cause__ is error
    assert any(len(call) == 3 for call in reranker.calls)  # they did share a batch


class Wrong(Lengths):
    """Answers queries `wrong` with what `answer` makes of its scores, and counts as `usage` says."""

    def __init__(self, answer: Any = lambda rows: rows, counts: Any = None) -> None:
        super().__init__()
        self.answer, self.counts = answer, counts

    def score_many(self, queries: Any, documents: Any, **_: Any) -> Any:
        rows = super().score_many(queries, documents)
        self._wrong = "wrong" in queries
        return self.answer(rows) if self._wrong else rows

    @property
    def last_usage(self) -> dict[str, Any]:
        return self.counts if self.counts is not None and self._wrong else super().last_usage


@pytest.mark.parametrize(
    "reranker",
    [
        Wrong(lambda rows: [row[1:] for row in rows]),
        Wrong(lambda rows: [np.stack([row, row]) for row in rows]),
        Wrong(lambda _: None),
        Wrong(lambda rows: [list("ab") for _ in rows]),
        Wrong(lambda rows: [*rows, *rows]),
        Wrong(counts={}),
        Wrong(counts={"tokens": None, "query_tokens": []}),
        Wrong(counts={"tokens": 1, "query_tokens": [1, 2, 3, 4, 5]}),
    ],
)
def test_wrong_answers_of_a_reranker_fail_their_request_alone(reranker: Wrong) -> None:
    shared, first = held(reranker)
    wrong, well = shared.submit("wrong", ["ab", "c"]), shared.submit("q", ["abc"])
    reranker.gate.set()
    assert isinstance(wrong.exception(10), Exception)
    assert [first.result(10).tolist(), well.result(10).tolist()] == [[0.0], [2.0]]
    assert shared.failure is None
    shared.close()
    assert shared.queued_tokens() == 0


def test_an_explanation_that_is_malformed_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = Explaining()
    monkeypatch.setattr(reranker, "rank", lambda *_, **__: [{"corpus_id": 7}])

    async def run() -> list[Any]:
        async with AsyncReranker(reranker, workers=1) as shared:
            jobs = [shared.scored("q", ["a"], explain=True), shared.score("q", ["a"])]
            return await asyncio.gather(*jobs, return_exceptions=True)

    failed, well = asyncio.run(run())
    assert isinstance(failed, Exception)
    assert well.tolist() == [1.0]


def test_a_worker_that_dies_ends_the_object(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reranker = Lengths()
    reranker.gate.clear()
    shared = AsyncReranker(reranker, workers=2, max_wait_ms=0)
    assert shared.failure is None
    assert dead({"one": shared}) is None
    first = shared.submit("q", ["a"])
    reranker.entered.acquire()
    second = shared.submit("q", ["b"])
    reranker.entered.acquire()
    waiting: list[Future[Any]] = [shared.submit("q", ["never"]) for _ in range(3)]

    def die(*_: Any) -> None:
        raise SystemExit("a bug of the batcher")

    monkeypatch.setattr(shared, "_note", die)
    with caplog.at_level(logging.CRITICAL, "fastrerank.serve"):
        reranker.gate.set()
        for future in (first, second, *waiting):
            assert isinstance(future.exception(10), Closed)
    for thread in shared._threads:
        thread.join(10)
        assert not thread.is_alive()
    assert "worker thread died" in caplog.text
    assert isinstance(shared.failure, SystemExit)
    assert "SystemExit" in str(dead({"one": shared}))
    with pytest.raises(Closed, match="bug of the batcher"):
        shared.submit("q", ["a"])
    shared.close()


def test_a_worker_thread_that_is_gone_without_a_word_is_noticed() -> None:
    shared = AsyncReranker(Lengths(), workers=1)
    thread = shared._threads[0]
    shared._threads[0] = type(thread)(target=int)  # one that does not run
    assert shared.failure is not None
    with pytest.raises(Closed, match="gone"):
        shared.submit("q", ["a"])
    shared._threads[0] = thread
    shared.close()
    assert shared.failure is None  # closing is no failure


class Optioned(Lengths):
    """Adds the limit `max_tokens_per_doc` to every score."""

    call_options = frozenset({"max_tokens_per_doc", "instruction"})

    def _score_many(self, queries: Any, documents: Any, usage: Any, call: CallOptions = NO_OPTIONS) -> Any:
        more = call.limits.max_tokens_per_doc or 0
        return [row + np.float32(more) for row in super()._score_many(queries, documents, usage)]


def test_requests_with_equal_options_share_calls() -> None:
    reranker = Optioned()
    shared, first = held(reranker)
    asked = [
        {},
        {"max_tokens_per_doc": 100},
        {"max_tokens_per_doc": None},
        {"max_tokens_per_doc": 100},
        {"max_tokens_per_doc": 300},
        {"max_tokens_per_doc": 100, "instruction": "x"},
    ]
    futures = [shared.submit("q", ["abc"], **options) for options in asked]
    reranker.gate.set()
    assert [future.result(10).tolist() for future in futures] == [[2.0], [102.0], [2.0], [102.0], [302.0], [102.0]]
    first.result(10)
    shared.close()
    assert sorted(map(len, reranker.calls)) == [1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="cannot honour label"):
        shared.submit("q", ["a"], label=1)
    with pytest.raises(TypeError, match="not an option"):
        shared.submit("q", ["a"], lable=1)


def test_rank_and_score_show_what_the_rerankers_own_show() -> None:
    reranker = Optioned()
    reranker.activated = lambda scores: scores / 100  # type: ignore[method-assign]

    async def run() -> None:
        async with AsyncReranker(reranker) as shared:
            for options in (
                {},
                {"raw": True},
                {"top_k": 1, "return_documents": True},
                {"score_threshold": 1.005},
                {"max_tokens_per_doc": 7},
            ):
                options = {"max_tokens_per_doc": 100, **options}
                assert await shared.rank("q", ["a", "abc"], **options) == reranker.rank("q", ["a", "abc"], **options)
            np.testing.assert_array_equal(await shared.score("q", ["abc"]), [2.0])
            given = await shared.scored("q", ["abc"], options=reranker.check_options(max_tokens_per_doc=9))
            assert given.scores.tolist() == [11.0]

    asyncio.run(run())


def test_a_request_may_have_a_query_for_each_document() -> None:
    reranker = Lengths()
    shared, first = held(reranker)
    several = shared.submit(["q", "q", "qqq"], ["abc", "abcd", "abc"])  # type: ignore[arg-type]
    other = shared.submit("qq", ["abc"])
    reranker.gate.set()
    assert several.result(10).tolist() == [2.0, 3.0, 0.0]
    assert [first.result(10).tolist(), other.result(10).tolist()] == [[0.0], [1.0]]
    assert reranker.calls[1] == [["abc", "abcd"], ["abc"], ["abc"]]
    with pytest.raises(ValueError, match="one for each of 2 documents, got 1"):
        shared.submit(["q"], ["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"query\[0\]"):
        shared.submit([1], ["a"])  # type: ignore[arg-type, list-item]
    shared.close()
    lists = AsyncReranker(Lengths(independent=False))
    with pytest.raises(ValueError, match="ranks the documents of one query"):
        lists.submit(["q"], ["a"])  # type: ignore[arg-type]
    lists.close()


def test_a_method_that_does_not_state_whether_its_documents_are_independent_is_refused() -> None:
    reranker = Lengths()
    del reranker.independent
    with pytest.raises(TypeError, match="Lengths must state whether its documents are independent"):
        AsyncReranker(reranker)


def test_requests_of_dependent_documents_rank_alike_explained_or_not() -> None:
    """Beside others and in any number: a split would compare other documents with each other."""

    class Compared(Explaining):
        def _score_many(self, queries: Any, documents: Any, usage: Any) -> Any:
            return [row * np.float32(len(row)) for row in super()._score_many(queries, documents, usage)]

    texts = [f"word{i % 7} " * (i % 5 + 1) for i in range(300)]
    expected = Compared().rank("q", texts)

    async def run() -> list[Any]:
        async with AsyncReranker(Compared(), max_batch_tokens=100) as shared:
            jobs = [shared.rank("q", texts, explain=i % 2 == 0) for i in range(8)]
            return await asyncio.gather(*jobs)

    for rows in asyncio.run(run()):
        assert [{key: row[key] for key in ("corpus_id", "score")} for row in rows] == expected
