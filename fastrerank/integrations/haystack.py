"""Haystack: a ranker component."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

import fastrerank
from fastrerank.rerankers.base import Reranker

__all__ = ["FastRanker"]


@component
class FastRanker:
    """Ranks documents by a query; the best `top_k` come back as copies with their scores.

    Args:
        model: hub id or local folder.
        method, options: as in `fastrerank.load`.
        top_k: how many documents to return.
        query_prefix, query_suffix, document_prefix, document_suffix: texts put around what is scored.
        meta_fields_to_embed: fields of `meta` that are put before a document's content, joined by
            `embedding_separator`.
        score_threshold: documents with a lower score are left out.

    Raises ValueError for `top_k` below 1.

    Example:
        >>> ranker = FastRanker("BAAI/bge-reranker-base")                                    # doctest: +SKIP
        >>> ranker.run(query="who?", documents=documents)["documents"]                       # doctest: +SKIP
    """

    def __init__(
        self, model: str, *, method: str | None = None, top_k: int = 10, query_prefix: str = "",
        query_suffix: str = "", document_prefix: str = "", document_suffix: str = "",
        meta_fields_to_embed: list[str] | None = None, embedding_separator: str = "\n",
        score_threshold: float | None = None, options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        _check(top_k)
        self.model, self.method, self.top_k, self.options = model, method, top_k, options or {}
        self.query_prefix, self.query_suffix = query_prefix, query_suffix
        self.document_prefix, self.document_suffix = document_prefix, document_suffix
        self.meta_fields_to_embed, self.embedding_separator = meta_fields_to_embed or [], embedding_separator
        self.score_threshold = score_threshold
        self._reranker: Reranker | None = None

    def __repr__(self) -> str:
        return f"FastRanker({self._reranker or self.model!r})"

    def warm_up(self) -> None:
        """Load the model; `run` does where nobody did."""
        if self._reranker is None:
            self._reranker = fastrerank.load(self.model, method=self.method, **self.options)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` makes the same component of."""
        names = ("model", "method", "top_k", "query_prefix", "query_suffix", "document_prefix", "document_suffix",
                 "meta_fields_to_embed", "embedding_separator", "score_threshold", "options")  # fmt: skip
        return dict(default_to_dict(self, **{name: getattr(self, name) for name in names}))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FastRanker:
        """Make a component of what `to_dict` returned."""
        made: FastRanker = default_from_dict(cls, data)
        return made

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, documents: list[Document], top_k: int | None = None, score_threshold: float | None = None
    ) -> dict[str, list[Document]]:
        """Return {"documents": best first}. Of documents with one id, the one with the highest score so far counts."""
        top_k = self.top_k if top_k is None else top_k
        _check(top_k)
        threshold = self.score_threshold if score_threshold is None else score_threshold
        self.warm_up()
        assert self._reranker is not None
        distinct: dict[str, Document] = {}
        for document in documents:
            known = distinct.get(document.id)
            if known is None or (document.score or float("-inf")) > (known.score or float("-inf")):
                distinct[document.id] = document
        chosen = list(distinct.values())
        texts = [self._text(document) for document in chosen]
        hits = self._reranker.rank(self.query_prefix + query + self.query_suffix, texts)
        kept = [hit for hit in hits if threshold is None or hit["score"] >= threshold][:top_k]
        return {"documents": [replace(chosen[hit["corpus_id"]], score=hit["score"]) for hit in kept]}

    def _text(self, document: Document) -> str:
        fields = [str(document.meta[name]) for name in self.meta_fields_to_embed if document.meta.get(name)]
        text = self.embedding_separator.join([*fields, document.content or ""])
        return self.document_prefix + text + self.document_suffix


def _check(top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
