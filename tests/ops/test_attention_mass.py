"""`ops.attention_mass` against its reference: in C++ at every level, in Triton on a GPU or in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import packing
import pytest
import torch

from fastrerank import ops
from fastrerank.ops import reference

GPU = torch.cuda.is_available()
CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter's dot products of bfloat16 are wrong without a word, so never there.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


class Case(NamedTuple):
    """R rows read at S keys. sees: "all" keys; "some", any intervals, also empty ones; "causal"; "window"."""

    rows: int
    keys: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    sees: str = "all"
    softcap: float = 0.0
    weighted: bool = False  # heads have weights, of which some are 0
    per_head: bool = False
    spread: float = 1.0  # of the queries: large ones make sharp attention


CASES = {
    "two branches": Case(50, 131, 4, 1, 64),
    "one row": Case(1, 97, 8, 1, 64),
    "one row, one key": Case(1, 1, 1, 1, 32),
    "no groups": Case(9, 49, 4, 4, 80),
    "groups of 7, weighted": Case(13, 65, 14, 2, 64, weighted=True),
    "capped scores": Case(17, 48, 4, 2, 96, softcap=5.0, spread=4.0),
    "any intervals, capped, weighted": Case(41, 90, 6, 3, 40, "some", 3.0, True),
    "causal": Case(35, 35, 4, 1, 128, "causal"),
    "window": Case(30, 145, 2, 1, 32, "window"),
    "per head": Case(19, 50, 4, 2, 64, per_head=True),
    "per head, any intervals": Case(18, 100, 3, 1, 24, "some", per_head=True),
    "sharp": Case(21, 77, 4, 1, 64, spread=12.0),
    "more rows than a chunk": Case(210, 55, 2, 1, 16, "some"),
}
LONG = {"long": Case(50, 1500, 4, 2, 64), "long, windows": Case(64, 1100, 2, 2, 48, "window")}


class Given(NamedTuple):
    """The op's positional arguments, and the others."""

    tensors: tuple[torch.Tensor, ...]
    options: dict[str, Any]


