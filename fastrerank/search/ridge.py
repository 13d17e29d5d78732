"""The ridge that fits held-out anchor queries best."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GRID", "held_out_ridge"]

# Beyond 0.05 the mean error may fall further where there are few anchor queries, but recall does not rise.
GRID = (1e-6, 1e-4, 0.003, 0.01, 0.02, 0.05)
_HELD_OUT = 64  # queries
_SCORED = 100  # items that a fit sees, half of them the query's best
_MOST_ITEMS = 16384


def held_out_ridge(scores: npt.NDArray[Any], seed: int = 0) -> float:
    """The relative ridge of `GRID` with the least error on held-out anchor queries, measured where searches need it.

    Each held-out query is fitted on items as a search would have scored them, half of them its best and half random.
    The error is measured on the items that follow in its order. The smallest ridge within 2.5 % of the least error
    wins. scores: (K, N). With fewer than 4 queries, 0.02.
    """
    width, total = scores.shape
    if width < 4 or total < 16:
        return 0.02
    random = np.random.default_rng(seed)
    items = np.sort(random.permutation(total)[:_MOST_ITEMS])
    rows = random.permutation(width)
    held = rows[: min(_HELD_OUT, width // 4)]
    kept = np.asarray(scores[rows[len(held) :]][:, items], np.float64)
    spread = float(np.square(kept - kept.mean(axis=1, keepdims=True)).sum(axis=0).mean()) or 1.0
    prior = kept.mean(axis=0)
    count = min(_SCORED, len(items) // 4)
    errors = np.zeros(len(GRID))
    for query in np.asarray(scores[held][:, items], np.float64):
        order = np.argsort(-query, kind="stable")
        best = order[: count // 2]
        others = random.permutation(len(items))
        seen = np.concatenate([best, others[~np.isin(others, best)][: count - len(best)]])
        near = order[count // 2 : 5 * count]
        near = near[~np.isin(near, seen)]
        vectors = kept[:, seen]
        values, directions = np.linalg.eigh(vectors.T @ vectors)
        target = directions.T @ (query[seen] - prior[seen])
        products = vectors.T @ kept[:, near]
        for number, ridge in enumerate(GRID):
            alpha = directions @ (target / (np.maximum(values, 0) + ridge * spread))
            difference = prior[near] + alpha @ products - query[near]
            errors[number] += float(np.square(difference).mean()) / max(float(query.var()), 1e-300)
    return next(ridge for ridge, error in zip(GRID, errors, strict=True) if error <= 1.025 * errors.min())
