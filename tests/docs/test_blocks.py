"""Every Python block of the pages runs, on tiny checkpoints in place of those that it names."""

from __future__ import annotations

import asyncio
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_models
import numpy as np
import pytest
from helpers_tiny import save_tiny_cross_encoder
from test_pointwise import save as save_causal

import fastrerank
from bench import docs
from fastrerank import ops

FENCE = re.compile(r"(?:<!-- not run: ([^>]*) -->\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Pages whose blocks have tests of their own.
ELSEWHERE = {"docs/howto/integrations.md": "tests/integrations", "docs/tutorial.md": "tests/docs/test_pages.py"}
BLOCKS = [
    (page.relative_to(docs.ROOT).as_posix(), number, *found)
    for page in docs.PAGES
    for number, found in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
    if page.relative_to(docs.ROOT).as_posix() not in ELSEWHERE
]
# What a block names -> what stands in for it. The longest name comes first.
STANDINS = {
    "path/to/nli-model": "labels",
    "cross-encoder/ms-marco-MiniLM-L6-v2": "cross",
    "BAAI/bge-reranker-v2-m3": "cross",
    "BAAI/bge-reranker-base": "cross",
    "sentence-transformers/all-MiniLM-L6-v2": "cross",
    "meta-llama/Llama-3.1-8B-Instruct": "attention",
    "Qwen/Qwen3-Reranker-0.6B": "causal",
    "path/to/First_Model": "causal",
    "path/to/checkpoint": "causal",
    "path/to/llama": "causal",
    "path/to/qwen": "causal",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            base = tmp_path_factory.mktemp(kind)
            if kind == "attention":
                made[kind] = attention_models.save(base, "llama", max_position_embeddings=8192)
            elif kind == "causal":
                made[kind] = save_causal(base / "Qwen3-Reranker-tiny")
            else:
                made[kind] = save_tiny_cross_encoder(base) if kind == "cross" else save_labels(base)
        return made[kind]

    return folder


def save_labels(folder: Path) -> Path:
    """A tiny cross-encoder with three labels, named as those of natural language inference."""
    import transformers

    save_tiny_cross_encoder(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.id2label = {0: "contradiction", 1: "entailment", 2: "neutral"}
    config.label2id = {name: number for number, name in config.id2label.items()}
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def names(folder: Callable[[str], Path]) -> dict[str, Any]:
    """What the pages' blocks have from the text around them."""
    generator = np.random.default_rng(0)
    passages = [f"passage {i} about fleas and owls number {7 * i}" for i in range(80)]
    return {
        "fastrerank": fastrerank,
        "CrossEncoder": fastrerank.CrossEncoder,
        "ops": ops,
        "query": "how long do fleas live",
        "passages": passages,
        "documents": passages[:3],
        "pairs": [("how long do fleas live", text) for text in passages[:3]],
        "training_queries": [f"question {i} about owls" for i in range(8)],
        "reranker": fastrerank.CrossEncoder(folder("cross")),
        "my_scorer": lambda ids: np.asarray(ids, np.float32),
        "vectors": generator.standard_normal((16, 3000)).astype(np.float32),
        "queries": generator.standard_normal((2, 16)).astype(np.float32),
    }


def test_each_block_that_is_not_run_says_why() -> None:
    assert len(BLOCKS) >= 15
    assert sum(bool(reason) for _, _, reason, _ in BLOCKS) <= 5


@pytest.mark.parametrize(("page", "number", "reason", "code"), BLOCKS, ids=[f"{b[0]}:{b[1]}" for b in BLOCKS])
def test_a_block_runs(
    page: str,
    number: int,
    reason: str,
    code: str,
    folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reason:
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    for name, kind in sorted(STANDINS.items(), key=lambda item: -len(item[0])):
        if name in code:
            code = code.replace(name, str(folders(kind)))
    space = names(folders)
    if "async with" in code:
        code = f"async def block():\n{textwrap.indent(code, '    ')}"
    exec(compile(code, f"{page}, block {number}", "exec"), space)
    if "block" in space:
        asyncio.run(space["block"]())
