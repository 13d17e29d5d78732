"""BEIR: the model that its `Rerank` calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fastrerank
from fastrerank.integrations.pairs import score_pairs
from fastrerank.rerankers.base import Reranker

__all__ = ["FastReranker"]


class FastReranker:
    """For `beir.reranking.rerank.Rerank`: any method of fastrerank. BEIR gives a query's documents one after another.

    Args:
        model: hub id, local folder, or a loaded reranker.
        method, options: as in `fastrerank.load`.

    Example:
        >>> rerank = Rerank(FastReranker("BAAI/bge-reranker-base"))                          # doctest: +SKIP
        >>> rerank.rerank(corpus, queries, results, top_k=100)                               # doctest: +SKIP
    """

    def __init__(self, model: Any, *, method: str | None = None, **options: Any) -> None:
        loaded = isinstance(model, Reranker)
        self.reranker: Reranker = model if loaded else fastrerank.load(model, method=method, **options)

    def __repr__(self) -> str:
        return f"FastReranker({self.reranker!r})"

    def predict(self, sentences: Sequence[Sequence[str]], batch_size: int = 32, **_: Any) -> list[float]:
        """Return the raw score of each [query, document]; `batch_size` changes nothing: work is split by tokens."""
        queries, documents = [pair[0] for pair in sentences], [pair[1] for pair in sentences]
        scores: list[float] = score_pairs(self.reranker, queries, documents).tolist()
        return scores
