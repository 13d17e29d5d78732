"""Kernels alone on a GPU: attention, its mass and label logits against torch's, and the ceilings over everything.

Times are of a CUDA graph that holds several calls, between two events, divided by the calls: launches cost nothing
there, as they do in a graphed forward. Beside them stands the time of one call as Python makes it. Inputs are warm in
the cache where they fit, as they are behind a projection. On a CPU everything is timed by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.cross_encoder.gpu_engines import DTYPE, NotHere, find_varlen
from bench.cross_encoder.gpu_models import key_pairs
from fastrerank import ops
from fastrerank.engine.batch import Batch, PackedBatch

CALLS = 10  # calls in one graph
WARM = 3


@dataclass(frozen=True)
class AttentionCase:
    """H heads of D on documents of these lengths; a window cuts off keys at `window` positions and beyond."""

    name: str
    heads: int
    head_dim: int
    lengths: NDArray[np.int64]
    window: int | None = None

    @property
    def flop(self) -> float:
        """Equals 2 x the multiply-accumulates of q @ k.T and of the weights @ v, keys inside the window only."""
        return 4.0 * self.head_dim * self.heads * key_pairs(self.lengths, self.window)

    def bytes(self, itemsize: int) -> float:
        """Equals the fewest bytes that can be moved: q, k and v read, the output written."""
        return 4.0 * itemsize * self.heads * self.head_dim * float(self.lengths.sum())


@dataclass(frozen=True)
class LabelCase:
    """K labels at N last positions of a model of width h, whose head has V rows."""

    name: str
    rows: int
    labels: int
    width: int
    vocabulary: int

    @property
    def flop(self) -> float:
        """Equals 2 x the multiply-accumulates of the labels' rows; the norm is not counted."""
        return 2.0 * self.rows * self.labels * self.width

    def bytes(self, itemsize: int) -> float:
        """Equals the fewest bytes that can be moved: states, label rows and norm weight read, logits and order
        written."""
        values = (self.rows + self.labels + 1) * self.width
        return float(itemsize * values + 8 * self.rows * self.labels)


@dataclass(frozen=True)
class MassCase:
    """R rows of one layer, H query and Hkv key heads of D, read at S keys that every row sees."""

    name: str
    rows: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def flop(self) -> float:
        """Equals 2 x the multiply-accumulates of q @ k.T; exponentials are not counted."""
        return 2.0 * self.rows * self.keys * self.heads * self.head_dim

    def bytes(self, itemsize: int) -> float:
        """Equals the fewest bytes that can be moved: q, k and logarithms read, the masses read and written."""
        values = self.head_dim * (self.rows * self.heads + self.keys * self.kv_heads)
        return float(itemsize * values + 4 * self.rows * self.heads + 8 * self.keys)


@dataclass
class KernelResult:
    """Seconds per call of one way: `graph` (in a CUDA graph; empty where it cannot be captured) and `call`."""

    case: str
    way: str
    state: str = "ok"
    detail: str = ""
    error: float = 0.0
    graph: list[float] = field(default_factory=list)
    call: list[float] = field(default_factory=list)


