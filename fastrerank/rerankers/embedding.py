"""Embedding models as rerankers: cosine similarity of the query's and each document's vector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastrerank import ops
from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.engine.heads import Head, module_head
from fastrerank.engine.loading import Encoder
from fastrerank.inputs.limits import NO_LIMITS, TextLimits
from fastrerank.inputs.tokenizer import check_texts
from fastrerank.rerankers.base import Scores, Usage
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.rerankers.vectors import VectorReranker

__all__ = ["EmbeddingReranker"]

# Texts tokenised and encoded in one forward: bounds memory, far above what keeps all threads busy.
BLOCK_TEXTS = 2048


class EmbeddingReranker(VectorReranker):
    """Like sentence-transformers' `util.cos_sim(model.encode_query(q), model.encode_document(documents))`.

    Pooling, Dense, LayerNorm and Normalize modules are those of the checkpoint; without any, tokens are averaged.
    Prompts that the checkpoint stores as "query" and "document" (else "passage", else "corpus") are prepended.

    Arguments as in `VectorReranker`: model_name_or_path, device, dtype, max_length, num_threads, and those of the hub.

    Paper: Sentence-BERT, Reimers and Gurevych 2019, arXiv 1908.10084.

    Example:
        >>> reranker = EmbeddingReranker("path/to/all-MiniLM-L6-v2")   # doctest: +SKIP
        >>> reranker.rank("who?", ["the owl", "the cat"])              # doctest: +SKIP
    """

    method: ClassVar[str] = "embedding"
    independent: ClassVar[bool] = True
    _reads: ClassVar[str] = "average token vectors"

    def __init__(self, model_name_or_path: str | Path, **options: Any) -> None:
        super().__init__(model_name_or_path, **options)
        self.query_prompt = _prompt(self.checkpoint, "query")
        self.document_prompt = _prompt(self.checkpoint, "document", "passage", "corpus")

    def _head(self, checkpoint: Checkpoint) -> Head:
        pooling = next((module for module in checkpoint.modules if module.type == "Pooling"), None)
        prompts = (_prompt(checkpoint, "query"), _prompt(checkpoint, "document", "passage", "corpus"))
        if pooling is not None and not pooling.config.get("include_prompt", True) and any(prompts):
            raise ValueError(
                f"{pooling.path}: include_prompt is false, which leaves the prompt's tokens out of the average; the "
                "embedding method does not, and its scores would be wrong"
            )
        return module_head(checkpoint.modules)

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> npt.NDArray[np.float32]:
        """Return unit vectors, float32 (N, D), of texts with `prompt` put before each.

        Example:
            >>> reranker.encode(["the owl"]).shape  # doctest: +SKIP
            (1, 384)
        """
        with self._call() as usage:
            return self._encode(self.engine, check_texts(texts, "texts"), prompt, usage)

    def _encode(
        self,
        engine: Encoder,
        texts: list[str],
        prompt: str,
        usage: Usage,
        limits: TextLimits = NO_LIMITS,
        most: int | None = None,
    ) -> npt.NDArray[np.float32]:
        if prompt and most is not None:
            most += len(self._tokenizer.tokenizer.encode(prompt, add_special_tokens=False).ids)
        if prompt and limits.cut_left():
            raise ValueError(
                f"truncation_side='left' would cut the prompt {prompt!r} that this checkpoint puts before its texts"
            )
        blocks = []
        for begin in range(0, len(texts), BLOCK_TEXTS):
            with usage.stage("tokenize"):
                block = [prompt + text for text in texts[begin : begin + BLOCK_TEXTS]]
                batch = self._tokenizer.singles(block, limits.max_length, limits=limits, most=most)
            usage.count(batch)
            with usage.stage("compute"):
                blocks.append(engine.forward(batch.ids, batch.type_ids, batch.offsets))
        return np.concatenate(blocks) if blocks else np.zeros((0, engine.width), np.float32)

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        flat = [text for some in documents for text in some]
        if not flat:
            return [np.zeros(0, np.float32) for _ in queries]
        limits = call.limits
        query_vectors = self._encode(
            self.query_engine, queries, self.query_prompt, usage, self._of_query(limits), limits.max_tokens_per_query
        )
        vectors = self._encode(self.engine, flat, self.document_prompt, usage, limits, limits.max_tokens_per_doc)
        bounds = np.cumsum([0, *map(len, documents)])
        # A dot product per document: late interaction between one-token texts, in the kernel's fixed order.
        with usage.stage("score"):
            return [
                ops.max_sim(query_vectors[i : i + 1], vectors[begin:end], np.arange(end - begin + 1), threads=1)
                for i, (begin, end) in enumerate(pairwise(bounds))
            ]


def _prompt(checkpoint: Checkpoint, *names: str) -> str:
    """The first prompt of `names` that the checkpoint stores, empty or not; "" if there is none."""
    prompts = checkpoint.st_config.get("prompts") or {}
    return str(next((prompts[name] for name in names if name in prompts), "") or "")
