"""Errors in the shape of the request's dialect: bodies that are no JSON, wrong routes and methods, keys, limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
from serve_fakes import Optioned

from fastrerank.serve.api.errors import Flavor
from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker

TEXTS = {"query": "q", "texts": ["a"]}
DOCUMENTS = {"query": "q", "documents": ["a"]}
PAIRS = {"text_1": "q", "text_2": "a"}


def request(method: str, path: str, settings: Settings | None = None, **options: Any) -> Any:
    async def run() -> Any:
        shared = AsyncReranker(Optioned(), max_wait_ms=0)
        transport = httpx.ASGITransport(create_app({"fake": shared}, settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            try:
                return await client.request(method, path, **options)
            finally:
                await shared.aclose()

    return asyncio.run(run())


def check_shape(flavor: str, body: Any, status: int, *, route: bool = False) -> None:
    """`route`: the error is one of the route, not of the request's fields."""
    if flavor == "tei":
        assert body.keys() == {"error", "error_type"}
        assert isinstance(body["error"], str)
    elif flavor == "cohere":
        assert body.keys() == {"message"}
    elif flavor == "voyage" or (flavor == "infinity" and route):
        assert body.keys() == {"detail"}
        assert isinstance(body["detail"], str)
    elif flavor == "infinity" and status == 422:
        assert all(row.keys() == {"loc", "msg", "type"} for row in body["detail"])
    elif flavor == "auto":
        assert body.keys() == {"message", "error", "detail"}
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["code"] == status


PINNED = [flavor.value for flavor in Flavor]
# Routes and bodies that tell their dialect, whatever is pinned or where nothing is.
OWN = [
    ("/score", PAIRS, "auto", "vllm"),
    ("/v1/score", PAIRS, "tei", "vllm"),
    ("/v2/rerank", DOCUMENTS, "auto", "cohere"),
    ("/rerank", TEXTS, "auto", "tei"),
    ("/", TEXTS, "auto", "tei"),
    ("/rerank", DOCUMENTS, "auto", "auto"),
    ("/rerank", DOCUMENTS | {"truncation": True}, "auto", "voyage"),
    ("/v1/rerank", DOCUMENTS | {"top_k": None}, "auto", "voyage"),
    ("/v1/rerank", DOCUMENTS | {"top_k": 1, "top_n": 1}, "auto", "auto"),
    *(("/rerank", DOCUMENTS, flavor, flavor) for flavor in PINNED),
]


@pytest.mark.parametrize(("path", "body", "pinned", "flavor"), OWN)
def test_wrong_fields_and_unknown_models(path: str, body: dict[str, Any], pinned: str, flavor: str) -> None:
    settings = Settings(flavor=Flavor(pinned), max_documents=1)
    sided = "text_2" if "text_2" in body else "texts" if "texts" in body else "documents"
    unknown = request("POST", path, settings, json=body | {"model": "other"})
    assert unknown.status_code == 404
    check_shape(flavor, unknown.json(), 404)
    assert "fake" in unknown.text
    bad = 400 if flavor in ("vllm", "voyage") else 422
    for wrong in ({"priority": "x"}, {"threshold": 1}, {sided: ["a", "b"]}, {sided: [1]}):
        refused = request("POST", path, settings, json=body | wrong)
        assert refused.status_code == bad, (wrong, refused.text)
        check_shape(flavor, refused.json(), bad)
    empty = request("POST", path, settings, json=body | {sided: []})
    status = 422 if flavor == "infinity" else 400
    assert empty.status_code == status, empty.text
    check_shape(flavor, empty.json(), status)
    if flavor == "tei":
        assert empty.json()["error_type"] == "Empty"


@pytest.mark.parametrize(
    ("path", "pinned", "flavor"),
    [
        ("/score", "auto", "vllm"),
        ("/v1/score", "infinity", "vllm"),
        ("/v2/rerank", "auto", "cohere"),
        ("/", "auto", "tei"),
        ("/rerank", "auto", "auto"),
        *(("/rerank", flavor, flavor) for flavor in PINNED),
    ],
)
def test_malformed_bodies(path: str, pinned: str, flavor: str) -> None:
    settings = Settings(flavor=Flavor(pinned), max_body_bytes=1000)
    json_headers = {"content-type": "application/json"}
    for content in (b'{"query": ', b"", b"\xff\xfe", b'{"query": "q", "documents": [}'):
        answer = request("POST", path, settings, content=content, headers=json_headers)
        status = 400 if flavor in ("tei", "vllm", "cohere", "voyage") else 422
        assert answer.status_code == status, answer.text
        check_shape(flavor, answer.json(), status)
    for content in (b"[]", b"5", b'"text"', b"{}"):
        answer = request("POST", path, settings, content=content, headers=json_headers)
        status = 400 if flavor in ("vllm", "voyage") else 422
        assert answer.status_code == status, answer.text
        check_shape(flavor, answer.json(), status)
    large = request("POST", path, settings, content=b" " * 2000, headers=json_headers)
    assert large.status_code == 413
    check_shape(flavor, large.json(), 413, route=True)