def timed_call(run: Callable[[], Any], device: torch.device) -> float:
    """Equals the seconds of one call: between CUDA events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Equals a CUDA graph's replay of `CALLS` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph.replay


def ceilings(device: torch.device, *, tiny: bool, rounds: int) -> dict[str, float]:
    """Equals what the device does at best, measured on random data, in the best of `rounds`.

    "matmul": bf16 operations/s of an 8192^3 product; "copy": bytes/s read plus written of a device-to-device copy;
    "read": bytes/s of `ops.bandwidth`, left out where fastrerank was built without CUDA (or there is no GPU).
    """
    size = 256 if tiny else 8192
    a, b = (torch.randn((size, size), device=device).to(torch.bfloat16) for _ in range(2))
    source = torch.randn((1 << 20) if tiny else (1 << 29), device=device)  # 2 GiB on a GPU: several times its L2
    target = torch.empty_like(source)
    expected = a[:4].float() @ b.float()
    assert torch.allclose((a @ b)[:4].float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))

    def best(run: Callable[[], Any]) -> float:
        for _ in range(WARM):
            run()
        return min(timed_call(run, device) for _ in range(rounds))

    found = {
        "matmul": 2.0 * size**3 / best(lambda: torch.mm(a, b)),
        "copy": 2.0 * source.nbytes / best(lambda: target.copy_(source)),
    }
    assert torch.equal(source, target)
    if device.type == "cuda" and ops.cuda_info()["built"]:
        found["read"] = ops.bandwidth(device.index or 0)
    return found


def attention_cases(
    natural: NDArray[np.int64], shapes: dict[str, tuple[int, int]], *, tiny: bool
) -> list[AttentionCase]:
    """Equals every shape on documents of natural lengths and of 512 tokens, and ModernBERT's window on both."""
    full = np.full(2 if tiny else 32, 64 if tiny else 512)
    cases = []
    for name, (heads, head_dim) in shapes.items():
        windows = (None, 17 if tiny else 65) if name.startswith("modernbert") else (None,)
        for window in windows:
            for kind, lengths in (("natural", natural), (f"{len(full)} x {full[0]}", full)):
                label = f"{name} {heads} x {head_dim}, {kind}" + (f", window {window}" if window else "")
                cases.append(AttentionCase(label, heads, head_dim, lengths, window))
    return cases


def attention(case: AttentionCase, device: torch.device, rounds: int) -> list[KernelResult]:
    """Equals the results of ours, varlen_attn and padded SDPA on one case; each is checked before it is timed.

    The bound is that of the tests: the root mean square error against float64 is at most twice that of plain torch
    attention, document by document, in the same precision.
    """
    dtype, rows = getattr(torch, DTYPE), int(case.lengths.sum())
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn((rows, case.heads, case.head_dim), device=device, generator=generator).to(dtype) for _ in range(3)
    )
    exact, plain = _exact(q, k, v, case), _exact(q, k, v, case, dtype)
    ways = {way: lambda make=make: make(q, k, v, case, device) for way, make in _WAYS.items()}
    return _compared(case.name, ways, exact, 2 * _rms(plain, exact), device, rounds)


def mass_cases(*, tiny: bool) -> list[MassCase]:
    """Equals in-context reranking's readout of one layer: 20, 50 and 100 passages, query and calibration."""
    shapes = {"tiny": (4, 2, 32)} if tiny else {"Qwen2.5-0.5B": (14, 2, 64), "Llama-3.1-8B": (32, 8, 128)}
    sizes = ((6, 50),) if tiny else ((60, 2_000), (60, 6_500), (60, 13_000))
    return [
        MassCase(f"{name}, {rows} rows at {keys} keys", rows, keys, *heads)
        for name, heads in shapes.items()
        for rows, keys in sizes
    ]


def attention_mass(case: MassCase, device: torch.device, rounds: int) -> list[KernelResult]:
    """Equals the results of ours and of torch with all scores in memory, in float32; checked before they are timed.

    The bound is that of the tests: twice the rms error of torch in float32 on the same values.
    """
    dtype = getattr(torch, DTYPE)
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((case.rows, case.heads), (case.keys, case.kv_heads))
    q, k = (torch.randn((*shape, case.head_dim), device=device, generator=generator).to(dtype) for shape in shapes)
    weight = torch.randn((case.rows,), device=device, generator=generator)
    lo = torch.zeros((case.rows,), dtype=torch.int32, device=device)
    hi = torch.full_like(lo, case.keys)

    def scores(kind: torch.dtype) -> torch.Tensor:
        grouped = q.to(kind).transpose(0, 1).reshape(case.kv_heads, -1, case.head_dim)
        products = grouped @ k.to(kind).permute(1, 2, 0) * case.head_dim**-0.5
        return products.view(case.heads, case.rows, case.keys)

    lse = scores(torch.float64).logsumexp(-1).float().T.contiguous()

    def plain(kind: torch.dtype) -> torch.Tensor:
        shares = torch.exp(scores(kind) - lse.T[..., None])
        return (weight.to(kind)[:, None] * shares).sum((0, 1))

    exact = plain(torch.float64)
    bound = 2 * _rms(plain(torch.float32), exact)
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "ops.attention_mass": lambda: ops.attention_mass(q, k, lse, lo, hi, weight),
        "torch, float32": lambda: plain(torch.float32),
    }
    ways = {way: lambda run=run: (run, lambda out: out) for way, run in runs.items()}
    return _compared(case.name, ways, exact, bound, device, rounds)


