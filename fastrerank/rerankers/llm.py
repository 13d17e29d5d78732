"""What rerankers by a decoder's logits share: a prompt template, its tokenizer, and a scorer of label tokens."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoint import Checkpoint, open_checkpoint
from fastrerank.engine.select import plan
from fastrerank.rerankers.base import Reranker, Usage

__all__ = ["LLMReranker"]

Scorer = Any


class LLMReranker(Reranker):
    """A reranker that reads the logits of a few vocabulary rows at the end of each prompt."""

    kind: ClassVar[str]
    default_template: ClassVar[str]
    template: Any
    prompts: Any

    def __init__(
        self, model: str | Path, *, template: str | Path | None = None, instruction: str | None = None,
        device: Any = None, dtype: str = "auto", max_length: int | None = None, num_threads: int | None = None,
        memory_limit: float | None = None, share_prefixes: bool = True, trust_remote_code: bool = False,
        revision: str | None = None, cache_folder: str | None = None, local_files_only: bool = False,
        token: bool | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        checkpoint = open_checkpoint(
            model, revision=revision, cache_folder=cache_folder, local_files_only=local_files_only, token=token,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        self.template = self._template(checkpoint, template)
        chosen = plan(checkpoint.config, "torch", device, dtype)
        self.device, self.dtype = chosen.devices[0], chosen.dtype
        self.prompts = importlib.import_module("fastrerank.text.prompt_tokenizer").PromptTokenizer.load(
            checkpoint.transformer_path, self.template, max_length=max_length, instruction=instruction,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        self.scorer = self._scorer(
            checkpoint, dtype=self.dtype, device=self.device, num_threads=num_threads, memory_limit=memory_limit,
            share_prefixes=share_prefixes,
        )  # fmt: skip

    def _template(self, checkpoint: Checkpoint, wanted: str | Path | None) -> Any:  # noqa: ARG002
        template = importlib.import_module("fastrerank.text.prompts").Template.load(wanted or self.default_template)
        if template.kind != self.kind:
            raise ValueError(f"template {template.name!r} is {template.kind}, {type(self).__name__} takes {self.kind}")
        return template

    def _scorer(self, checkpoint: Checkpoint, **options: Any) -> Scorer:
        return importlib.import_module("fastrerank.engine.causal").CausalScorer.load(checkpoint, **options)

    def _logits(
        self, prompts: Sequence[Any], labels: npt.NDArray[np.integer[Any]], usage: Usage
    ) -> npt.NDArray[np.float32]:
        usage.truncated += sum(int(prompt.truncated.sum()) for prompt in prompts)
        with usage.stage("compute"):
            logits, cost = self.scorer.label_logits([prompt.ids for prompt in prompts], labels)
        usage.forwards += cost.forwards
        usage.tokens += cost.tokens
        usage.prefix_tokens += cost.prefix_tokens
        return np.asarray(logits, np.float32)