def intervals(case: Case, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    row = np.arange(case.rows)
    lo, hi = np.zeros(case.rows, int), np.full(case.rows, case.keys)
    if case.sees == "causal":
        hi = row + 1
    elif case.sees == "window":  # the last rows of a longer prompt
        hi = np.minimum(case.keys, case.keys - case.rows // 2 + row)
        lo = np.maximum(0, case.keys - case.rows // 2 + row - case.keys // 3)
    elif case.sees == "some":
        lo = random.integers(0, case.keys + 1, case.rows)
        hi = lo + (random.random(case.rows) * (case.keys - lo + 1)).astype(int)
        lo[::5] = hi[::5]
    return lo.astype(np.int32), hi.astype(np.int32)


def make(case: Case, dtype: Any, device: str = "cpu", seed: int = 0) -> Given:
    """Arguments of the op; denominators of every second row are about twice as many keys as its interval has."""
    random = np.random.default_rng(seed)
    q = torch.tensor(random.normal(0, case.spread, (case.rows, case.heads, case.head_dim))).to(dtype)
    k = torch.tensor(random.normal(size=(case.keys, case.kv_heads, case.head_dim))).to(dtype)
    lo, hi = intervals(case, random)
    scores = np.einsum("rhd,shd->hrs", q.double(), k.double().repeat_interleave(case.heads // case.kv_heads, 1))
    scores *= case.head_dim**-0.5
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    key = np.arange(case.keys)
    seen = (key >= lo[:, None]) & (key < hi[:, None])
    with np.errstate(divide="ignore"):
        lse = np.log((np.exp(scores) * seen).sum(-1)).T + np.where(np.arange(case.rows) % 2, np.log(2), 0)[:, None]
    weight = np.where(np.arange(case.rows) < case.rows // 2, 1.0, -0.6) * random.random(case.rows)
    bounds = [torch.tensor(bound) for bound in (lo, hi)]
    tensors = (q, k, torch.tensor(lse).float(), *bounds, torch.tensor(weight).float())
    options: dict[str, Any] = {"softcap": case.softcap, "per_head": case.per_head}
    if case.weighted:
        heads = np.arange(case.heads)
        options["head_weight"] = torch.tensor(np.where(heads % 3 == 1, 0, 1 - heads / 3)).float().to(device)
    return Given(tuple(tensor.to(device) for tensor in tensors), options)


def plain(given: Given) -> Any:
    """The same as one writes it in torch, in float32."""
    q, k, lse, lo, hi, weight = (tensor.float() for tensor in given.tensors)
    scores = torch.einsum("rhd,shd->hrs", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * q.shape[2] ** -0.5
    cap = given.options["softcap"]
    scores = cap * torch.tanh(scores / cap) if cap else scores
    key = torch.arange(len(k), device=q.device)
    seen = (key >= lo[:, None]) & (key < hi[:, None])
    shares = torch.exp(scores - lse.T[:, :, None]).where(seen, 0)
    masses = (shares * weight[:, None]).sum(1)
    heads = given.options.get("head_weight")
    if given.options["per_head"]:
        return masses
    return masses.sum(0) if heads is None else (masses * heads[:, None]).sum(0)


def exact(given: Given) -> np.ndarray:
    """The reference in float64, on the same values."""

    def wide(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return (value.double() if value.is_floating_point() else value).cpu().numpy()

    options = {name: wide(value) for name, value in given.options.items()}
    return reference.attention_mass(*(wide(tensor) for tensor in given.tensors), **options)


def check(*calls: Given, **options: Any) -> None:
    """Errors against float64 of at most twice those of plain torch in float32, whatever the inputs' dtype."""
    results = [ops.attention_mass(*given.tensors, **given.options, **options) for given in calls]
    rights = [exact(given) for given in calls]
    for result, right in zip(results, rights, strict=True):
        assert result.dtype == torch.float32
        assert result.shape == right.shape
        assert not result.isnan().any()
    right = np.concatenate([right.ravel() for right in rights])
    both = [torch.cat([value.flatten() for value in values]) for values in (results, map(plain, calls))]
    ours, theirs = (packing.errors(values, right) for values in both)
    floor = 0.5 * 2.0**-23 * float(np.abs(right).max(initial=0))  # half a last bit: torch may have been lucky
    assert ours[0] <= 2 * theirs[0] + floor, f"rms error {ours[0]:.3g}, plain torch's {theirs[0]:.3g}"
    assert ours[1] <= 4 * theirs[1] + 4 * floor, f"largest error {ours[1]:.3g}, plain torch's {theirs[1]:.3g}"


def small_tiles(monkeypatch: pytest.MonkeyPatch, queries: int = 16, keys: int = 16) -> dict[str, str]:
    """Triton, in the interpreter with small tiles: small cases then have many."""
    pytest.importorskip("triton")
    import fastrerank.ops._attention_mass.triton as module

    if not GPU:
        monkeypatch.setattr(module, "tile", lambda *_: module.Tile(queries, keys, 4, 2))
    return {"backend": "triton"}


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *LONG])
@pytest.mark.usefixtures("isa")
def test_cpp_equals_the_reference(name: str, dtype: Any) -> None:
    check(make((CASES | LONG)[name], dtype))


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 33, *packing.HEAD_SIZES])
@pytest.mark.usefixtures("isa")
def test_cpp_head_sizes(head_dim: int, dtype: Any) -> None:
    check(make(Case(11, 70, 4, 2, head_dim), dtype))


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 15])
@pytest.mark.usefixtures("isa")
def test_cpp_numbers_of_rows_and_keys(rows: int) -> None:
    keys = [1, 3, 7, 8, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49, 63, 95, 96, 479, 481]
    check(*(make(Case(rows, n, 2, 1, 8), torch.float32) for n in keys))  # one bound: a few keys' errors are luck


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield ops.set_num_threads
    ops.set_num_threads(None)


@pytest.mark.parametrize("name", ["two branches", "any intervals, capped, weighted", "window", "per head", "long"])
@pytest.mark.usefixtures("isa")
def test_a_key_is_bitwise_the_same_in_any_company(name: str, threads: Any) -> None:
    case = (CASES | LONG)[name]
    given = make(case, torch.bfloat16)
    whole = ops.attention_mass(*given.tensors, **given.options)
    q, k, lse, lo, hi, weight = given.tensors
    random = np.random.default_rng(1)
    for n in (1, 2, 5, 16):
        threads(n)
        assert torch.equal(ops.attention_mass(*given.tensors, **given.options), whole)
        for _ in range(6):  # some of the keys, and rows that see none of them
            begin, end = np.sort(random.integers(0, case.keys + 1, 2))
            bounds = [bound.clamp(int(begin), int(end)) - int(begin) for bound in (lo, hi)]
            part = ops.attention_mass(q, k[begin:end], lse, *bounds, weight, **given.options)
            assert torch.equal(part, whole[..., begin:end])
        strange = torch.full((3, case.heads, case.head_dim), torch.nan).to(q.dtype)
        more = [torch.cat([tensor, tensor[:3]]) for tensor in (lse, lo, hi, weight)]
        more[2][-3:] = more[1][-3:]
        assert torch.equal(ops.attention_mass(torch.cat([q, strange]), k, *more, **given.options), whole)


def test_heads_are_added_one_after_another_on_the_cpu() -> None:
    given = make(CASES["per head"], torch.float32)
    masses = ops.attention_mass(*given.tensors, per_head=True)
    total = torch.zeros(masses.shape[1])
    for mass in masses:
        total += mass
    assert torch.equal(ops.attention_mass(*given.tensors), total)
    alone = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert torch.equal(ops.attention_mass(*given.tensors, head_weight=alone), masses[2])


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.gpu
def test_the_result_is_added_to_out(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"backend": "cpp"} if backend == "cpp" else small_tiles(monkeypatch)
    device = "cuda" if GPU and backend == "triton" else "cpu"
    for name in ("groups of 7, weighted", "two branches", "per head"):
        given = make(CASES[name], torch.float32, device)
        new = ops.attention_mass(*given.tensors, **given.options, **options)
        wide = torch.randn((*new.shape[:-1], new.shape[-1] + 6), generator=torch.Generator().manual_seed(0)).to(device)
        before = wide.clone()
        view = wide[..., 2:-4]
        assert ops.attention_mass(*given.tensors, **given.options, **options, out=view) is view
        assert torch.equal(view, before[..., 2:-4] + new)
        assert torch.equal(wide[..., :2], before[..., :2])
        assert torch.equal(wide[..., -4:], before[..., -4:])


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.gpu
def test_all_of_the_softmax_is_given_out(backend: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 1 behind `ops.attention`: the masses of all keys sum to the number of rows and heads."""
    options = {"backend": "cpp"} if backend == "cpp" else small_tiles(monkeypatch)
    device = "cuda" if GPU and backend == "triton" else "cpu"
    case = packing.Case(packing.documents([40, 1, 33, 60], mode), 6, 2, 64)
    q, k, v = packing.tensors(case, torch.float32, device)
    lo, hi = (torch.from_numpy(bound).to(device) for bound in packing.intervals(case.segments)[:2])
    _, lse = ops.attention(q, k, v, lo, hi, return_lse=True)
    mass = ops.attention_mass(q, k, lse, lo, hi, torch.ones(len(q), device=device), **options)
    # A logarithm is off by a few of its last bits, and with it the sum of its row.
    bound = q.shape[0] * q.shape[1] * 4 * 2.0**-23 * float(lse.abs().max())
    assert abs(float(mass.double().sum()) - q.shape[0] * q.shape[1]) <= bound
    own = mass[40]  # the document of one token: all of its attention
    assert abs(float(own) - q.shape[1]) <= bound / len(q)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.gpu
def test_rows_that_cancel_leave_rounding_only(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows once with w and once with -w, as where query and calibration query are the same."""
    options = {"backend": "cpp"} if backend == "cpp" else small_tiles(monkeypatch)
    device = "cuda" if GPU and backend == "triton" else "cpu"
    given = make(CASES["two branches"], torch.float32, device)
    q, k, lse, lo, hi, weight = given.tensors
    twice = [torch.cat([tensor, tensor]) for tensor in (lse, lo, hi)]
    both = torch.cat([weight, -weight])
    mass = ops.attention_mass(torch.cat([q, q]), k, *twice, both, **options)
    size = ops.attention_mass(torch.cat([q, q]), k, *twice, both.abs(), **options)
    terms = 2 * q.shape[0] * q.shape[1]
    assert (mass.abs() <= terms * 2.0**-24 * size).all()
    assert (ops.attention_mass(torch.cat([q, q]), k, *twice, 0 * both, **options) == 0).all()


@pytest.mark.usefixtures("isa")
def test_nan_and_infinity_stay_with_the_keys_that_see_them() -> None:
    given = make(Case(20, 120, 4, 2, 40, "some"), torch.float32)
    q, k, lse, lo, hi, weight = given.tensors
    expected = ops.attention_mass(*given.tensors)
    spoiled = k.clone()
    spoiled[33, 0, 5] = torch.nan
    spoiled[70, 1, 0] = torch.inf
    mass = ops.attention_mass(q, spoiled, lse, lo, hi, weight)
    assert mass[33].isnan()
    assert not mass[70].isfinite()
    others = np.delete(np.arange(120), [33, 70])
    assert torch.equal(mass[others], expected[others])
    for name in ("q", "lse", "weight"):
        row = {"q": q.clone(), "lse": lse.clone(), "weight": weight.clone()}
        row[name][7] = torch.nan
        assert hi[7] > lo[7]
        mass = ops.attention_mass(row["q"], k, row["lse"], lo, hi, row["weight"])
        inside = (torch.arange(120) >= lo[7]) & (torch.arange(120) < hi[7])
        assert mass[inside].isnan().all()
        assert torch.equal(mass[~inside], expected[~inside])


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.gpu
def test_rows_without_keys_and_heads_without_weight_are_not_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"backend": "cpp"} if backend == "cpp" else small_tiles(monkeypatch)
    device = "cuda" if GPU and backend == "triton" else "cpu"
    given = make(Case(20, 60, 6, 2, 32), torch.float32, device)
    q, k, lse, lo, hi, weight = (tensor.clone() for tensor in given.tensors)
    heads = torch.tensor([0.5, 0.0, -1.0, 0.0, 0.0, 0.0], device=device)
    expected = ops.attention_mass(*given.tensors, head_weight=heads, **options)
    q[:, [1, 3, 4, 5]] = torch.nan
    k[:, 1] = torch.nan
    lse[:, [1, 3, 4, 5]] = torch.nan
    assert torch.equal(ops.attention_mass(q, k, lse, lo, hi, weight, head_weight=heads, **options), expected)
    assert (ops.attention_mass(q, k, lse, lo, hi, weight, head_weight=0 * heads, **options) == 0).all()
    keep = torch.ones(20, dtype=torch.bool, device=device)
    keep[[2, 9, 19]] = False
    rows = [tensor[keep] for tensor in given.tensors[2:]]
    fewer = ops.attention_mass(given.tensors[0][keep], given.tensors[1], *rows, **options)
    q, k, lse = (tensor.clone() for tensor in given.tensors[:3])
    q[~keep] = torch.nan
    lse[~keep] = -torch.inf
    dead = ops.attention_mass(q, k, lse, lo, hi, weight, **options)
    assert torch.equal(dead, fewer) if backend == "cpp" else torch.allclose(dead, fewer, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("isa")
def test_shares_far_from_one_vanish_or_are_infinite() -> None:
    q, k = torch.ones(1, 1, 8), torch.ones(4, 1, 8) * torch.tensor([-1000.0, 0, 30, 1000])[:, None, None]
    mass = ops.attention_mass(
        q, k, torch.zeros(1, 1), *(torch.tensor([x], dtype=torch.int32) for x in (0, 4)), torch.ones(1)
    )
    assert mass[0] == 0
    assert mass[1] == 1
    assert mass[2].item() == pytest.approx(float(np.exp(30 * 8**0.5)), rel=1e-5)
    assert mass[3] == torch.inf


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.gpu
def test_strided_views_are_read_in_place(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"backend": "cpp"} if backend == "cpp" else small_tiles(monkeypatch)
    device = "cuda" if GPU and backend == "triton" else "cpu"
    given = make(Case(21, 50, 4, 2, 40), torch.float16, device)
    q, k, lse, lo, hi, weight = given.tensors
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)  # as transformers holds it
    fused = torch.stack([k, k.flip(0)], 2).flatten(2)[..., :40]
    pairs = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in (lse, lo, hi, weight)]
    views = (heads_first, fused, *pairs)
    assert not any(view.is_contiguous() for view in views)
    assert torch.equal(ops.attention_mass(*views, **options), ops.attention_mass(*given.tensors, **options))


def test_no_rows_and_no_keys() -> None:
    q, k, lse, lo, hi, weight = make(Case(5, 9), torch.float32).tensors
    none = [tensor[:0] for tensor in (lse, lo, hi, weight)]
    assert ops.attention_mass(q[:0], k, *none).tolist() == [0.0] * 9
    assert ops.attention_mass(q[:0], k, *none, per_head=True).shape == (4, 9)
    assert ops.attention_mass(q, k[:0], lse, 0 * lo, 0 * hi, weight).shape == (0,)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *(LONG if GPU else {})])
