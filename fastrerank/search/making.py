"""The contents of a new index: vectors packed, items of first rounds and the ridge chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from fastrerank.inputs.columns import as_column
from fastrerank.search.anchors import choose_anchors
from fastrerank.search.checks import as_ids, relative_ridge
from fastrerank.search.contents import Contents, Settings, pack, spread_of
from fastrerank.search.ridge import held_out_ridge
from fastrerank.search.texts import Texts

__all__ = ["made"]

_ANCHORS = 128  # items chosen for first rounds; longer ones go on with items at random


def made(
    kind: str,
    matrix: npt.NDArray[Any],
    storage: str,
    scales: str | None,
    ridge: float | None,
    anchors: str | npt.ArrayLike,
    seed: int,
    items: Sequence[str] | None,
) -> Contents:
    """Return the contents whose item vectors are the columns of `matrix` (K, N); see `CURIndex.from_scores`."""
    count, items = matrix.shape[1], as_column(items, "items")
    if items is not None and len(items) != count:
        raise ValueError(f"items must have one text for each of {count} items, got {len(items)}")
    if isinstance(anchors, str):
        chosen = choose_anchors(matrix, min(count, _ANCHORS), anchors, seed=seed)
    else:
        chosen = as_ids("anchors", anchors)
        if (chosen < 0).any() or (chosen >= count).any():
            raise ValueError(f"anchors must be items within 0 .. {count - 1}, got {chosen.min()} .. {chosen.max()}")
    if ridge is not None:
        settings = Settings(ridge=relative_ridge(ridge))
    else:
        settings = Settings(ridge=held_out_ridge(matrix, seed)) if kind == "scores" else Settings()
    return Contents(
        shards=pack(matrix, storage, scales),
        anchors=chosen,
        spread=spread_of(matrix),
        settings=settings,
        kind=kind,
        following=count,
        texts=None if items is None else Texts.of(items),
    )
