"""MTEB's protocol of a cross-encoder: pairs come from two loaders of batches; results are filed under a metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.pairs import score_pairs, shown
from fastrerank.runtime.naming import hub_id

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

__all__ = ["model_meta", "score_batches"]

# MTEB passes these to every model. They change nothing: work is split by tokens, and no bar is drawn.
_WITHOUT_EFFECT = frozenset(
    {"task_metadata", "hf_split", "hf_subset", "prompt_type", "batch_size", "show_progress_bar", "num_proc"}
)


def score_batches(
    reranker: Reranker,
    inputs1: Iterable[dict[str, Any]],
    inputs2: Iterable[dict[str, Any]],
    *,
    raw: bool = True,
    **options: Any,
) -> npt.NDArray[np.float32]:
    """Return the score of each pair of MTEB's loaders, float32 (N,); see `FastReranker.predict`."""
    asked = {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT}
    reranker.check_options(**asked)
    return shown(reranker, score_pairs(reranker, _texts(inputs1), _texts(inputs2), **asked), raw)


def model_meta(reranker: Reranker, name: str | None = None, revision: str | None = None) -> ModelMeta:
    """Return the metadata under which MTEB files results.

    With `name` None, the name is the checkpoint's hub id, or "fastrerank/<folder>" for a local folder.
    """
    from mteb.models.model_meta import ModelMeta

    if name is None:
        name = f"fastrerank/{type(reranker).__name__}"
        path = getattr(getattr(reranker, "checkpoint", None), "path", None)
        if path is not None:
            found = hub_id(path)
            name, revision = (f"fastrerank/{path.name}", revision) if found is None else (found, path.name)
    return ModelMeta.create_empty(
        {
            "name": name,
            "revision": revision,
            "model_type": ["cross-encoder"],
            "modalities": ["text"],
            "max_tokens": getattr(reranker, "max_length", None),
        }
    )


def _texts(batches: Iterable[dict[str, Any]]) -> list[str]:
    texts: list[str] = []
    for batch in batches:
        if "text" not in batch:
            raise ValueError(f"fastrerank scores texts, but this task's inputs have {', '.join(batch)}")
        texts += batch["text"]
    return texts
