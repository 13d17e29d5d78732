"""Which items every query scores first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["RULES", "choose_anchors"]

RULES = ("greedy", "leverage", "random")
_MOST_ITEMS = 16384  # items that the choice looks at; a random sample where there are more
_MOST_DIRECTIONS = 256


def choose_anchors(
    vectors: npt.NDArray[Any], count: int, rule: str = "greedy", *, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Items whose scores predict the scores of all items best, the best predictors first.

    Args:
        vectors: item vectors as columns, (K, N). count: at most N are chosen.
        rule: "greedy": each next item lowers the mean squared error of reconstructing all items from the chosen most
            (l2-greedy, arXiv 2607.03515), in the leading directions. "leverage": drawn with probability proportional
            to leverage scores there. "random": uniformly.
        seed: of the random draws.

    Returns int64 (min(count, N),), without repetition. Raises ValueError for an unknown rule.

    Example:
        >>> choose_anchors(np.array([[1.0, 9.0, 1.0]]), 1).tolist()
        [1]
    """
    if rule not in RULES:
        raise ValueError(f"anchors must be one of {', '.join(RULES)}, or item ids, got {rule!r}")
    total = vectors.shape[1]
    count = min(count, total)
    random = np.random.default_rng(seed)
    shuffled = random.permutation(total)
    if rule == "random" or count == 0:
        return shuffled[:count].astype(np.int64)
    pool = np.sort(shuffled[:_MOST_ITEMS]) if total > _MOST_ITEMS else np.arange(total)
    coordinates = _leading(np.asarray(vectors[:, pool], np.float64))
    if rule == "greedy":
        chosen = pool[_greedy(coordinates, min(count, len(pool)))]
    else:
        leverage = np.square(coordinates / np.linalg.norm(coordinates, axis=0)).sum(axis=1) + 1e-12
        draws = np.log(leverage) + random.gumbel(size=len(pool))
        chosen = pool[np.argsort(-draws, kind="stable")[:count]]
    rest = shuffled[~np.isin(shuffled, chosen)]
    return np.concatenate([chosen, rest])[:count].astype(np.int64)


def _leading(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Items in the leading directions of their second moment, (N, r), r at least 1."""
    values, directions = np.linalg.eigh(vectors @ vectors.T)
    kept = np.flatnonzero(values > 1e-10 * max(values[-1], np.finfo(float).tiny))[-_MOST_DIRECTIONS:]
    if not kept.size:
        return np.ones((vectors.shape[1], 1))
    result: npt.NDArray[np.float64] = vectors.T @ directions[:, kept]
    return result


def _greedy(items: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """l2-greedy in coordinates: the drop in error from item f is f^T M f / f^T f, M the second moment of what is left.

    `units` are the chosen items, orthonormalised. What is left of an item is orthogonal to them, and so is the image of
    the next unit: products of both with whole items are those with what is left of them, which is never formed.
    """
    units = np.empty((count, items.shape[1]))
    moment = items.T @ items
    length = np.square(items).sum(axis=1)
    gain = np.einsum("nr,nr->n", items @ moment, items)
    floor = 1e-10 * float(length.mean())
    alive = length > floor
    chosen: list[int] = []
    while len(chosen) < count and alive.any():
        best = int(np.argmax(np.where(alive, gain / np.maximum(length, floor), -np.inf)))
        done = units[: len(chosen)]
        left = items[best].copy()
        for _ in range(2):  # one pass is not orthogonal enough where the rest is small
            left -= (done @ left) @ done
        unit = left / max(float(np.linalg.norm(left)), np.finfo(float).tiny)
        image = moment @ unit
        image -= (done @ image) @ done
        along, across = (items @ np.stack([unit, image], axis=1)).T
        gain += along * (along * (unit @ image) - 2 * across)
        length -= np.square(along)
        units[len(chosen)] = unit
        chosen.append(best)
        alive[best] = False
        alive &= length > floor
    return np.array(chosen, np.int64)
