"""Pairwise and setwise rerankers over a fake model: decisions, shared prefixes, counts, refusals."""

from __future__ import annotations

from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import list_fakes as fakes
import numpy as np
import pytest
from list_fakes import Build, by_relevance, documents, order_of

import fastrerank
from fastrerank import PairwiseReranker, SetwiseReranker
from fastrerank.rerankers import list_questions

QUERY = "who?"
ALGORITHMS = ("heapsort", "allpair", "sliding")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    return fakes.builder(monkeypatch, tmp_path)


def preferred(reranker: Any, texts: list[str], i: int, j: int) -> float:
    """Logit of the first document's label less the second's, where i is shown first."""
    first, second = np.array(reranker.model._values([QUERY, texts[i], texts[j]]), np.float32)
    return float(first) - float(second)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("n", [0, 1, 2, 9, 40])
def test_a_consistent_model_gives_its_top(build: Build, algorithm: str, n: int) -> None:
    texts = documents(n)
    reranker = build(PairwiseReranker, algorithm=algorithm, top_k=5)
    order = order_of(reranker.rank(QUERY, texts))
    best = by_relevance(texts)
    assert sorted(order) == list(range(n))
    if algorithm == "allpair":
        assert order == best
    else:
        assert order[:5] == best[:5]
    if algorithm == "heapsort":
        assert order[5:] == sorted(order[5:])
    assert len(reranker.score(QUERY, texts)) == n


@pytest.mark.parametrize("soft", [False, True])
def test_all_pairs_are_asked_once_in_both_orders(build: Build, soft: bool) -> None:
    texts = documents(12)
    reranker = build(PairwiseReranker, algorithm="allpair", soft=soft, noise=4.0)
    scores = reranker.score(QUERY, texts)
    expected = np.zeros(12)
    for i, j in combinations(range(12), 2):
        ahead, behind = preferred(reranker, texts, i, j), preferred(reranker, texts, j, i)
        if soft:
            won = (1 / (1 + np.exp(-ahead)) + 1 / (1 + np.exp(behind))) / 2
        else:
            won = 1.0 if ahead > 0 and behind < 0 else 0.0 if ahead < 0 and behind > 0 else 0.5
        expected[[i, j]] += won, 1 - won
    assert scores == pytest.approx(expected.astype(np.float32), rel=1e-6)
    assert (scores % 0.5 == 0).all() != soft
    usage = reranker.last_usage
    assert (usage["comparisons"], usage["steps"], usage["forwards"]) == (66, 1, 1)
    assert usage["tokens"] == 3 * 12 * 11
    assert len({tuple(ids) for ids in reranker.model.seen}) == len(reranker.model.seen) == 12 * 11
    # Prompts with the same left document stand together, so that they share what they begin with.
    assert len(list(groupby(reranker.model.seen, key=lambda ids: ids[1]))) == 12


