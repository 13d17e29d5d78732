"""Which columns of a product's inputs int8 rounding should see larger, smaller or not at all, from the weights alone.

One scale serves a whole row of activations, so a column that stands far out takes the resolution of all others.
`y = W x` is unchanged when a column of x is multiplied by f and that column of W divided by it (SmoothQuant, Xiao et
al. 2022, arXiv 2211.10438, which measures x on sample data; here nothing is measured). What remains too large for any
factor, the few weights behind a model's massive activations, is left out of the rounding (LLM.int8(), Dettmers et al.
2022, arXiv 2208.07339, chooses such columns from the activations of each call).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["STRIP", "column_factors", "spread", "strip_columns"]

Vector = npt.NDArray[np.float32]

# Inputs of a feed-forward's second product that are multiplied in float32. Simulated on MiniLM, whose product has 1536,
# four take its error from 0.034 to 0.024, eight to 0.023.
STRIP = 8


def spread(gamma: Vector, beta: Vector | None) -> Vector:
    """Return the size that a layer norm's outputs reach by column: |beta| + 3 |gamma|, float32 (k,)."""
    reach = 3 * np.abs(gamma)
    return reach if beta is None else reach + np.abs(beta)


def column_factors(weights: Sequence[npt.NDArray[np.float32]], reach: Vector | None, power: float) -> Vector:
    """Return what each input column is multiplied by before rounding: (rms of its weights)^power / sqrt(reach).

    Args:
        weights: float32 (n, k) matrices that read the same input.
        reach: float32 (k,) size of the inputs by column, or None where nothing is known of them.
        power: 1 gives every column of the divided weights the same size; 0 leaves them as they are.

    Returns float32 (k,), mean square 1; 0 for a column that no weight reads. Weights and inputs all alike get 1.

    Example:
        >>> column_factors([np.array([[1.0, 2.0]], np.float32)], None, 1.0).round(2).tolist()
        [0.63, 1.26]
    """
    square = sum(np.einsum("nk,nk->k", w, w, dtype=np.float32) for w in weights) / sum(len(w) for w in weights)
    factor = np.sqrt(square) ** power
    if reach is not None:
        factor = factor / np.sqrt(np.maximum(reach, np.float32(1e-3) * reach.mean() + np.float32(1e-30)))
    size = np.sqrt(np.mean(np.square(factor)))
    if not np.isfinite(size) or size == 0:  # packing the weights reports NaN
        return np.ones_like(factor, np.float32)
    return np.asarray(factor / size, np.float32)


def strip_columns(weight: npt.NDArray[np.float32], count: int = STRIP) -> npt.NDArray[np.int32]:
    """Return the `count` columns that hold the largest weights of (n, k), fewer if k is below 8 count, in order.

    Example:
        >>> strip_columns(np.eye(1, 64, k=5, dtype=np.float32), 1).tolist()
        [5]
    """
    largest = np.abs(weight).max(axis=0)
    count = min(count, weight.shape[1] // 8)
    return np.sort(np.argsort(-largest, kind="stable")[:count]).astype(np.int32)
