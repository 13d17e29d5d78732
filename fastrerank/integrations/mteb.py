"""MTEB: a cross-encoder of its protocol, for reranking tasks and for retrieval tasks that were converted to them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mteb.models.model_meta import ModelMeta

import fastrerank
from fastrerank.integrations.pairs import score_pairs
from fastrerank.rerankers.base import Reranker

__all__ = ["FastReranker"]


class FastReranker:
    """For `mteb.evaluate`: any method of fastrerank, all pairs of a task in one call.

    Args:
        model_name: hub id or local folder, which results are filed under, or a loaded reranker.
        revision, device, method, options: as in `fastrerank.load`.
        name: what results are filed under, as "organisation/name"; None: the hub id, or fastrerank/<folder>.

    Example:
        >>> mteb.evaluate(FastReranker("BAAI/bge-reranker-base"), mteb.get_tasks(["AskUbuntuDupQuestions"]))
        ... # doctest: +SKIP
    """

    def __init__(
        self, model_name: Any, revision: str | None = None, device: str | None = None, *, method: str | None = None,
        name: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        loaded = isinstance(model_name, Reranker)
        self.reranker: Reranker = model_name if loaded else fastrerank.load(
            model_name, method=method, device=device, **({} if revision is None else {"revision": revision}), **options
        )  # fmt: skip
        if name is None:
            last = type(model_name).__name__ if loaded else Path(model_name).name
            hub = not loaded and str(model_name).count("/") == 1 and not Path(model_name).exists()
            name = str(model_name) if hub else f"fastrerank/{last}"
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": revision, "model_type": ["cross-encoder"], "modalities": ["text"],
             "max_tokens": getattr(self.reranker, "max_length", None)}
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"FastReranker({self.reranker!r})"

    def predict(
        self, inputs1: Iterable[dict[str, Any]], inputs2: Iterable[dict[str, Any]], *, task_metadata: Any,
        hf_split: str, hf_subset: str, prompt_type: Any = None, **kwargs: Any,
    ) -> npt.NDArray[np.float32]:  # fmt: skip
        """Return the raw score of each pair, float32 (N,), of loaders whose batches have "text".

        Raises ValueError for inputs without text, as tasks of other modalities have them.
        """
        return score_pairs(self.reranker, _texts(inputs1), _texts(inputs2))


def _texts(batches: Iterable[dict[str, Any]]) -> list[str]:
    texts: list[str] = []
    for batch in batches:
        if "text" not in batch:
            raise ValueError(f"fastrerank scores texts, but this task's inputs have {', '.join(batch)}")
        texts += batch["text"]
    return texts
