"""The first step of every adapter: load a reranker, or take a loaded one, and check that it can do the work."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.loading import load
from fastrerank.serve.batching.batcher import AsyncReranker

__all__ = ["call_options", "load_reranker", "name_of", "shared_by"]

_creating = threading.Lock()


def load_reranker(
    model: Any, method: str | None = None, options: Mapping[str, Any] | None = None, label: str | int | None = None
) -> Reranker:
    """Return `model` where it is a loaded reranker, else `fastrerank.load(model, method=method, **options)`.

    Args:
        label: the label that ranks, of a head with several.

    Raises ValueError for a method or options beside a loaded reranker, which they cannot change, and for a head with
    several labels where nothing tells which one ranks. Both are raised here, not at the first call.

    Example:
        >>> load_reranker("BAAI/bge-reranker-base", options={"device": "cpu"})             # doctest: +SKIP
    """
    given = [*([] if method is None else ["method"]), *(options or {})]
    if isinstance(model, Reranker):
        if given:
            raise ValueError(f"{', '.join(given)} cannot change a loaded reranker: give them where it is loaded")
        reranker = model
    else:
        reranker = load(model, method=method, **(options or {}))
    reranker.check_options(**call_options(label))
    return reranker


def call_options(label: str | int | None) -> dict[str, Any]:
    """Return the keywords of a call of `score` or `rank` with this label.

    Example:
        >>> call_options(None), call_options("entailment")
        ({}, {'label': 'entailment'})
    """
    return {} if label is None else {"label": label}


def shared_by(owner: Any, reranker: Reranker) -> AsyncReranker:
    """Return `owner._shared`. The first async call makes it, once even if several threads call at the same time.

    Only its owner holds it, so it ends with the owner.
    """
    with _creating:
        if owner._shared is None:
            owner._shared = AsyncReranker(reranker)
        found: AsyncReranker = owner._shared
    return found


def name_of(model: Any) -> str:
    """Return what an adapter calls its model: the checkpoint that it was given, or the class of a loaded reranker.

    Example:
        >>> name_of("BAAI/bge-reranker-base")
        'BAAI/bge-reranker-base'
    """
    return type(model).__name__ if isinstance(model, Reranker) else str(model)
