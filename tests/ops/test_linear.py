"""The packed product of every instruction-set level against float64, and int8 against the same arithmetic in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrerank import _cpu_tests, ops

torch = pytest.importorskip("torch")
from fastrerank.ops._linear import Linear, feed_forward  # noqa: E402

LEVELS = ops.cpu_info()["supported"]
DTYPES = ("float32", "bfloat16", "int8")
# (rows, n outputs, k inputs): ragged row tiles, sizes off every vector and step, and more panels than one.
SHAPES = [(rows, 1 + 7 * rows % 53, 1 + 11 * rows % 37) for rows in range(1, 18)]
SHAPES += [(5, 1, 1), (3, 16, 4), (9, 48, 64), (17, 97, 131), (33, 130, 385)]
Array = npt.NDArray[np.float32]


def operands(rows: int, n: int, k: int, seed: int = 0) -> tuple[Array, Array, Array]:
    random = np.random.default_rng((seed, rows, n, k))
    x, w, bias = (random.normal(size=shape).astype(np.float32) for shape in ((rows, k), (n, k), (n,)))
    return x, w, bias


def rms(x: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def bits(w: Array) -> npt.NDArray[np.uint16]:
    """The nearest bfloat16, as checkpoints store it."""
    return torch.from_numpy(w).bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(isa: str, dtype: str) -> None:
    # Over all shapes together: a single tiny product of torch may be right by luck.
    ours, theirs = [], []
    for shape in SHAPES:
        x, w, bias = operands(*shape)
        exact = x.astype(np.float64) @ w.astype(np.float64).T + bias
        kind = getattr(torch, dtype)
        plain = torch.nn.functional.linear(*(torch.from_numpy(a).to(kind) for a in (x, w, bias)))
        result = _cpu_tests.linear(x, w, bias, dtype, "identity", isa)
        assert result.shape == exact.shape
        ours.append(result - exact)
        theirs.append(plain.double().numpy() - exact)
    factor = 2.0 if dtype == "float32" or isa in ops.BFLOAT16_LEVELS else 1.0  # elsewhere inputs stay float32: better
    assert rms(np.concatenate([e.ravel() for e in ours])) <= factor * rms(np.concatenate([e.ravel() for e in theirs]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 16, 32, 48, 70, 130])
def test_no_rows_give_no_rows(isa: str, dtype: str, n: int) -> None:
    x, w, bias = operands(0, n, 42)
    assert _cpu_tests.linear(x, w, bias, dtype, "relu", isa).shape == (0, n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_element_exceeds_the_bound_of_its_own_sum(isa: str, dtype: str, shape: tuple[int, int, int]) -> None:
    x, w, bias = operands(*shape)
    inputs, weights = x.astype(np.float64), w.astype(np.float64)
    if dtype == "bfloat16":  # after the stated rounding of weights, and of inputs where the level has bfloat16
        weights = torch.from_numpy(w).bfloat16().double().numpy()
        inputs = torch.from_numpy(x).bfloat16().double().numpy() if isa in ops.BFLOAT16_LEVELS else inputs
    # Higham's bound for a sum of k products and a bias in float32, in any order.
    bound = (shape[2] + 2) * 2.0**-24 * (np.abs(inputs) @ np.abs(weights).T + np.abs(bias))
    result = _cpu_tests.linear(x, w, bias, dtype, "identity", isa)
    assert (np.abs(result - (inputs @ weights.T + bias)) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_formats_of_one_value_give_one_result(isa: str, dtype: str) -> None:
    x, w, bias = operands(5, 19, 23)
    half = w.astype(np.float16)
    expected = _cpu_tests.linear(x, half.astype(np.float32), bias, dtype, "identity", isa)
    np.testing.assert_array_equal(_cpu_tests.linear(x, half, bias, dtype, "identity", isa), expected)
    stored = bits(w)
    wide = (stored.astype(np.uint32) << 16).view(np.float32)
    expected = _cpu_tests.linear(x, wide, bias, dtype, "identity", isa)
    np.testing.assert_array_equal(_cpu_tests.linear(x, stored, bias, dtype, "identity", isa), expected)


def test_float16_weights_keep_subnormals_and_signs(isa: str) -> None:
    w = np.array([[6e-8], [-6e-8], [65504], [-0.0], [1e-5]], np.float16)
    result = _cpu_tests.linear(np.ones((1, 1), np.float32), w, None, "float32", "identity", isa)
    np.testing.assert_array_equal(result[0], w[:, 0].astype(np.float32))


def quantised(x: Array, w: Array, u8_max: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(x W^T) of dynamically quantised operands, and the sum of the magnitudes of the two integers it is made of.

    Rows of x: asymmetric on 0 .. u8_max - 1 over their range, 0 included. Rows of w: symmetric on -127 .. 127.
    """
    low = np.minimum(x.min(axis=1, initial=0), 0).astype(np.float32)
    span = np.maximum(x.max(axis=1, initial=0), 0).astype(np.float32) - low
    inverse = np.divide(np.float32(u8_max - 1), span, where=span > 0, out=np.zeros_like(span))
    zero = np.rint(-low * inverse).astype(np.int64)
    q = np.rint(x.astype(np.float64) * inverse[:, None]).astype(np.int64) + zero[:, None]
    assert q.min() >= 0
    assert q.max() <= u8_max
    scale = np.abs(w).max(axis=1) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1))
    s = np.rint(w / scale[:, None]).astype(np.int64)
    x_scale = span / np.float32(u8_max - 1)
    unit = scale.astype(np.float64) * x_scale[:, None].astype(np.float64)
    raw, offset = q @ s.T, zero[:, None] * s.sum(axis=1)
    return (raw - offset) * unit, (np.abs(raw) + np.abs(offset)) * unit


