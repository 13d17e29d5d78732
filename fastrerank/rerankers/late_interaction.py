"""Late interaction: every query token looks for its best document token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastrerank import ops
from fastrerank.checkpoint import Module, open_checkpoint
from fastrerank.engine.heads import Head, NormalizeStep, module_head
from fastrerank.engine.native import NativeEncoder
from fastrerank.rerankers.base import Reranker, Scores, Usage, check_device, native_dtype
from fastrerank.text.tokenizer import Tokenizer

__all__ = ["LateInteractionReranker"]

# Token vectors alive at once: 8,192 x 384 float32 are 12 MiB.
BLOCK_TOKENS = 8192
BLOCK_TEXTS = 256


class LateInteractionReranker(Reranker):
    """MaxSim: the mean over the query's tokens of the largest cosine with a token of the document.

    Works with any encoder of the native families; token vectors are the last hidden states, projected by the
    checkpoint's Dense modules where these follow the Transformer without Pooling. Special tokens take part on both
    sides. The mean, not ColBERT's sum, keeps scores of different queries comparable; the ranking is the same.

    Args:
        model_name_or_path: hub id or local folder.
        device: None or "cpu".
        dtype: "float32", "bfloat16", "int8"; "auto" is float32.
        max_length: tokens per text; None for the checkpoint's limit.
        num_threads: CPU threads of a call; None for `fastrerank.set_num_threads`'s.
        revision, cache_folder, local_files_only, token, trust_remote_code: as in huggingface_hub.

    Paper: ColBERT, Khattab and Zaharia 2020, arXiv 2004.12832.

    Example:
        >>> reranker = LateInteractionReranker("path/to/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> reranker.score("who?", ["the owl", "the cat"])                  # doctest: +SKIP
    """

    method: ClassVar[str] = "late-interaction"

    def __init__(
        self, model_name_or_path: str | Path, *, device: Any = None, dtype: str = "auto",
        max_length: int | None = None, num_threads: int | None = None, revision: str | None = None,
        cache_folder: str | None = None, local_files_only: bool = False, token: bool | str | None = None,
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.device = check_device(device)
        self.dtype = native_dtype(dtype)
        checkpoint = open_checkpoint(
            model_name_or_path, revision=revision, cache_folder=cache_folder, local_files_only=local_files_only,
            token=token, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if checkpoint.st_config.get("do_query_expansion") or checkpoint.st_config.get("query_prefix"):
            raise ValueError(
                f"{checkpoint.path}: this ColBERT checkpoint marks and expands its queries "
                "(query_prefix, do_query_expansion), which late-interaction does not do; its scores would be wrong"
            )
        head = module_head(_token_modules(checkpoint.modules), tokens=True)
        if not head.steps or not isinstance(head.steps[-1], NormalizeStep):
            head = Head("tokens", (*head.steps, NormalizeStep()))
        self.engine = NativeEncoder.load(checkpoint, head, dtype=self.dtype, num_threads=num_threads)
        self._tokenizer = Tokenizer.load(checkpoint.transformer_path, max_length or checkpoint.max_seq_length)

    def _tokens(self, texts: list[str], usage: Usage) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        with usage.stage("tokenize"):
            batch = self._tokenizer.singles(texts)
        usage.count(batch)
        with usage.stage("compute"):
            return self.engine.forward(batch.ids, batch.type_ids, batch.offsets), batch.offsets

    def _score_many(self, queries: list[str], documents: list[list[str]], usage: Usage) -> list[Scores]:
        results = []
        for query, texts in zip(queries, documents, strict=True):
            scores = [np.zeros(0, np.float32)]
            if texts:
                vectors, _ = self._tokens([query], usage)
                scores += [self._block(vectors, texts[i : i + BLOCK_TEXTS], usage)
                           for i in range(0, len(texts), BLOCK_TEXTS)]  # fmt: skip
            results.append(np.concatenate(scores))
        return results

    def _block(self, query: npt.NDArray[np.float32], texts: list[str], usage: Usage) -> Scores:
        with usage.stage("tokenize"):
            batch = self._tokenizer.singles(texts)
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
