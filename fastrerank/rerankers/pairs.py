"""Scores of (query, document) pairs, computed as one list of documents per query."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastrerank.rerankers.base import Reranker

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.rerankers.call import Options

__all__ = ["score_pairs", "shown"]


def score_pairs(
    reranker: Reranker, queries: Sequence[str], documents: Sequence[str], **options: Unpack[Options]
) -> npt.NDArray[np.float32]:
    """Return the raw score of each (query, document) pair, float32 (N,).

    Consecutive pairs with the same query form one list: it is scored in one go, and methods that compare documents
    compare those of one list.

    Args:
        reranker: any method. queries, documents: N str each.
        options: as in `Reranker.score`.

    Raises ValueError where queries and documents differ in number, and where the method compares a query's documents
    and they do not stand together: a list that is scored in pieces has other scores.

    Example:
        >>> score_pairs(reranker, ["who?", "who?"], ["the owl", "the cat"])              # doctest: +SKIP
        array([3.1, -2. ], dtype=float32)
    """
    if len(queries) != len(documents):
        raise ValueError(f"pairs need a document for each query: {len(queries)} queries, {len(documents)} documents")
    bounds = np.cumsum([0, *(len(list(run)) for _, run in groupby(queries))])
    if not reranker.independent:
        _check_together(reranker, queries, bounds)
    lists = [documents[begin:end] for begin, end in pairwise(bounds)]
    found = reranker.score_many([queries[begin] for begin in bounds[:-1]], lists, **options)
    return np.concatenate([np.zeros(0, np.float32), *found])


def shown(reranker: Reranker, scores: npt.NDArray[np.float32], raw: bool) -> npt.NDArray[np.float32]:
    """Return raw scores as they are, or as `rank` shows them: float32 of the same shape."""
    return scores if raw else np.asarray(reranker.activated(scores), np.float32)


def _check_together(reranker: Reranker, queries: Sequence[str], bounds: npt.NDArray[np.int64]) -> None:
    seen: dict[str, int] = {}
    for begin in bounds[:-1].tolist():
        query = queries[begin]
        if query in seen:
            raise ValueError(
                f"pairs {seen[query]} and {begin} have one query, and pairs of other queries stand between them: "
                f"method {reranker.method!r} compares a query's documents with each other, so put them together"
            )
        seen[query] = begin
