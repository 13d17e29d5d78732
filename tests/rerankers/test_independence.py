"""Each method wherever its scores are asked for: whole requests come back as its own `rank` ranks them, or refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import attention_models
import decoders
import prompt_tokenizers
import transformers
from attention_models import HEADS
from serve_fakes import Lengths

import fastrerank
from fastrerank.data.datasets import Candidate, JudgedQuery
from fastrerank.evaluation.reranking import rerank
from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.pairs import score_pairs
from fastrerank.rerankers.registry import list_methods
from fastrerank.serve.batching.batcher import AsyncReranker

QUERIES = ["how long do fleas live?", "where do owls sleep?"]
DOCUMENTS = [f"{'owl ' * (i % 4)}number {i} {'sleeps' if i % 3 else 'hunts'} by day" for i in range(8)]
DEPENDENT = {"listwise", "pairwise", "setwise", "icr", "qrhead", "core"}
pytestmark = pytest.mark.filterwarnings("ignore:.* was trained as a classifier")
OPTIONS: dict[str, dict[str, Any]] = {
    "pointwise": {"template": "relevance"},
    "listwise": {"template": "first", "window": 6, "stride": 3},
    "pairwise": {"template": "prp"},
    "setwise": {"template": "rank-r1", "readout": "logits", "set_size": 5},
    "qrhead": {"heads": HEADS},
    "core": {"heads": HEADS},
}
Load = Callable[[str], Reranker]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Load:
    """A tiny model of each method."""
    made: dict[str, Reranker] = {}

    def checkpoint(method: str) -> Path:
        folder = tmp_path_factory.mktemp(method)
        if method in ("icr", "qrhead", "core"):
            return attention_models.save(folder, "llama")
        prompt_tokenizers.save("qwen", folder, answers=True)
        size = len(transformers.AutoTokenizer.from_pretrained(folder))
        return decoders.save(folder, "qwen3", vocab_size=size, max_position_embeddings=4096)

    def loaded(method: str) -> Reranker:
        if method not in made:
            encoder = method in ("cross-encoder", "late-interaction", "embedding")
            path = tiny("bert") if encoder else checkpoint(method)
            options = {"device": "cpu", **OPTIONS.get(method, {})}
            made[method] = fastrerank.load(str(path), method=method, **options)
        return made[method]

    return loaded


def own(reranker: Reranker, query: str) -> list[tuple[int, float]]:
    """What a method's `rank` says."""
    return [(hit["corpus_id"], hit["score"]) for hit in reranker.rank(query, DOCUMENTS, raw=True)]


def scores_of(ranking: list[tuple[int, float]]) -> list[float]:
    return [score for _, score in sorted(ranking)]


@pytest.fixture(params=list(list_methods()))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_method_says_whether_documents_depend_on_each_other(method: str, load: Load) -> None:
    assert load(method).independent == (method not in DEPENDENT)


def test_what_says_independent_is(method: str, load: Load) -> None:
    """Scores of the parts of a list are those of the list, exactly where a method says so."""
    reranker = load(method)
    whole = reranker.score(QUERIES[0], DOCUMENTS)
    parts = np.concatenate([reranker.score(QUERIES[0], DOCUMENTS[i : i + 5]) for i in range(0, len(DOCUMENTS), 5)])
    assert np.array_equal(whole, parts) == reranker.independent


