"""FlagEmbedding: `FlagReranker` and its `compute_score`, for callers that only change the import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fastrerank

__all__ = ["FlagReranker"]

Pair = tuple[str, str]


class FlagReranker:
    """`FlagEmbedding.FlagReranker`'s interface on `fastrerank.CrossEncoder`: raw logits, or their sigmoid.

    Args:
        model_name_or_path: hub id or local folder of a cross-encoder.
        use_fp16: bfloat16 in place of float32; on GPUs only, as in FlagEmbedding.
        query_instruction_for_rerank: text put before each query.
        devices: as `device` of `fastrerank.CrossEncoder`.
        max_length: tokens of a pair; None for the checkpoint's limit. Documents are cut, not queries.
        normalize: whether `compute_score` applies a sigmoid.
        batch_size, query_max_length, options: accepted; work is split by tokens, and queries are not cut.

    Example:
        >>> FlagReranker("BAAI/bge-reranker-base").compute_score([("who?", "the owl")])      # doctest: +SKIP
        [3.1]
    """

    def __init__(
        self, model_name_or_path: str, use_fp16: bool = False, query_instruction_for_rerank: str | None = None,
        devices: Any = None, batch_size: int = 128, query_max_length: int | None = None,
        max_length: int | None = 512, normalize: bool = False, cache_dir: str | None = None,
        trust_remote_code: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        first = devices[0] if isinstance(devices, list) and len(devices) == 1 else devices
        gpu = first is not None and "cpu" not in str(first)
        self.model = fastrerank.CrossEncoder(
            model_name_or_path, device=first, dtype="bfloat16" if use_fp16 and gpu else "auto", max_length=max_length,
            cache_folder=cache_dir, trust_remote_code=trust_remote_code, **options,
        )  # fmt: skip
        self.instruction, self.normalize = query_instruction_for_rerank or "", normalize

    def __repr__(self) -> str:
        return f"FlagReranker({self.model!r})"

    def compute_score(
        self, sentence_pairs: Pair | Sequence[Pair], batch_size: int | None = None,
        query_max_length: int | None = None, max_length: int | None = None, normalize: bool | None = None, **_: Any,
    ) -> list[float]:  # fmt: skip
        """Return one score per pair; one pair gives a list of one.

        Raises ValueError for a `max_length` other than the model was loaded with: documents would be cut elsewhere.
        """
        if max_length is not None and max_length != self.model.max_length:
            raise ValueError(
                f"max_length is {self.model.max_length} since loading, got {max_length}: give it to FlagReranker()"
            )
        normalize = self.normalize if normalize is None else normalize
        scores = self.model.predict(
            sentence_pairs, prompt=self.instruction or None, activation_fn="sigmoid" if normalize else "identity"
        )
        values = scores.tolist()
        return values if isinstance(values, list) else [values]
