"""Bodies of hostile clients: refused or answered, while memory stays within what is promised and health answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from serve_running import Running

from bench.serve.hostile import KINDS, bodies
from fastrerank.serve.api.dialects import Problem
from fastrerank.serve.api.schemas import RerankBody, ScoreBody
from fastrerank.serve.api.validation import Bodies, stopping

MOST_MEMORY = 1 << 30  # beyond the memory of the idle server; docs/howto/serve.md
JSON = {"content-type": "application/json"}


class Health:
    """Asks /health without a pause while the block runs; `longest` seconds for an answer."""

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        self.longest, self.asked = 0.0, 0

    def __enter__(self) -> Health:
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.wait(0.02):
                begin = time.monotonic()
                assert client.get("/health").status_code == 200
                self.longest = max(self.longest, time.monotonic() - begin)
                self.asked += 1


@pytest.fixture(scope="module")
def server(minilm: Path) -> Iterator[Running]:
    running = Running("--model", f"one={minilm}", "--method", "embedding", "--threads", "1")
    yield running
    running.kill()


def storm(server: Running, count: int, size: int, clients: int) -> tuple[list[Any], float, int]:
    """Send the bodies; (kind, status, seconds) of each, the longest wait for health, and the most memory."""
    idle = server.status("VmRSS")
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the most begins anew

    def send(one: tuple[str, str, bytes]) -> tuple[str, int, float]:
        begin = time.monotonic()
        while True:
            answer = httpx.post(server.url + one[1], content=one[2], headers=JSON, timeout=600)
            if answer.status_code != 429:  # the bodies of all together are bounded
                return one[0], answer.status_code, time.monotonic() - begin
            assert answer.headers["retry-after"]
            time.sleep(0.05)

    with Health(server.url) as health, ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(send, bodies(count, size)))
    slowest = sorted(((round(seconds, 2), kind, status) for kind, status, seconds in answers), reverse=True)[:8]
    print(
        f"health {health.longest:.3f} s of {health.asked}, memory {(server.status('VmHWM') - idle) >> 20} MiB,", slowest
    )
    return answers, health.longest, server.status("VmHWM") - idle


def checked(server: Running, count: int, size: int, clients: int, latency: float) -> None:
    answers, longest, memory = storm(server, count, size, clients)
    assert len(answers) == count
    assert {status for _, status, _ in answers} <= {200, 400, 404, 413, 422, 424}, answers
    assert longest <= latency
    assert memory <= MOST_MEMORY
    right = httpx.post(f"{server.url}/rerank", json={"query": "owl", "texts": ["a cat", "an owl"]}, timeout=30)
    assert [row["index"] for row in right.json()] == [1, 0]


def test_hostile_bodies_are_refused_or_answered(server: Running) -> None:
    checked(server, len(KINDS), 1 << 20, clients=2, latency=5.0)  # a generous bound: other tests may run beside


@pytest.mark.nightly
def test_200_hostile_bodies_of_full_size(server: Running) -> None:
    checked(server, 200, (8 << 20) - 2000, clients=4, latency=1.0)


LISTS = [(model, name) for model in (RerankBody, ScoreBody) for name in model.model_fields]


@pytest.mark.parametrize(("model", "name"), LISTS, ids=[f"{model.__name__}.{name}" for model, name in LISTS])
def test_validation_stops_at_the_first_error(model: Any, name: str) -> None:
    """Whatever field the integers are in: FastAPI's own validation made an error of each."""
    raw = b'{"query":"q","documents":["a"],"%b":[%b0]}' % (name.encode(), b"0," * 100_000)
    with pytest.raises(RequestValidationError) as refused:
        Bodies().parsed(raw, model)
    assert f"body.{name}" in {".".join(map(str, row["loc"][:2])) for row in refused.value.errors()}
    with pytest.raises(ValidationError) as first:
        stopping(model).model_validate({"query": "q", "documents": ["a"], name: [0] * 100_000})
    assert first.value.error_count() <= 5


def test_what_stops_early_is_the_same_model() -> None:
    for model in (RerankBody, ScoreBody):
        early = stopping(model)
        assert early.model_json_schema() == model.model_json_schema()
        assert issubclass(early, model)
    body = {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1, "other": 7}
    assert stopping(RerankBody).model_validate(body).model_dump() == RerankBody.model_validate(body).model_dump()


def test_values_are_counted_outside_of_texts() -> None:
    small = Bodies(most_values=10)
    body = rb'{"query": ",,[[{{,,,,,,,,,,,,,,,\"\\", "documents": ["a,\\\",,,,,,,,,,,,,", "b\\"]}'
    assert small.parsed(body, RerankBody).documents == ['a,\\",,,,,,,,,,,,,', "b\\"]
    for more in (b'{"query": "q", "documents": [0,0,0,0,0,0,0,0,0,0]}', b"[" * 20, rb'{"\\":[[[[[[[[[[[['):
        with pytest.raises(Problem, match="more than 10 JSON values") as refused:
            small.parsed(more, RerankBody)
        assert refused.value.status == 413
    with pytest.raises(RequestValidationError):
        small.parsed(b'{"' + b'\\"' * 50 + b"," * 20, RerankBody)  # a text without an end


def test_what_is_no_json_is_told_by_its_place() -> None:
    for raw, place in ((b'{"a": x}', 6), (b"", 0), (b"\xff\xfe", 0)):
        with pytest.raises(RequestValidationError) as refused:
            Bodies().parsed(raw, RerankBody)
        assert refused.value.errors()[0]["loc"] == ("body", place)
    for raw in (b"[" * 100_000, b'{"top_n": ' + b"9" * 10_000 + b"}", b'{"query": "\xff"}'):
        with pytest.raises(RequestValidationError, match="JSON decode error"):
            Bodies().parsed(raw, RerankBody)
