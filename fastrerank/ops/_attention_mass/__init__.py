"""The Python face of `ops.attention_mass`: checks, and a choice between C++ (CPU tensors) and Triton (CUDA tensors)."""

from __future__ import annotations

from typing import Any

import torch

import fastrerank._cpu as _cpu
from fastrerank.ops._tensors import (
    DTYPES,
    check_out,
    check_tensor,
    choose_backend,
    not_negative,
    on_device,
    positive_scale,
    register_op,
    said,
)
from fastrerank.runtime import cpu

__all__ = ["attention_mass"]


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    row_weight: torch.Tensor,
    *,
    head_weight: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    per_head: bool = False,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Like `sum(head_weight[h] * (row_weight @ where(seen, exp(scale * q[:, h] @ k[:, h // G].T - lse[:, h])))`.

    The attention that weighted rows give to each key, summed over heads: the readout of in-context reranking (ICR,
    arXiv 2410.02642; QRHead, 2506.09944; CoRe, 2510.02219). `lse` is what `ops.attention` returns, so the softmax over
    the whole prompt need not be repeated; rows of a calibration prompt get negative weights. No memory
    of rows x keys is used: beside the inputs there is `out` and, on a GPU, float32 (Hkv, S).

    Args:
        q: (R, H, D) float32, float16 or bfloat16: the rows that are read, after rotary embedding. D is at most 256.
            Any strides, D contiguous.
        k: (S, Hkv, D) in q's dtype likewise; Hkv divides H, query head h uses key head h // (H / Hkv), in place.
        lse: float32 (R, H), log-sum-exp of the rows' scores. A row of -infinity adds nothing.
        lo, hi: int32 (R,) with 0 <= lo <= hi <= S: row r is read at the keys [lo_r, hi_r), which may be fewer than
            those of `lse`. lo == hi is an empty interval.
        row_weight: float32 (R,), of any sign.
        head_weight: float32 (H,); None for ones. Heads of weight 0 are not computed, and their `lse` is not read.
        scale: positive factor of the scores; None for D**-0.5.
        softcap: scores become softcap * tanh(score / softcap) where it is above 0.
        per_head: return every head's sum; head_weight must be None.
        out: float32 (S,) or (H, S), contiguous along S, to which the result is added; None for zeros. It shares no
            memory with the inputs.
        backend: "cpp" (CPU tensors) or "triton" (CUDA tensors, or CPU tensors under TRITON_INTERPRET=1); None chooses.

    Returns `out`: float32 (S,), with `per_head` (H, S). Products and sums are float32 on every device and in every
    dtype, without atomics, in one fixed order: the same call gives the same bits. On the CPU a key's bits do not
    depend on the other keys or on the number of threads. On the CPU, NaN reaches only the keys that see it. On a GPU, a
    key that is not finite spoils its own value only, and a row that is not finite those of the keys that it sees.

    The CPU checks `lo` and `hi`. Checking on a GPU would wait for the device, so there they are clamped to [0, S).

    Raises TypeError, ValueError naming the argument; ValueError if a gradient is required: there is none.

    Example:
        >>> import torch
        >>> q, k = torch.zeros(2, 1, 8), torch.zeros(4, 1, 8)
        >>> lo, hi = torch.tensor([0, 0], dtype=torch.int32), torch.tensor([2, 4], dtype=torch.int32)
        >>> _, lse = attention(q, k, k, lo, hi, return_lse=True)
        >>> attention_mass(q, k, lse, lo, hi, torch.tensor([1.0, -1.0])).tolist()
        [0.25, 0.25, -0.25, -0.25]
    """
    given = (q, k, lse, row_weight, head_weight, out)
    if torch.is_grad_enabled() and any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in given):
        raise ValueError("attention_mass has no gradient: call it under torch.inference_mode() or torch.no_grad()")
    if torch.compiler.is_compiling():
        if out is not None:
            _check_out(q, k, per_head, out)
        result: torch.Tensor = torch.ops.fastrerank.attention_mass(
            q, k, lse, lo, hi, row_weight, head_weight, scale, softcap, per_head, backend
        )
        return result if out is None else out.add_(result)
    return _run(q, k, lse, lo, hi, row_weight, head_weight, scale, softcap, per_head, out, backend)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    row_weight: torch.Tensor,
    head_weight: torch.Tensor | None,
    scale: float | None,
    softcap: float,
    per_head: bool,
    out: torch.Tensor | None,
    backend: str | None,
) -> torch.Tensor:
    _check(q, k, lse, lo, hi, row_weight, head_weight)
    backend = choose_backend(q.device, backend, "q")
    scale, softcap = positive_scale(scale, q.shape[2]), not_negative("softcap", softcap)
    if per_head and head_weight is not None:
        raise ValueError("head_weight must be None with per_head, which weighs no heads against each other")
    if out is None:
        out = torch.zeros(_shape(q, k, per_head), dtype=torch.float32, device=q.device)
    else:
        _check_out(q, k, per_head, out)
    if q.shape[0] == 0 or k.shape[0] == 0:
        return out
    lse, lo, hi, row_weight = (tensor.contiguous() for tensor in (lse, lo, hi, row_weight))
    if head_weight is not None:
        head_weight = head_weight.contiguous()
    given = (q, k, lse, lo, hi, row_weight, head_weight, scale, softcap, per_head, out)
    if backend == "triton":
        from fastrerank.ops._attention_mass.triton import attention_mass as launch

        with on_device(q, "q"):
            launch(*given)
    else:
        _cpp(*given)
    return out


def _cpp(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    row_weight: torch.Tensor,
    head_weight: torch.Tensor | None,
    scale: float,
    softcap: float,
    per_head: bool,
    out: torch.Tensor,
) -> None:
    rows, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    strides = [*q.stride()[:2], *k.stride()[:2], out.stride(0)]
    _cpu.attention_mass(
        q.data_ptr(),
        k.data_ptr(),
        lse.data_ptr(),
        lo.data_ptr(),
        hi.data_ptr(),
        row_weight.data_ptr(),
        0 if head_weight is None else head_weight.data_ptr(),
        out.data_ptr(),
        rows,
        keys,
        heads,
        kv_heads,
        head_dim,
        strides,
        str(q.dtype)[6:],
        scale,
        softcap,
        per_head,
        cpu.num_threads(),
        cpu.isa(),
    )


def _shape(q: torch.Tensor, k: torch.Tensor, per_head: bool) -> tuple[int, ...]:
    return (q.shape[1], k.shape[0]) if per_head else (k.shape[0],)


def _check_out(q: torch.Tensor, k: torch.Tensor, per_head: bool, out: torch.Tensor) -> None:
    check_tensor("out", out)
    shape = _shape(q, k, per_head)
    if out.dtype != torch.float32 or out.shape != shape:
        raise ValueError(f"out must be float32 of shape {shape}, got {said(out)}")
    if out.device != q.device:
        raise ValueError(f"out must be on {q.device} like q, got {out.device}")
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"out must be contiguous along the keys, got strides {out.stride()}")
    check_out(out)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    row_weight: torch.Tensor,
    head_weight: torch.Tensor | None,
) -> None:
    for name, tensor in (("q", q), ("k", k)):
        check_tensor(name, tensor)
        if tensor.ndim != 3 or tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16 (rows, heads, D), got {said(tensor)}")
        if tensor.stride(2) != 1 and tensor.numel() and tensor.shape[2] > 1:
            raise ValueError(f"{name} must be contiguous along D, got strides {tensor.stride()}; call .contiguous()")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {tensor.dtype} on {tensor.device}")
    rows, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    if not 1 <= head_dim <= 256:
        raise ValueError(f"q's head size must be 1 to 256, got {head_dim}")
    if k.shape[2] != head_dim or kv_heads < 1 or heads % kv_heads or heads < 1:
        raise ValueError(f"k must be (S, Hkv, {head_dim}) with Hkv dividing {heads} heads, got {tuple(k.shape)}")
    if max(rows * heads, keys) >= 2**31:
        raise ValueError(f"q and k must have fewer than 2**31 rows of all heads, got {rows} x {heads} and {keys}")
    vectors: tuple[tuple[str, torch.Tensor | None, torch.dtype, tuple[int, ...]], ...] = (
        ("lse", lse, torch.float32, (rows, heads)),
        ("lo", lo, torch.int32, (rows,)),
        ("hi", hi, torch.int32, (rows,)),
        ("row_weight", row_weight, torch.float32, (rows,)),
        ("head_weight", head_weight, torch.float32, (heads,)),
    )
    for name, given, dtype, shape in vectors:
        if given is None and name == "head_weight":
            continue
        vector = check_tensor(name, given)
        if vector.dtype != dtype or vector.shape != shape:
            raise ValueError(f"{name} must be {str(dtype)[6:]} of shape {shape}, got {said(vector)}")
        if vector.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {vector.device}")


def _compiled(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    row_weight: torch.Tensor,
    head_weight: torch.Tensor | None,
    scale: float | None,
    softcap: float,
    per_head: bool,
    backend: str | None,
) -> torch.Tensor:
    return _run(q, k, lse, lo, hi, row_weight, head_weight, scale, softcap, per_head, None, backend)


def _fake(q: torch.Tensor, k: torch.Tensor, *others: Any) -> torch.Tensor:
    return q.new_empty(_shape(q, k, others[-2]), dtype=torch.float32)


register_op(
    "attention_mass(Tensor q, Tensor k, Tensor lse, Tensor lo, Tensor hi, Tensor row_weight, Tensor? head_weight, "
    "float? scale, float softcap, bool per_head, str? backend) -> Tensor",
    _compiled,
    _fake,
)
