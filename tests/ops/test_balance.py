"""Column factors and strips for int8: what they may not change, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from fastrerank import _cpu_tests
from fastrerank.engine.native.int8_scaling import column_factors, spread, strip_columns


def weights(n: int = 24, k: int = 80, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32)


def test_alike_columns_get_one() -> None:
    w = np.tile(np.array([[1.0], [-2.0]], np.float32), 5)
    np.testing.assert_allclose(column_factors([w], np.full(5, 3, np.float32), 1.0), np.ones(5), rtol=1e-6)


def test_factor_follows_weights_and_reach() -> None:
    w = weights()
    w[:, 3] *= 16
    reach = np.ones(80, np.float32)
    reach[7] = 4
    ratio = column_factors([w], reach, 1.0) / column_factors([weights()], np.ones(80, np.float32), 1.0)
    np.testing.assert_allclose(ratio[3] / ratio[0], 16, rtol=1e-5)
    np.testing.assert_allclose(ratio[7] / ratio[0], 0.5, rtol=1e-5)


def test_matrices_of_one_input_share_its_factors() -> None:
    a, b = weights(24), weights(8, seed=1)
    np.testing.assert_allclose(
        column_factors([a, b], None, 1.0), column_factors([np.concatenate([a, b])], None, 1.0), rtol=1e-5
    )


@pytest.mark.parametrize("reach", [None, np.zeros(80, np.float32)])
def test_columns_that_nothing_reads_get_zero_and_damaged_weights_stay_visible(reach: np.ndarray | None) -> None:
    w = weights()
    w[:, 5] = 0
    factor = column_factors([w], reach, 1.0)
    assert factor[5] == 0
    assert (np.delete(factor, 5) > 0).all()
    assert (column_factors([np.zeros((2, 80), np.float32)], reach, 1.0) == 1).all()
    w[0, 0] = np.nan
    assert (column_factors([w], reach, 1.0) == 1).all()  # packing then finds the NaN


def test_spread_counts_bias_and_weight() -> None:
    gamma, beta = np.array([1, -2], np.float32), np.array([-1, 0.5], np.float32)
    np.testing.assert_array_equal(spread(gamma, beta), [4, 6.5])
    np.testing.assert_array_equal(spread(gamma, None), [3, 6])


def test_strip_takes_the_largest_weights_and_never_more_than_an_eighth() -> None:
    w = weights()
    w[2, 70], w[9, 4] = 50, -60
    assert strip_columns(w, 2).tolist() == [4, 70]
    assert len(strip_columns(w)) == 8
    assert len(strip_columns(w[:, :20])) == 2
    assert len(strip_columns(w[:, :7])) == 0


def test_a_few_large_columns_no_longer_cost_the_others_their_resolution(isa: str) -> None:
    random = np.random.default_rng(2)
    w, x = weights(48, 128), random.normal(size=(64, 128)).astype(np.float32)
    x[:, 9] *= 40  # as in a transformer's residual stream: large inputs that small weights read
    w[:, 9] /= 40
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    plain = _cpu_tests.linear(x, w, None, "int8", "identity", isa)
    factor = column_factors([w], None, 1.0)
    balanced = _cpu_tests.linear(x * factor, w / factor, None, "int8", "identity", isa)
    error = [np.sqrt(np.mean((y - exact) ** 2)) for y in (plain, balanced)]
    assert error[1] < 0.4 * error[0]
