"""The load benchmark's clients and its judge: what they count, and that no wrong, lost or swapped answer passes."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")
from serve_fakes import Lengths
from serve_running import running

from bench.serve.load import Address, closed, compare, http_request, opened
from fastrerank.serve.app import create_app
from fastrerank.serve.batching.batcher import AsyncReranker

DOCUMENTS = [["a", "cccc", "bb"], ["xx", "y"], ["zzz"]]
EXPECTED = [np.array([len(text) - 1 for text in texts], np.float32) for texts in DOCUMENTS]


class Served:
    """A server of a fake reranker in a thread, and the requests that it is asked."""

    def __init__(self, **options: Any) -> None:
        self.reranker = Lengths()
        self._running = running(create_app({"fake": AsyncReranker(self.reranker, **options)}))
        host, _, port = self._running.__enter__().removeprefix("http://").partition(":")
        self.address = Address(host, int(port))
        bodies = [{"query": "q", "documents": texts, "raw_scores": True} for texts in DOCUMENTS]
        self.requests = [http_request("/rerank", body, self.address) for body in bodies]

    def end(self) -> None:
        self.reranker.gate.set()
        self._running.__exit__(None, None, None)


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.end()


def test_every_client_gets_its_answers(served: Served) -> None:
    phase = closed(served.address, served.requests, 8, 0.3)
    assert {reply.status for reply in phase.replies} == {200}
    numbers = [reply.number for reply in phase.replies]
    assert max(map(numbers.count, range(3))) - min(map(numbers.count, range(3))) <= 1
    assert phase.begin < phase.end
    assert phase.rate == len(numbers) / (phase.end - phase.begin)
    assert compare(phase.replies, EXPECTED, 0.0).wrong == 0
    steady = opened(served.address, served.requests, 100.0, 0.3)
    assert 5 < len(steady.answered()) == len(steady.replies)
    assert compare(steady.replies, EXPECTED, 0.0).wrong == 0


def test_refusals_and_lost_servers_are_counted() -> None:
    served = Served(max_queue_tokens=16, workers=1)
    served.reranker.gate.clear()
    threading.Timer(0.4, served.reranker.gate.set).start()
    phase = opened(served.address, served.requests, 100.0, 0.3)
    refused = [reply for reply in phase.replies if reply.status == 429]
    assert refused
    assert all(reply.retry_after for reply in refused)
    assert len(phase.answered()) == len(phase.replies) - len(refused) >= 1
    served.end()
    gone = closed(served.address, served.requests, 1, 0.01)
    assert {reply.status for reply in gone.replies} == {0}
    assert b"Error" in gone.replies[0].body
    assert np.isnan(gone.percentile(50))


def test_what_is_wrong_is_found(served: Served) -> None:
    right = closed(served.address, served.requests[:1], 1, 0.001).replies[0]
    rows = json.loads(right.body)["results"]

    def verdict(results: Any, number: int = 0, allowed: float = 0.0) -> Any:
        body = results if isinstance(results, bytes) else json.dumps({"results": results}).encode()
        return compare([dataclasses.replace(right, number=number, body=body)], EXPECTED, allowed)

    assert verdict(rows) == compare([right], EXPECTED, 0.0)
    assert verdict(rows).wrong == 0
    off = [row | {"relevance_score": row["relevance_score"] + 1e-6} for row in rows]
    assert "off by 1e-06" in verdict(off).first
    assert (verdict(off, allowed=1e-5).wrong, verdict(off, allowed=1e-5).furthest > 0) == (0, True)
    assert verdict(rows[::-1]).first.endswith("not sorted")
    assert "positions" in verdict(rows[:2]).first
    assert "positions" in verdict(rows, number=1).first  # another request's answer
    swapped = [row | {"index": {0: 2, 2: 0}.get(row["index"], 1)} for row in rows]
    assert verdict(swapped).wrong == 1
    assert "not an answer" in verdict(b"{").first
    assert verdict([row | {"relevance_score": float("nan")} for row in rows]).wrong == 1
