"""One order of a model's documents, whichever interface ranks them: also where an activation changes that of logits."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_tiny import WORDS, save_tiny_cross_encoder
from safetensors.numpy import load_file, save_file

import fastrerank
from fastrerank.rerankers.base import Reranker, order
from fastrerank.runtime.types import Hit
from fastrerank.serve.batching.batcher import AsyncReranker

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
QUERY = "how long do fleas live"
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 9)) for i in range(24)]
NAMES = ["GELU", "SiLU", "Mish", "Hardswish"]


def falling(x: np.ndarray) -> np.ndarray:
    """An activation that turns the order round."""
    return -x


def save(folder: Path, activation: str) -> Path:
    """A checkpoint that saved an activation of torch, and whose logits lie on both sides of where it turns."""
    save_tiny_cross_encoder(folder)
    logits = fastrerank.CrossEncoder(folder, device="cpu").score(QUERY, TEXTS)
    weights = load_file(folder / "model.safetensors")
    factor = np.float32(3 / logits.std())
    weights["classifier.weight"] *= factor
    weights["classifier.bias"] = (weights["classifier.bias"] - logits.mean()) * factor - np.float32(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["sentence_transformers"] = {"activation_fn": f"torch.nn.modules.activation.{activation}"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pairs(hits: list[Any]) -> list[tuple[int, float]]:
    return [(hit["corpus_id"], hit["score"]) for hit in hits]


async def shared(model: Reranker, raw: bool) -> list[tuple[int, float]]:
    async with AsyncReranker(model) as served:
        return pairs(await served.rank(QUERY, TEXTS, raw=raw))


async def over_http(model: Reranker, flavor: str, raw: bool) -> list[tuple[int, float]]:
    pytest.importorskip("fastapi")
    httpx = pytest.importorskip("httpx")
    from fastrerank.serve.api.errors import Flavor
    from fastrerank.serve.app import Settings, create_app

    async with AsyncReranker(model) as served:
        transport = httpx.ASGITransport(create_app({"ours": served}, Settings(flavor=Flavor(flavor))))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"query": QUERY, "documents": TEXTS} | ({"use_activation": False} if raw else {})
            rows = (await client.post("/rerank", json=body)).json()["results"]
    return [(row["index"], row["relevance_score"]) for row in rows]


def in_haystack(path: Path, raw: bool, **options: Any) -> list[tuple[int, float]]:
    haystack = pytest.importorskip("haystack")
    from fastrerank.integrations.haystack import FastRanker

    ranker = FastRanker(str(path), top_k=len(TEXTS), raw=raw, options={"device": "cpu", **options})
    documents = [haystack.Document(id=str(i), content=text) for i, text in enumerate(TEXTS)]
    return [(int(one.id), one.score) for one in ranker.run(query=QUERY, documents=documents)["documents"]]


@pytest.mark.parametrize("activation", [*NAMES, falling])
@pytest.mark.parametrize("raw", [False, True])
def test_every_door_has_one_order(activation: Any, raw: bool, tmp_path: Path) -> None:
    path = save(tmp_path / "model", activation if isinstance(activation, str) else "Identity")
    options = {} if isinstance(activation, str) else {"activation_fn": activation}
    model = fastrerank.CrossEncoder(path, device="cpu", **options)
    scores = model.score(QUERY, TEXTS)
    shown = scores if raw else model.activated(scores)
    expected = [(int(i), float(shown[i])) for i in np.lexsort((np.arange(len(TEXTS)), -scores, -shown))]
    assert raw or [i for i, _ in expected] != order(scores).tolist()  # the activation does change the order

    assert pairs(model.rank(QUERY, TEXTS, raw=raw)) == expected
    assert pairs(Reranker.rank(model, QUERY, TEXTS, raw=raw)) == expected
    assert asyncio.run(shared(model, raw)) == expected
    assert asyncio.run(over_http(model, "vllm", raw)) == expected
    if not raw:  # other dialects show the sigmoid, whose order is that of the logits
        assert [i for i, _ in asyncio.run(over_http(model, "jina", raw))] == order(scores).tolist()
    assert in_haystack(path, raw, **options) == expected


def test_a_threshold_is_checked_before_anything_is_scored(tmp_path: Path) -> None:
    path = save_tiny_cross_encoder(tmp_path / "model")
    model = fastrerank.CrossEncoder(path, device="cpu")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("documents were scored")

    async def shared_rank(threshold: Any) -> list[Hit]:
        async with AsyncReranker(model) as served:
            return await served.rank(QUERY, TEXTS, score_threshold=threshold)

    model.engine.forward = never  # type: ignore[method-assign]
    for wrong, error, came in (
        ("a", TypeError, "must be a number or None, got str 'a'"),
        (True, TypeError, "must be a number or None, got bool True"),
        (float("nan"), ValueError, "must be a finite number or None, got nan"),
        (float("inf"), ValueError, "must be a finite number or None, got inf"),
    ):
        for call in (
            lambda t: model.rank(QUERY, TEXTS, score_threshold=t),
            lambda t: Reranker.rank(model, QUERY, TEXTS, score_threshold=t),
            lambda t: asyncio.run(shared_rank(t)),
        ):
            with pytest.raises(error, match=f"score_threshold {came}"):
                call(wrong)


def test_haystack_checks_a_threshold_by_name() -> None:
    pytest.importorskip("haystack")
    from fastrerank.integrations.haystack import FastRanker

    with pytest.raises(TypeError, match="score_threshold must be a number"):
        FastRanker("none", score_threshold="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="score_threshold must be a number"):
        FastRanker("none").run(query="q", documents=[], score_threshold="a")  # type: ignore[arg-type]


def test_times_are_checked_by_name(tmp_path: Path) -> None:
    model = fastrerank.CrossEncoder(save_tiny_cross_encoder(tmp_path / "model"), device="cpu")
    with pytest.raises(TypeError, match="max_wait_ms must be a number, got str 'x'"):
        AsyncReranker(model, max_wait_ms="x")  # type: ignore[arg-type]
    for wrong in (float("nan"), float("inf"), -1):
        with pytest.raises(ValueError, match="max_wait_ms must be at least 0 and finite"):
            AsyncReranker(model, max_wait_ms=wrong)
    served = AsyncReranker(model)
    try:
        with pytest.raises(TypeError, match="timeout must be a number or None, got str 'x'"):
            served.submit(QUERY, TEXTS, timeout="x")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="timeout must be a number or None, got str 'x'"):
            asyncio.run(served.rank(QUERY, TEXTS, timeout="x"))  # type: ignore[arg-type]
    finally:
        served.close()
