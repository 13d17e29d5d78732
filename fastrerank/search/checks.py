"""Arguments of the index, checked; errors name the argument, what came and what is valid."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["as_ids", "as_scores", "positive", "relative_ridge", "share"]


def positive(name: str, value: Any, most: int | None = None, most_is: str = "") -> int:
    """`value` as an int of at least 1, and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, {most_is}, got {value}")
    return int(value)


def share(name: str, value: Any) -> float:
    """`value` as a float in 0 .. 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
    return float(value)


def relative_ridge(value: Any) -> float:
    """`value` as a finite float of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < np.inf:
        raise ValueError(f"ridge must be a number of at least 0, got {value!r}")
    return float(value)


def as_scores(name: str, value: Any, width: int | None = None) -> npt.NDArray[Any]:
    """`value` as a real (K, N) array with K at least 1, without NaN and infinity. Not copied."""
    array: npt.NDArray[Any] = np.asanyarray(value)
    if array.dtype.kind not in "fiu" or array.ndim != 2:
        raise ValueError(f"{name} must be a matrix of numbers ({width or 'K'}, N), got {array.dtype} {array.shape}")
    if array.shape[0] < 1 or (width is not None and array.shape[0] != width):
        raise ValueError(
            f"{name} must have {f'{width} rows, the width of the index' if width else 'at least one row'}, "
            f"got shape {array.shape}"
        )
    for begin in range(0, array.shape[1], 1 << 14):
        finite = np.isfinite(array[:, begin : begin + (1 << 14)])
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            item = begin + column
            raise ValueError(f"{name} must be finite, got {array[row, item]} in row {row} for item {item}")
    return array


def as_ids(name: str, value: Any) -> npt.NDArray[np.int64]:
    """`value` as int64 (n,) without repetition."""
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a list of integer item ids, got {array.dtype} of shape {array.shape}")
    ids = array.astype(np.int64)
    if len(np.unique(ids)) != len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise ValueError(f"{name} must not repeat an item, got {int(values[counts > 1][0])} more than once")
    return ids
