"""The built-in page in a real browser: typing, pasting, dropping, keys, coloured tokens, and nothing from outside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")
pytest.importorskip("playwright")
from playwright import sync_api as playwright
from serve_fakes import Explaining, Lengths
from serve_running import running

from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
if BROWSER is None:
    pytest.skip(f"no Chromium on PATH ({', '.join(NAMES)})", allow_module_level=True)

OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
]
TEXTS = ["aa not bbbbb", "cccc", "dd <b>&amp;</b> e"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that asks for a key, with a model that reads attention and one that does not."""
    models = {"icr": AsyncReranker(Explaining()), "plain": AsyncReranker(Lengths())}
    with running(create_app(models, Settings(keys=("secret",)))) as address:
        yield f"{address}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        folder = tmp_path_factory.mktemp("profile")
        context = play.chromium.launch_persistent_context(folder, executable_path=BROWSER, args=OPTIONS)
        context.set_default_timeout(10_000)
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page with the key given; fails if it asked anyone else or its script did not run well."""
    opened, problems = browser.new_page(), []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(url)
    opened.wait_for_selector("#key")  # shown once the server has asked for it
    assert "API key" in opened.inner_text("#say")
    opened.keyboard.type("secret")  # it has the focus
    opened.keyboard.press("Tab")
    opened.wait_for_selector("#model option", state="attached")
    yield opened
    opened.close()
    assert problems == []
    assert [one for one in asked if not one.startswith((url, "data:"))] == []


def rank(page: Any, keys: str = "Control+Enter") -> list[tuple[str, str]]:
    page.evaluate("document.getElementById('results').replaceChildren()")
    page.keyboard.press(keys)
    page.wait_for_selector("#results li")
    return [
        (row.query_selector(".score").inner_text(), row.query_selector(".text").inner_text())
        for row in page.query_selector_all("#results li")
    ]


def test_by_keys_alone(page: Any) -> None:
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.insert_text("q")
    page.keyboard.press("Tab")
    page.keyboard.insert_text("\n".join(TEXTS))
    assert page.inner_text("#count") == "3 documents"
    found = rank(page)
    assert found == [("15.00", TEXTS[2]), ("6.000", TEXTS[0]), ("4.000", TEXTS[1])]
    page.keyboard.press("Escape")  # out of the field, to the first result
    focused = "document.activeElement.querySelector('.text')?.textContent"
    assert page.evaluate(focused) == TEXTS[2]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("j")
    assert page.evaluate(focused) == TEXTS[1]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.get_attribute("#results li:nth-child(2)", "aria-expanded") == "true"
    assert page.evaluate(focused) == TEXTS[0]


def test_tokens_are_coloured_where_a_method_reads_attention(page: Any) -> None:
    page.fill("#query", "q")
    page.fill("#documents", "\n".join(TEXTS))
    rank(page)
    read = "all => all.map(one => [one.textContent, one.title, one.style.backgroundColor])"
    tokens = page.eval_on_selector_all("#results li:nth-child(2) .token", read)
    assert [(text, title) for text, title, _ in tokens] == [("aa", "2.00"), (" not", "-1.00"), (" bbbbb", "5.00")]
    assert ["above" in color for _, _, color in tokens] == [True, False, True]
    assert "below" in tokens[1][2]
    assert page.is_visible("#legend")
    page.keyboard.press("Escape")
    page.keyboard.press("h")
    assert page.query_selector(".token") is None
    assert not page.is_visible("#legend")
    page.select_option("#model", "plain")
    assert not page.is_visible("#marking")
    assert [text for _, text in rank(page)] == [TEXTS[2], TEXTS[0], TEXTS[1]]
    assert page.query_selector(".token") is None


def test_documents_that_are_dropped_pasted_or_chosen(page: Any, tmp_path: Path) -> None:
    page.evaluate(
        """() => {
          const data = new DataTransfer();
          data.items.add(new File(['{"text": "one"}\\n{"text": "two\\\\n\\\\nlines"}\\n'], 'some.jsonl'));
          data.items.add(new File(['three\\nfour\\n'], 'some.txt'));
          dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
        }"""
    )
    playwright.expect(page.locator("#count")).to_have_text("4 documents")
    page.evaluate("document.activeElement.blur()")
    page.evaluate(
        """() => {
          const data = new DataTransfer();
          data.setData('text', 'a paragraph\\nof two lines\\n\\nanother');
          dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}));
        }"""
    )
    (tmp_path / "more.txt").write_text("last\n")
    page.set_input_files("#files", str(tmp_path / "more.txt"))
    playwright.expect(page.locator("#count")).to_have_text("7 documents")
    page.fill("#query", "q")
    texts = {text for _, text in rank(page)}
    assert texts == {"one", "two\nlines", "three", "four", "a paragraph\nof two lines", "another", "last"}


def test_what_is_wrong_is_said(page: Any) -> None:
    page.focus("#query")
    page.keyboard.press("Enter")
    assert page.inner_text("#say") == "Type a query."
    page.fill("#query", "q")
    page.keyboard.press("Enter")
    assert page.inner_text("#say") == "Add at least one document."
    page.fill("#documents", "boom")
    page.keyboard.press("Control+Enter")
    playwright.expect(page.locator("#say")).to_contain_text("RuntimeError")
    assert page.get_attribute("#say", "class") == "bad"
    page.click("#example")
    page.wait_for_selector("#results li:nth-child(5)")
