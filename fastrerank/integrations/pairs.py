"""What adapters of pairs share: lists of (query, document) pairs scored as each query's list of documents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

from fastrerank.rerankers.base import Reranker

__all__ = ["score_pairs"]


def score_pairs(reranker: Reranker, queries: Sequence[str], documents: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return the score of each (query, document) pair, float32 (N,).

    Neighbours with one query are one list: they share its work, and methods that compare documents compare those.

    Example:
        >>> score_pairs(reranker, ["who?", "who?"], ["the owl", "the cat"])              # doctest: +SKIP
        array([3.1, -2. ], dtype=float32)
    """
    bounds = np.cumsum([0, *(len(list(run)) for _, run in groupby(queries))])
    lists = [documents[begin:end] for begin, end in pairwise(bounds)]
    found = reranker.score_many([queries[begin] for begin in bounds[:-1]], lists)
    return np.concatenate([np.zeros(0, np.float32), *found])
