"""Passes over rows at every instruction-set level: layer norm against torch, 8-bit rounding against float64."""

from __future__ import annotations

import numpy as np
import pytest

from fastrerank import _cpu_tests

torch = pytest.importorskip("torch")
WIDTHS = (1, 7, 15, 16, 17, 31, 33, 48, 100, 384, 390)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_layer_norm_error_is_at_most_twice_torchs(isa: str, n: int, shift: float) -> None:
    random = np.random.default_rng(n)
    x = (random.normal(size=(9, n)) * 3 + shift).astype(np.float32)
    gamma, beta = (random.normal(size=n).astype(np.float32) for _ in range(2))
    for bias in (beta, None):
        parts = [torch.from_numpy(a) for a in (x, gamma)] + [None if bias is None else torch.from_numpy(bias)]
        wide = [None if p is None else p.double() for p in parts]
        exact = torch.nn.functional.layer_norm(wide[0], (n,), wide[1], wide[2], 1e-5).numpy()
        plain = torch.nn.functional.layer_norm(parts[0], (n,), parts[1], parts[2], 1e-5).numpy()
        ours = _cpu_tests.layer_norm(x, gamma, bias, 1e-5, isa)
        # torch may be exact by luck in a row of few values: a unit in the last place is always allowed.
        bound = 2 * np.abs(plain - exact).max() + 2.0**-23 * np.abs(exact).max() + 1e-30
        assert np.abs(ours - exact).max() <= bound


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "factor"])
def test_quantised_rows_are_within_half_a_step(isa: str, n: int, kind: str) -> None:
    levels = (127 if isa == "avx2" else 255) - 1
    random = np.random.default_rng(n)
    x = random.normal(size=(11, n)).astype(np.float32) * np.float32(10.0) ** random.integers(-3, 4, (11, 1))
    x = {"positive": np.abs(x), "negative": -np.abs(x)}.get(kind, x).astype(np.float32)
    factor = random.uniform(0, 2, n).astype(np.float32) if kind == "factor" else None
    if factor is not None:
        factor[::3] = 0
    q, scale, zero = _cpu_tests.quantise(x, factor, isa)
    y = x.astype(np.float64) * (1 if factor is None else factor)
    span = np.maximum(y.max(axis=1), 0) - np.minimum(y.min(axis=1), 0)
    np.testing.assert_allclose(scale, span / levels, rtol=1e-6, atol=1e-36)
    assert q.max() <= levels + 1
    back = (q.astype(np.float64) - zero[:, None]) * scale[:, None]
    # Half a step, and four float32 roundings (factor, both scales, product) of a value of up to `levels` steps.
    assert (np.abs(back - y) <= scale[:, None] * (0.5 + 4 * 2.0**-24 * levels)).all()
    if factor is not None:
        assert (back[:, ::3] == 0).all()


def test_a_smallest_value_halfway_between_two_levels_does_not_wrap(isa: str) -> None:
    # The zero point is then rounded away from the exact middle, or to it: the smallest level must not fall below 0.
    levels = (127 if isa == "avx2" else 255) - 1
    random = np.random.default_rng(0)
    step = random.uniform(1e-3, 1, 20000)
    low = random.integers(0, levels, step.size) + 0.5
    x = np.zeros((step.size, 16), np.float32)
    x[:, 0], x[:, 1] = -low * step, (levels - low) * step
    q, scale, zero = _cpu_tests.quantise(x, None, isa)
    assert q.max() <= levels + 1
    back = (q.astype(np.float64) - zero[:, None]) * scale[:, None]
    assert (np.abs(back - x) <= scale[:, None] * (0.5 + 4 * 2.0**-24 * levels)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_shows_in_its_scale_alone(isa: str, bad: float) -> None:
    x = np.ones((4, 33), np.float32)
    x[2, 32] = bad
    _, scale, _ = _cpu_tests.quantise(x, None, isa)
    assert np.isnan(scale).tolist() == [False, False, True, False]
