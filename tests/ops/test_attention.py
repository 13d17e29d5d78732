"""`ops.attention` against its reference: in C++ at every level, in Triton on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import packing
import pytest
import torch
from packing import Case, Segment, documents

from fastrerank import ops
from fastrerank.ops import reference

GPU = torch.cuda.is_available()
CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter's dot products of bfloat16 are wrong without a word, so never there.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]

CASES = {
    "ragged": Case(documents([5, 17, 1, 40, 23]), 4, 2, 64),
    "one token each": Case(documents([1] * 33, "causal")),
    "60 x 3 tokens": Case(documents([3] * 60), 4, 1, 48),
    "causal, groups of 8": Case(documents([21, 2, 50], "causal"), 8, 1, 80),
    "causal, no groups": Case(documents([21, 2, 50], "causal"), 4, 4, 40),
    "local": Case(documents([30, 1, 7, 45], "local"), 2, 1, 96),
    "capped scores": Case(documents([19, 30], "causal"), 2, 2, 64, softcap=5.0),
    "shared prefix": Case([Segment(37, None, "causal"), *documents([9, 1, 14, 3], "causal", 0)], 4, 1, 128),
    "prefix without own keys": Case([Segment(30), *documents([6, 2], "causal", 0), Segment(5)], 2, 1, 32),
    "a prefix each": Case(
        [
            Segment(20, None, "causal"),
            Segment(33, None, "causal"),
            Segment(8, 0, "causal"),
            Segment(5, 1, "causal"),
            Segment(9, 0, "causal"),
            Segment(1, 1, "causal"),
            Segment(4, None, "causal"),
            Segment(6, 1, "causal"),
        ],
        4,
        2,
        32,
    ),
    "prefix and window": Case([Segment(25, None, "window"), *documents([12, 3, 1, 9], "window", 0)], 2, 1, 32),
    "padding": Case(
        [
            Segment(3, None, "padding"),
            Segment(20),
            Segment(19, None, "padding"),
            *documents([4, 9], "causal", 1),
            Segment(21, None, "padding"),
        ],
        2,
        1,
        64,
        softcap=3.0,
    ),
    "nothing but padding": Case([Segment(18, None, "padding")]),
}
LONG = {
    "long prefix": Case([Segment(1100, None, "causal"), *documents([9, 1, 30, 3], "causal", 0)], 2, 1, 32),
    "long documents": Case([Segment(3), Segment(1000), Segment(481, None, "causal")], 1, 1, 32),
    "long local": Case([Segment(7, None, "local"), Segment(1200, None, "local")], 1, 1, 64, softcap=20.0),
}


def triton_attention(monkeypatch: pytest.MonkeyPatch, rows: int = 16, keys: int = 16) -> Callable[..., Any]:
    """`ops.attention` in Triton, in the interpreter with small tiles: small cases then have many."""
    pytest.importorskip("triton")
    import fastrerank.ops._attention.triton as module

    if not GPU:
        monkeypatch.setattr(module, "tile", lambda *_, **__: module.Tile(rows, keys, 4, 2))
    return lambda *args, **options: ops.attention(*args, backend="triton", **options)


def run(op: Callable[..., Any], inputs: list[Any], spans: list[np.ndarray], **options: Any) -> tuple[Any, Any]:
    """The op on NaN-poisoned output; plo and phi are left out where they are empty."""
    device = inputs[0].device
    on_device = [torch.from_numpy(span).to(device) for span in (spans if (spans[3] > spans[2]).any() else spans[:2])]
    out = torch.full_like(inputs[0], torch.nan)
    result, lse = op(*inputs, *on_device, out=out, return_lse=True, **options)
    assert result is out
    return result, lse


def compare(op: Callable[..., Any], case: Case, dtype: Any, device: str = "cpu") -> None:
    inputs, spans = packing.tensors(case, dtype, device), packing.intervals(case.segments)
    packing.check(*run(op, inputs, spans, softcap=case.softcap), inputs, spans, case.softcap)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *LONG])
@pytest.mark.usefixtures("isa")
def test_cpp_equals_the_reference(name: str, dtype: Any) -> None:
    compare(ops.attention, (CASES | LONG)[name], dtype)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", packing.HEAD_SIZES)
@pytest.mark.usefixtures("isa")
def test_cpp_head_sizes(head_dim: int, dtype: Any) -> None:
    case = Case([Segment(19), *documents([6, 1, 17], "causal", 0)], 2, 1, head_dim)
    compare(ops.attention, case, dtype)


@pytest.mark.parametrize("dtype", CPU_DTYPES[:2], ids=str)
@pytest.mark.parametrize("factor", [40.0, 3e6])
@pytest.mark.usefixtures("isa")
def test_cpp_scores_far_apart(factor: float, dtype: Any) -> None:
    # Every third query's scores reach hundreds or tens of millions, with small ones in the rows between.
    case = Case([Segment(310, None, "causal"), *documents([40, 7], "causal", 0), Segment(50)], 4, 2, 64)
    inputs, spans = packing.tensors(case, dtype), packing.intervals(case.segments)
    inputs[0][::3] *= factor
    out, lse = run(ops.attention, inputs, spans)
    exact, exact_lse = reference.attention(*(x.double().numpy() for x in inputs), *spans, scale=64**-0.5)
    plain, _ = packing.plain(inputs[0], inputs[1], inputs[2], spans, 0.0, 64**-0.5)
    for rows in (slice(0, None, 3), slice(1, None, 3)):
        largest = float(np.abs(exact[rows]).max())
        rms, torchs = packing.errors(out[rows], exact[rows])[0], packing.errors(plain[rows], exact[rows])[0]
        assert rms <= 2 * torchs + 0.5 * torch.finfo(dtype).eps * largest
        np.testing.assert_allclose(lse[rows].numpy(), exact_lse[rows], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.gpu
def test_triton_equals_the_reference(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(triton_attention(monkeypatch), CASES[name], dtype, "cuda" if GPU else "cpu")


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", packing.HEAD_SIZES)
@pytest.mark.gpu
def test_triton_head_sizes(head_dim: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([Segment(19), *documents([6, 1, 17], "causal", 0)], 2, 1, head_dim)
    compare(triton_attention(monkeypatch, 32, 16), case, dtype, "cuda" if GPU else "cpu")


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.gpu
def test_triton_long(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(triton_attention(monkeypatch), LONG[name], dtype, "cuda")


@pytest.mark.gpu
def test_triton_the_tile_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(triton_attention(monkeypatch, 128, 64), CASES["shared prefix"], torch.float16, "cuda" if GPU else "cpu")


def any_intervals(rows: int, keys: int, seed: int) -> list[np.ndarray]:
    """Intervals without any order: the first ends before a random key, the second begins there."""
    random = np.random.default_rng(seed)
    middle = random.integers(0, keys + 1, rows)
    plo = (random.random(rows) * (middle + 1)).astype(np.int32)
    hi = middle + (random.random(rows) * (keys - middle + 1)).astype(np.int32)
    bounds = [middle + (hi - middle) // 3, hi, plo, plo + (middle - plo) // 2]
    return [bound.astype(np.int32) for bound in bounds]


@pytest.mark.parametrize("level", ops.cpu_info()["supported"])
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize(("prefix", "own"), [(1, 1), (40, 70), (480, 33), (479, 500), (700, 600)])
def test_a_shared_prefix_changes_no_bit_on_the_cpu(level: str, dtype: Any, prefix: int, own: int) -> None:
    # Two segments behind one prefix, and the second of them with the prefix as one causal sequence of its own.
    random = torch.Generator().manual_seed(prefix)
    q, k, v = (torch.randn(prefix + 2 * own, heads, 24, generator=random).to(dtype) for heads in (4, 2, 2))
    rows = np.arange(prefix + 2 * own)
    lo = np.repeat([0, prefix, prefix + own], [prefix, own, own])
    phi = np.where(rows < prefix, 0, prefix)
    alone = np.concatenate([rows[:prefix], rows[prefix + own :]])
    spans = [torch.from_numpy(bound.astype(np.int32)) for bound in (lo, rows + 1, np.zeros_like(rows), phi)]
    single = [torch.from_numpy(bound.astype(np.int32)) for bound in (np.zeros_like(alone), np.arange(len(alone)) + 1)]
    ops.set_isa(level)
    try:
        shared = ops.attention(q, k, v, *spans)
        expected = ops.attention(q[alone], k[alone], v[alone], *single)
    finally:
        ops.set_isa(None)
    assert torch.equal(shared[prefix + own :], expected[prefix:])


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.gpu
def test_any_intervals_and_fewer_queries_than_keys(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    op = ops.attention if backend == "cpp" else triton_attention(monkeypatch)
    device = "cuda" if GPU and backend == "triton" else "cpu"
    _, k, v = packing.tensors(Case(documents([90]), 2, 2), torch.float32, device)
    q = packing.tensors(Case(documents([41]), 4), torch.float32, device, 1)[0]
    spans = any_intervals(41, 90, seed)
    packing.check(*run(op, [q, k, v], spans, scale=0.3), [q, k, v], spans, scale=0.3)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.gpu
def test_strided_views_are_read_and_written_in_place(backend: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton" and dtype not in TRITON_DTYPES:
        pytest.skip("no CUDA device")
    op = ops.attention if backend == "cpp" else triton_attention(monkeypatch)
    device = "cuda" if GPU and backend == "triton" else "cpu"
    case = CASES["ragged"]
    q, k, v = packing.tensors(case, dtype, device)
    spans = packing.intervals(case.segments)
    rows, heads, head_dim = q.shape
    heads_first = q.transpose(0, 1)[None].contiguous()  # [1, H, T, D], as transformers hands it over
    fused = torch.stack([k, v], 2).flatten(2)  # (T, Hkv, 2 D)
    views = [heads_first[0].transpose(0, 1), fused[..., :head_dim], fused[..., head_dim:]]
    assert not any(view.is_contiguous() for view in views)
    wide = torch.full((rows, heads + 2, head_dim + 8), 7.0, dtype=dtype, device=device)
    on_device = [torch.from_numpy(span).to(device) for span in spans[:2]]
    out, lse = op(*views, *on_device, out=wide[:, 1:-1, :head_dim], return_lse=True)
    packing.check(out, lse, [q, k, v], spans)
    assert torch.equal(out, op(q, k, v, *on_device))
    wide[:, 1:-1, :head_dim] = 7.0
    assert (wide == 7.0).all()


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["bidirectional", "causal", "window", "local"])
@pytest.mark.usefixtures("isa")
def test_a_segment_is_bitwise_the_same_in_any_company(mode: str, dtype: Any, threads: Any) -> None:
    prefix, length, heads, head_dim = 501, 83, 4, 40
    alone = Case([Segment(prefix, None, mode), Segment(length, 0, mode)], heads, 2, head_dim)
    inputs = packing.tensors(alone, dtype)
    own, own_lse = run(ops.attention, inputs, packing.intervals(alone.segments))
    for before, between, after in ([[1], [33, 1], [5]], [[490, 3], [], [600]], [[], [1] * 7, []]):
        shared = len(before)  # the prefix's number
        segments = [
            *documents(before, mode),
            Segment(prefix, None, mode),
            *documents(between, mode, shared),
            Segment(length, shared, mode),
            *documents(after, mode, shared),
            Segment(9, None, "padding"),
        ]
        start, again = sum(before), sum(before) + prefix + sum(between)
        places = np.r_[start : start + prefix, again : again + length]
        company = packing.tensors(Case(segments, heads, 2, head_dim), dtype, seed=1)
        for tensor, value in zip(company, inputs, strict=True):
            tensor[places] = value
        for n in (1, 3):
            threads(n)
            out, lse = run(ops.attention, company, packing.intervals(segments))
            assert torch.equal(out[places], own)
            assert torch.equal(lse[places], own_lse)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield ops.set_num_threads
    ops.set_num_threads(None)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_nan_stays_in_its_segment_and_in_it_is_not_lost(dtype: Any) -> None:
    segments = [*documents([11, 20, 9], "causal"), Segment(4, None, "padding")]
    clean = packing.tensors(Case(segments), dtype)
    spans = packing.intervals(segments)
    expected, _ = run(ops.attention, clean, spans)
    for spoiled in range(3):
        inputs = [tensor.clone() for tensor in clean]
        inputs[spoiled][11:31, :, 3] = torch.nan
        inputs[spoiled][40:] = torch.nan
        out, _ = run(ops.attention, inputs, spans)
        others = np.r_[0:11, 31:44]
        assert torch.equal(out[others], expected[others])
        if spoiled < 2:
            assert out[11:31].isnan().all()
        else:
            assert out[11:31, :, 3].isnan().all()
    inputs = [tensor.clone() for tensor in clean]
    inputs[1][15, :, 0] = torch.nan  # rows before it do not see that key
    out, _ = run(ops.attention, inputs, spans)
    assert torch.equal(out[:15], expected[:15])
    assert out[15:31].isnan().all()


@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.gpu
def test_triton_gives_the_same_bits_again() -> None:
    case = CASES["a prefix each"]
    inputs, spans = packing.tensors(case, torch.bfloat16, "cuda"), packing.intervals(case.segments)
    first, first_lse = run(ops.attention, inputs, spans)
    for _ in range(5):
        out, lse = run(ops.attention, inputs, spans)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


def example() -> dict[str, Any]:
    case = Case(documents([3, 4]), 2, 1, 16)
    lo, hi, plo, phi = (torch.from_numpy(span) for span in packing.intervals(case.segments))
    q, k, v = packing.tensors(case, torch.float32)
    return {"q": q, "k": k, "v": v, "lo": lo, "hi": hi, "plo": plo, "phi": phi}


def i32(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(7, 32)}, r"q must be .* \(rows, heads, D\), got torch.float32 \(7, 32\)"),
        ({"q": torch.zeros(7, 2, 16, dtype=torch.float64)}, "q must be float32, float16 or bfloat16"),
        ({"q": torch.zeros(7, 16, 2).transpose(1, 2)}, "q must be contiguous along D"),
        ({"q": torch.zeros(7, 2, 16, requires_grad=True)}, "no gradient"),
        ({"q": torch.zeros(7, 2, 264), "k": torch.zeros(7, 1, 264), "v": torch.zeros(7, 1, 264)}, "1 to 256, got 264"),
        ({"k": torch.zeros(7, 1, 16).half()}, "k must be torch.float32 on cpu like q"),
        ({"k": torch.zeros(7, 1, 8)}, "k must be"),
        ({"q": torch.zeros(7, 3, 16), "k": torch.zeros(7, 2, 16)}, "Hkv dividing 3 heads"),
        ({"v": torch.zeros(6, 1, 16)}, r"v must have k's shape \(7, 1, 16\), got \(6, 1, 16\)"),
        ({"lo": torch.zeros(7, dtype=torch.int64)}, r"lo must be int32 of shape \(7,\), got torch.int64"),
        ({"hi": i32(1, 2)}, r"hi must be int32 of shape \(7,\)"),
        ({"phi": None}, "got only plo"),
        ({"plo": None}, "got only phi"),
        ({"phi": torch.zeros(3, dtype=torch.int32)}, "phi must be int32"),
        ({"lo": i32(0, 0, 0, 3, -1, 3, 3)}, r"0 <= lo\[i\] <= hi\[i\] <= 7.* got \[-1, 7\) at row 4"),
        ({"lo": i32(0, 0, 4, 3, 3, 3, 3)}, r"got \[4, 3\) at row 2"),
        ({"hi": i32(3, 3, 3, 7, 7, 7, 8)}, r"got \[3, 8\) at row 6"),
        ({"phi": i32(0, 0, 0, 0, 0, 0, 8)}, r"plo and phi .* got \[0, 8\) at row 6"),
        ({"phi": i32(0, 0, 0, 0, 4, 0, 0)}, "must not overlap; both hold key 3 at row 4"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"softcap": -1.0}, "softcap must be finite and at least 0"),
        ({"out": torch.zeros(7, 1, 16)}, r"out must have q's shape \(7, 2, 16\), got \(7, 1, 16\)"),
        ({"out": torch.zeros(7, 2, 16).half()}, "out must be torch.float32"),
        ({"backend": "cuda"}, "backend must be one of cpp, triton or None, got 'cuda'"),
        ({"q": torch.zeros(7, 2, 16, device="meta")}, "k must be torch.float32 on meta"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention(**(example() | changes))


@pytest.mark.parametrize("name", ["q", "k", "v", "lo", "hi", "plo", "phi"])
def test_arrays_that_are_no_tensors_are_refused(name: str) -> None:
    given = example()
    given[name] = given[name].numpy()
    with pytest.raises((TypeError, AttributeError), match=rf"{name} must be a torch.Tensor|requires_grad"):
        ops.attention(**given)


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="takes CUDA tensors"):
        ops.attention(**example(), backend="triton")


def test_no_rows_and_no_keys() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    k = torch.ones(3, 1, 16)
    out, lse = ops.attention(torch.zeros(0, 2, 16), k, k, none, none, return_lse=True)
    assert out.shape == (0, 2, 16)
    assert lse.shape == (0, 2)
    zeros = torch.zeros(3, dtype=torch.int32)
    out, lse = ops.attention(k, k[:0], k[:0], zeros, zeros, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    q = torch.full((2, 1, 8), 100.0)
    k = torch.stack([torch.full((1, 8), x) for x in (-100.0, 100.0)])
    out, lse = ops.attention(q, k, k, i32(0, 0), i32(2, 1), return_lse=True)
    assert out[:, 0, 0].tolist() == [100.0, -100.0]
    np.testing.assert_allclose(lse[:, 0], [80000 * 8**-0.5, -80000 * 8**-0.5], rtol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_keeps_one_graph(backend: str) -> None:
    case = CASES["a prefix each"]
    q, k, v = packing.tensors(case, torch.float32)
    spans = [torch.from_numpy(span) for span in packing.intervals(case.segments)]

    def layer(q: Any, k: Any, v: Any, *spans: Any) -> Any:
        out, lse = ops.attention(q * 2, k, v, *spans, softcap=4.0, return_lse=True)
        return out + 1, lse, ops.attention(q, k, v, *spans[:2]), ops.attention(q, k, v, *spans, out=torch.empty_like(q))

    torch._dynamo.reset()
    results = torch.compile(layer, fullgraph=True, backend=backend)(q, k, v, *spans)
    for compiled, eager in zip(results, layer(q, k, v, *spans), strict=True):
        assert torch.equal(compiled, eager)


def test_the_registered_op_passes_torchs_checks() -> None:
    case = CASES["shared prefix"]
    spans = [torch.from_numpy(span) for span in packing.intervals(case.segments)]
    ops.attention(*packing.tensors(case, torch.float32), *spans)
    for with_lse in (False, True):
        torch.library.opcheck(
            torch.ops.fastrerank.attention.default,
            (*packing.tensors(case, torch.bfloat16), *spans, None, 2.0, with_lse, None),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_importing_ops_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys, fastrerank.ops; print('attention' in fastrerank.ops.__all__, {'torch', 'triton'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.split() == ["True", "set()"]


def test_the_reference_is_softmax_attention() -> None:
    case = CASES["capped scores"]
    inputs, spans = packing.tensors(case, torch.float64), packing.intervals(case.segments)
    out, lse = reference.attention(*(tensor.numpy() for tensor in inputs), *spans, softcap=case.softcap)
    expected, expected_lse = packing.plain(*inputs, spans, case.softcap, case.head_dim**-0.5)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)


@pytest.mark.parametrize("width", [7, 8])
def test_an_out_that_cannot_hold_the_result_is_refused(width: int) -> None:
    q, bounds = torch.zeros(3, 2, width), torch.tensor([0, 0, 0], dtype=torch.int32)
    for out in (torch.zeros(3, 1, width).expand(3, 2, width), torch.zeros(1, 2, width).expand(3, 2, width)):
        with pytest.raises(ValueError, match="out must have a place of its own for every value"):
            ops.attention(q, q, q, bounds, bounds + 3, out=out)
    with pytest.raises(ValueError, match="out must not require a gradient"):
        ops.attention(q, q, q, bounds, bounds + 3, out=torch.nn.Parameter(torch.zeros_like(q)))
    turned = torch.zeros(2, 3, width).transpose(0, 1)
    assert ops.attention(q, q, q, bounds, bounds + 3, out=turned) is turned