def label_cases(*, tiny: bool) -> list[LabelCase]:
    """Equals the readouts of pointwise rerankers (yes and no) and of FIRST's windows (26 identifiers)."""
    shapes = {"Qwen3-0.6B": (1024, 151_669), "Qwen3-4B": (2560, 151_669), "Llama-3.1-8B": (4096, 128_256)}
    cases = []
    for name, (width, vocabulary) in ({"tiny": (96, 300)} if tiny else shapes).items():
        for rows, labels in ((6, 2), (3, 26)) if tiny else ((100, 2), (1000, 2), (9, 26)):
            cases.append(LabelCase(f"{name}, {rows} x {labels} labels", rows, labels, width, vocabulary))
    return cases


def label_logits(case: LabelCase, device: torch.device, rounds: int) -> list[KernelResult]:
    """Equals the results of ours and of torch: norm and label rows in float32, in bfloat16, and with the whole head.

    Each takes states before the final norm and gives the labels' logits and order. Checked before it is timed: ours and
    torch's in float32 against twice the error of torch's in float32, the ways in bfloat16 against twice their own kind.
    """
    dtype = getattr(torch, DTYPE)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn((case.rows, case.width), device=device, generator=generator).mul_(3).to(dtype)
    head = torch.randn((case.vocabulary, case.width), device=device, generator=generator).mul_(case.width**-0.5)
    head = head.to(dtype)
    gamma = torch.rand((case.width,), device=device, generator=generator).to(dtype)
    ids = torch.arange(case.labels, device=device) * 7
    rows = head[ids].contiguous()

    def products(weight: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        states = torch.nn.functional.rms_norm(hidden.to(kind), (case.width,), gamma.to(kind), 1e-6)
        return states @ weight.to(kind).T

    def ordered(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits, logits.argsort(dim=1, descending=True, stable=True)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.label_logits(hidden, rows, norm="rms", norm_weight=gamma, eps=1e-6, return_order=True)

    exact = products(rows, torch.float64)
    bounds = {kind: 2 * _rms(products(rows, kind), exact) for kind in (torch.float32, dtype)}
    ways: dict[str, tuple[torch.dtype, Callable[[], tuple[torch.Tensor, torch.Tensor]]]] = {
        "ops.label_logits": (torch.float32, ours),
        "torch, label rows, float32": (torch.float32, lambda: ordered(products(rows, torch.float32))),
        f"torch, label rows, {DTYPE}": (dtype, lambda: ordered(products(rows, dtype))),
        f"torch, whole head, {DTYPE}": (dtype, lambda: ordered(products(head, dtype)[:, ids].float())),
    }
    results = []
    for way, (kind, run) in ways.items():
        results += _compared(
            case.name, {way: lambda run=run: (run, lambda out: out[0])}, exact, bounds[kind], device, rounds
        )
    return results


def _compared(
    case: str, ways: dict[str, Callable[[], Way]], exact: torch.Tensor, bound: float, device: torch.device, rounds: int
) -> list[KernelResult]:
    """Every way checked (rms error of at most `bound`), then timed."""
    results = []
    for way, make in ways.items():
        result = KernelResult(case, way)
        results.append(result)
        try:
            run, unpad = make()
            out = unpad(run())
            result.error = _rms(out, exact) / float(exact.double().square().mean().sqrt())
        except NotHere as reason:
            result.state, result.detail = "not here", str(reason)
            continue
        except Exception as error:  # Triton's are no RuntimeErrors; the next way may do
            result.state, result.detail = "failed", said(error)
            continue
        if not _rms(out, exact) <= bound:  # false for NaN
            result.state, result.detail = "WRONG", f"error {_rms(out, exact):.2e}, at most {bound:.2e} allowed"
            continue
        for _ in range(WARM):
            run()
        result.call = [timed_call(run, device) for _ in range(rounds)]
        if device.type == "cuda":
            try:
                replay = captured(run)
            except Exception as error:
                result.detail = f"no graph: {said(error)}"
                continue
            replay()
            result.graph = [timed_call(replay, device) / CALLS for _ in range(rounds)]
    return results


def said(error: Exception) -> str:
    """Equals an error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def packed_batch(lengths: NDArray[np.int64]) -> PackedBatch:
    """Equals a batch of documents of these lengths, of token 0."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Batch(np.zeros(int(offsets[-1]), np.int32), offsets).pack()


Way = tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]  # a call, and what makes the values to compare of it


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase, device: torch.device) -> Way:
    batch = packed_batch(case.lengths)
    spans = (batch.lo, batch.hi) if case.window is None else batch.windowed(case.window)[:2]
    lo, hi = (torch.from_numpy(span).to(device) for span in spans)
    return lambda: ops.attention(q, k, v, lo, hi), lambda out: out


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase, device: torch.device) -> Way:
    attend = find_varlen(device)
    ends = torch.tensor([0, *np.cumsum(case.lengths)], dtype=torch.int32, device=device)
    longest = int(case.lengths.max())
    window = (-1, -1) if case.window is None else (case.window - 1, case.window - 1)
    return lambda: attend(q, k, v, ends, ends, longest, longest, window_size=window), lambda out: out


