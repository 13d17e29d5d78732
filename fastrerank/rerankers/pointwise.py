"""Pointwise LLM reranking: one prompt per document, scored by the logits of its labels or by a written integer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.inputs.prompts import Template, list_templates
from fastrerank.inputs.prompts.chat_pairs import chat_tokenizer, joined_template, pair_template
from fastrerank.inputs.prompts.prompt_tokenizer import Prompt
from fastrerank.rerankers.activations import sigmoid
from fastrerank.rerankers.base import Scores, Usage
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.rerankers.generation import INTEGER, TransformersGenerator, room_to_write
from fastrerank.rerankers.llm import LLMReranker
from fastrerank.rerankers.recognise import is_classifier, is_layerwise, logit_score, recognised_template
from fastrerank.runtime.types import Readout

__all__ = ["PointwiseReranker"]


class PointwiseReranker(LLMReranker):
    """Scores each document by the first token that a language model would say about it.

    Qwen3-Reranker (also converted to a sequence classifier), mxbai-rerank-v2, bge-reranker-v2-gemma and
    -minicpm-layerwise, monoT5, RankT5, RankLLaMA, sentence-transformers' LogitScore checkpoints and classifiers of one
    label (pairs as its CrossEncoder reads them), and any instruction-tuned model by a plain question (template
    "relevance"). Prompts of one query begin alike: that part passes through the network once. `score` is float32 and
    raw: logit(yes) - logit(no) where there are two labels, the logit where there is one, and the expected value where
    labels are numbers. `rank` shows the sigmoid of a logit, which for two labels is P(yes), and an expected value as it
    is.

    ERank's published score is another: the model reasons and writes an integer, and the score is that integer times the
    probability of its last token. readout="generation" computes it; a text without an integer scores 0 and is counted
    in `last_usage["unparsed"]`.

    Args:
        model, template, instruction, and the rest: as in `LLMReranker`.
        cutoff_layers: layers to run of a layerwise checkpoint, which has a head after each; None for 28 or, where it
            has fewer, all. ValueError for any other checkpoint.
        readout: "logits", or "generation" for templates whose labels are numbers.
        max_new_tokens: most tokens that are written, with readout="generation".

    Papers: monoT5 (arXiv 2003.06713), RankT5 (arXiv 2210.10634), RankLLaMA (arXiv 2310.08319), Qwen3 Embedding (arXiv
    2506.05176), ERank (arXiv 2509.00520), ProRank (arXiv 2506.03487).

    Example:
        >>> reranker = PointwiseReranker("Qwen/Qwen3-Reranker-0.6B")                        # doctest: +SKIP
        >>> reranker.score("how long do fleas live", ["Fleas are insects.", "A year."])     # doctest: +SKIP
        array([-3.1, 4.7], dtype=float32)
    """

    method: ClassVar[str] = "pointwise"
    independent: ClassVar[bool] = True
    kind: ClassVar[str] = "pointwise"
    default_template: ClassVar[str] = "relevance"
    default_seq2seq: ClassVar[str] = "monot5"

    def __init__(
        self,
        model: str | Path,
        *,
        cutoff_layers: int | None = None,
        readout: Readout = "logits",
        max_new_tokens: int = 2048,
        **options: Any,
    ) -> None:
        if readout not in ("logits", "generation"):
            raise ValueError(f"readout must be 'logits' or 'generation', got {readout!r}")
        self._cutoff_layers, self._new_tokens = cutoff_layers, max_new_tokens
        self.readout = readout
        self._generator: TransformersGenerator | None = None
        super().__init__(model, **options)

    def _template(self, checkpoint: Checkpoint, wanted: str | Path | None) -> Template:
        if wanted is None and _unknown_words(checkpoint):
            known = sorted(name for name in list_templates("pointwise") if Template.load(name).model == "seq2seq")
            raise ValueError(
                f"{checkpoint.path} is a multilingual T5 of a name that does not tell the words that it answers with, "
                "and with other words its order means nothing: say template=, one of "
                f"{', '.join(known)}, or a file of yours"
            )
        template = super()._template(checkpoint, wanted)
        if self.readout == "generation":
            if template.score != "expectation":
                raise ValueError(
                    f"readout must be 'logits' for template {template.name!r}: only where labels are numbers, as in "
                    "'erank', does a written integer score"
                )
            return replace(template, readout="generate")
        if template.name != "sentence-transformers":
            return template
        name, prompts = checkpoint.st_config.get("default_prompt_name"), checkpoint.st_config.get("prompts") or {}
        prompt, tokenizer = prompts.get(name) or "", chat_tokenizer(checkpoint)
        if tokenizer is None:
            return joined_template(prompt)
        return pair_template(checkpoint, tokenizer.chat_template, prompt=prompt)

    def _limit(self, checkpoint: Checkpoint, max_length: int | None) -> int | None:
        if self.readout == "logits":
            return max_length
        return room_to_write(checkpoint, self.template.max_length, max_length, self._new_tokens)

    def _scorer(self, checkpoint: Checkpoint, **options: Any) -> Any:
        if self.readout == "generation":
            self._generator = TransformersGenerator(
                checkpoint.path,
                max_new_tokens=self._new_tokens,
                stop=("</answer>",),
                device=options["device"],
                dtype=options["dtype"],
                trust_remote_code=checkpoint.trust_remote_code,
            )
            return None
        self._labels = np.zeros(1, np.int64)
        if is_layerwise(checkpoint):
            from fastrerank.engine.torch.layerwise import load_layerwise

            return load_layerwise(checkpoint, self._cutoff_layers, **options)
        if self._cutoff_layers is not None:
            raise ValueError(
                f"cutoff_layers is for layerwise checkpoints, which have a head after each layer; {checkpoint.path} "
                "has one head"
            )
        scorer = super()._scorer(checkpoint, **options)
        stored = logit_score(checkpoint)
        if is_classifier(checkpoint):
            count = int(getattr(scorer, "labels", 1))
            if count != 1:
                raise ValueError(f"{checkpoint.path} has {count} labels, a pointwise score needs a head with one")
        elif self.template.readout == "head":
            raise ValueError(
                f"template {self.template.name!r} is for a scalar head, and {checkpoint.path} is a language model: "
                "take a template with labels"
            )
        elif stored is not None:
            self._labels = np.array(stored, np.int64)
        else:
            self._labels = self.prompts.label_ids()
        return scorer

    @property
    def raw_is_logit(self) -> bool:
        """Whether a raw score is a logit: not where it is the expected value of labels that are numbers."""
        return self.template.score != "expectation"

    def activated(self, scores: Scores) -> Scores:
        """Return the probabilities of raw scores, their sigmoid; expected values of numbers stay as they are."""
        return sigmoid(scores) if self.raw_is_logit else scores

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        with usage.stage("tokenize"):
            tokenizer = self.prompts.with_instruction(call.instruction)
            prompts = [
                prompt
                for query, texts in zip(queries, documents, strict=True)
                for prompt in tokenizer.encode(query, [[text] for text in texts], limits=call.limits)
            ]
        if self._generator is None:
            scores = self._formula(self._logits(prompts, self._labels, usage))
        else:
            scores = self._written(self._generator, prompts, usage)
        bounds = np.cumsum([0, *map(len, documents)])
        return [scores[begin:end] for begin, end in pairwise(bounds)]

    def _written(self, generator: TransformersGenerator, prompts: Sequence[Prompt], usage: Usage) -> Scores:
        """The integer at the end of each text times the probability of its last token."""
        with usage.stage("generate"):
            texts, chances = generator.generate_scored(prompts)
        usage.tokens += sum(len(prompt.ids) for prompt in prompts)
        usage.truncated += sum(int(prompt.truncated.sum()) for prompt in prompts)
        values = [integers[-1] if (integers := INTEGER.findall(text)) else None for text in texts]
        usage.unparsed += values.count(None)
        pairs = zip(values, chances, strict=True)
        return np.array([0.0 if value is None else int(value) * chance for value, chance in pairs], np.float32)

    def _formula(self, logits: npt.NDArray[np.float32]) -> Scores:
        if logits.shape[1] == 1:
            return logits[:, 0]
        if self.template.score == "expectation":
            weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True, initial=-np.inf))
            expected: Scores = (weights @ np.array([float(label) for label in self.template.labels])).astype(np.float32)
            return np.asarray(expected / weights.sum(1), np.float32)
        return np.asarray(logits[:, 0] - logits[:, 1], np.float32)


def _unknown_words(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is an mT5, whose rerankers answer with words of their own, and nothing tells which."""
    return (
        checkpoint.config.get("model_type") in ("mt5", "umt5") and recognised_template(checkpoint, "pointwise") is None
    )
