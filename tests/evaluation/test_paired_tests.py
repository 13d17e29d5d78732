"""Paired tests against scipy's, Holm's correction against its definition, and data that do not vary."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fastrerank.evaluation import holm, paired_tests


def values(random, systems, count, decimals=None):
    rows = random.uniform(0, 1, (systems + 1, count))
    rows = rows if decimals is None else rows.round(decimals)
    return rows[1:], rows[0]


@pytest.mark.parametrize("count", [2, 3, 43, 1000])
def test_t_test_interval_and_effect_equal_scipys(random, count):
    rows, baseline = values(random, 3, count)
    for test, row in zip(paired_tests(rows, baseline, resamples=100), rows, strict=True):
        theirs = stats.ttest_rel(row, baseline)
        low, high = theirs.confidence_interval(0.95)
        assert (test.p_t, test.low, test.high) == pytest.approx((theirs.pvalue, low, high), rel=1e-9)
        differences = row - baseline
        assert test.effect == pytest.approx(differences.mean() / differences.std(ddof=1))
        assert test.difference == pytest.approx(differences.mean())
        assert (test.better + test.equal + test.worse, test.queries) == (count, count)


@pytest.mark.parametrize("decimals", [None, 1])  # one decimal: many sums are as extreme as the observed one
@pytest.mark.parametrize("count", [2, 5, 9])
def test_all_sign_flips_are_counted_as_scipy_counts_them(random, count, decimals):
    rows, baseline = values(random, 4, count, decimals)
    for test, row in zip(paired_tests(rows, baseline), rows, strict=True):
        theirs = stats.permutation_test(
            (row - baseline,), np.mean, permutation_type="samples", n_resamples=2**count, vectorized=True
        )
        assert test.p_randomisation == pytest.approx(theirs.pvalue, abs=1e-12)


def test_random_sign_flips_come_near_all_of_them(random):
    rows, baseline = values(random, 5, 17)  # 131,072 flips: more than the default draws
    exact = paired_tests(rows, baseline, resamples=2**17)
    drawn = paired_tests(rows, baseline)
    for every, some in zip(exact, drawn, strict=True):
        p = every.p_randomisation
        assert abs(some.p_randomisation - p) < 5 * np.sqrt(p * (1 - p) / 100_000) + 1e-5
        assert some.p_randomisation != p
    assert paired_tests(rows, baseline) == drawn


def test_holm_is_the_closed_bonferroni_procedure(random):
    for count in (1, 2, 5):
        p = random.uniform(0, 0.4, count).round(2).tolist()
        closed = [
            max(
                min(1.0, len(chosen) * min(p[j] for j in chosen))
                for size in range(1, count + 1)
                for chosen in combinations(range(count), size)
                if i in chosen
            )
            for i in range(count)
        ]
        assert holm(p) == pytest.approx(closed)
    assert holm([]) == []


def test_the_correction_is_for_all_systems_of_the_call(random):
    rows, baseline = values(random, 4, 12)
    tests = paired_tests(rows, baseline)
    assert [test.p_holm for test in tests] == holm([test.p_randomisation for test in tests])


def test_equal_and_constant_differences():
    same, shifted = paired_tests([[0.1, 0.2, 0.7], [0.3, 0.4, 0.9]], [0.1, 0.2, 0.7])
    assert (same.p_t, same.p_randomisation, same.effect, same.low, same.high, same.equal) == (1, 1, 0, 0, 0, 3)
    assert (shifted.p_t, shifted.p_randomisation, shifted.effect, shifted.better) == (0, 0.25, None, 3)
    assert shifted.low == shifted.high == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("rows", "baseline", "options"),
    [([[1.0]], [1.0], {}), ([[1.0, 2.0]], [1.0, 2.0, 3.0], {}), ([[1.0, 2.0]], [1.0, 2.0], {"resamples": 0})],
)
def test_refusals(rows, baseline, options):
    with pytest.raises(ValueError, match="at least"):
        paired_tests(rows, baseline, **options)
    assert paired_tests([], [1.0, 2.0]) == []