@pytest.mark.parametrize(
    ("method", "path", "pinned", "flavor", "status"),
    [
        ("GET", "/rerank", "auto", "auto", 405),
        ("GET", "/score", "auto", "vllm", 405),
        ("GET", "/v2/rerank", "auto", "cohere", 405),
        ("POST", "/info", "auto", "tei", 405),
        ("POST", "/models", "auto", "infinity", 405),
        ("GET", "/nothing", "auto", "auto", 404),
        *(("GET", "/rerank", flavor, flavor, 405) for flavor in PINNED),
        *(("POST", "/nothing", flavor, flavor, 404) for flavor in PINNED),
    ],
)
def test_wrong_routes_and_methods(method: str, path: str, pinned: str, flavor: str, status: int) -> None:
    answer = request(method, path, Settings(flavor=Flavor(pinned)))
    assert answer.status_code == status
    check_shape(flavor, answer.json(), status, route=True)
    if flavor == "vllm":
        assert answer.json()["error"]["type"] == {404: "Not Found", 405: "Method Not Allowed"}[status]


@pytest.mark.parametrize(
    ("path", "pinned", "flavor"),
    [("/score", "auto", "vllm"), ("/info", "auto", "tei"), *(("/v1/rerank", flavor, flavor) for flavor in PINNED)],
)
def test_missing_keys(path: str, pinned: str, flavor: str) -> None:
    answer = request("GET" if path == "/info" else "POST", path, Settings(keys=("key",), flavor=Flavor(pinned)))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    check_shape(flavor, answer.json(), 401, route=True)


@pytest.mark.parametrize("flavor", PINNED)
def test_errors_of_the_model(flavor: str) -> None:
    for text, status in (("nan", 424), ("boom", 500)):
        answer = request("POST", "/rerank", Settings(flavor=Flavor(flavor)), json=DOCUMENTS | {"documents": [text]})
        assert answer.status_code == status, answer.text
        check_shape(flavor, answer.json(), status)


def test_infinity_names_the_place_of_an_error() -> None:
    pinned = Settings(flavor=Flavor.infinity)
    (row,) = request("POST", "/rerank", pinned, json={"query": "q", "documents": ["a"], "top_n": 0}).json()["detail"]
    assert row == {"loc": ["body", "top_n"], "msg": "`top_n` must be at least 1", "type": "value_error"}
    rows = request("POST", "/rerank", pinned, json={"query": "q", "documents": ["a"], "top_n": "x"}).json()["detail"]
    assert rows[0]["loc"] == ["body", "top_n"]
    vllm = request("POST", "/score", json=PAIRS | {"priority": "x"}).json()["error"]
    assert (vllm["type"], vllm["param"], vllm["code"]) == ("Bad Request", "priority", 400)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": "q", "documents": ["a", None]}, "documents[1] must be a valid string or an object"),
        ({"query": "q", "documents": 5}, "documents must be a valid list or a valid string or an object"),
        ({"query": "q", "documents": ["a"], "truncate": 1}, "truncate must be a valid boolean or 'NONE' or 'END'"),
        ({"query": "q", "documents": ["a"], "top_n": -1}, "top_n must be greater than or equal to 0"),
        (
            {"query": 5, "documents": ["a"], "top_n": "x"},
            "query must be a valid string or an object; top_n must be a valid integer",
        ),
        ({"query": "q"}, "the body needs either `documents` or `texts`"),
        ({}, "query: Field required"),
    ],
)
def test_messages_name_the_place_and_what_is_valid(body: Any, message: str) -> None:
    assert request("POST", "/rerank", json=body).json()["message"] == message


def test_messages_of_the_place_in_a_text_that_is_no_json() -> None:
    headers = {"content-type": "application/json"}
    answer = request("POST", "/rerank", content=b'{"query": x}', headers=headers).json()
    assert answer["message"] == "the body at position 10: JSON decode error: Expecting value"


def test_messages_are_bounded() -> None:
    long = "x" * 100_000
    for wrong in ({"label": long}, {"model": long}, {"rank_fields": [long]}, {"chat_template_kwargs": {long: 1}}):
        answer = request("POST", "/v1/rerank", json=DOCUMENTS | wrong)
        assert answer.status_code in (404, 422)
        assert len(answer.content) < 10_000
