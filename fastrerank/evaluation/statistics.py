"""Paired tests of two systems on the same queries: randomisation, Student's t, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ALPHA", "RESAMPLES", "PairedTest", "holm", "paired_tests"]

ALPHA = 0.05
RESAMPLES = 100_000
_SEED = 20070101
_ENTRIES = 1 << 22  # of the sign matrix at a time: 32 MiB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairedTest:
    """How one system's values differ from another's on the same n queries.

    Attributes:
        queries: n, the queries that were compared.
        difference: mean of the n differences, positive where the system is better.
        low, high: 95 % confidence interval of `difference`, by Student's t; not corrected for several comparisons.
        effect: `difference` in standard deviations of the differences (Cohen's d of paired samples); None where
            they are all one number that is not 0.
        p_randomisation: two-sided p of the sign-flip randomisation test.
        p_t: two-sided p of the paired t-test.
        p_holm: `p_randomisation` after Holm's correction for all systems of one call.
        better, equal, worse: numbers of queries.
    """

    queries: int
    difference: float
    low: float
    high: float
    effect: float | None
    p_randomisation: float
    p_t: float
    p_holm: float
    better: int
    equal: int
    worse: int


def paired_tests(
    systems: Sequence[Sequence[float]], baseline: Sequence[float], *, resamples: int = RESAMPLES
) -> list[PairedTest]:
    """Equal to `scipy.stats.permutation_test(permutation_type="samples")` of the mean difference and `ttest_rel`.

    Where there are at most `resamples` ways to flip the signs of the differences (16 queries with the default), all of
    them are counted and p is exact; else p = (1 + flips as extreme) / (1 + resamples), from a fixed seed.

    Args:
        systems: one row of n values for each system, n >= 2.
        baseline: n values, of the same queries in the same order.
        resamples: random sign flips, at least 1.

    Raises ValueError for fewer than two queries, or rows of different lengths.

    Papers: Smucker, Allan and Carterette 2007 (CIKM) on randomisation tests in retrieval; Holm 1979.

    Example:
        >>> (test,) = paired_tests([[0.5, 0.6, 0.9]], [0.4, 0.5, 0.5])
        >>> round(test.difference, 3), test.p_randomisation
        (0.2, 0.25)
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    lengths = {len(baseline), *(len(row) for row in systems)}
    if len(lengths) != 1 or len(baseline) < 2:
        raise ValueError(f"paired tests need rows of one length of at least 2 queries, got lengths {sorted(lengths)}")
    if len(systems) == 0:
        return []
    differences = np.asarray(systems, np.float64) - np.asarray(baseline, np.float64)  # (S, n)
    count = differences.shape[1]
    mean = differences.mean(1)
    spread = differences.std(1, ddof=1)
    # Where all differences are equal, rounding leaves a spread of about one ulp.
    spread[spread <= 1e-12 * np.abs(differences).max(1)] = 0.0
    p_t, half = _student(mean, spread, count)
    p_randomisation = _randomise(differences, resamples)
    return [
        PairedTest(
            count,
            float(mean[i]),
            float(mean[i] - half[i]),
            float(mean[i] + half[i]),
            _effect(float(mean[i]), float(spread[i])),
            float(p_randomisation[i]),
            float(p_t[i]),
            corrected,
            int((row > 0).sum()),
            int((row == 0).sum()),
            int((row < 0).sum()),
        )
        for i, (row, corrected) in enumerate(zip(differences, holm(p_randomisation.tolist()), strict=True))
    ]


def holm(values: Sequence[float]) -> list[float]:
    """Return the p values after Holm's step-down correction: each at least the original, in the order given.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


def _effect(mean: float, spread: float) -> float | None:
    return 0.0 if mean == 0 else mean / spread if spread > 0 else None


def _student(mean: Floats, spread: Floats, count: int) -> tuple[Floats, Floats]:
    """(two-sided p, half the width of the 95 % interval) of each mean difference."""
    from scipy import stats

    error = spread / np.sqrt(count)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / error)  # no spread: infinite, p 0; no difference either: p 1
    return 2 * stats.t.sf(np.abs(t), count - 1), stats.t.ppf(0.975, count - 1) * error


def _randomise(differences: Floats, resamples: int) -> Floats:
    """Two-sided p of the sum of each row of differences (S, n) under flips of the signs of its columns."""
    systems, count = differences.shape
    observed = np.abs(differences.sum(1))
    # Sums of the same numbers in another order differ in their last bits; they must count as equal.
    limit = observed - 1e-12 * np.abs(differences).sum(1)
    exact = count < 63 and 2**count <= resamples
    random = np.random.default_rng(_SEED)
    total = 2**count if exact else resamples
    extreme = np.zeros(systems, np.int64)
    step = max(1, _ENTRIES // count)
    for start in range(0, total, step):
        rows = min(step, total - start)
        if exact:
            bits = (np.arange(start, start + rows)[:, None] >> np.arange(count) & 1).astype(np.uint8)
        else:
            packed = random.integers(0, 256, (rows, -(-count // 8)), np.uint8)
            bits = np.unpackbits(packed, axis=1, count=count)
        signs = 1.0 - 2.0 * bits  # (rows, n)
        extreme += (np.abs(signs @ differences.T) >= limit).sum(0)
    return extreme / total if exact else (1 + extreme) / (1 + total)
