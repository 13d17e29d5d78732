"""MTEB: a cross-encoder of its protocol, for reranking tasks and for retrieval tasks that were converted to them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.integrations.loading import call_options, load_reranker
from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.mteb_protocol import model_meta, score_batches

__all__ = ["FastReranker", "model_meta", "score_batches"]


class FastReranker:
    """For `mteb.evaluate`: any method of fastrerank, all pairs of a task in one call.

    A loaded `fastrerank.CrossEncoder` may be given to `mteb.evaluate` without this class.

    Args:
        model_name: hub id or local folder, which results are filed under, or a loaded reranker.
        revision, device, method, options: as in `fastrerank.load`.
        name: what results are filed under, as "organisation/name"; None: the hub id, or fastrerank/<folder>.
        label: the label that ranks where the head has several, by name or number.
        raw: whether scores are raw, as an evaluation wants them; else activated, as `rank` shows them.

    Raises ValueError for a head with several labels where nothing tells which one ranks.

    Example:
        >>> mteb.evaluate(FastReranker("BAAI/bge-reranker-base"), mteb.get_tasks(["AskUbuntuDupQuestions"]))
        ... # doctest: +SKIP
    """

    def __init__(
        self,
        model_name: Any,
        revision: str | None = None,
        device: str | None = None,
        *,
        method: str | None = None,
        name: str | None = None,
        label: str | int | None = None,
        raw: bool = True,
        **options: Any,
    ) -> None:
        loading = {"revision": revision, "device": device}
        options |= {key: value for key, value in loading.items() if value is not None}
        self.reranker = load_reranker(model_name, method, options, label)
        self.label, self.raw = label, raw
        if name is None and not isinstance(model_name, Reranker):
            hub = str(model_name).count("/") == 1 and not Path(model_name).exists()
            name = str(model_name) if hub else f"fastrerank/{Path(model_name).name}"
        self.mteb_model_meta = model_meta(self.reranker, name, revision)

    def __repr__(self) -> str:
        return f"FastReranker({self.reranker!r})"

    def predict(
        self,
        inputs1: Iterable[dict[str, Any]],
        inputs2: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> npt.NDArray[np.float32]:
        """Return the score of each pair, float32 (N,), of loaders whose batches have "text".

        `kwargs` are the encode_kwargs of `mteb.evaluate`: options of `Reranker.score` hold for this call; batch_size,
        show_progress_bar and num_proc change nothing.

        Raises ValueError for inputs without text, as tasks of other modalities have them, TypeError for other keywords.
        """
        return score_batches(self.reranker, inputs1, inputs2, raw=self.raw, **{**call_options(self.label), **kwargs})
