"""How a device's scan rounds queries, in NumPy: what csrc/cur_topk/cur_topk.cu is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def rounded(
    queries: npt.NDArray[np.float64], storage: str, width: int, reach: float
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Equals queries (B, K) as the kernel reads them, padded to `width`, and units: an item's score is within `errors`
    (B,) of `units` (B,) times its product."""
    largest = np.abs(queries).max(axis=1, initial=0.0)
    largest[largest == 0] = 1
    if storage == "int8":
        units = largest / 127
        inside = queries / units[:, None]
        values = np.rint(inside)
        error = np.linalg.norm(inside - values, axis=1) + 8 * 2.0**-24 * np.linalg.norm(values, axis=1)
    else:
        units = 2.0 ** np.floor(np.log2(largest))
        values = queries / units[:, None]
        error = (queries.shape[1] + 16) * 2.0**-24 * np.linalg.norm(values, axis=1)
    given = np.zeros((len(queries), width), np.int8 if storage == "int8" else np.float32)
    given[:, : queries.shape[1]] = values
    return given, units, units * (error * reach + queries.shape[1] * 2.0**-123) * 1.0001