def on_grid(random: np.random.Generator, rows: int, k: int, levels: int) -> Array:
    """Rows whose values lie well inside a rounding interval, so that the order of float operations cannot matter."""
    if k < 2:
        return np.ones((rows, k), np.float32)
    span = random.uniform(0.5, 4, (rows, 1))
    zero = random.integers(0, levels + 1, (rows, 1))
    steps = np.clip(
        random.integers(0, levels + 1, (rows, k)) - zero + random.uniform(-0.3, 0.3, (rows, k)), -zero, levels - zero
    )
    steps[:, :1], steps[:, 1:2] = -zero, levels - zero
    return (steps * (span / levels)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_equals_integer_arithmetic_to_the_last_rounding(isa: str, shape: tuple[int, int, int]) -> None:
    rows, n, k = shape
    u8_max = 127 if isa == "avx2" else 255
    random = np.random.default_rng((1, rows, n, k))
    x = on_grid(random, rows, k, u8_max - 1)
    w = random.integers(-127, 128, (n, k)) + random.uniform(-0.3, 0.3, (n, k))
    w[:, 0] = 127.0
    w = (np.clip(w, -127, 127) * random.uniform(0.01, 0.1, (n, 1))).astype(np.float32)
    bias = random.normal(size=n).astype(np.float32)
    product, magnitude = quantised(x, w, u8_max)
    result = _cpu_tests.linear(x, w, bias, "int8", "identity", isa)
    # Integer sums are exact; each of the two is scaled in float32 (two scales, their product, its product, the sum).
    bound = 2.0**-24 * (5 * magnitude + 2 * np.abs(bias)) + 1e-30
    assert (np.abs(result - (product + bias)) <= bound).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_int8_sums_do_not_saturate(isa: str, sign: int) -> None:
    # The largest inputs against the largest weights: 8-bit pair products overflow 16 bits unless the level avoids it.
    x = np.full((2, 64), 3.0, np.float32)
    w = np.full((17, 64), sign * 0.5, np.float32)
    result = _cpu_tests.linear(x, w, None, "int8", "identity", isa)
    np.testing.assert_allclose(result, np.full((2, 17), sign * 96.0), rtol=1e-6)


def test_int8_rows_of_zeros_and_of_one_sign(isa: str) -> None:
    _, w, bias = operands(3, 20, 33)
    x = np.zeros((3, 33), np.float32)
    x[1], x[2] = np.linspace(0.5, 1, 33), np.linspace(-1, -0.5, 33)
    result = _cpu_tests.linear(x, w, bias, "int8", "identity", isa)
    np.testing.assert_array_equal(result[0], bias)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    step = 1 / (126 if isa == "avx2" else 254)  # half a step per input, half a step per weight
    bound = 33 * (0.5 * step * np.abs(w).max() + 0.5 / 127 * np.abs(w).max()) * 0.6
    assert np.abs(result - bias - exact).max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 17), n=st.integers(1, 67), k=st.integers(1, 67), seed=st.integers(0, 9))
def test_a_row_is_bitwise_the_same_alone_and_in_company(dtype: str, rows: int, n: int, k: int, seed: int) -> None:
    x, w, bias = operands(rows, n, k, seed)
    for level in LEVELS:
        together = _cpu_tests.linear(x, w, bias, dtype, "gelu", level)
        alone = [_cpu_tests.linear(row[None], w, bias, dtype, "gelu", level) for row in x]
        np.testing.assert_array_equal(together, np.concatenate(alone))


