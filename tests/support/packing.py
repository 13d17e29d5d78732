"""Packed rows for the tests of attention: intervals of segments, plain torch on dense masks, comparisons."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from fastrerank.ops import reference

HEAD_SIZES = (8, 10, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)


class Segment(NamedTuple):
    """`length` rows in a row; prefix: number of the segment that they also see."""

    length: int
    prefix: int | None = None
    mode: str = "bidirectional"  # causal, window (causal, of 8 positions), local (4 to either side), padding


class Case(NamedTuple):
    """Segments one after another, heads, key heads, head size, cap of the scores."""

    segments: list[Segment]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    softcap: float = 0.0


def documents(lengths: list[int], mode: str = "bidirectional", prefix: int | None = None) -> list[Segment]:
    return [Segment(length, prefix, mode) for length in lengths]


def intervals(segments: list[Segment]) -> list[np.ndarray]:
    """[lo, hi, plo, phi] of the segments packed one after another."""
    starts = np.cumsum([0, *(segment.length for segment in segments)])
    rows = []
    for number, (_, prefix, mode) in enumerate(segments):
        start, end = int(starts[number]), int(starts[number + 1])
        shared = (0, 0) if prefix is None else (int(starts[prefix]), int(starts[prefix + 1]))
        for i in range(start, end):
            plo, phi = shared
            lo, hi = start, end
            if mode == "causal":
                hi = i + 1
            elif mode == "window":
                lo, hi = max(start, i - 7), i + 1
                plo = min(phi, max(plo, phi + (i - start) - 7))
            elif mode == "local":
                lo, hi = max(start, i - 4), min(end, i + 5)
            elif mode == "padding":
                lo = hi = plo = phi = 0
            rows.append((lo, hi, plo, phi))
    return [np.array(column, np.int32) for column in zip(*rows, strict=True)]


def tensors(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
    """q, k, v of a case."""
    random = np.random.default_rng(seed)
    rows = sum(segment.length for segment in case.segments)
    shapes = [(rows, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    return [torch.tensor(random.normal(size=shape)).to(dtype).to(device) for shape in shapes]


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: list[np.ndarray], softcap: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as one writes it in torch, on a dense mask, in the inputs' dtype; the logarithms in float32."""
    lo, hi, plo, phi = (torch.from_numpy(span).to(q.device)[:, None] for span in spans)
    key = torch.arange(len(k), device=q.device)[None]
    seen = ((key >= lo) & (key < hi)) | ((key >= plo) & (key < phi))
    group = q.shape[1] // k.shape[1]
    q, k, v = q.transpose(0, 1), k.repeat_interleave(group, 1).transpose(0, 1), v.repeat_interleave(group, 1)

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        s = q @ k.transpose(1, 2) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        return s.masked_fill(~seen, float("-inf"))

    out = scores(q, k).softmax(-1).masked_fill(~seen.any(1)[:, None], 0) @ v.transpose(0, 1)
    return out.transpose(0, 1), scores(q.float(), k.float()).logsumexp(-1).T


def errors(value: Any, exact: np.ndarray) -> tuple[float, float]:
    """Root mean square and largest difference to finite values of float64."""
    difference = np.asarray(value.double().cpu())[np.isfinite(exact)] - exact[np.isfinite(exact)]
    return float(np.sqrt(np.mean(difference**2))) if difference.size else 0.0, float(np.abs(difference).max(initial=0))


def check(
    out: torch.Tensor,
    lse: torch.Tensor,
    inputs: list[torch.Tensor],
    spans: list[np.ndarray],
    softcap: float = 0.0,
    scale: float | None = None,
) -> None:
    """Assert errors against float64 of at most twice plain torch's in the same dtype, and what empty rows hold."""
    scale = inputs[0].shape[2] ** -0.5 if scale is None else scale
    exact, exact_lse = reference.attention(
        *(tensor.double().cpu().numpy() for tensor in inputs), *spans, scale=scale, softcap=softcap
    )
    assert out.dtype == inputs[0].dtype
    assert lse.dtype == torch.float32
    assert out.shape == exact.shape
    assert lse.shape == exact_lse.shape
    assert not out.isnan().any()
    assert not lse.isnan().any()
    empty = np.isinf(exact_lse)
    assert (out.cpu()[torch.from_numpy(empty)] == 0).all()
    assert (lse.cpu()[torch.from_numpy(empty)] == -torch.inf).all()
    plain_out, plain_lse = plain(*inputs, spans, softcap, scale)
    # A value that float64 and torch both round to itself leaves torch without an error: half a last bit is allowed.
    floor = 0.5 * torch.finfo(out.dtype).eps * float(np.abs(exact).max(initial=0))
    for name, a, b in zip(("rms", "largest"), errors(out, exact), errors(plain_out, exact), strict=True):
        assert a <= 2 * b + floor, f"{name} error {a:.3g}, plain torch's {b:.3g}"
    # The logarithm moves as much as the scores do. The largest error of so few values is a matter of luck: it is held
    # against the rounding of a score's sum of D products in any order, twice the statistical bound, and of itself.
    (rms, largest), (plain_rms, _) = errors(lse, exact_lse), errors(plain_lse, exact_lse)
    unit = float(np.abs(exact_lse[np.isfinite(exact_lse)]).max(initial=0)) * 2.0**-24
    norms = [float(tensor.double().norm(dim=-1).max()) for tensor in inputs[:2]]
    assert rms <= 2 * plain_rms + unit, f"rms error of the logarithms {rms:.3g}, plain torch's {plain_rms:.3g}"
    assert largest <= 2 * np.sqrt(exact.shape[2] + 1) * 2.0**-24 * norms[0] * norms[1] * scale + 4 * unit
