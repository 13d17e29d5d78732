"""Logits of a language model's labels with the face of an encoder: one value per document of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoint import Checkpoint
from fastrerank.engine.causal import CausalScorer

__all__ = ["LabelEncoder"]


class LabelEncoder:
    """Logit of the first label at a document's last token, less the second's where there are two.

    Equals sentence-transformers' LogitScore module. What the documents of a call begin with alike is computed once.
    """

    readout = "last"
    width = 1

    def __init__(self, scorer: CausalScorer, labels: Sequence[int]) -> None:
        self._scorer, self._labels = scorer, np.array(labels, np.int64)
        self.dtype, self.num_threads = scorer.dtype, scorer.num_threads

    @classmethod
    def load(cls, checkpoint: Checkpoint, labels: Sequence[int], **options: Any) -> LabelEncoder:
        """Load a `*ForCausalLM`; `labels` are one or two token ids, `options` those of `CausalScorer.load`."""
        return cls(CausalScorer.load(checkpoint, **options), labels)

    def forward(
        self, ids: npt.NDArray[np.int32], type_ids: npt.NDArray[np.int32] | None, offsets: npt.NDArray[np.int64]  # noqa: ARG002
    ) -> npt.NDArray[np.float32]:  # fmt: skip
        """Return float32 (N, 1) of N documents of T tokens in all, packed one after the other; types do not exist."""
        logits, _ = self._scorer.label_logits(np.split(np.asarray(ids), np.asarray(offsets)[1:-1]), self._labels)
        return logits if logits.shape[1] == 1 else logits[:, :1] - logits[:, 1:]
