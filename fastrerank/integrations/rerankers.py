"""The `rerankers` package: a ranker of its interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rerankers.documents import Document
from rerankers.models.ranker import BaseRanker
from rerankers.results import RankedResults, Result
from rerankers.utils import prep_docs

import fastrerank
from fastrerank.rerankers.base import Reranker

__all__ = ["FastRanker"]


class FastRanker(BaseRanker):  # type: ignore[misc]
    """`rerankers.Reranker`'s interface on any method of fastrerank.

    Args:
        model_name_or_path: hub id, local folder, or a loaded reranker.
        method, options: as in `fastrerank.load`.

    Example:
        >>> FastRanker("BAAI/bge-reranker-base").rank("who?", ["the owl", "the cat"]).top_k(1)   # doctest: +SKIP
    """

    def __init__(self, model_name_or_path: Any, verbose: int = 0, *, method: str | None = None, **options: Any) -> None:
        self.verbose = verbose
        loaded = isinstance(model_name_or_path, Reranker)
        self.model = model_name_or_path if loaded else fastrerank.load(model_name_or_path, method=method, **options)

    def __repr__(self) -> str:
        return f"FastRanker({self.model!r})"

    def score(self, query: str, doc: str) -> float:
        """Return the document's raw score."""
        return float(self.model.score(query, [doc])[0])

    def rank(
        self, query: str, docs: str | Document | Sequence[str | Document],
        doc_ids: Sequence[str] | Sequence[int] | None = None, metadata: Sequence[dict[str, Any]] | None = None,
        **_: Any,
    ) -> RankedResults:  # fmt: skip
        """Return `RankedResults`, best first, ranks from 1; no documents give no results."""
        if isinstance(docs, (str, Document)):
            docs = [docs]
        if not docs:
            return RankedResults(results=[], query=query, has_scores=True)
        documents = prep_docs(list(docs), doc_ids, metadata)
        hits = self.model.rank(query, [document.text for document in documents])
        results = [
            Result(document=documents[hit["corpus_id"]], score=hit["score"], rank=place)
            for place, hit in enumerate(hits, start=1)
        ]
        return RankedResults(results=results, query=query, has_scores=True)
