"""Score matrices for tests of the CUR index."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[Any]


def low_rank(seed: int, queries: int, count: int, rank: int) -> Matrix:
    """Scores of exactly this rank, float64 (queries, count)."""
    random = np.random.default_rng(seed)
    return random.normal(size=(queries, rank)) @ random.normal(size=(rank, count))


def noisy(seed: int, queries: int, count: int, noise: float = 0.1) -> Matrix:
    """Scores with a spectrum that falls like a power, and noise, float32."""
    random = np.random.default_rng(seed)
    left = random.normal(size=(queries, 100)) * np.arange(1, 101) ** -0.8
    scores = left @ random.normal(size=(100, count))
    return (scores + noise * scores.std() * random.normal(size=scores.shape)).astype(np.float32)


def top(exact: Matrix, k: int) -> Matrix:
    """The k best of each row: by score descending, then by column."""
    return np.argsort(-exact, axis=1, kind="stable")[:, :k]


def recall(found: Matrix, exact: Matrix) -> float:
    """Share of the exact best k of each row that is among the k found, mean over rows."""
    k = found.shape[1]
    return float(
        np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), top(exact, k).tolist(), strict=True)])
    )


class Scorer:
    """Counts calls of `score_items`, and refuses an item that comes twice."""

    def __init__(self, row: Matrix) -> None:
        self.row, self.asked = row, []  # type: ignore[var-annotated]

    def __call__(self, ids: Matrix) -> Matrix:
        assert ids.dtype == np.int64
        assert not set(ids.tolist()) & set(self.asked)
        assert len(set(ids.tolist())) == len(ids)
        self.asked += ids.tolist()
        return self.row[ids]


class TextScorer:
    """A reranker over texts that are numbers of items: scores are cells of a matrix, queries numbers of rows."""

    method = "matrix"

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.pairs, self.calls = matrix, 0, 0

    def score_many(self, queries: list[str], documents: list[list[str]]) -> list[Matrix]:
        self.calls += 1
        self.pairs += sum(map(len, documents))
        return [self.matrix[int(q), [int(d) for d in some]] for q, some in zip(queries, documents, strict=True)]