def test_requests_that_share_batches_rank_as_alone(method: str, load: Load) -> None:
    reranker = load(method)
    expected = [own(reranker, query) for query in QUERIES]
    explains = [False, True] if hasattr(reranker, "token_masses") else [False]

    async def run() -> list[list[dict[str, Any]]]:
        async with AsyncReranker(reranker, max_batch_tokens=64, max_wait_ms=5) as shared:
            jobs = [
                shared.rank(QUERIES[i % 2], DOCUMENTS, raw=True, explain=explain)
                for i in range(6)
                for explain in explains
            ]
            return await asyncio.gather(*jobs)

    found = asyncio.run(run())
    for i, rows in enumerate(found):
        got = [(row["corpus_id"], row["score"]) for row in rows]
        assert got == expected[i // len(explains) % 2]


def test_pairs_that_stand_together_are_a_list(method: str, load: Load) -> None:
    reranker = load(method)
    queries = [query for query in QUERIES for _ in DOCUMENTS]
    found = score_pairs(reranker, queries, DOCUMENTS * 2).reshape(2, -1)
    assert [scores.tolist() for scores in found] == [scores_of(own(reranker, query)) for query in QUERIES]
    mixed = [QUERIES[i % 2] for i in range(len(DOCUMENTS))]
    if reranker.independent:
        alone = [reranker.score(query, [text])[0] for query, text in zip(mixed, DOCUMENTS, strict=True)]
        assert score_pairs(reranker, mixed, DOCUMENTS).tolist() == alone
    else:
        with pytest.raises(ValueError, match=f"pairs 0 and 2 have one query.*method '{method}' compares"):
            score_pairs(reranker, mixed, DOCUMENTS)


def test_the_evaluation_ranks_whole_lists(method: str, load: Load) -> None:
    reranker = load(method)
    candidates = tuple(Candidate(f"d{i}", text) for i, text in enumerate(DOCUMENTS))
    judged = [JudgedQuery(query, query, candidates, {"d0": 1}) for query in QUERIES]
    run, _ = rerank(reranker, judged)
    for query in QUERIES:
        assert [(int(name[1:]), score) for name, score in run[query]] == own(reranker, query)


def test_an_index_takes_scores_of_single_pairs(method: str, load: Load) -> None:
    reranker = load(method)
    if reranker.independent:
        index = fastrerank.CURIndex.build(reranker, DOCUMENTS, QUERIES, block=5, progress=False)
        expected = [scores_of(own(reranker, query)) for query in QUERIES]
        assert index.vectors().tolist() == expected
        ids, scores = index.search_reranker(reranker, QUERIES[0], k=3, budget=len(DOCUMENTS))
        assert list(zip(ids.tolist(), scores.tolist(), strict=True)) == own(reranker, QUERIES[0])[:3]
        return
    with pytest.raises(ValueError, match=f"an index holds scores of single pairs: method '{method}' compares"):
        fastrerank.CURIndex.build(reranker, DOCUMENTS, QUERIES, progress=False)
    index = fastrerank.CURIndex.from_scores(np.eye(3, len(DOCUMENTS)), items=DOCUMENTS)
    with pytest.raises(ValueError, match=f"a search scores a few items at a time: method '{method}' compares"):
        index.search_reranker(reranker, QUERIES[0])


def test_ray_takes_scores_of_single_pairs(method: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.data")
    from fastrerank.integrations.ray import PairScorer

    reranker = load(method)
    monkeypatch.setattr("fastrerank.integrations.loading.load", lambda *_, **__: reranker)
    if not reranker.independent:
        with pytest.raises(ValueError, match=f"method '{method}' compares"):
            PairScorer("path")
        return
    scorer, expected = PairScorer("path"), scores_of(own(reranker, QUERIES[0]))
    found = [
        score
        for i in range(0, len(DOCUMENTS), 5)
        for score in scorer({"query": [QUERIES[0]] * len(DOCUMENTS[i : i + 5]), "document": DOCUMENTS[i : i + 5]})[
            "score"
        ]
    ]
    assert found == expected


def test_langchain_takes_scores_of_single_pairs(method: str, load: Load) -> None:
    pytest.importorskip("langchain_core")
    from fastrerank.integrations.langchain import FastRerankCrossEncoder

    reranker = load(method)
    if not reranker.independent:
        with pytest.raises(ValueError, match=f"FastReranker ranks lists: method '{method}' compares"):
            FastRerankCrossEncoder(reranker)
        return
    pairs = [(QUERIES[0], text) for text in DOCUMENTS]
    found = FastRerankCrossEncoder(reranker, raw=True).score(pairs[:5]) + FastRerankCrossEncoder(
        reranker, raw=True
    ).score(pairs[5:])
    assert found == scores_of(own(reranker, QUERIES[0]))


def test_a_fake_that_compares_is_not_split() -> None:
    """However small the batches, and whoever else waits."""
    whole = Lengths(independent=False)
    texts = ["a", "bb", "ccc", "dddd"]

    async def run() -> None:
        async with AsyncReranker(whole, max_batch_tokens=1, max_wait_ms=5) as shared:
            await asyncio.gather(*(shared.score("q", texts) for _ in range(5)))

    asyncio.run(run())
    assert all(documents == texts for call in whole.calls for documents in call)
