"""The `rerankers` package: a ranker of its interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rerankers.documents import Document
from rerankers.models.ranker import BaseRanker
from rerankers.results import RankedResults, Result
from rerankers.utils import prep_docs

from fastrerank.inputs.columns import as_column
from fastrerank.integrations.loading import call_options, load_reranker
from fastrerank.rerankers.pairs import shown

__all__ = ["FastRanker"]


class FastRanker(BaseRanker):  # type: ignore[misc]
    """`rerankers.Reranker`'s interface on any method of fastrerank; `rank` and `score` have one scale.

    Args:
        model_name_or_path: hub id, local folder, or a loaded reranker.
        method, options: as in `fastrerank.load`.
        label: the label that ranks where the head has several, by name or number.
        raw: whether scores are raw; else activated, as `rank` shows them.

    Raises ValueError for a head with several labels where nothing tells which one ranks.

    Example:
        >>> FastRanker("BAAI/bge-reranker-base").rank("who?", ["the owl", "the cat"]).top_k(1)   # doctest: +SKIP
    """

    def __init__(
        self,
        model_name_or_path: Any,
        verbose: int = 0,
        *,
        method: str | None = None,
        label: str | int | None = None,
        raw: bool = False,
        **options: Any,
    ) -> None:
        self.verbose = verbose
        self.model = load_reranker(model_name_or_path, method, options, label)
        self.label, self.raw = label, raw

    def __repr__(self) -> str:
        return f"FastRanker({self.model!r})"

    def score(self, query: str, doc: str) -> float:
        """Return the document's score, on the scale of `rank`."""
        scores = self.model.score(query, [doc], **call_options(self.label))
        return float(shown(self.model, scores, self.raw)[0])

    def rank(
        self,
        query: str,
        docs: str | Document | Sequence[str | Document],
        doc_ids: Sequence[str] | Sequence[int] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        batch_size: int | None = None,
    ) -> RankedResults:
        """Return `RankedResults`, best first, ranks from 1; no documents give no results.

        `batch_size` changes nothing: work is split by tokens.
        """
        docs = [docs] if isinstance(docs, (str, Document)) else as_column(docs, "docs")
        if len(docs) == 0:
            return RankedResults(results=[], query=query, has_scores=True)
        documents = prep_docs(list(docs), doc_ids, metadata)
        texts = [document.text for document in documents]
        hits = self.model.rank(query, texts, raw=self.raw, **call_options(self.label))
        results = [
            Result(document=documents[hit["corpus_id"]], score=hit["score"], rank=place)
            for place, hit in enumerate(hits, start=1)
        ]
        return RankedResults(results=results, query=query, has_scores=True)
