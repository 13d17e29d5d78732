"""The ops in naive NumPy: the specification that the kernels are tested against. Works in the inputs' precision."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["max_sim"]


def max_sim(query: npt.NDArray[Any], tokens: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Mean over the query's tokens of the largest dot product with one of the document's tokens.

    Args:
        query: (Q, D). tokens: (T, D). offsets: int64 (N+1,), document d's tokens are tokens[offsets[d]:offsets[d+1]].

    Returns (N,) in the inputs' dtype.

    Example:
        >>> max_sim(np.eye(2, 4), np.eye(4), np.array([0, 1, 4])).tolist()
        [0.5, 0.5]
    """
    best = [(query @ tokens[begin:end].T).max(axis=1) for begin, end in pairwise(offsets)]
    return np.array([similarities.mean() for similarities in best], query.dtype)