def _padded_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase, device: torch.device) -> Way:
    """All documents in one batch padded to the longest; padding and its removal are not in the time."""
    longest, count = int(case.lengths.max()), len(case.lengths)
    place = torch.arange(longest, device=device)
    inside = place[None] < torch.from_numpy(case.lengths).to(device)[:, None]  # (N, longest)

    def pad(x: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros((count, longest, *x.shape[1:]), dtype=x.dtype, device=device)
        wide[inside] = x
        return wide.transpose(1, 2)

    seen: torch.Tensor | None = inside[:, None, None]
    if case.window is not None:
        seen = inside[:, None, None] & ((place[:, None] - place[None]).abs() < case.window)
        seen = seen | ~inside[:, None, :, None]  # a padding row sees everything: no row of nothing but -inf
    elif bool(inside.all()):
        seen = None  # the fast path without a mask
    wide = [pad(x) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda: sdpa(*wide, attn_mask=seen), lambda out: out.transpose(1, 2)[inside]


_WAYS: dict[str, Callable[..., Way]] = {"ops.attention": _ours, "varlen_attn": _varlen, "padded SDPA": _padded_sdpa}


def _exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: AttentionCase, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Attention as one writes it in torch, document by document, computed in `dtype`."""
    parts = []
    for q_, k_, v_ in zip(*(x.to(dtype).split(case.lengths.tolist()) for x in (q, k, v)), strict=True):
        heads = [x.transpose(0, 1) for x in (q_, k_, v_)]
        scores = heads[0] @ heads[1].transpose(1, 2) * case.head_dim**-0.5
        if case.window is not None:
            place = torch.arange(len(q_), device=q.device)
            scores = scores.masked_fill((place[:, None] - place[None]).abs() >= case.window, float("-inf"))
        parts.append((scores.softmax(-1) @ heads[2]).transpose(0, 1))
    return torch.cat(parts)


def _rms(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact.double()).square().mean().sqrt())
