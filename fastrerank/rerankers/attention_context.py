"""Documents that are asked about again: their keys and values are kept, so that a query costs its own rows only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrerank.inputs.tokenizer import check_texts
from fastrerank.rerankers.base import Scores, Usage
from fastrerank.runtime.types import Hit

if TYPE_CHECKING:
    from fastrerank.rerankers.attention import AttentionReranker

__all__ = ["Context"]


class Context:
    """A list of documents whose keys and values a reranker keeps: `score` and `rank` equal the reranker's on them.

    Made by `AttentionReranker.context`. The documents' forward runs once, when it is made; a query then costs the rows
    of instruction and query. Let go of the object to free the memory. One object may be called from many threads.

    Attributes:
        documents: the documents, in order.
        nbytes: bytes that are held, on the reranker's device.

    Example:
        >>> context = reranker.context(["the owl", "the cat"])                  # doctest: +SKIP
        >>> [context.rank(query)[0] for query in ("who hoots?", "who purrs?")]  # doctest: +SKIP
        [{'corpus_id': 0, 'score': 0.31}, {'corpus_id': 1, 'score': 0.27}]
    """

    def __init__(self, reranker: AttentionReranker, documents: Sequence[str], max_bytes: int | None) -> None:
        self.documents = check_texts(documents, "documents")
        self._reranker = reranker
        self._kept: Any = None
        self.nbytes = 0
        if not self.documents:
            return
        prompt = reranker.prompts.encode("", self.documents)
        if reranker.max_length is not None and prompt.longest > reranker.max_length:
            raise ValueError(
                f"documents make a prompt of {prompt.longest} tokens, the limit is {reranker.max_length}: only "
                "documents that fit into one prompt can be kept"
            )
        need = len(prompt.context) * reranker.scorer.kept_bytes
        if max_bytes is not None and need > max_bytes:
            raise ValueError(
                f"max_bytes must be at least {need:,} for these documents of {len(prompt.context):,} tokens, "
                f"{reranker.scorer.kept_bytes:,} bytes each, got {max_bytes:,}"
            )
        with reranker._call() as usage:
            with usage.stage("compute"):
                self._kept, cost = reranker.scorer.keep(prompt.context)
            usage.add(cost)
        self.nbytes = self._kept.nbytes

    def score(self, query: str) -> Scores:
        """Return the documents' scores, float32 (N,): those of `reranker.score(query, documents)`."""
        return self._reranker._answer(query, self.documents, self).scores

    def rank(
        self, query: str, top_k: int | None = None, return_documents: bool = False, explain: bool = False
    ) -> list[Hit]:
        """Return what `reranker.rank(query, documents, ...)` returns."""
        return self._reranker._rank(query, self.documents, top_k, return_documents, explain, self)

    def before(self, context: Any, usage: Usage) -> Any:
        """Return what is kept; ValueError unless the prompt's context is the one that was kept."""
        if self._kept is not None and not np.array_equal(self._kept.ids, context):
            raise ValueError("the query does not fit behind the documents that are kept: ask the reranker itself")
        if self._kept is not None:
            usage.prefix_tokens += len(context)
        return self._kept