@pytest.mark.gpu
def test_triton_equals_the_reference(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = small_tiles(monkeypatch)
    check(make((CASES | LONG)[name], dtype, "cuda" if GPU else "cpu"), **options)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", packing.HEAD_SIZES)
@pytest.mark.gpu
def test_triton_head_sizes(head_dim: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = small_tiles(monkeypatch, 16, 32)
    check(make(Case(11, 70, 4, 2, head_dim), dtype, "cuda" if GPU else "cpu"), **options)


@pytest.mark.parametrize("name", ["two branches", "groups of 7, weighted", "per head"])
@pytest.mark.gpu
def test_triton_the_tile_of_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = small_tiles(monkeypatch, 64, 128)
    check(make(CASES[name], torch.float16, "cuda" if GPU else "cpu"), **options)


@pytest.mark.parametrize("name", ["two branches", "any intervals, capped, weighted", "per head"])
@pytest.mark.gpu
def test_triton_gives_the_same_bits_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = small_tiles(monkeypatch)
    given = make(CASES[name], torch.float16, "cuda" if GPU else "cpu")
    first = ops.attention_mass(*given.tensors, **given.options, **options)
    for _ in range(3):
        assert torch.equal(ops.attention_mass(*given.tensors, **given.options, **options), first)


@pytest.mark.gpu
def test_triton_clamps_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    options = small_tiles(monkeypatch)
    given = make(Case(6, 40), torch.float32, "cuda" if GPU else "cpu")
    q, k, lse, lo, hi, weight = given.tensors
    expected = ops.attention_mass(*given.tensors, **options)
    assert torch.equal(ops.attention_mass(q, k, lse, lo - 3, hi + 100, weight, **options), expected)


def test_memory_does_not_grow_with_rows_times_keys() -> None:
    """64 rows of 16 heads at 32768 keys: rows x heads x keys would be 134 MB, rows x keys 8 MB of float32."""
    code = """
import torch
from fastrerank import ops
from fastrerank.evaluation.worker import peak_bytes
ops.set_num_threads(2)
def run(keys):
    q, k = torch.zeros(64, 16, 8), torch.zeros(keys, 1, 8)
    lo, hi = torch.zeros(64, dtype=torch.int32), torch.full((64,), keys, dtype=torch.int32)
    return ops.attention_mass(q, k, torch.zeros(64, 16), lo, hi, torch.ones(64))
run(480)
before = peak_bytes()
assert (run(32768) == 1024).all()
print(peak_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 6e6  # keys and result are 1.2 MB, a task's scratch is 0.1 MB


def example() -> dict[str, Any]:
    q, k, lse, lo, hi, weight = make(Case(7, 9, 2, 1, 16), torch.float32).tensors
    return {"q": q, "k": k, "lse": lse, "lo": lo, "hi": hi, "row_weight": weight}


def i32(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(7, 32)}, r"q must be .* \(rows, heads, D\), got torch.float32 \(7, 32\)"),
        ({"q": torch.zeros(7, 2, 16, dtype=torch.float64)}, "q must be float32, float16 or bfloat16"),
        ({"q": torch.zeros(7, 16, 2).transpose(1, 2)}, "q must be contiguous along D"),
        ({"q": torch.zeros(7, 2, 16, requires_grad=True)}, "no gradient"),
        ({"row_weight": torch.zeros(7, requires_grad=True)}, "no gradient"),
        ({"q": torch.zeros(7, 2, 264), "k": torch.zeros(9, 1, 264)}, "1 to 256, got 264"),
        ({"k": torch.zeros(9, 1, 16).half()}, "k must be torch.float32 on cpu like q"),
        ({"k": torch.zeros(9, 1, 8)}, "k must be"),
        ({"q": torch.zeros(7, 3, 16), "k": torch.zeros(9, 2, 16)}, "Hkv dividing 3 heads"),
        ({"lse": torch.zeros(2, 7)}, r"lse must be float32 of shape \(7, 2\), got torch.float32 \(2, 7\)"),
        ({"lse": torch.zeros(7, 2).half()}, "lse must be float32"),
        ({"lo": torch.zeros(7, dtype=torch.int64)}, r"lo must be int32 of shape \(7,\), got torch.int64"),
        ({"hi": i32(1, 2)}, r"hi must be int32 of shape \(7,\)"),
        ({"row_weight": torch.zeros(7, dtype=torch.float64)}, r"row_weight must be float32 of shape \(7,\)"),
        ({"head_weight": torch.zeros(1)}, r"head_weight must be float32 of shape \(2,\)"),
        ({"head_weight": torch.ones(2), "per_head": True}, "head_weight must be None with per_head"),
        ({"lo": i32(0, 0, 0, 3, -1, 3, 3)}, r"0 <= lo\[i\] <= hi\[i\] <= 9.* got \[-1, 9\) at row 4"),
        ({"hi": i32(3, 3, 3, 7, 7, 7, 10)}, r"got \[0, 10\) at row 6"),
        ({"lo": i32(0, 0, 9, 3, 3, 3, 3), "hi": i32(*[7] * 7)}, r"got \[9, 7\) at row 2"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"softcap": -1.0}, "softcap must be finite and at least 0"),
        ({"out": torch.zeros(7)}, r"out must be float32 of shape \(9,\), got torch.float32 \(7,\)"),
        ({"out": torch.zeros(9), "per_head": True}, r"out must be float32 of shape \(2, 9\)"),
        ({"out": torch.zeros(9).half()}, "out must be float32"),
        ({"out": torch.zeros(9, 2)[:, 0]}, "out must be contiguous along the keys"),
        ({"out": torch.zeros(1, 9).expand(2, 9), "per_head": True}, "a place of its own"),
        ({"backend": "cuda"}, "backend must be one of cpp, triton or None, got 'cuda'"),
        ({"q": torch.zeros(7, 2, 16, device="meta")}, "k must be torch.float32 on meta"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention_mass(**(example() | changes))


@pytest.mark.parametrize("name", ["q", "k", "lse", "lo", "hi", "row_weight", "head_weight", "out"])
def test_arrays_that_are_no_tensors_are_refused(name: str) -> None:
    given = example() | {name: np.zeros(3, np.float32)}
    with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor"):
        ops.attention_mass(**given)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_keeps_one_graph(backend: str) -> None:
    given = make(CASES["two branches"], torch.float32)
    heads = torch.tensor([1.0, 0.5, 0.0, 2.0])

    def layers(q: Any, *others: Any) -> Any:
        total = ops.attention_mass(q * 2, *others, softcap=4.0)
        total = ops.attention_mass(q, *others, head_weight=heads, out=total)
        return total + 1, ops.attention_mass(q, *others, per_head=True)

    torch._dynamo.reset()
    results = torch.compile(layers, fullgraph=True, backend=backend)(*given.tensors)
    for compiled, eager in zip(results, layers(*given.tensors), strict=True):
        assert torch.equal(compiled, eager)


def test_the_registered_op_passes_torchs_checks() -> None:
    given = make(CASES["two branches"], torch.bfloat16)
    ops.attention_mass(*given.tensors)
    for per_head in (False, True):
        torch.library.opcheck(
            torch.ops.fastrerank.attention_mass.default,
            (*given.tensors, None if per_head else torch.ones(4), None, 2.0, per_head, None),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_the_reference_is_the_sum_of_softmax_rows() -> None:
    for name in ("any intervals, capped, weighted", "per head, any intervals"):
        given = make(CASES[name], torch.float64)
        q, k, lse, lo, hi, weight = given.tensors
        wide = Given((q, k, lse.double(), lo, hi, weight.double()), given.options)
        np.testing.assert_allclose(exact(wide), plain(wide), rtol=1e-4, atol=1e-6)
        out = np.ones_like(exact(wide))
        arrays = [tensor.numpy() for tensor in wide.tensors]
        options = {n: v.double().numpy() if isinstance(v, torch.Tensor) else v for n, v in wide.options.items()}
        np.testing.assert_array_equal(reference.attention_mass(*arrays, **options, out=out), 1 + exact(wide))