ACTIVATIONS = {
    "identity": lambda x: x,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_fast": torch.nn.functional.gelu,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


# Absolute error: 1.2e-7 |x| is the fit's of GELU, to which two roundings come. tanh is 1 - 2 / (e^2x + 1) above 0.08:
# the roundings of the exponential, the sum, the quotient and the difference, each on values of at most 1.
U = 2.0**-24
BOUNDS = {
    "identity": lambda x: 0 * x,
    "relu": lambda x: 0 * x,
    "gelu": lambda x: (1.2e-7 + 2 * U) * x,
    "gelu_fast": lambda x: 1.8e-4 + 2 * U * x,  # a twentieth of what rounding to 8 bits costs a row that reaches 3
    "gelu_tanh": lambda x: 5 * U * x,
    "silu": lambda x: 4 * U * x,
    "sigmoid": lambda x: 3 * U + 0 * x,
    "tanh": lambda x: np.where(x < 0.07, 4 * U * x, 3.2 * U),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_against_float64(isa: str, name: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4801), [-100, -30, 30, 100, 0, 1e-6, -1e-6]]).astype(np.float32)[:, None]
    result = _cpu_tests.linear(x, np.ones((1, 1), np.float32), None, "float32", name, isa)
    exact = ACTIVATIONS[name](torch.from_numpy(x).double()).numpy()
    assert (np.abs(result - exact) <= BOUNDS[name](np.abs(x))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_nan(isa: str, name: str) -> None:
    # A damaged model must end in NaN, which is refused, and not in a plausible score.
    x = np.array([[np.nan]], np.float32)
    assert np.isnan(_cpu_tests.linear(x, np.ones((1, 1), np.float32), None, "float32", name, isa))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_int8_rows_that_are_not_finite_stay_so(isa: str, value: float) -> None:
    x, w, bias = operands(3, 5, 40)
    x[1, 3] = value
    result = _cpu_tests.linear(x, w, bias, "int8", "identity", isa)
    np.testing.assert_array_equal(np.isfinite(result).all(axis=1), [True, False, True])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(isa: str, dtype: str, value: float) -> None:
    x, w, bias = operands(2, 5, 7)
    w[3, 4] = value
    for stored in (w, w.astype(np.float16), bits(w)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            _cpu_tests.linear(x, stored, bias, dtype, "identity", isa)


def test_wrong_names_and_shapes_name_what_is_valid() -> None:
    x, w, bias = operands(2, 5, 7)
    with pytest.raises(ValueError, match="float32, bfloat16, int8"):
        _cpu_tests.linear(x, w, bias, "float8", "identity", LEVELS[0])
    with pytest.raises(ValueError, match="relu"):
        _cpu_tests.linear(x, w, bias, "float32", "swoosh", LEVELS[0])
    with pytest.raises(ValueError, match="portable"):
        _cpu_tests.linear(x, w, bias, "float32", "identity", "avx1024")
    with pytest.raises(ValueError, match="shape"):
        _cpu_tests.linear(x[:, :5], w, bias, "float32", "identity", LEVELS[0])
    with pytest.raises(ValueError, match="bias"):
        _cpu_tests.linear(x, w, bias[:3], "float32", "identity", LEVELS[0])
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        _cpu_tests.linear(x, w.astype(np.float64), bias, "float32", "identity", LEVELS[0])


@pytest.mark.parametrize(
    ("rows", "out", "message"),
    [
        (torch.ones(4, 2), torch.ones(4, 2), r"rows must be torch.float32 \(4, 3\)"),
        (torch.ones(4, 3).double(), torch.ones(4, 2), "rows must be torch.float32"),
        (torch.ones(4, 6)[:, ::2], torch.ones(4, 2), "rows must be .* of contiguous rows"),
        (torch.ones(4, 3), torch.ones(3, 2), r"out must be torch.float32 \(4, 2\)"),
        (torch.ones(4, 3), torch.ones(4, 3), r"out must be torch.float32 \(4, 2\)"),
    ],
)
def test_rows_and_results_that_do_not_fit_are_named(rows: torch.Tensor, out: torch.Tensor, message: str) -> None:
    linear = Linear(torch.ones(2, 3), None)
    with pytest.raises(ValueError, match=message):
        linear.run(rows, out)
    with pytest.raises(ValueError, match=message):
        feed_forward(Linear(torch.ones(5, 3), None), None, Linear(torch.ones(2, 5), None), "relu", rows, out)
