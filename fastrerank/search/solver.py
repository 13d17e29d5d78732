"""The estimator of budgeted search: a ridge fit to the exact scores seen so far, extended by blocks.

For a query, u = u0 + V_S^T alpha with (V_S V_S^T + ridge I) alpha = a - V_S u0: V_S (n, K) are the vectors of the n
items scored so far, a their exact scores, u0 (K,) what is believed before any score. An item's estimate is u . v.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["RidgeFits", "least_norm"]

Floats = npt.NDArray[np.float64]


class RidgeFits:
    """The ridge fits of B queries that have scored equally many items, in float64.

    `add` extends every fit by a block of m items in O(n m (K + m) + n^2 m): the inverse of the Cholesky factor of
    V_S V_S^T + ridge I grows by m rows, and its earlier rows are kept.

    Args:
        count: queries B. capacity: most items per query. width: K.
        ridge: above 0.
        prior: u0, float (B, K) or (K,); None is 0.

    Example:
        >>> fits = RidgeFits(1, 4, 2, ridge=1e-9)
        >>> fits.add(np.eye(2, dtype=np.float32)[None], np.array([[3.0, 5.0]]))
        >>> fits.weights().round(6).tolist()
        [[3.0, 5.0]]
    """

    def __init__(
        self, count: int, capacity: int, width: int, *, ridge: float, prior: npt.NDArray[Any] | None = None
    ) -> None:
        self.size = 0
        self._ridge = ridge
        self._vectors = np.empty((count, capacity, width))  # float64: a small ridge needs exact products
        self._inverse = np.zeros((count, capacity, capacity))  # of the lower Cholesky factor
        self._whitened = np.empty((count, capacity))  # inverse factor times residuals
        self._prior = (
            np.zeros((count, width)) if prior is None else np.broadcast_to(prior, (count, width)).astype(float)
        )

    def add(self, vectors: npt.NDArray[np.float32], scores: Floats) -> None:
        """Add m scored items to each query: vectors float32 (B, m, K), exact scores (B, m)."""
        n, m = self.size, scores.shape[1]
        self._vectors[:, n : n + m] = vectors
        old, new, inverse = self._vectors[:, :n], self._vectors[:, n : n + m], self._inverse
        residuals = scores - np.matmul(new, self._prior[:, :, None])[..., 0]
        own = np.matmul(new, new.transpose(0, 2, 1))
        own[:, np.arange(m), np.arange(m)] += self._ridge
        if n:
            cross = np.matmul(old, new.transpose(0, 2, 1))
            solved = np.matmul(inverse[:, :n, :n], cross)  # (B, n, m)
            own -= np.matmul(solved.transpose(0, 2, 1), solved)
            residuals -= np.matmul(self._whitened[:, None, :n], solved)[:, 0]
        corner = np.linalg.inv(_cholesky(own, self._ridge))
        if n:
            inverse[:, n : n + m, :n] = -np.matmul(corner, np.matmul(solved.transpose(0, 2, 1), inverse[:, :n, :n]))
        inverse[:, n : n + m, n : n + m] = np.tril(corner)
        self._whitened[:, n : n + m] = np.matmul(corner, residuals[..., None])[..., 0]
        self.size = n + m

    def alpha(self) -> Floats:
        """The dual weights (B, n)."""
        n = self.size
        result: Floats = np.matmul(self._whitened[:, None, :n], self._inverse[:, :n, :n])[:, 0]
        return result

    def weights(self) -> npt.NDArray[np.float32]:
        """The fitted u of every query, float32 (B, K)."""
        n = self.size
        fitted = np.matmul(self.alpha()[:, None], self._vectors[:, :n])[:, 0]
        result: npt.NDArray[np.float32] = (self._prior + fitted).astype(np.float32)
        return result

    def errors(self) -> Floats:
        """Leave-one-out errors, (B, n): each score minus its estimate from the other scores."""
        n = self.size
        result: Floats = self.alpha() / np.square(self._inverse[:, :n, :n]).sum(axis=1)
        return result


def _cholesky(matrices: Floats, ridge: float) -> Floats:
    try:
        factors: Floats = np.linalg.cholesky(matrices).astype(np.float64, copy=False)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"ridge={ridge:.3g} is too small for these item vectors: items that are nearly equal make the fit "
            "singular. Pass a larger ridge, or ridge=0 for the pseudo-inverse"
        ) from error
    return factors


def least_norm(vectors: npt.NDArray[Any], scores: npt.NDArray[Any]) -> Floats:
    """`scores @ pinv(vectors)` in float64: the published estimate, without a ridge. (K, n), (n,) -> u (K,)."""
    result: Floats = np.asarray(scores, np.float64) @ np.linalg.pinv(np.asarray(vectors, np.float64))
    return result
