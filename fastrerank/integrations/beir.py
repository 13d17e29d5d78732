"""BEIR: the model that its `Rerank` calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrerank.inputs.columns import pairs_of_columns
from fastrerank.integrations.loading import call_options, load_reranker
from fastrerank.rerankers.pairs import score_pairs, shown

__all__ = ["FastReranker"]


class FastReranker:
    """For `beir.reranking.rerank.Rerank`: any method of fastrerank. BEIR gives a query's documents one after another.

    Args:
        model: hub id, local folder, or a loaded reranker.
        method, options: as in `fastrerank.load`.
        label: the label that ranks where the head has several, by name or number.
        raw: whether scores are raw, as a run of an evaluation wants them; else activated, as `rank` shows them.

    Raises ValueError for a head with several labels where nothing tells which one ranks.

    Example:
        >>> rerank = Rerank(FastReranker("BAAI/bge-reranker-base"))                          # doctest: +SKIP
        >>> rerank.rerank(corpus, queries, results, top_k=100)                               # doctest: +SKIP
    """

    def __init__(
        self, model: Any, *, method: str | None = None, label: str | int | None = None, raw: bool = True, **options: Any
    ) -> None:
        self.reranker = load_reranker(model, method, options, label)
        self.label, self.raw = label, raw

    def __repr__(self) -> str:
        return f"FastReranker({self.reranker!r})"

    def predict(
        self, sentences: Sequence[Sequence[str]], batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> list[float]:
        """Return the score of each [query, document].

        `batch_size` changes nothing: work is split by tokens. No bar is drawn.

        Raises ValueError where a method that compares documents gets a query's pairs in pieces.
        """
        sentences = pairs_of_columns(sentences, "sentences")
        queries, documents = [pair[0] for pair in sentences], [pair[1] for pair in sentences]
        found = score_pairs(self.reranker, queries, documents, **call_options(self.label))
        scores: list[float] = shown(self.reranker, found, self.raw).tolist()
        return scores
