"""Logits of a decoder's head with the face of an encoder: rows of packed token ids in, what they begin with once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers
from transformers.modeling_layers import GenericForSequenceClassification

from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.engine.torch.causal import CausalScorer
from fastrerank.engine.usage import Cost

__all__ = ["LabelEncoder"]


class LabelEncoder:
    """A decoder's logits at each document's last token; what a call's documents begin with alike is computed once.

    With `labels`, one or two token ids of a language model, equals sentence-transformers' LogitScore module: the logit
    of the first, less the second's where there are two. Without, equals a classifier: all its labels.

    Attributes:
        width: values per document.
    """

    readout = "last"

    def __init__(self, scorer: CausalScorer, labels: Sequence[int] | None = None) -> None:
        self._scorer = scorer
        self._labels = np.arange(scorer.labels) if labels is None else np.array(labels, np.int64)
        self._difference = labels is not None and len(labels) == 2
        self.width = 1 if labels is not None else scorer.labels
        self.dtype, self.num_threads = scorer.dtype, scorer.num_threads

    @classmethod
    def load(cls, checkpoint: Checkpoint, labels: Sequence[int] | None = None, **options: Any) -> LabelEncoder:
        """Load a `*ForCausalLM` for `labels`, else a decoder's `*ForSequenceClassification`.

        `options` are those of `CausalScorer.load`. Raises ValueError for other classifiers, and as it does.
        """
        if labels is not None:
            return cls(CausalScorer.load(checkpoint, **options), labels)
        if not _reads_last_token(checkpoint):
            raise ValueError(f"{checkpoint.path} is no decoder classifier of transformers' common kind")
        scorer = CausalScorer.load(checkpoint, head="classification", **options)
        scorer.max_length = None  # positions of that kind are rotary: like transformers, it reads what it is given
        return cls(scorer)

    def forward(
        self, ids: npt.NDArray[np.int32], type_ids: npt.NDArray[np.int32] | None, offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return float32 (N, width) of N documents of T tokens in all, packed one after the other; types are unused."""
        return self.counted(ids, type_ids, offsets)[0]

    def counted(
        self,
        ids: npt.NDArray[np.int32],
        type_ids: npt.NDArray[np.int32] | None,  # noqa: ARG002
        offsets: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.float32], Cost]:
        """What `forward` returns, and what it cost."""
        prompts = np.split(np.asarray(ids), np.asarray(offsets)[1:-1]) if len(offsets) > 1 else []
        logits, cost = self._scorer.label_logits(prompts, self._labels)
        return (logits[:, :1] - logits[:, 1:] if self._difference else logits), cost


def _reads_last_token(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's class is transformers' own for decoders: a linear head on the last token but padding."""
    name = (checkpoint.config.get("architectures") or [""])[0]
    kind = getattr(transformers, name, None)
    return isinstance(kind, type) and issubclass(kind, GenericForSequenceClassification)
