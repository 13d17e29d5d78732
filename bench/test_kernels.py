"""Microbenchmarks of the kernels: `pytest bench/test_kernels.py --benchmark-only`.

Each checks its result before it is timed and reports operations per second and the fraction of what the same level
sustains in registers (`fastrerank.ops.peak`). Sizes are MiniLM-L6's and bge-reranker-base's, one thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastrerank import _cpu, _cpu_tests, ops
from fastrerank.ops import reference

ROWS = 128
SHAPES = {"minilm-up": (1536, 384), "minilm-down": (384, 1536), "base-up": (3072, 768), "base-down": (768, 3072)}
# Relative to the largest output: float32 sums, 8 bits of mantissa, 8 bits of range (7 at avx2).
BOUNDS = {"float32": 5e-6, "bfloat16": 2e-2, "int8": 6e-2}


@pytest.fixture(params=_cpu.levels())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _report(benchmark: Any, operations: float, dtype: str, isa: str) -> None:
    if benchmark.stats is None:
        return
    rate = operations / benchmark.stats.stats.median
    benchmark.extra_info["Gop/s"] = round(rate / 1e9, 1)
    benchmark.extra_info["% of peak"] = round(100 * rate / _cpu.peak(dtype, 1, isa))


def _report_bytes(benchmark: Any, moved: int) -> None:
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(benchmark: Any, isa: str, dtype: str, shape: str) -> None:
    """One packed product, with packing and conversion left out of the operations but not out of the time."""
    n, k = SHAPES[shape]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, k), np.float32)
    w = rng.standard_normal((n, k), np.float32)
    expected = x @ w.T
    product = _cpu_tests.Linear(w, None, dtype, isa)
    assert np.abs(product(x) - expected).max() <= BOUNDS[dtype] * np.abs(expected).max()
    benchmark(product, x)
    _report(benchmark, 2.0 * ROWS * n * k, dtype, isa)


def _time_attention(
    benchmark: Any, isa: str, dtype: str, shapes: list[tuple[int, int, int]], spans: list[Any], pairs: float
) -> None:
    """Check two heads' last rows, then time one call on one thread. pairs: of queries and keys in one head."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_normal(shape, np.float32)).to(getattr(torch, dtype)) for shape in shapes)
    rows, group = slice(-100, None), q.shape[1] // k.shape[1]
    exact, _ = reference.attention(
        q[rows, : 2 * group].double().numpy(), *(x[:, :2].double().numpy() for x in (k, v)), *(s[rows] for s in spans)
    )
    intervals = [torch.from_numpy(span) for span in spans]
    ops.set_isa(isa)
    ops.set_num_threads(1)
    try:
        result = ops.attention(q, k, v, *intervals)[rows, : 2 * group].float().numpy()
        assert np.abs(result - exact).max() <= {"float32": 1e-5, "bfloat16": 2e-2}[dtype] * np.abs(exact).max()
        benchmark(ops.attention, q, k, v, *intervals)
    finally:
        ops.set_isa(None)
        ops.set_num_threads(None)
    _report(benchmark, 4.0 * pairs * q.shape[1] * q.shape[2], dtype, isa)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("length", [96, 512])
def test_attention(benchmark: Any, isa: str, dtype: str, length: int, head_dim: int) -> None:
    """MiniLM's or BERT's heads over packed documents, bidirectional."""
    rows = 1920 // length * length
    lo = np.arange(rows, dtype=np.int32) // length * length
    spans = [lo, lo + np.int32(length)]
    _time_attention(benchmark, isa, dtype, [(rows, 12, head_dim)] * 3, spans, rows * length)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["causal", "shared prefix"])
def test_decoder_attention(benchmark: Any, isa: str, dtype: str, mask: str) -> None:
    """Qwen2.5-0.5B's heads: one causal prompt of 2,048 tokens, or 100 segments of 100 tokens after a prefix of 100."""
    rows = 2048 if mask == "causal" else 10_100
    row = np.arange(rows, dtype=np.int32)
    own = 0 * row if mask == "causal" else row // 100 * 100
    spans = [own, row + 1, 0 * row, np.minimum(own, 0 if mask == "causal" else 100)]
    pairs = float((spans[1] - own + spans[3]).sum())
    _time_attention(benchmark, isa, dtype, [(rows, 14, 64), (rows, 2, 64), (rows, 2, 64)], spans, pairs)


