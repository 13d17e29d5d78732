"""float32 products whose operands are hard to take apart: every level must give what float32 arithmetic gives."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fastrerank import _cpu_tests

Array = npt.NDArray[np.float32]
# (rows, n, k): one row, ragged tiles, the second part of a deep panel, a block's last row tile that overlaps.
SHAPES = [(1, 17, 40), (37, 97, 131), (20, 48, 800), (33, 16, 1156)]
U = 2.0**-24


def check(x: Array, w: Array, isa: str) -> None:
    """Every element within Higham's bound of a float32 sum in any order."""
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    bound = (x.shape[1] + 2) * U * (np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64))
    result = _cpu_tests.linear(x, w, None, "float32", "identity", isa)
    assert (np.abs(result - exact) <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_large_range_cancellation_and_all_24_bits(isa: str, shape: tuple[int, int, int]) -> None:
    rows, n, k = shape
    random = np.random.default_rng(shape)
    x, w = (random.normal(size=size).astype(np.float32) for size in ((rows, k), (n, k)))
    check(x, w, isa)
    spread = np.float32(2.0) ** random.integers(-30, 31, k).astype(np.float32)
    check(x * spread, w, isa)
    check(x * spread, w / spread, isa)
    x[:, 1::2], w[:, 1::2] = x[:, : k // 2 * 2 : 2], -w[:, : k // 2 * 2 : 2]  # sums of nothing but rounding
    check(x, w, isa)
    odd = (2.0**23 + 2 * random.integers(0, 2**22, (rows, k)) + 1).astype(np.float32)  # the last bit is set
    check(odd, w, isa)
    check(-odd, np.full((n, k), 1 + 2.0**-23, np.float32), isa)


def test_a_value_times_one_is_itself(isa: str) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0x0C000000, 0x7F800000, (64, 33)).astype(np.uint32)  # 2^-103 to the largest float32
    bits[0, :3] = 0x7F7FFFFF, 0x7F7F8000, 0x0C000001
    x = (bits | random.integers(0, 2, bits.shape).astype(np.uint32) << 31).view(np.float32)
    np.testing.assert_array_equal(
        _cpu_tests.linear(x, np.eye(33, dtype=np.float32), None, "float32", "identity", isa), x
    )
    np.testing.assert_array_equal(
        _cpu_tests.linear(np.eye(33, dtype=np.float32), x, None, "float32", "identity", isa), x.T
    )


def test_weights_whose_first_term_rounds_to_infinity(isa: str) -> None:
    # In columns of a pair of vectors and of the last one, in both parts of a deep panel, in its last inputs.
    random = np.random.default_rng(4)
    rows, n, k = 37, 97, 1156
    x, w = (random.normal(size=size).astype(np.float32) for size in ((rows, k), (n, k)))
    clean = _cpu_tests.linear(x, w, None, "float32", "identity", isa)
    largest = np.array([0x7F7FFFFF, 0xFF7F8000], np.uint32).view(np.float32)
    places = np.array([(3, 0), (40, 383), (40, 500), (96, 1155)])
    w[tuple(places.T)] = largest[[0, 1, 0, 1]]
    small = x * np.float32(2.0**-8)
    small[2] = 0  # a term that is infinite meets zeros
    small[5, places[:, 1]] = 0
    check(small, w, isa)
    small[20, 0], small[36, 1155] = np.finfo(np.float32).max, -8.0
    result = _cpu_tests.linear(small, w, None, "float32", "identity", isa)
    assert (result[20, 3], result[36, 96]) == (np.inf, np.inf)
    assert np.isfinite(np.delete(result[36], 96)).all()
    others = np.delete(np.arange(n), places[:, 0])
    result = _cpu_tests.linear(x, w, None, "float32", "identity", isa)
    np.testing.assert_array_equal(result[:, others], clean[:, others])


def test_infinities_and_nan_are_those_of_float32_and_of_their_row_alone(isa: str) -> None:
    random = np.random.default_rng(1)
    x, w = (random.normal(size=size).astype(np.float32) for size in ((21, 40), (35, 40)))
    w[:, :20] = np.sign(w[:, :20])  # their lower terms are zeros
    clean = _cpu_tests.linear(x, w, None, "float32", "identity", isa)
    x[2, 3], x[5, 30], x[17, 7], x[20, 39] = np.inf, -np.inf, np.nan, 3.4e38
    x[9, 1], x[9, 2] = np.inf, -np.inf
    w[1, 39] = 8.0
    result = _cpu_tests.linear(x, w, None, "float32", "identity", isa)
    for row, column in ((2, 3), (5, 30)):
        np.testing.assert_array_equal(result[row], x[row, column] * np.sign(w[:, column]))
    assert np.isnan(result[17]).all()
    assert result[20, 1] == np.inf  # 8 x 3.4e38
    opposite = np.sign(w[:, 1]) == np.sign(w[:, 2])
    assert np.isnan(result[9, opposite]).all()
    assert np.isinf(result[9, ~opposite]).all()
    finite = [r for r in range(21) if r not in (2, 5, 9, 17, 20)]
    columns = np.arange(35) != 1
    np.testing.assert_array_equal(result[np.ix_(finite, columns)], clean[np.ix_(finite, columns)])


def test_what_is_lost_near_the_smallest_float32(isa: str) -> None:
    # A term below 2^-126 counts as zero on tiles: at most two terms of either operand, and the product itself.
    random = np.random.default_rng(2)
    x = (random.normal(size=(19, 50)) * 2.0 ** random.integers(-149, -90, (19, 50))).astype(np.float32)
    w = random.normal(size=(31, 50)).astype(np.float32)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    rounding = 52 * U * (np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64))
    lost = 2.0**-126 * (3 * np.abs(w).sum(axis=1) + 6 * 50)
    result = _cpu_tests.linear(x, w, None, "float32", "identity", isa)
    assert (np.abs(result - exact) <= rounding + lost).all()


def test_the_smallest_values_leave_their_neighbours_alone(isa: str) -> None:
    # Bits whose lower halves would be a bfloat16's infinity, NaN or a large value, were they taken for one.
    tiny = np.array([0x7F80, 0x7FC0, 0x7F7F, 0x3F80, 0xFFFF, 0x80017F7F, 0x01804480, 0x04807FC0], np.uint32)
    ordinary = np.random.default_rng(3).normal(size=(len(tiny), 64)).astype(np.float32)
    for odd in (True, False):  # odd inputs share words with even ones
        w = ordinary.copy()
        w[:, odd::2] = tiny.view(np.float32)[:, None]
        check(ordinary, w, isa)
        check(w, ordinary, isa)
