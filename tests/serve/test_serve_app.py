"""The HTTP application in process: dialects, errors, keys, limits, metrics, and what the page needs."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
import numpy as np
from serve_fakes import Explaining, Lengths

from fastrerank.serve.api.errors import Flavor
from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker
from fastrerank.serve.middleware import JsonFormatter

BODY = {"query": "qq", "documents": ["a", "cccc", "bbb"]}


def ask(
    work: Callable[[Any], Any],
    settings: Settings | None = None,
    rerankers: dict[str, Lengths] | None = None,
    **options: Any,
) -> Any:
    """Run `work(client)` against an application of fake rerankers; headers etc. as httpx takes them."""

    async def run() -> Any:
        shared = {name: AsyncReranker(one, max_wait_ms=0) for name, one in (rerankers or {"fake": Lengths()}).items()}
        transport = httpx.ASGITransport(create_app(shared, settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", **options) as client:
            try:
                return await work(client)
            finally:
                for one in shared.values():
                    await one.aclose()

    return asyncio.run(run())


def post(path: str, body: Any, settings: Settings | None = None, **options: Any) -> Any:
    return ask(lambda client: client.post(path, json=body), settings, **options)


def sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-float(value))))


def test_tei() -> None:
    answer = post("/rerank", {"query": "qq", "texts": BODY["documents"], "return_text": True})
    assert answer.status_code == 200
    assert answer.json() == [
        {"index": 1, "text": "cccc", "score": sigmoid(2)},
        {"index": 2, "text": "bbb", "score": sigmoid(1)},
        {"index": 0, "text": "a", "score": sigmoid(-1)},
    ]
    assert answer.headers["x-compute-type"] == "cpu"
    assert answer.headers["x-compute-tokens"] == "3"
    raw = post("/rerank", {"query": "qq", "texts": ["a", "ccc"], "raw_scores": True}).json()
    assert raw == [{"index": 1, "score": 1.0}, {"index": 0, "score": -1.0}]
    empty = post("/rerank", {"query": "q", "texts": []})
    assert (empty.status_code, empty.json()) == (400, {"error": "`texts` cannot be empty", "error_type": "Empty"})
    wrong = post("/rerank", {"query": 5, "texts": ["a"]})
    assert wrong.status_code == 422
    assert wrong.json()["error_type"] == "Validation"
    assert "query" in wrong.json()["error"]


def test_the_superset_of_documents() -> None:
    answer = post("/v1/rerank", BODY | {"top_n": 2, "return_documents": True}).json()
    assert [row["index"] for row in answer["results"]] == [1, 2]
    assert answer["results"][0]["document"] == {"text": "cccc"}
    assert answer["results"][0]["relevance_score"] == sigmoid(2)
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert answer["model"] == "fake"
    assert {"id", "object", "created", "meta"} <= answer.keys()
    assert "document" not in post("/rerank", BODY).json()["results"][0]


def test_cohere() -> None:
    answer = post("/v2/rerank", BODY | {"model": "fake"}).json()
    assert answer.keys() == {"id", "results", "meta"}
    assert answer["results"][0] == {"index": 1, "relevance_score": sigmoid(2)}
    assert answer["meta"]["tokens"]["input_tokens"] == 3
    assert post("/v2/rerank", BODY | {"top_n": 0}).status_code == 422
    missing = post("/v2/rerank", BODY | {"model": "other"})
    assert missing.status_code == 404
    assert "fake" in missing.json()["message"]
    kept = post("/v1/rerank", {"query": "qq", "documents": [{"text": "abc", "url": 7}], "return_documents": True})
    assert kept.json()["results"][0]["document"] == {"text": "abc", "url": 7}
    fields = post(
        "/v1/rerank",
        {"query": "qq", "documents": [{"a": "ab", "b": "cd"}], "rank_fields": ["b", "a"], "raw_scores": True},
    )
    assert fields.json()["results"][0]["relevance_score"] == len("cd\nab") - 2
    lacking = post("/v1/rerank", {"query": "q", "documents": [{"a": "x"}], "rank_fields": ["b"]})
    assert (lacking.status_code, "`b`" in lacking.json()["message"]) == (422, True)


@pytest.mark.parametrize(
    ("flavor", "document"), [("jina", {"text": "cccc"}), ("vllm", {"text": "cccc", "multi_modal": None})]
)
def test_flavors_that_return_documents(flavor: str, document: Any) -> None:
    answer = post("/rerank", BODY, Settings(flavor=Flavor(flavor))).json()
    score = 2.0 if flavor == "vllm" else sigmoid(2)  # vLLM shows what the checkpoint says, here the score itself
    assert answer["results"][0] == {"index": 1, "relevance_score": score, "document": document}
    assert "object" not in answer


@pytest.mark.parametrize("flavor", ["auto", "tei", "sglang", "infinity"])
def test_tokens_of_methods_that_read_attention(flavor: str) -> None:
    pinned, models = Settings(flavor=Flavor(flavor)), {"icr": Explaining(), "fake": Lengths()}
    rows = post("/rerank", BODY | {"explain": True}, pinned, rerankers=models).json()
    rows = rows if isinstance(rows, list) else rows["results"]
    assert [(row["index"], row["tokens"]) for row in rows] == [(1, [["cccc", 4]]), (2, [["bbb", 3]]), (0, [["a", 1]])]
    refused = post("/rerank", BODY | {"explain": True, "model": "fake"}, pinned, rerankers=models)
    assert refused.status_code == 422
    assert "explain needs a method that reads attention" in refused.text
    info = ask(lambda client: client.get("/info"), pinned, rerankers=models).json()["models"]
    assert {name: row["explain"] for name, row in info.items()} == {"icr": True, "fake": False}


def test_infinity_and_sglang() -> None:
    infinity = Settings(flavor=Flavor.infinity)
    answer = post("/rerank", BODY | {"return_documents": True}, infinity).json()
    assert answer["object"] == "rerank"
    assert answer["results"][0]["document"] == "cccc"
    assert post("/rerank", BODY, infinity).json()["results"][0]["document"] is None
    assert post("/rerank", BODY | {"top_n": 0}, infinity).status_code == 422
    rows = post("/v1/rerank", BODY, Settings(flavor=Flavor.sglang)).json()
    assert rows[0] == {"index": 1, "score": sigmoid(2), "document": "cccc"}
    assert len(post("/rerank", BODY | {"top_n": 0}, Settings(flavor=Flavor.vllm)).json()["results"]) == 3


def test_vllm_scores_keep_the_order_of_pairs() -> None:
    answer = post("/score", {"text_1": "qq", "text_2": ["a", "cccc"], "use_activation": False}).json()
    assert [row["score"] for row in answer["data"]] == [-1.0, 2.0]
    assert answer["usage"]["prompt_tokens"] == 2
    pairs = post("/v1/score", {"queries": ["a", "bb", "a"], "documents": ["x", "x", "xxx"], "raw_scores": True}).json()
    assert [row["score"] for row in pairs["data"]] == [0.0, -1.0, 2.0]
    wrong = post("/score", {"text_1": ["a", "b"], "text_2": ["x", "y", "z"]})
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (
        400,
        "Input lengths must be either 1:1, 1:N or N:N",
    )
    assert post("/score", {"text_1": "a"}).status_code == 400
    assert post("/score", {"text_1": "a", "text_2": []}).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        5,
        "x",
        {"query": "q"},
        {"query": "q", "texts": ["a"], "documents": ["a"]},
        {"query": "q", "texts": "a"},
        {"query": None, "documents": ["a"]},
        {"query": "q", "documents": [None]},
        {"query": "q", "documents": [1]},
        {"query": "q", "documents": [{}]},
        {"query": "q", "documents": ["a"], "top_n": -1},
        {"query": "q", "documents": ["a"], "top_n": "2"},
        {"query": {"text": 1}, "documents": ["a"]},
    ],
)
def test_wrong_bodies_are_the_clients_fault(body: Any) -> None:
    answer = post("/rerank", body)
    assert answer.status_code == 422, answer.text
    assert answer.json()


def post_raw(path: str, body: bytes) -> Any:
    return ask(lambda client: client.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"])
def test_malformed_json_and_unknown_models_on_every_route(path: str) -> None:
    for body in (
        b'{"query": ',
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"query": "q", "documents": ["a"], "top_n": 1e999}',
    ):
        answer = post_raw(path, body)
        assert 400 <= answer.status_code < 500, (body[:50], answer.text)
        assert answer.json()
    sides = {"queries": "q", "documents": ["a"]} if "score" in path else BODY
    unknown = post(path, sides | {"model": "other"})
    assert unknown.status_code == 404
    assert "no model 'other' here; one of fake" in unknown.text


def test_documents_come_back_as_they_were_sent_or_are_refused() -> None:
    body = rb'{"query": "q\ud800", "documents": [{"text": "a\udfff", "x": "\ud800"}], "return_documents": true}'
    echoed = post_raw("/rerank", body)  # lone surrogates, which JSON can carry and UTF-8 cannot
    assert echoed.status_code == 200
    assert echoed.json()["results"][0]["document"] == {"text": "a\udfff", "x": "\ud800"}
    for number in (b"NaN", b"-Infinity", b"1e999"):
        body = b'{"query": "q", "documents": [{"text": "a", "x": %b}], "return_documents": true}' % number
        refused = post_raw("/rerank", body)
        assert refused.status_code == 422
        assert "number that JSON does not have" in refused.json()["message"]
        assert post_raw("/rerank", body.replace(b"true", b"false")).status_code == 200


def test_unknown_routes() -> None:
    assert ask(lambda client: client.get("/nothing")).status_code == 404
    assert ask(lambda client: client.get("/rerank")).status_code == 405


def test_limits() -> None:
    few = Settings(max_documents=3)
    assert post("/rerank", {"query": "q", "texts": ["a"] * 3}, few).status_code == 200
    many = post("/rerank", {"query": "q", "texts": ["a"] * 4}, few)
    assert (many.status_code, many.json()["error"]) == (422, "batch size 4 > maximum allowed batch size 3")
    small = Settings(max_body_bytes=200)
    assert post("/rerank", {"query": "q", "texts": ["a" * 300]}, small).status_code == 413

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b" " * 20

    assert ask(lambda client: client.post("/rerank", content=chunks()), small).status_code == 413

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    slow_settings = Settings(body_seconds=0.05)
    assert ask(lambda client: client.post("/rerank", content=slow()), slow_settings).status_code == 408


def test_ten_thousand_documents() -> None:
    answer = post("/rerank", {"query": "q", "texts": ["x" * (i % 7) for i in range(10_000)], "raw_scores": True}).json()
    assert len(answer) == 10_000
    assert [row["index"] for row in answer[:3]] == [6, 13, 20]


def test_keys_open_all_but_health() -> None:
    settings = Settings(keys=("secret", "other"))
    for path in ("/health", "/ready", "/"):
        assert ask(lambda client, path=path: client.get(path), settings).status_code == 200
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Bearer "}):
        refused = post("/rerank", BODY, settings, headers=headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert ask(lambda client: client.get("/metrics"), settings, headers=headers).status_code == 401
    for key in settings.keys:
        assert post("/rerank", BODY, settings, headers={"authorization": f"bearer {key}"}).status_code == 200


def test_errors_of_the_model() -> None:
    nan = post("/rerank", {"query": "q", "texts": ["a", "nan"]})
    assert (nan.status_code, nan.json()["error_type"]) == (424, "Backend")
    boom = post("/v1/rerank", {"query": "q", "documents": ["boom"]})
    assert boom.status_code == 500
    assert "RuntimeError" in boom.json()["message"]


def test_overload_is_429_with_retry_after() -> None:
    reranker = Lengths()
    reranker.gate.clear()

    async def run() -> tuple[Any, Any]:
        shared = AsyncReranker(reranker, workers=1, max_queue_tokens=100)
        transport = httpx.ASGITransport(create_app({"fake": shared}))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.ensure_future(client.post("/rerank", json={"query": "q", "texts": ["a" * 200]}))
            await asyncio.to_thread(reranker.entered.acquire)
            second = await client.post("/rerank", json={"query": "q", "texts": ["a" * 200]})
            metrics = (await client.get("/metrics")).text
            reranker.gate.set()
            await first
            await shared.aclose()
            return second, metrics

    refused, metrics = asyncio.run(run())
    assert (refused.status_code, refused.json()["error_type"]) == (429, "Overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert 'fastrerank_overloaded_total{model="fake"} 1.0' in metrics


def test_a_timeout_is_504() -> None:
    reranker = Lengths()
    reranker.gate.clear()

    async def work(client: Any) -> Any:
        answer = await client.post("/rerank", json=BODY)
        reranker.gate.set()
        return answer

    assert ask(work, Settings(timeout=0.05), {"fake": reranker}).status_code == 504


def test_models_by_name_and_what_is_said_of_them() -> None:
    two = {"first": Lengths(), "second": Lengths()}
    assert post("/rerank", BODY | {"model": "second"}, rerankers=two).json()["model"] == "second"
    assert post("/rerank", BODY, rerankers=two).json()["model"] == "first"
    listed = ask(lambda client: client.get("/v1/models"), rerankers=two).json()
    assert [row["id"] for row in listed["data"]] == ["first", "second"]
    info = ask(lambda client: client.get("/info"), rerankers=two).json()
    assert info["model_id"] == "first"
    assert info["models"]["second"]["method"] == "cross-encoder"


def test_metrics_count_what_was_scored() -> None:
    async def work(client: Any) -> str:
        for _ in range(3):
            await client.post("/v1/rerank", json=BODY)
        await client.post("/v1/rerank", json={})
        return str((await client.get("/metrics")).text)

    text = ask(work)
    assert 'fastrerank_documents_total{model="fake"} 9.0' in text
    assert 'fastrerank_tokens_total{model="fake"} 9.0' in text
    assert 'fastrerank_requests_total{route="/v1/rerank",status="200"} 3.0' in text
    assert 'fastrerank_requests_total{route="/v1/rerank",status="422"} 1.0' in text


def test_the_log_has_the_request_and_not_its_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastrerank.serve"):
        answer = post(
            "/rerank", {"query": "a secret query", "texts": ["a secret text"]}, headers={"x-request-id": "mine-1"}
        )
    assert answer.headers["x-request-id"] == "mine-1"
    rows = [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.message == "request"]
    assert (
        rows[0].items()
        >= {"request_id": "mine-1", "status": 200, "path": "/rerank", "documents": 1, "model": "fake"}.items()
    )
    assert "secret" not in caplog.text
    odd = post("/rerank", BODY, headers={"x-request-id": "x" * 500})
    assert len(odd.headers["x-request-id"]) == 32


def test_cors_is_off_unless_asked_for() -> None:
    origin = {"origin": "https://example.org"}
    assert "access-control-allow-origin" not in post("/rerank", BODY, headers=origin).headers
    allowed = post("/rerank", BODY, Settings(origins=("https://example.org",)), headers=origin)
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"


def test_the_page_asks_for_nothing_outside() -> None:
    page = ask(lambda client: client.get("/")).text
    assert "<!doctype html>" in page
    assert "http://" not in page
    assert "https://" not in page


def test_openapi_names_the_fields() -> None:
    schema = ask(lambda client: client.get("/openapi.json")).json()
    assert {"/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"} <= schema["paths"].keys()
    assert {"query", "texts", "documents", "top_n"} <= schema["components"]["schemas"]["RerankBody"][
        "properties"
    ].keys()
