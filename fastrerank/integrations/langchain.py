"""LangChain: a cross-encoder and a document compressor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field, PrivateAttr

import fastrerank
from fastrerank.rerankers.base import Reranker
from fastrerank.serve.batcher import AsyncReranker
from fastrerank.types import Hit

__all__ = ["FastRerankCrossEncoder", "FastReranker"]


class FastRerankCrossEncoder(BaseCrossEncoder):
    """`langchain_core.cross_encoders.BaseCrossEncoder` on `fastrerank.CrossEncoder`: activated scores of pairs.

    Args:
        model: hub id, local folder, or a loaded `fastrerank.CrossEncoder`.
        options: keywords of `fastrerank.CrossEncoder` where `model` is not loaded yet.

    Example:
        >>> FastRerankCrossEncoder("BAAI/bge-reranker-base").score([("who?", "the owl")])    # doctest: +SKIP
        [0.92]
    """

    def __init__(self, model: Any, **options: Any) -> None:
        loaded = isinstance(model, fastrerank.CrossEncoder)
        self.model: fastrerank.CrossEncoder = model if loaded else fastrerank.CrossEncoder(model, **options)

    def __repr__(self) -> str:
        return f"FastRerankCrossEncoder({self.model!r})"

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return one score per (query, document) pair."""
        scores: list[float] = self.model.predict(list(text_pairs)).tolist()
        return scores


class FastReranker(BaseDocumentCompressor):
    """Keeps the `top_n` best documents, each with its score in `metadata["relevance_score"]`; inputs are not changed.

    Async calls of one object share batches (`fastrerank.AsyncReranker`).

    Args:
        model: hub id or local folder; `reranker`: or a loaded reranker of any method.
        method, options: as in `fastrerank.load`.
        top_n: how many documents to keep; None for all.

    Raises ValueError unless exactly one of `model` and `reranker` is given.

    Example:
        >>> compressor = FastReranker(model="BAAI/bge-reranker-base", top_n=3)               # doctest: +SKIP
        >>> compressor.compress_documents(documents, "who?")                                 # doctest: +SKIP
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str | None = None
    reranker: Reranker | None = Field(None, exclude=True)
    method: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    top_n: int | None = Field(3, ge=1)
    _shared: AsyncReranker | None = PrivateAttr(None)

    def model_post_init(self, _: Any) -> None:
        """Load the model, where it is not."""
        if (self.model is None) == (self.reranker is None):
            raise ValueError("FastReranker needs either model= (a checkpoint) or reranker= (a loaded one)")
        if self.reranker is None and self.model is not None:
            self.reranker = fastrerank.load(self.model, method=self.method, **self.options)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return copies of the best documents, best first."""
        assert self.reranker is not None
        hits = self.reranker.rank(query, [document.page_content for document in documents], top_k=self.top_n)
        return _kept(documents, hits)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """`compress_documents` in batches with this object's other calls."""
        assert self.reranker is not None
        if self._shared is None:
            self._shared = AsyncReranker(self.reranker)
        hits = await self._shared.rank(query, [document.page_content for document in documents], top_k=self.top_n)
        return _kept(documents, hits)


def _kept(documents: Sequence[Document], hits: list[Hit]) -> list[Document]:
    kept = []
    for hit in hits:
        document = documents[hit["corpus_id"]]
        metadata = {**document.metadata, "relevance_score": hit["score"]}
        kept.append(document.model_copy(update={"metadata": metadata}))
    return kept