MASS_SHAPES = {"qwen2.5-0.5b": (50, 2048, 14, 2, 64), "llama-3.1-8b": (50, 8192, 32, 8, 128)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", MASS_SHAPES)
def test_attention_mass(benchmark: Any, isa: str, dtype: str, shape: str) -> None:
    """50 rows of one layer read at a whole context. Against the float32 peak, which all levels compute in.

    "% of floor" counts 13 further vector operations per exponential, at two a cycle like the multiply-adds.
    """
    torch = pytest.importorskip("torch")
    rows, keys, heads, kv_heads, head_dim = MASS_SHAPES[shape]
    random = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, head_dim, generator=random).to(getattr(torch, dtype))
    k = torch.randn(keys, kv_heads, head_dim, generator=random).to(getattr(torch, dtype))
    lo, hi = torch.zeros(rows, dtype=torch.int32), torch.full((rows,), keys, dtype=torch.int32)
    weight = torch.randn(rows, generator=random)
    wide = k.float().repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("rhd,shd->rhs", q.float(), wide).double() * head_dim**-0.5
    lse = scores.logsumexp(-1)
    exact = torch.einsum("rhs,r->s", (scores - lse.float()[..., None]).exp(), weight.double())
    given = (q, k, lse.float(), lo, hi, weight)
    ops.set_isa(isa)
    ops.set_num_threads(1)
    try:
        result = ops.attention_mass(*given)
        assert (result - exact).abs().max() <= 1e-5 * exact.abs().max()
        benchmark(ops.attention_mass, *given)
    finally:
        ops.set_isa(None)
        ops.set_num_threads(None)
    products = 2.0 * rows * keys * heads * head_dim
    _report(benchmark, products, "float32", isa)
    if benchmark.stats is not None:
        floor = (products + 26.0 * rows * keys * heads) / _cpu.peak("float32", 1, isa)
        benchmark.extra_info["% of floor"] = round(100 * floor / benchmark.stats.stats.median)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("queries", [1, 32])
def test_cur_topk(benchmark: Any, isa: str, storage: str, queries: int) -> None:
    """The best 100 of 50,000 items of width 256. Float storages multiply in float32 at every level."""
    rng = np.random.default_rng(0)
    items = ops.cur_pack(rng.standard_normal((256, 50_000), np.float32), storage)
    given = rng.standard_normal((queries, 256), np.float32)
    vectors = items.vectors().astype(np.float64)
    exact = np.sort(given.astype(np.float64) @ vectors, axis=1)[:, :-101:-1]
    ops.set_isa(isa)
    try:
        ids, scores = ops.cur_topk(given, items, 100, threads=1)
        np.testing.assert_allclose(scores, exact, rtol=1e-6)
        np.testing.assert_allclose(np.einsum("bk,kbn->bn", given.astype(np.float64), vectors[:, ids]), exact, rtol=1e-6)
        benchmark(ops.cur_topk, given, items, 100, threads=1)
    finally:
        ops.set_isa(None)
    _report(benchmark, 2.0 * given.size * items.N, "int8" if storage == "int8" else "float32", isa)
    _report_bytes(benchmark, items.nbytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("labels", [2, 26])
def test_label_logits(benchmark: Any, isa: str, dtype: str, labels: int) -> None:
    """RMS norm and label rows at 100 positions of Qwen3-0.6B's width. Bytes: every input once, and the logits."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    hidden, weight = (
        torch.from_numpy(rng.standard_normal((n, 1024), np.float32)).to(getattr(torch, dtype)) for n in (100, labels)
    )
    gamma = torch.from_numpy(rng.standard_normal(1024, np.float32))
    exact, _ = reference.label_logits(
        *(x.double().numpy() for x in (hidden, weight)), norm="rms", norm_weight=gamma.double().numpy()
    )
    given = {"norm": "rms", "norm_weight": gamma, "return_order": True}
    ops.set_isa(isa)
    ops.set_num_threads(1)
    try:
        result, _ = ops.label_logits(hidden, weight, **given)
        assert np.abs(result.numpy() - exact).max() <= 1e-5 * np.abs(exact).max()
        benchmark(ops.label_logits, hidden, weight, **given)
    finally:
        ops.set_isa(None)
        ops.set_num_threads(None)
    _report_bytes(benchmark, hidden.nbytes + weight.nbytes + gamma.nbytes + 2 * result.nbytes)


def test_layer_norm(benchmark: Any, isa: str) -> None:
    """Rows of 384 with the copies that the Python face makes."""
    x = np.random.default_rng(0).standard_normal((ROWS, 384), np.float32)
    ones, zeros = np.ones(384, np.float32), np.zeros(384, np.float32)
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
    np.testing.assert_allclose(_cpu_tests.layer_norm(x, ones, zeros, 1e-12, isa), expected, atol=1e-5)
    benchmark(_cpu_tests.layer_norm, x, ones, zeros, 1e-12, isa)
    _report_bytes(benchmark, 2 * x.nbytes)


def test_quantise(benchmark: Any, isa: str) -> None:
    """Rows of 1536 to 8 bits with the copies that the Python face makes."""
    x = np.random.default_rng(0).standard_normal((ROWS, 1536), np.float32)
    q, scale, zero = _cpu_tests.quantise(x, None, isa)
    assert np.abs((q.astype(np.float32) - zero[:, None]) * scale[:, None] - x).max() <= 0.51 * scale.max()
    benchmark(_cpu_tests.quantise, x, None, isa)
    _report_bytes(benchmark, x.nbytes + q.nbytes)


def test_max_sim(benchmark: Any, isa: str) -> None:
    rng = np.random.default_rng(0)
    query = rng.standard_normal((12, 384), np.float32)
    offsets = np.arange(0, 9601, 96)
    tokens = rng.standard_normal((offsets[-1], 384), np.float32)
    ops.set_isa(isa)
    try:
        expected = reference.max_sim(query.astype(np.float64), tokens.astype(np.float64), offsets)
        np.testing.assert_allclose(ops.max_sim(query, tokens, offsets, threads=1), expected, rtol=1e-5)
        benchmark(ops.max_sim, query, tokens, offsets, threads=1)
    finally:
        ops.set_isa(None)
    _report(benchmark, 2.0 * query.size * len(tokens), "float32", isa)
