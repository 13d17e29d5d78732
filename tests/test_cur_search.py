"""CURIndex.search: recall on real scores, the budget, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fastrerank


def low_rank(seed: int, queries: int, count: int, rank: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(queries, rank)) @ random.normal(size=(rank, count))


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    k = found.shape[1]
    best = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), best.tolist(), strict=True)]))


@pytest.mark.parametrize(("k", "budget", "least"), [(10, 100, 0.86), (10, 200, 0.955), (100, 200, 0.82)])
def test_recall_on_real_scores(data_folder: Path, k: int, budget: int, least: float) -> None:
    anchors = np.load(data_folder / "cur" / "scifact_anchor.npy")
    exact = np.load(data_folder / "cur" / "scifact_test.npy").astype(np.float32)
    index = fastrerank.CURIndex.from_scores(anchors)
    ids, scores = index.search_many(lambda query, item: exact[query, item], len(exact), k=k, budget=budget)
    assert recall(ids, exact) >= least
    np.testing.assert_array_equal(scores, np.take_along_axis(exact, ids, 1))


def test_low_rank_scores_are_found_exactly() -> None:
    exact = low_rank(3, 30, 400, 6)
    index = fastrerank.CURIndex.from_scores(exact[:20])
    ids, _ = index.search_many(lambda query, item: exact[20 + query, item], 10, k=10, budget=60, ridge=1e-7)
    assert recall(ids, exact[20:]) == 1.0
