"""`ops.max_sim`: checks its arguments and calls the C++ kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import fastrerank._cpu as _cpu
from fastrerank.runtime import cpu

__all__ = ["max_sim"]


def max_sim(
    query: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.int64],
    *,
    threads: int | None = None,
) -> npt.NDArray[np.float32]:
    """Equal to `[(query @ tokens[a:b].T).max(1).mean() for a, b in zip(offsets, offsets[1:])]`.

    Late interaction: each query token takes its best document token, and the mean over query tokens is the score.
    ColBERT (arXiv 2004.12832) takes the sum.

    Args:
        query: float32 (Q, D), Q >= 1.
        tokens: float32 (T, D), the documents' tokens one after the other.
        offsets: int64 (N+1,); document d's tokens are tokens[offsets[d]:offsets[d+1]], at least one each.
        threads: CPU threads; None for the default. The result does not depend on it.

    Returns float32 (N,). Raises ValueError for shapes that do not fit or a document without tokens.

    Example:
        >>> q, t = np.eye(2, 4, dtype=np.float32), np.eye(4, dtype=np.float32)
        >>> max_sim(q, t, np.array([0, 1, 4])).tolist()
        [0.5, 0.5]
    """
    query, tokens = _numbers("query", query), _numbers("tokens", tokens)
    offsets = np.asarray(offsets)
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu":
        raise ValueError(f"offsets must be integers (N+1,), got {offsets.dtype} of shape {offsets.shape}")
    offsets = np.ascontiguousarray(offsets, np.int64)
    if (np.diff(offsets) < 1).any():
        raise ValueError(f"offsets must give every document at least one token, got lengths {np.diff(offsets)}")
    result: npt.NDArray[np.float32] = _cpu.max_sim(query, tokens, offsets, cpu.num_threads(threads), cpu.isa())
    return result


def _numbers(name: str, value: Any) -> npt.NDArray[np.float32]:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of real numbers, got {array.dtype} of shape {array.shape}")
    return np.require(array, np.float32, ["C", "A"])
