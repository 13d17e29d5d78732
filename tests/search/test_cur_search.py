"""CURIndex.search: recall, parity with the published formula, the budget, and what it refuses."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cur_data import Scorer, TextScorer, low_rank, noisy, recall, top

import fastrerank
from fastrerank.inputs.prompts import Message, Template
from fastrerank.search.build import identity
from fastrerank.search.search import round_sizes
from fastrerank.search.solver import RidgeFits


@pytest.fixture(scope="module")
def scores() -> Any:
    return noisy(1, 90, 700)


@pytest.fixture(scope="module")
def index(scores: Any) -> fastrerank.CURIndex:
    return fastrerank.CURIndex.from_scores(scores[:80])


@pytest.fixture(scope="module")
def real(data_folder: Path) -> tuple[fastrerank.CURIndex, Any]:
    exact = np.load(data_folder / "cur" / "scifact_test.npy").astype(np.float32)
    return fastrerank.CURIndex.from_scores(np.load(data_folder / "cur" / "scifact_anchor.npy")), exact


@pytest.mark.parametrize(("k", "budget", "least"), [(10, 100, 0.86), (10, 200, 0.955), (100, 200, 0.82)])
def test_recall_on_real_scores(real: Any, k: int, budget: int, least: float) -> None:
    index, exact = real
    ids, scores = index.search_many(lambda query, item: exact[query, item], len(exact), k=k, budget=budget)
    assert recall(ids, exact) >= least
    np.testing.assert_array_equal(scores, np.take_along_axis(exact, ids, 1))
    assert index.last_usage["calls"] == budget * len(exact)


def test_low_rank_scores_are_found_exactly() -> None:
    exact = low_rank(3, 30, 400, 6)
    index = fastrerank.CURIndex.from_scores(exact[:20])
    for ridge in (1e-7, 0.0):
        ids, _ = index.search_many(
            lambda query, item: exact[20 + query, item], 10, k=10, budget=30, rounds=2, first=0.3, ridge=ridge
        )
        assert recall(ids, exact[20:]) == 1.0


@pytest.mark.parametrize("anchors", [10, 35, 90])
def test_without_a_ridge_estimates_equal_the_published_formula(scores: Any, anchors: int) -> None:
    index = fastrerank.CURIndex.from_scores(scores[:40], anchors="random", ridge=0)
    chosen = np.random.default_rng(0).choice(700, anchors, replace=False)
    known = scores[80, chosen].astype(np.float64)
    matrix = scores[:40].astype(np.float64)
    published = known @ np.linalg.pinv(matrix[:, chosen]) @ matrix
    np.testing.assert_allclose(index.estimate(chosen, known), published, rtol=0, atol=1e-9)


def test_two_rounds_without_a_ridge_are_published_anncur(scores: Any) -> None:
    index = fastrerank.CURIndex.from_scores(scores[:40], anchors="random", ridge=0, seed=4)
    scorer = Scorer(scores[80])
    index.search(scorer, k=10, budget=60, rounds=2, first=0.25)
    anchors, retrieved = scorer.asked[:15], scorer.asked[15:]
    estimate = scores[80, anchors].astype(np.float64) @ np.linalg.pinv(scores[:40, anchors].astype(np.float64))
    estimate = estimate @ scores[:40]
    estimate[anchors] = -np.inf
    assert set(retrieved) == set(np.argsort(-estimate)[:45].tolist())


def test_the_fit_warns_where_it_would_interpolate_noise(scores: Any) -> None:
    index = fastrerank.CURIndex.from_scores(scores[:40], ridge=0)
    with pytest.warns(RuntimeWarning, match="40 scored items and item vectors of width 40"):
        index.search(Scorer(scores[80]), k=10, budget=80, rounds=2, first=0.5)


def test_blocks_equal_a_fit_from_scratch(random: np.random.Generator) -> None:
    vectors = random.normal(size=(3, 12, 8)).astype(np.float32)
    exact, prior = random.normal(size=(3, 12)), random.normal(size=(3, 8))
    fits = RidgeFits(3, 12, 8, ridge=0.3, prior=prior)
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        fits.add(vectors[:, begin:end], exact[:, begin:end])
        for b in range(3):
            rows = vectors[b, :end].astype(np.float64)
            inverse = np.linalg.inv(rows @ rows.T + 0.3 * np.eye(end))
            alpha = inverse @ (exact[b, :end] - rows @ prior[b])
            np.testing.assert_allclose(fits.weights()[b], prior[b] + alpha @ rows, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(fits.errors()[b], alpha / np.diag(inverse), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("budget", "rounds"), [(10, 1), (10, 10), (11, 4), (57, 10), (300, 7), (5000, 3)])
def test_the_budget_is_kept_and_no_item_is_paid_twice(index: Any, scores: Any, budget: int, rounds: int) -> None:
    scorer = Scorer(scores[85])
    ids, found = index.search(scorer, k=10, budget=budget, rounds=rounds)
    assert len(scorer.asked) == min(budget, 700) == index.last_usage["calls"]
    best = sorted((-scores[85, i], i) for i in scorer.asked)[:10]
    assert ids.tolist() == [i for _, i in best]
    np.testing.assert_array_equal(found, scores[85, ids])
    if budget >= 700:
        assert ids.tolist() == top(scores[85:86], 10)[0].tolist()


@pytest.mark.parametrize(("budget", "rounds", "first"), [(100, 5, 0.2), (7, 9, 0.0), (3, 2, 1.0), (1, 1, 0.5)])
def test_round_sizes_sum_to_the_budget(budget: int, rounds: int, first: float) -> None:
    sizes = round_sizes(budget, rounds, first)
    assert sum(sizes) == budget
    assert min(sizes) >= 1
    assert len(sizes) == min(rounds, budget)


def test_many_queries_at_once_get_the_answers_of_one_at_a_time(index: Any, scores: Any) -> None:
    calls = []

    def score(queries: Any, ids: Any) -> Any:
        calls.append(len(ids))
        return scores[80 + queries, ids]

    ids, found = index.search_many(score, 10, k=7, budget=60)
    assert len(calls) == 10  # one per round, for all queries
    for query in range(10):
        own_ids, own = index.search(Scorer(scores[80 + query]), k=7, budget=60)
        assert own_ids.tolist() == ids[query].tolist()
        np.testing.assert_array_equal(own, found[query])


def test_equal_scores_are_ordered_by_id(index: Any) -> None:
    ids, _ = index.search(lambda some: np.zeros(len(some)), k=30, budget=700)
    assert ids.tolist() == list(range(30))


def test_seeds_are_scored_first_and_the_best_of_them_found(index: Any, scores: Any) -> None:
    seeds = top(scores[85:86], 12)[0]
    scorer = Scorer(scores[85])
    ids, _ = index.search(scorer, k=10, budget=20, rounds=2, first=0.6, seeds=seeds)
    assert scorer.asked[:12] == seeds.tolist()
    assert ids.tolist() == seeds[:10].tolist()


def test_a_good_prior_helps_and_mixing_with_it_does() -> None:
    """Vectors of a dual encoder whose products are nearly the scores, and its query vectors."""
    random = np.random.default_rng(0)
    items, queries = random.normal(size=(500, 16)), random.normal(size=(20, 16))
    exact = queries @ items.T + random.normal(size=(20, 500))
    index = fastrerank.CURIndex.from_vectors(items)

    def found(**options: Any) -> float:
        return recall(index.search_many(lambda q, i: exact[q, i], 20, k=10, budget=15, rounds=3, **options)[0], exact)

    without = found()
    assert found(prior=queries) > without
    assert found(prior=queries, mix=0.8) > without
    with pytest.raises(ValueError, match=r"mix=0\.5 needs a prior"):
        found(mix=0.5)


def test_a_reranker_searches_its_texts() -> None:
    matrix = noisy(2, 60, 300)
    reranker = TextScorer(matrix)
    texts = [str(i) for i in range(300)]
    index = fastrerank.CURIndex.build(reranker, texts, [str(i) for i in range(50)])
    assert reranker.pairs == 50 * 300
    reranker.calls = reranker.pairs = 0
    ids, _ = index.search_reranker(reranker, ["55", "56"], k=5, budget=300)
    assert ids.tolist() == top(matrix[55:57], 5).tolist()
    assert reranker.pairs == 600
    assert reranker.calls == index.settings.rounds  # all queries of a round in one call
    one, _ = index.search_reranker(reranker, "56", k=5, budget=300)
    assert one.tolist() == ids[1].tolist()

    class Other(TextScorer):
        pass

    with pytest.raises(ValueError, match=r"built with the scores of TextScorer .* this reranker is Other"):
        index.search_reranker(Other(matrix), "56")


def test_an_index_knows_the_checkpoint_it_was_built_with(tiny: Any, tmp_path: Path) -> None:
    texts = [f"the owl {i}" for i in range(30)]
    built, other = (fastrerank.CrossEncoder(tiny("bert", seed=seed)) for seed in (0, 1))
    index = fastrerank.CURIndex.build(built, texts, ["owl", "cat"], checkpoint=tmp_path / "build")
    assert len(index.search_reranker(built, "mice", k=2, budget=5)[0]) == 2
    with pytest.raises(ValueError, match=r"built with the scores of CrossEncoder .* this reranker is CrossEncoder"):
        index.search_reranker(other, "mice", k=2, budget=5)
    with pytest.raises(ValueError, match=r"holds scores of another build .scorer differs"):
        fastrerank.CURIndex.build(other, texts, ["owl", "cat"], checkpoint=tmp_path / "build")


def test_the_identity_of_a_scorer_holds_every_word_of_its_template() -> None:
    def of(**changes: Any) -> str:
        reranker.template = replace(Template.load("qwen3-reranker"), **changes)
        return str(identity(reranker)["template"])

    reranker = types.SimpleNamespace(method="pointwise")
    # Saved indexes hold these digests: another one would refuse them all.
    assert of() == "bc7b774b26ed62b6"
    reranker.template = Template.load("prp")
    assert identity(reranker)["template"] == "b334a4259ea67bad"
    edits = (
        {},
        {"labels": ("yes", "nope")},
        {"suffix": "?"},
        {"max_length": 7},
        {"chat_options": {"a": 1}},
        {"messages": (Message("user", "{query} {document}"),)},
        {"document": "[{document}]"},
    )
    assert len({of(**changes) for changes in edits}) == len(edits)


@pytest.mark.parametrize(
    ("labels", "label"), [({"num_labels": 3}, None), ({"num_labels": None}, "none"), ({"num_labels": 3, "label": 1}, 1)]
)
def test_a_scorer_of_ones_own_may_count_labels(scores: Any, labels: dict[str, Any], label: Any) -> None:
    reranker = TextScorer(scores)
    vars(reranker).update(labels)
    assert identity(reranker).get("label", "none") == label
    index = fastrerank.CURIndex.build(reranker, [str(i) for i in range(20)], ["1", "2"])
    assert len(index.search_reranker(reranker, "3", k=2, budget=5)[0]) == 2


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_every_storage_finds_what_float32_finds(scores: Any, storage: str) -> None:
    index = fastrerank.CURIndex.from_scores(scores[:80], storage=storage)
    ids, _ = index.search_many(lambda q, i: scores[80 + q, i], 10, k=10, budget=200)
    assert recall(ids, scores[80:]) >= 0.97
    products = index.vectors().astype(np.float64)
    query = np.random.default_rng(0).normal(size=(2, 80)).astype(np.float32)
    got, _ = index.top_k(query, k=9)
    assert got.tolist() == top((query.astype(np.float64) @ products).astype(np.float32), 9).tolist()


@pytest.mark.parametrize(
    ("scorer", "kind", "message"),
    [
        (lambda _: 1 / 0, RuntimeError, r"failed on items \[.*and 12 more\]: ZeroDivisionError"),
        (
            lambda ids: np.where(np.arange(len(ids)) == 3, np.nan, 0.0),
            ValueError,
            r"NaN or infinity for items \[\d+\]$",
        ),
        (lambda ids: np.full(len(ids), np.inf), ValueError, r"NaN or infinity for items \[.*and 12 more\]"),
        (lambda _: [0.0], ValueError, r"must return 20 scores, one per item, got shape \(1,\) for items \["),
        (lambda _: "a", ValueError, r"one number per item, got str for items \["),
    ],
)
def test_a_bad_scorer_stops_the_search_and_names_items(index: Any, scorer: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        index.search(scorer, k=5, budget=200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 20, "budget": 10}, "budget must be at least k=20, got 10"),
        ({"k": 701, "budget": 800}, "k must be at most 700, the number of items, got 701"),
        ({"k": 0}, "k must be an int of at least 1, got 0"),
        ({"budget": 0}, "budget must be an int of at least 1"),
        ({"rounds": 0}, "rounds must be an int of at least 1"),
        ({"ridge": -1.0}, "ridge must be a number of at least 0, got -1.0"),
        ({"first": 1.5}, "first must be a number from 0 to 1"),
        ({"seeds": [1, 1]}, "seeds must not repeat an item, got 1"),
        ({"seeds": [700]}, "seeds has item 700, which the index does not hold"),
        ({"prior": np.zeros(3)}, r"prior must be finite, \(80,\) or \(1, 80\), got shape \(3,\)"),
    ],
)
def test_impossible_arguments_are_refused(index: Any, scores: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index.search(Scorer(scores[80]), **options)


def test_what_cannot_be_indexed_is_refused(index: Any) -> None:
    bad = np.zeros((3, 5))
    bad[1, 4] = np.nan
    with pytest.raises(ValueError, match="anchor_scores must be finite, got nan in row 1 for item 4"):
        fastrerank.CURIndex.from_scores(bad)
    with pytest.raises(ValueError, match="must be a matrix of numbers"):
        fastrerank.CURIndex.from_scores(np.zeros(3))
    with pytest.raises(ValueError, match="anchors must be one of greedy, leverage, random"):
        fastrerank.CURIndex.from_scores(np.zeros((3, 5)), anchors="best")
    with pytest.raises(ValueError, match=r"query_vectors must be \(B, 80\), got shape \(2, 79\)"):
        index.top_k(np.zeros((2, 79)))
    with pytest.raises(ValueError, match="anchor_scores must have 80 rows, the width of the index"):
        index.add(np.zeros((79, 1)))
    with pytest.raises(ValueError, match="the index holds no texts"):
        index.search_reranker(TextScorer(np.zeros((1, 1))), "0")
    empty = fastrerank.CURIndex.from_scores(np.zeros((3, 0)))
    for call in (lambda: empty.search(lambda ids: ids), lambda: empty.top_k(np.zeros(3))):
        with pytest.raises(ValueError, match="the index is empty"):
            call()