def test_blocks_do_not_change_results(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(15)
    expected = build(PairwiseReranker, algorithm="allpair", noise=5.0).score(QUERY, texts)
    monkeypatch.setattr(list_questions, "BLOCK_PROMPTS", 7)
    reranker = build(PairwiseReranker, algorithm="allpair", noise=5.0)
    assert np.array_equal(reranker.score(QUERY, texts), expected)
    assert max(reranker.model.calls) == 7


def test_contradicting_orders_tie(build: Build) -> None:
    """A model that prefers the first document, or none, leaves the order as it is; a heap its own order of ties."""
    for algorithm in ALGORITHMS:
        ties = list(range(9)) if algorithm != "heapsort" else [0, *range(8, 0, -1)]
        for values in ([1.0, 0.0], [0.0, 0.0]):
            reranker = build(PairwiseReranker, algorithm=algorithm)
            reranker.model._values = lambda _, values=values: values
            assert order_of(reranker.rank(QUERY, documents(9))) == ties
        same = order_of(build(PairwiseReranker, algorithm=algorithm).rank(QUERY, ["same"] * 9))
        assert same == ties
        odd = order_of(build(PairwiseReranker, algorithm=algorithm).rank(QUERY, ["", "a 1", "", "a 1"]))
        assert set(odd[:2]) == {1, 3}


@pytest.mark.parametrize("noise", [0.0, 30.0])
def test_model_calls_of_heapsort(build: Build, noise: float) -> None:
    reranker = build(PairwiseReranker, noise=noise)
    for seed in range(5):
        reranker.rank(QUERY, documents(100, seed=seed))
        usage = reranker.last_usage
        assert usage["steps"] == usage["forwards"] <= 80
        assert usage["tokens"] == 3 * 2 * usage["comparisons"]
        assert usage["comparisons"] <= 330


def test_model_calls_of_sliding_and_all_pairs(build: Build) -> None:
    texts = [f"text {i}" for i in range(100)]
    reranker = build(PairwiseReranker, algorithm="sliding", passes=10)
    reranker.rank(QUERY, texts)
    assert reranker.last_usage["comparisons"] == 945
    assert reranker.last_usage["steps"] <= 117
    reranker = build(PairwiseReranker, algorithm="allpair")
    reranker.rank(QUERY, texts)
    assert sum(reranker.model.calls) == 100 * 99


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "setwise", "rank-r1"])
def test_many_queries_equal_one_at_a_time(build: Build, algorithm: str) -> None:
    if algorithm in ALGORITHMS:
        reranker = build(PairwiseReranker, algorithm=algorithm, noise=5.0, top_k=4)
    else:
        reranker = build(SetwiseReranker, template=algorithm, noise=5.0, top_k=4, write=algorithm == "rank-r1")
    queries = [f"query {'x' * i}" for i in range(5)]
    texts = [documents(n, seed=n) for n in (0, 1, 4, 9, 23)]
    together = reranker.score_many(queries, texts)
    usage = reranker.last_usage
    steps = []
    for query, some, scores in zip(queries, texts, together, strict=True):
        assert np.array_equal(reranker.score(query, some), scores)
        steps.append(reranker.last_usage["steps"])
    assert usage["steps"] == max(steps)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"set_size": 2},
        {"set_size": 23},
        {"template": "rank-r1", "write": True, "set_size": 20},
        {"template": "rank-r1", "readout": "logits", "set_size": 9},
    ],
)
@pytest.mark.parametrize("n", [0, 1, 2, 5, 60])
def test_setwise_finds_the_top(build: Build, options: dict[str, Any], n: int) -> None:
    reranker = build(SetwiseReranker, top_k=6, **options)
    texts = documents(n)
    order = order_of(reranker.rank(QUERY, texts))
    assert order[:6] == by_relevance(texts)[:6]
    assert order[6:] == sorted(order[6:])
    assert reranker.last_usage["unparsed"] == 0
    assert reranker.last_usage["comparisons"] == sum(reranker.model.calls)


@pytest.mark.parametrize(("size", "most"), [(4, 90), (10, 40), (20, 30)])
def test_model_calls_of_setwise(build: Build, size: int, most: int) -> None:
    reranker = build(SetwiseReranker, set_size=size)
    reranker.rank(QUERY, documents(100))
    assert reranker.last_usage["steps"] <= reranker.last_usage["comparisons"] <= most


def test_setwise_keeps_the_parent_where_nothing_is_said(build: Build) -> None:
    reranker = build(SetwiseReranker, template="rank-r1", generate=lambda prompts: ["hm"] * len(prompts))
    assert order_of(reranker.rank(QUERY, documents(3))) == [0, 2, 1]  # the heap's own order: the last leaf moves up
    assert reranker.last_usage["unparsed"] == reranker.last_usage["comparisons"] == 2
    ties = build(SetwiseReranker)
    ties.model._values = lambda texts: [0.0] * (len(texts) - 1)
    assert order_of(ties.rank(QUERY, documents(3))) == [0, 2, 1]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PairwiseReranker, {"algorithm": "bogosort"}, "'heapsort', 'allpair', 'sliding'"),
        (PairwiseReranker, {"top_k": 0}, "top_k must be"),
        (PairwiseReranker, {"algorithm": "sliding", "passes": 0}, "passes must be"),
        (PairwiseReranker, {"passes": 3}, "passes is for algorithm 'sliding'"),
        (PairwiseReranker, {"template": "first"}, "listwise"),
        (PairwiseReranker, {"generate": print}, "readout"),
        (SetwiseReranker, {"set_size": 1}, "set_size must be"),
        (SetwiseReranker, {"set_size": 24}, "at most 23"),
        (SetwiseReranker, {"set_size": 27}, "26 letters"),
        (SetwiseReranker, {"template": "rank-r1", "readout": "logits", "set_size": 10}, "from 10 on"),
        (SetwiseReranker, {"top_k": True}, "top_k must be"),
        (SetwiseReranker, {"template": "prp"}, "pairwise"),
    ],
)
def test_what_cannot_rank_is_refused_by_name(build: Build, kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **options)


def test_damaged_logits_are_an_error(build: Build) -> None:
    for kind in (PairwiseReranker, SetwiseReranker):
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            build(kind).score(QUERY, ["1", "1" + "0" * 400])


def test_methods_are_registered() -> None:
    methods = fastrerank.list_methods()
    for name, kind in (
        ("listwise", "ListwiseReranker"),
        ("pairwise", "PairwiseReranker"),
        ("setwise", "SetwiseReranker"),
    ):
        assert "arXiv" in methods[name]
        assert getattr(fastrerank, kind).method == name
