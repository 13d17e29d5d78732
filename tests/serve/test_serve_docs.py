"""`/docs`: the OpenAPI document in a browser, with nothing from another host."""

from __future__ import annotations

import importlib.util
import re
import shutil
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
import httpx
from serve_fakes import Lengths
from serve_running import running

from fastrerank.serve.api import docs_page
from fastrerank.serve.app import create_app
from fastrerank.serve.batching.batcher import AsyncReranker

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def test_the_page_and_its_files_are_served_and_name_no_other_host() -> None:
    pytest.importorskip("fastapi_offline")
    with running(create_app({"plain": AsyncReranker(Lengths())})) as address:
        page = httpx.get(f"{address}/docs")
        assert page.status_code == 200
        assert re.findall(r"https?:|//[\w-]+\.", page.text) == []
        named = re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text)
        assert sorted(named) == ["docs/swagger-ui-bundle.js", "docs/swagger-ui.css"]
        for name in named:
            file = httpx.get(f"{address}/{name}")
            assert (file.status_code, file.headers["content-type"].split(";")[0]) == (
                200,
                "text/css" if name.endswith("css") else "text/javascript",
            )
            assert len(file.content) > 50_000
        assert "'unsafe-inline'" not in page.headers["content-security-policy"].split("style-src")[0]
        assert httpx.get(f"{address}/redoc").status_code == 404
        assert "/docs" not in httpx.get(f"{address}/openapi.json").json()["paths"]


def test_without_its_files_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(docs_page, "find_spec", lambda name: None if name == "fastapi_offline" else find(name))
    with running(create_app({"plain": AsyncReranker(Lengths())})) as address:
        page = httpx.get(f"{address}/docs")
        assert page.status_code == 501
        assert "pip install 'fastrerank[serve]'" in page.text
        assert httpx.get(f"{address}/openapi.json").status_code == 200


def test_a_browser_shows_the_routes_and_asks_nobody_else(tmp_path: Any) -> None:
    pytest.importorskip("fastapi_offline")
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium on PATH ({', '.join(NAMES)})")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with running(create_app({"plain": AsyncReranker(Lengths())})) as address, playwright.sync_playwright() as play:
        context = play.chromium.launch_persistent_context(tmp_path, executable_path=program, args=options)
        try:
            page, asked, problems = context.new_page(), [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
            page.goto(f"{address}/docs")
            page.wait_for_selector(".opblock-summary-path", timeout=20_000)
            shown = page.eval_on_selector_all(".opblock-summary-path", "all => all.map(one => one.dataset.path)")
            assert {"/rerank", "/v2/rerank", "/score"} <= set(shown)
            assert "Unable to render" not in page.inner_text("body")
        finally:
            context.close()
    assert problems == []
    assert [one for one in asked if not one.startswith((f"{address}/", "data:"))] == []
