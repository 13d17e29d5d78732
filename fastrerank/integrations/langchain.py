"""LangChain: a cross-encoder and a document compressor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field, PrivateAttr

from fastrerank.inputs.columns import pairs_of_columns
from fastrerank.integrations.loading import call_options, load_reranker, shared_by
from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.cross_encoder import CrossEncoder
from fastrerank.rerankers.independence import check_independent
from fastrerank.rerankers.pairs import score_pairs, shown
from fastrerank.runtime.types import Hit
from fastrerank.serve.batching.batcher import AsyncReranker

__all__ = ["FastRerankCrossEncoder", "FastReranker"]


class FastRerankCrossEncoder(BaseCrossEncoder):
    """`langchain_core.cross_encoders.BaseCrossEncoder` on `fastrerank.CrossEncoder`: one activated score per pair.

    Args:
        model: hub id, local folder, or a loaded `fastrerank.CrossEncoder` or other method that scores pairs one by one.
        label: the label that ranks where the head has several, by name or number.
        raw: whether scores are raw; else activated, as `rank` shows them.
        options: keywords of `fastrerank.CrossEncoder` where `model` is not loaded yet.

    Raises ValueError for a head with several labels where nothing tells which one ranks, and for a method that compares
    documents: a pair has no score of its own there; `FastReranker` takes it.

    Example:
        >>> FastRerankCrossEncoder("BAAI/bge-reranker-base").score([("who?", "the owl")])    # doctest: +SKIP
        [0.92]
    """

    def __init__(self, model: Any, *, label: str | int | None = None, raw: bool = False, **options: Any) -> None:
        found = model if isinstance(model, Reranker) else CrossEncoder(model, **options)
        self.model = load_reranker(found, None, options if found is model else None, label)
        check_independent(self.model, "FastRerankCrossEncoder scores pairs, FastReranker ranks lists")
        self.label, self.raw = label, raw

    def __repr__(self) -> str:
        return f"FastRerankCrossEncoder({self.model!r})"

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return one score per (query, document) pair."""
        text_pairs = pairs_of_columns(text_pairs, "text_pairs")
        queries, documents = [pair[0] for pair in text_pairs], [pair[1] for pair in text_pairs]
        found = score_pairs(self.model, queries, documents, **call_options(self.label))
        scores: list[float] = shown(self.model, found, self.raw).tolist()
        return scores


class FastReranker(BaseDocumentCompressor):
    """Keeps the `top_n` best documents, each with its score in `metadata["relevance_score"]`; inputs are not changed.

    Async calls of one object share batches (`fastrerank.AsyncReranker`); their scores are those of the other calls.

    Args:
        model: hub id or local folder; `reranker`: or a loaded reranker of any method.
        method, options: as in `fastrerank.load`.
        top_n: how many documents to keep; None for all.
        label: the label that ranks where the head has several, by name or number.
        raw: whether scores are raw; else activated, as `rank` shows them.

    Raises ValueError unless exactly one of `model` and `reranker` is given, and for a head with several labels where
    nothing tells which one ranks.

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
    label: str | int | None = None
    raw: bool = False
    _shared: AsyncReranker | None = PrivateAttr(None)

    def model_post_init(self, _: Any) -> None:
        """Load the model, where it is not."""
        if (self.model is None) == (self.reranker is None):
            raise ValueError("FastReranker needs either model= (a checkpoint) or reranker= (a loaded one)")
        self.reranker = load_reranker(self.reranker or self.model, self.method, self.options, self.label)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return copies of the best documents, best first."""
        assert self.reranker is not None
        texts = [document.page_content for document in documents]
        return _kept(documents, self.reranker.rank(query, texts, **self._options()))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """`compress_documents` in batches with this object's other calls."""
        assert self.reranker is not None
        texts = [document.page_content for document in documents]
        return _kept(documents, await shared_by(self, self.reranker).rank(query, texts, **self._options()))

    def _options(self) -> dict[str, Any]:
        return {"top_k": self.top_n, "raw": self.raw, **call_options(self.label)}


def _kept(documents: Sequence[Document], hits: list[Hit]) -> list[Document]:
    kept = []
    for hit in hits:
        document = documents[hit["corpus_id"]]
        metadata = {**document.metadata, "relevance_score": hit["score"]}
        kept.append(document.model_copy(update={"metadata": metadata}))
    return kept
