"""Which request is scored when: large ones in slices, small ones between them, and what is never taken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from serve_fakes import Lengths

from fastrerank.serve.batching.admission import HEAVY_BYTES, REQUEST_SHARE
from fastrerank.serve.batching.batcher import QUIET_SLICES, AsyncReranker, Overloaded, TooLarge
from fastrerank.serve.batching.queue import LEAST_SLICE_TOKENS, SLICE_SECONDS, Speed


class Stepped(Lengths):
    """Scores one call at a time, when it is told to: `step` lets the oldest call go and returns its texts."""

    def __init__(self, independent: bool = True, max_length: int | None = None) -> None:
        super().__init__(independent)
        self.max_length = max_length
        self._lock = threading.Lock()
        self._held: list[tuple[list[str], threading.Event]] = []

    def _score_many(self, _queries: list[str], documents: list[list[str]], usage: Any) -> Any:
        held = [text for texts in documents for text in texts], threading.Event()
        with self._lock:
            self._held.append(held)
        self.entered.release()
        assert held[1].wait(30)
        usage.tokens = sum(map(len, documents))
        return [np.array([len(text) for text in texts], np.float32) for texts in documents]

    def wait(self) -> None:
        """Wait until one more call has begun."""
        assert self.entered.acquire(timeout=30)

    def running(self) -> list[list[str]]:
        with self._lock:
            return [texts for texts, _ in self._held]

    def step(self, text: str | None = None) -> list[str]:
        """Let the oldest call go on, or the oldest that holds `text`."""
        with self._lock:
            i = next(i for i, (texts, _) in enumerate(self._held) if text is None or text in texts)
            texts, event = self._held.pop(i)
        event.set()
        return texts

    def step_all(self) -> None:
        with self._lock:
            for _, event in self._held:
                event.set()


class Untaught(Speed):
    """Keeps its first guesses, which no clock changes: 0.3 tokens per byte, and slices of the least size."""

    def note(self, *_: Any) -> None:
        pass


def shared_by(reranker: Stepped, **options: Any) -> AsyncReranker:
    shared = AsyncReranker(reranker, max_wait_ms=0, **options)
    shared.speed = Untaught()
    return shared


LARGE = ["x" * 92] * 1000  # with its query and what a pair costs, 30 tokens each


@pytest.fixture
def single() -> Iterator[tuple[Stepped, AsyncReranker]]:
    reranker = Stepped()
    shared = shared_by(reranker, workers=1)
    yield reranker, shared
    drain(reranker, shared)


def drain(reranker: Stepped, shared: AsyncReranker) -> None:
    for request in list(shared._waiting):
        request.future.cancel()
    reranker.step_all()
    shared.close()


def kind(texts: list[str]) -> str:
    return "large" if texts[0].startswith("x") else texts[0]


def test_small_requests_pass_between_slices_of_a_large_one(single: tuple[Stepped, AsyncReranker]) -> None:
    reranker, shared = single
    large = shared.submit("q", LARGE)
    reranker.wait()
    (slice_,) = reranker.running()
    assert len(slice_) <= LEAST_SLICE_TOKENS // 30  # and not half a batch, as nothing is known of the speed
    order = []
    smalls: list[Future[Any]] = [shared.submit("q", ["s1"] * 10), shared.submit("q", ["s2"])]
    for _ in range(6):
        texts = reranker.step()
        order.append(kind(texts))
        if order == ["large", "s1"]:
            smalls.append(shared.submit("q", ["s3"]))  # comes while a slice is computed
        reranker.wait()
    assert order[:4] == ["large", "s1", "large", "s3"]
    assert order[4:] == ["large", "large"]
    assert [len(future.result(5)) for future in smalls] == [10, 1, 1]
    assert not large.done()


def test_small_ones_without_end_do_not_stop_a_large_one(single: tuple[Stepped, AsyncReranker]) -> None:
    reranker, shared = single
    shared.submit("q", LARGE)
    shared.submit("q", ["s"])
    order = []
    for _ in range(12):
        reranker.wait()
        shared.submit("q", ["s"])
        order.append(kind(reranker.step()))
    assert order.count("large") == 6  # one slice after each batch


def test_large_requests_share_what_is_left(single: tuple[Stepped, AsyncReranker]) -> None:
    reranker, shared = single
    shared.submit("q", ["x1" + text for text in LARGE])
    reranker.wait()
    shared.submit("q", ["x2" + text for text in LARGE])
    order = []
    for _ in range(6):
        order.append(reranker.step()[0][:2])
        reranker.wait()
    assert order in (["x1", "x1", "x2", "x1", "x2", "x1"], ["x1", "x2", "x1", "x2", "x1", "x2"])


def test_one_of_two_workers_stays_free_for_small_ones_until_it_is_quiet() -> None:
    reranker = Stepped()
    shared = shared_by(reranker, workers=2)
    try:
        shared.submit("q", LARGE * 3)
        for _ in range(QUIET_SLICES - 1):
            reranker.wait()
            assert len(reranker.running()) == 1
            reranker.step()
        reranker.wait()
        reranker.wait()
        assert len(reranker.running()) == 2  # nobody small has come for a while
        small = shared.submit("q", ["s"])
        reranker.step()
        reranker.wait()
        assert sorted(map(kind, reranker.running())) == ["large", "s"]
        reranker.step("s")
        assert small.result(5).shape == (1,)
        second = shared.submit("q", ["s"])
        reranker.wait()  # at once: the other worker computes a slice
        assert sorted(map(kind, reranker.running())) == ["large", "s"]
        reranker.step("s")
        assert second.result(5).shape == (1,)
    finally:
        drain(reranker, shared)


def test_what_cannot_be_sliced_never_has_all_workers() -> None:
    """Requests that are taken whole, and texts that take long to be tokenised."""
    for independent, texts in ((False, LARGE), (True, ["x" * (HEAVY_BYTES + 1)])):
        reranker = Stepped(independent, max_length=100)
        shared = shared_by(reranker, workers=2, max_batch_tokens=1000)
        try:
            shared._quiet = QUIET_SLICES
            for _ in range(3):
                shared.submit("q", texts)
            reranker.wait()
            small = shared.submit("q", ["s"])
            reranker.wait()
            assert sorted(map(kind, reranker.running())) == ["large", "s"]
            reranker.step("s")
            small.result(5)
            assert [kind(texts) for texts in reranker.running()] == ["large"]
        finally:
            drain(reranker, shared)


def test_a_slice_lasts_a_bounded_time() -> None:
    speed = Speed()
    assert speed.tokens(speed.slice(16384)) == pytest.approx(LEAST_SLICE_TOKENS, abs=2)
    speed.note(100_000, 30_000, 1.0)
    assert speed.tokens(speed.slice(16384)) == pytest.approx(30_000 * SLICE_SECONDS, abs=2)
    for _ in range(50):
        speed.note(100_000, 30_000, 0.01)
    assert speed.tokens(speed.slice(16384)) == pytest.approx(16384, abs=2)  # a GPU's slices are batches
    assert speed.tokens(speed.slice(100)) == pytest.approx(100, abs=2)


def test_texts_of_few_tokens_do_not_make_batches_grow_without_bound() -> None:
    speed = Speed()
    for _ in range(100):
        speed.note(1 << 20, 512, 0.1)
    assert speed.bytes(16384) <= 16384 / 0.1


def test_a_request_beyond_its_share_is_refused_into_an_empty_queue_too() -> None:
    reranker = Lengths()
    shared = AsyncReranker(reranker, max_queue_tokens=1000)
    share = int(1000 * REQUEST_SHARE)
    with pytest.raises(TooLarge, match=rf"about \d+ tokens .*at most {share}, 75% of max_queue_tokens=1000"):
        shared.submit("q", ["x" * 91] * 30)
    assert len(shared.submit("q", ["x" * 91] * 20).result(10)) == 20
    assert not isinstance(Overloaded("", 0.0), TooLarge)
    shared.close()


def test_a_long_query_counts_with_every_document() -> None:
    """99 KiB: a long query and many documents of a letter, which are tens of millions of tokens."""
    reranker = Lengths()
    shared = AsyncReranker(reranker)
    query, letters = "of " * 16_000, ["a"] * 10_000
    with pytest.raises(TooLarge):
        shared.submit(query, letters)
    assert shared.submit("of", letters).result(30).shape == (10_000,)
    shared.close()


def test_many_queries_of_one_request_are_one_large_request(single: tuple[Stepped, AsyncReranker]) -> None:
    reranker, shared = single
    queries = [f"q{i}" for i in range(len(LARGE))]
    shared.submit(queries, LARGE)  # type: ignore[arg-type]
    reranker.wait()
    small = shared.submit("q", ["s"])
    assert kind(reranker.step()) == "large"
    reranker.wait()
    assert kind(reranker.step()) == "s"
    assert small.result(5).shape == (1,)


def test_a_pair_counts_no_more_than_the_model_reads() -> None:
    reranker = Stepped(max_length=128)
    shared = shared_by(reranker, workers=1)
    try:
        shared.submit("word " * 20_000, ["s"] * 5)
        reranker.wait()
        assert shared.queued_tokens() == pytest.approx(5 * 128, abs=5)
    finally:
        drain(reranker, shared)


def test_large_requests_leave_room_for_small_ones() -> None:
    reranker = Stepped()
    shared = shared_by(reranker, workers=1, max_queue_tokens=100_000, max_batch_tokens=4000)
    try:
        for _ in range(2):
            shared.submit("q", LARGE)
        with pytest.raises(Overloaded, match="what large requests may take"):
            shared.submit("q", LARGE)
        small = [shared.submit("q", ["s" * 91] * 60) for _ in range(10)]
        assert not any(future.done() for future in small)
    finally:
        drain(reranker, shared)
