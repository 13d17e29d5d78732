"""Pointwise LLM reranking: one prompt per document, scored by the logits of a label or two at its end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoint import Checkpoint
from fastrerank.rerankers.base import Scores, Usage
from fastrerank.rerankers.llm import LLMReranker, Scorer
from fastrerank.rerankers.recognise import is_classifier, is_layerwise, logit_score

__all__ = ["PointwiseReranker"]


class PointwiseReranker(LLMReranker):
    """Scores each document by the first token that a language model would say about it; nothing is generated.

    Qwen3-Reranker (also converted to a sequence classifier), mxbai-rerank-v2, bge-reranker-v2-gemma and
    -minicpm-layerwise, monoT5, RankT5, RankLLaMA and other scalar heads, sentence-transformers' LogitScore checkpoints,
    and any instruction-tuned model by a plain question (template "relevance"). Prompts of one query begin alike: that
    part passes through the network once. `score` is float32 and raw: logit(yes) - logit(no) where there are two labels,
    the logit where there is one, and the expected value where labels are numbers.

    Args:
        model, template, instruction, and the rest: as in `LLMReranker`.
        cutoff_layers: layers to run of a layerwise checkpoint, which has a head after each; None for 28 or, where it
            has fewer, all. ValueError for any other checkpoint.

    Papers: Qwen3 Embedding (arXiv 2506.05176), monoT5 (arXiv 2003.06713), RankLLaMA (arXiv 2310.08319).

    Example:
        >>> reranker = PointwiseReranker("Qwen/Qwen3-Reranker-0.6B")                        # doctest: +SKIP
        >>> reranker.score("how long do fleas live", ["Fleas are insects.", "A year."])     # doctest: +SKIP
        array([-3.1, 4.7], dtype=float32)
    """

    method: ClassVar[str] = "pointwise"
    kind: ClassVar[str] = "pointwise"
    default_template: ClassVar[str] = "relevance"

    def __init__(self, model: str | Path, *, cutoff_layers: int | None = None, **options: Any) -> None:
        self._cutoff_layers = cutoff_layers
        super().__init__(model, **options)

    def _scorer(self, checkpoint: Checkpoint, **options: Any) -> Scorer:
        if is_layerwise(checkpoint):
            from fastrerank.engine.layerwise import load_layerwise

            scorer: Scorer = load_layerwise(checkpoint, self._cutoff_layers, **options)
            self._labels = np.zeros(1, np.int64)
            return scorer
        if self._cutoff_layers is not None:
            raise ValueError(
                f"cutoff_layers is for layerwise checkpoints, which have a head after each layer; {checkpoint.path} "
                "has one head"
            )
        scorer = super()._scorer(checkpoint, **options)
        stored = logit_score(checkpoint)
        if is_classifier(checkpoint):
            count = int(scorer.labels)  # type: ignore[attr-defined]
            if count != 1:
                raise ValueError(f"{checkpoint.path} has {count} labels, a pointwise score needs a head with one")
            self._labels = np.zeros(1, np.int64)
        elif stored is not None:
            self._labels = np.array(stored, np.int64)
        else:
            self._labels = self.prompts.label_ids()
        return scorer

    def _score_many(self, queries: list[str], documents: list[list[str]], usage: Usage) -> list[Scores]:
        with usage.stage("tokenize"):
            prompts = [
                prompt
                for query, texts in zip(queries, documents, strict=True)
                for prompt in self.prompts.encode(query, [[text] for text in texts])
            ]
        scores = self._formula(self._logits(prompts, self._labels, usage))
        bounds = np.cumsum([0, *map(len, documents)])
        return [scores[begin:end] for begin, end in pairwise(bounds)]

    def _formula(self, logits: npt.NDArray[np.float32]) -> Scores:
        if logits.shape[1] == 1:
            return logits[:, 0]
        if self.template.score == "expectation":
            weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True, initial=-np.inf))
            values = np.array([float(label) for label in self.template.labels])
            return (weights @ values / weights.sum(1)).astype(np.float32)
        return logits[:, 0] - logits[:, 1]
