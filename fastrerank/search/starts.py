"""Where a search starts: the items of its first round, and what is believed before any score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastrerank.search.checks import as_ids
from fastrerank.search.contents import Contents

__all__ = ["first_items", "prior_of"]


def first_items(
    held: Contents, queries: int, size: int, seeds: Sequence[npt.ArrayLike] | None
) -> npt.NDArray[np.int64]:
    """Places of the first round's items, (B, size): each query's seeds, then anchors, then any items."""
    anchors = held.anchors
    if len(anchors) < 2 * size:  # seeds may be anchors too
        rest = np.random.default_rng(0).permutation(held.count)
        anchors = np.concatenate([anchors, rest[~np.isin(rest, anchors)]])
    if seeds is None:
        return np.repeat(anchors[None, :size], queries, axis=0)
    if len(seeds) != queries:
        raise ValueError(f"seeds must have one list for each of {queries} queries, got {len(seeds)}")
    first = np.empty((queries, size), np.int64)
    for number, some in enumerate(seeds):
        own = held.positions("seeds", as_ids("seeds", some)[:size])
        first[number, : len(own)] = own
        first[number, len(own) :] = anchors[~np.isin(anchors, own)][: size - len(own)]
    return first


def prior_of(held: Contents, prior: npt.ArrayLike | None, queries: int, ridge: float) -> npt.NDArray[np.float64] | None:
    """What is believed of the query vectors, (1, K) or (B, K); None for 0. ValueError for a wrong shape or NaN."""
    if prior is None:
        # the published formula, without a ridge, has no prior
        return None if held.kind == "vectors" or ridge == 0 else np.full((1, held.width), 1 / held.width)
    vectors = np.atleast_2d(np.asarray(prior, np.float64))
    if vectors.shape not in ((1, held.width), (queries, held.width)) or not np.isfinite(vectors).all():
        raise ValueError(
            f"prior must be finite, ({held.width},) or ({queries}, {held.width}), got shape {np.shape(prior)}"
        )
    return vectors
