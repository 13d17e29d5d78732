"""Batches across requests: fairness, budgets, deadlines, cancelling, errors, overload, and the same scores as alone."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import Explaining, Lengths, held

import fastrerank
from fastrerank.serve.batching.batcher import AsyncReranker, Closed, DeadlineExceeded, Overloaded
from fastrerank.serve.batching.queue import Request, Waiting


def request(*sizes: int, whole: bool = False, large: bool = False) -> Request:
    return Request("q", ["d"] * len(sizes), list(sizes), whole, None, large=large)


def queue(*requests: Request) -> Waiting:
    waiting = Waiting()
    for one in requests:
        waiting.add(one)
    return waiting


SHAPE = st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.booleans(), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.lists(SHAPE, min_size=1, max_size=6), st.integers(1, 120))
def test_batches_hold_every_document_once_within_the_budget(
    shapes: list[tuple[list[int], bool, bool]], budget: int
) -> None:
    everyone = [request(*sizes, whole=whole, large=large) for sizes, whole, large in shapes]
    waiting = queue(*everyone)
    seen: set[tuple[int, int]] = set()
    while waiting:
        line, take = (waiting.small, waiting.take) if waiting.small else (waiting.large, waiting.slice)
        first = line.first
        pieces = take(budget)
        assert pieces[0].request is first  # the one whose turn it is
        assert line is waiting.small or len(pieces) == 1
        total = sum(piece.bytes for piece in pieces)
        alone = len(pieces) == 1 and (pieces[0].request.whole or pieces[0].end - pieces[0].begin == 1)
        assert total <= budget or alone
        for piece in pieces:
            assert piece.bytes == sum(piece.request.sizes[piece.begin : piece.end])
            assert not piece.request.whole or (piece.begin, piece.end) == (0, len(piece.request.documents))
            for i in range(piece.begin, piece.end):
                assert (id(piece.request), i) not in seen
                seen.add((id(piece.request), i))
    assert len(seen) == sum(len(one.documents) for one in everyone)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "take", "drop", "late"]), st.integers(0, 9)), max_size=40))
def test_the_bytes_that_wait_are_what_waits(steps: list[tuple[str, int]]) -> None:
    waiting, everyone = Waiting(), [request(7)]
    for step, n in steps:
        if step == "add":
            everyone.append(Request("q", ["d"] * (n + 1), [n + 1] * (n + 1), n == 3, float(n), large=n > 6))
            waiting.add(everyone[-1])
        elif step == "take" and waiting.small:
            waiting.take(5 * n + 1)
        elif step == "take" and waiting.large:
            waiting.slice(5 * n + 1)
        elif step == "drop":
            waiting.discard(everyone[n % len(everyone)])  # whether it still waits or not
        elif step == "late":
            assert all(one.deadline is not None and one.deadline <= n for one in waiting.late(n))
            assert all(one.deadline is None or one.deadline > n for one in waiting)
        assert waiting.bytes == sum(sum(one.sizes[one.next :]) for one in waiting)


def test_an_arrival_costs_the_same_however_many_wait() -> None:
    """Counted in lines that Python runs, as a clock would tell more of the machine."""
    reranker = Lengths()
    shared, _ = held(reranker)
    lines = 0

    def count(frame: Any, event: str, _argument: Any) -> Any:
        nonlocal lines
        ours = frame.f_globals["__name__"].startswith("fastrerank.")  # and not what the garbage collector calls
        lines += ours and event == "line"
        return count

    def cost() -> int:
        nonlocal lines
        lines, before = 0, sys.gettrace()
        sys.settrace(count)
        try:
            dropped = shared.submit("q", ["b", "c"])
            dropped.cancel()
            shared.queued_tokens()
        finally:
            sys.settrace(before)
        return lines

    few = cost()
    for _ in range(1000):
        shared.submit("q", ["x"])
    many = cost()
    assert few == many > 10
    reranker.gate.set()
    shared.close()


def test_large_ones_take_turns() -> None:
    first, second = request(*[10] * 6, large=True), request(*[10] * 3, large=True)
    waiting = queue(first, second)
    took = [waiting.slice(25)[0] for _ in range(5)]
    assert [(piece.request is first, piece.begin, piece.end) for piece in took] == [
        (True, 0, 2),
        (False, 0, 2),
        (True, 2, 4),
        (False, 2, 3),
        (True, 4, 6),
    ]
    assert not waiting


def test_scores_are_those_of_a_call_of_its_own(tiny: object) -> None:
    model = fastrerank.CrossEncoder(tiny("bert"), device="cpu")  # type: ignore[operator]
    import tiny as factory

    texts = factory.texts(60)
    queries = factory.texts(12, seed=1, longest=6)
    alone = [model.score(query, texts[i : 5 * i]) for i, query in enumerate(queries)]

    async def together() -> list[np.ndarray]:
        async with AsyncReranker(model, max_batch_tokens=300, max_wait_ms=5) as shared:
            return await asyncio.gather(*(shared.score(q, texts[i : 5 * i]) for i, q in enumerate(queries)))

    for expected, scores in zip(alone, asyncio.run(together()), strict=True):
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(expected, scores)


def test_usage_is_the_requests_own(tiny: object) -> None:
    model = fastrerank.CrossEncoder(tiny("bert"), device="cpu")  # type: ignore[operator]

    async def run() -> list[int]:
        async with AsyncReranker(model) as shared:
            jobs = [shared.scored("the owl", ["a cat"] * n) for n in (1, 5)]
            return [result.tokens for result in await asyncio.gather(*jobs)]

    one, five = asyncio.run(run())
    model.score("the owl", ["a cat"])
    assert (one, five) == (model.last_usage["tokens"], 5 * one)


def test_requests_share_batches_and_rank_breaks_ties_by_position() -> None:
    reranker = Lengths()
    reranker.gate.clear()

    async def run() -> list[list[dict[str, object]]]:
        async with AsyncReranker(reranker, workers=1, max_wait_ms=0) as shared:
            jobs = [asyncio.ensure_future(shared.rank("q", ["bb", "a", "cc"], return_documents=True))]
            await asyncio.to_thread(reranker.entered.acquire)
            jobs += [asyncio.ensure_future(shared.rank("qq", ["x" * n])) for n in range(1, 8)]
            await asyncio.sleep(0.05)
            reranker.gate.set()
            return await asyncio.gather(*jobs)

    first, *others = asyncio.run(run())
    assert [(hit["corpus_id"], hit["score"], hit["text"]) for hit in first] == [
        (0, 1.0, "bb"),
        (2, 1.0, "cc"),
        (1, 0.0, "a"),
    ]
    assert [hits[0]["score"] for hits in others] == [float(n - 2) for n in range(1, 8)]
    assert len(reranker.calls) == 2  # the first alone, then all that came meanwhile


def test_a_failing_request_fails_alone() -> None:
    reranker = Lengths()
    shared, _ = held(reranker)
    with_all = {name: shared.submit("q", [name]) for name in ("good", "boom", "nan", "also good")}
    reranker.gate.set()
    shared.close()
    assert with_all["good"].result(1).tolist() == [3.0]
    assert with_all["also good"].result(1).tolist() == [8.0]
    with pytest.raises(RuntimeError, match="boom"):
        with_all["boom"].result(1)
    with pytest.raises(FloatingPointError):
        with_all["nan"].result(1)


class Short(Lengths):
    """Returns a score too few for queries `short`."""

    def score_many(self, queries: Any, documents: Any) -> Any:
        results = super().score_many(queries, documents)
        return [row[1:] if query == "short" else row for query, row in zip(queries, results, strict=True)]


def test_a_reranker_that_returns_too_few_scores_fails_that_request_alone() -> None:
    reranker = Short()
    shared, first = held(reranker)
    good, bad, after = (shared.submit(query, ["ab", "c"]) for query in ("q", "short", "q"))
    reranker.gate.set()
    with pytest.raises(RuntimeError, match=r"returned \[1\] scores for \[2\] documents"):
        bad.result(10)
    assert [len(future.result(10)) for future in (first, good, after)] == [1, 2, 2]
    shared.close()
    assert shared.queued_tokens() == 0


def test_explained_requests_carry_their_tokens_and_share_batches_with_others() -> None:
    async def run() -> Any:
        async with AsyncReranker(Explaining(), workers=1) as shared:
            jobs = [shared.rank("q", ["aa b", "c"], explain=i != 1, top_k=1) for i in range(3)]
            failing = shared.rank("q", ["boom"], explain=True)
            return await asyncio.gather(*jobs, failing, return_exceptions=True)

    first, plain, last, failed = asyncio.run(run())
    assert first == last == [{"corpus_id": 0, "score": 3.0, "tokens": [("aa", 2.0), (" b", 1.0)]}]
    assert plain == [{"corpus_id": 0, "score": 3.0}]
    assert isinstance(failed, RuntimeError)
    with pytest.raises(ValueError, match=r"explain needs .*icr.*not cross-encoder"):
        asyncio.run(AsyncReranker(Lengths()).scored("q", ["a"], explain=True))


def test_a_cancelled_request_is_not_computed() -> None:
    reranker = Lengths()
    shared, first = held(reranker)
    dropped = shared.submit("q", ["never"] * 100)
    assert shared.waiting() == 1
    assert dropped.cancel()
    assert shared.waiting() == 0
    reranker.gate.set()
    shared.close()
    assert first.result(1).tolist() == [0.0]
    assert reranker.calls == [[["a"]]]


def test_a_task_that_is_cancelled_drops_its_request() -> None:
    reranker = Lengths()
    reranker.gate.clear()

    async def run() -> None:
        shared = AsyncReranker(reranker, workers=1)
        first = asyncio.ensure_future(shared.score("q", ["a"]))
        await asyncio.to_thread(reranker.entered.acquire)
        second = asyncio.ensure_future(shared.score("q", ["never"]))
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert shared.waiting() == 0
        reranker.gate.set()
        await first
        await shared.aclose()

    asyncio.run(run())
    assert reranker.calls == [[["a"]]]


def test_deadlines() -> None:
    reranker = Lengths()
    reranker.gate.clear()

    async def run() -> None:
        shared = AsyncReranker(reranker, workers=1)
        first = asyncio.ensure_future(shared.score("q", ["a"]))
        await asyncio.to_thread(reranker.entered.acquire)
        with pytest.raises(DeadlineExceeded, match="0 of 2 documents"):
            await shared.score("q", ["late", "too"], timeout=0.02)
        late = shared.submit("q", ["late"], timeout=0.01)  # no one waits for it: found when the next batch is made
        await asyncio.sleep(0.03)
        reranker.gate.set()
        await first
        with pytest.raises(DeadlineExceeded):
            await asyncio.wrap_future(late)
        await shared.aclose()

    asyncio.run(run())
    assert reranker.calls == [[["a"]]]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    reranker = Lengths()
    shared, first = held(reranker, "a" * 200, max_queue_tokens=100)
    with pytest.raises(Overloaded) as refused:
        shared.submit("q", ["b" * 200])
    assert refused.value.retry_after > 0
    reranker.gate.set()
    first.result(5)
    shared.close()


def test_methods_of_lists_get_requests_whole() -> None:
    reranker = Lengths(independent=False)
    shared = AsyncReranker(reranker, max_batch_tokens=2)
    futures = [shared.submit("q", ["abcdef"] * n) for n in (30, 2, 7)]
    shared.close()
    assert [len(future.result(1)) for future in futures] == [30, 2, 7]
    assert sorted(len(texts) for call in reranker.calls for texts in call) == [2, 7, 30]


def test_closing_finishes_what_was_accepted_and_takes_no_more() -> None:
    reranker = Lengths()
    shared = AsyncReranker(reranker)
    futures = [shared.submit("q", ["a" * i]) for i in range(50)]
    shared.close()
    assert [future.result(0)[0] for future in futures] == [i - 1 for i in range(50)]
    with pytest.raises(Closed):
        shared.submit("q", ["a"])
    shared.close()


def test_closing_with_a_grace_time_ends_the_rest() -> None:
    reranker = Lengths()
    shared, _ = held(reranker)
    waiting = shared.submit("q", ["b"])
    shared.close(grace=0.01)
    with pytest.raises(Closed):
        waiting.result(1)
    reranker.gate.set()


def test_nothing_to_score_and_bad_arguments() -> None:
    shared = AsyncReranker(Lengths())
    assert shared.submit("q", []).result(0).shape == (0,)
    with pytest.raises(TypeError, match=r"documents\[1\]"):
        shared.submit("q", ["a", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="timeout"):
        shared.submit("q", ["a"], timeout=0)
    shared.close()
    with pytest.raises(TypeError, match="reranker"):
        AsyncReranker("a path")  # type: ignore[arg-type]
    for name in ("max_batch_tokens", "max_queue_tokens", "workers"):
        with pytest.raises(ValueError, match=name):
            AsyncReranker(Lengths(), **{name: 0})  # type: ignore[arg-type]


def test_many_threads_get_their_own_answers(minilm: Path) -> None:
    model = fastrerank.load(str(minilm), method="embedding", device="cpu")
    texts = [f"document number {i} about {'owls' if i % 3 else 'fleas'}" for i in range(20)]
    expected = {n: model.score("owls", texts[:n]) for n in range(1, 20)}
    shared = AsyncReranker(model)
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for i in range(10):
            n = 1 + (7 * seed + i) % 19
            if not np.array_equal(shared.submit("owls", texts[:n]).result(30), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared.close()
    assert not wrong
