"""Bounds of a body over HTTP, whatever the route and dialect; and which routes a browser and a probe may open."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
from serve_fakes import Lengths

from fastrerank.serve.api.validation import MOST_VALUES
from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker

JSON = {"content-type": "application/json"}
ROUTES = ("/rerank", "/v1/rerank", "/v2/rerank", "/", "/score", "/v1/score")


def asked(*requests: dict[str, Any], settings: Settings | None = None) -> list[httpx.Response]:
    """Answers of one application, one request after the other."""

    async def run() -> list[httpx.Response]:
        async with AsyncReranker(Lengths(), max_wait_ms=0) as shared:
            transport = httpx.ASGITransport(create_app({"fake": shared}, settings), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return [await client.request(**{"method": "POST", **one}) for one in requests]

    return asyncio.run(run())


def message_of(answer: httpx.Response) -> str:
    """The message, where any dialect has it."""
    body = answer.json()
    error = body.get("error", body.get("message", body.get("detail")))
    return str(error["message"] if isinstance(error, dict) else error)


def test_every_route_with_a_body_reads_it_within_bounds() -> None:
    shared = AsyncReranker(Lengths())
    try:
        posted = [route for route in create_app({"fake": shared}).routes if "POST" in getattr(route, "methods", ())]
        assert sorted(route.path for route in posted) == sorted(ROUTES)  # type: ignore[attr-defined]
        assert {type(route).__name__ for route in posted} == {"BodyRoute"}
    finally:
        shared.close()


@pytest.mark.parametrize("route", ROUTES)
def test_too_many_values_and_what_is_no_json(route: str) -> None:
    many = b'{"query": "q", "texts": [' + b"0," * MOST_VALUES + b"0]}"
    plain = b'{"query": "q", "documents": ["a"]}' if "rerank" in route else b'{"query": "q", "texts": ["a"]}'
    plain = b'{"text_1": "q", "text_2": "a"}' if "score" in route else plain
    values, bad, kind, right = asked(
        {"url": route, "content": many, "headers": JSON},
        {"url": route, "content": b"{bad", "headers": JSON},
        {"url": route, "content": plain, "headers": {"content-type": "text/plain"}},
        {"url": route, "content": plain, "headers": {"content-type": "application/vnd.x+json; charset=utf-8"}},
    )
    assert values.status_code == 413, values.text
    assert f"more than {MOST_VALUES} JSON values: send fewer documents at a time" in message_of(values)
    assert bad.status_code in (400, 422)
    assert "JSON decode error: Expecting property name" in message_of(bad)
    assert kind.status_code in (400, 422)
    assert "the content-type must be application/json" in message_of(kind)
    assert right.status_code == 200, right.text


@pytest.mark.parametrize("route", ROUTES)
def test_bodies_beyond_their_share_are_told_to_come_back(route: str) -> None:
    settings = Settings(max_body_bytes=10_000, max_bodies_bytes=5_000)
    long, small = ({"query": "q", "texts": ["x" * n], "text_1": "q", "text_2": "x"} for n in (6_000, 60))
    refused, large, right = asked(
        {"url": route, "json": long},
        {"url": route, "content": b" " * 11_000, "headers": JSON},
        {"url": "/rerank", "json": small},
        settings=settings,
    )
    assert (refused.status_code, refused.headers.get("retry-after")) == (429, "1"), refused.text
    assert "the bodies of all requests together exceed 5000 bytes" in message_of(refused)
    assert large.status_code == 413
    assert "the body exceeds 10000 bytes" in message_of(large)
    assert right.status_code == 200  # nothing stays counted


def test_a_field_that_is_named_again_and_again_is_refused() -> None:
    body = {"query": "q", "documents": [{"a": "x" * 30_000, "b": "y"}], "rank_fields": ["b", *["a"] * 5_000]}
    begin = time.monotonic()
    refused, right = asked(
        {"url": "/v1/rerank", "json": body}, {"url": "/v1/rerank", "json": {**body, "rank_fields": ["b", "a"]}}
    )
    assert time.monotonic() - begin < 5
    assert (refused.status_code, message_of(refused)) == (
        422,
        "`rank_fields` must name each field once, got 'a' twice or more",
    )
    assert right.json()["results"][0]["relevance_score"] > 0


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_probes_may_ask_for_the_head_alone(keys: tuple[str, ...]) -> None:
    answers = asked(*({"method": "HEAD", "url": path} for path in ("/health", "/ready")), settings=Settings(keys=keys))
    assert [answer.status_code for answer in answers] == [200, 200]


def test_a_browser_opens_the_documents_page_of_a_server_with_keys() -> None:
    """A browser sends no key for a page and its files: the page itself asks for the key of its requests."""
    pytest.importorskip("fastapi_offline")
    pages = ("/docs", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/openapi.json")
    closed = (
        {"url": "/docs"},
        {"url": "/docs/x"},
        {"method": "GET", "url": "/docsx"},
        {"method": "GET", "url": "/info"},
    )
    answers = asked(*({"method": "GET", "url": page} for page in pages), *closed, settings=Settings(keys=("secret",)))
    assert [answer.status_code for answer in answers] == [200] * 4 + [401] * 4
    schema = answers[3].json()
    assert schema["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    keyed = {path for path, methods in schema["paths"].items() for one in methods.values() if one.get("security")}
    assert keyed == set(schema["paths"]) - {"/health", "/ready"}
    (open_to_all,) = asked({"method": "GET", "url": "/openapi.json"})
    assert "securitySchemes" not in open_to_all.json()["components"]


def test_a_key_opens_the_routes_that_the_schema_says_it_does() -> None:
    headers = {"authorization": "Bearer secret"}
    body = {"query": "q", "texts": ["a"]}
    info = {"method": "GET", "url": "/info", "headers": headers}
    right, wrong = {"url": "/rerank", "json": body, "headers": headers}, {"url": "/rerank", "json": body}
    answers = asked(right, wrong, info, settings=Settings(keys=("secret",)))
    assert [answer.status_code for answer in answers] == [200, 401, 200]
