"""Late interaction: every query token looks for its best document token."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint, Module
from fastrerank.checkpoints.layouts import refuse_token_projection
from fastrerank.engine.heads import Head, module_head
from fastrerank.inputs.limits import TextLimits
from fastrerank.rerankers.base import Scores, Usage
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.rerankers.vectors import VectorReranker

__all__ = ["LateInteractionReranker"]

# Token vectors alive at once: 16,384 x 384 float32 are 24 MiB.
BLOCK_TOKENS = 16384
BLOCK_TEXTS = 256


class LateInteractionReranker(VectorReranker):
    """MaxSim: the mean over the query's tokens of the largest cosine with a token of the document.

    Works with any encoder of the native families; token vectors are the last hidden states, projected by the
    checkpoint's Dense modules where these follow the Transformer without Pooling. Special tokens take part on both
    sides. The mean, not ColBERT's sum, keeps scores of different queries comparable; the ranking is the same.

    Arguments as in `VectorReranker`: model_name_or_path, device, dtype, max_length, num_threads, and those of the hub.

    Paper: ColBERT, Khattab and Zaharia 2020, arXiv 2004.12832.

    Example:
        >>> reranker = LateInteractionReranker("path/to/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> reranker.score("who?", ["the owl", "the cat"])                  # doctest: +SKIP
    """

    method: ClassVar[str] = "late-interaction"
    independent: ClassVar[bool] = True
    _reads: ClassVar[str] = "token vectors"

    def _head(self, checkpoint: Checkpoint) -> Head:
        refuse_token_projection((checkpoint.path, checkpoint.transformer_path))
        return module_head(_token_modules(checkpoint.modules), tokens=True)

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        results = []
        limits = call.limits
        for query, texts in zip(queries, documents, strict=True):
            scores = [np.zeros(0, np.float32)]
            if texts:
                with usage.stage("tokenize"):
                    batch = self._tokenizer.singles(
                        [query], limits.max_length, limits=self._of_query(limits), most=limits.max_tokens_per_query
                    )
                usage.count(batch)
                with usage.stage("compute"):
                    vectors = self.query_engine.forward(batch.ids, batch.type_ids, batch.offsets)
                scores += [
                    self._block(vectors, texts[i : i + BLOCK_TEXTS], usage, limits)
                    for i in range(0, len(texts), BLOCK_TEXTS)
                ]
            results.append(np.concatenate(scores))
        return results

    def _block(self, query: npt.NDArray[np.float32], texts: list[str], usage: Usage, limits: TextLimits) -> Scores:
        with usage.stage("tokenize"):
            batch = self._tokenizer.singles(texts, limits.max_length, limits=limits, most=limits.max_tokens_per_doc)
        usage.count(batch)
        parts = []
        begin = 0
        while begin < len(texts):
            # At least one document, else as many as stay within BLOCK_TOKENS.
            limit = batch.offsets[begin] + BLOCK_TOKENS
            end = max(begin + 1, int(np.searchsorted(batch.offsets, limit, side="right")) - 1)
            span = slice(batch.offsets[begin], batch.offsets[end])
            offsets = batch.offsets[begin : end + 1] - batch.offsets[begin]
            with usage.stage("compute"):
                vectors = self.engine.forward(batch.ids[span], batch.type_ids[span], offsets)
            with usage.stage("score"):
                parts.append(ops.max_sim(query, vectors, offsets, threads=self.engine.num_threads))
            begin = end
        return np.concatenate(parts)


def _token_modules(modules: list[Module]) -> list[Module]:
    """Modules that act on tokens: all of a model without Pooling, else only what stands before it."""
    kinds = [module.type for module in modules]
    return modules[: kinds.index("Pooling")] if "Pooling" in kinds else modules
