"""The Python face of `ops.attention`: checks, and a choice between C++ (CPU tensors) and Triton (CUDA tensors)."""

from __future__ import annotations

from typing import Any, Literal, overload

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

__all__ = ["attention"]


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    plo: torch.Tensor | None = ...,
    phi: torch.Tensor | None = ...,
    *,
    scale: float | None = ...,
    softcap: float = ...,
    out: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    plo: torch.Tensor | None = ...,
    phi: torch.Tensor | None = ...,
    *,
    scale: float | None = ...,
    softcap: float = ...,
    out: torch.Tensor | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    plo: torch.Tensor | None = None,
    phi: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Like `softmax(scale * q @ k.T, where=row i sees [lo_i, hi_i) and [plo_i, phi_i)) @ v` in every head.

    One op for every mask of packed attention: bidirectional documents (lo and hi are the document's ends), causal ones
    (hi = i + 1), sliding windows (both move), a shared prefix ([plo, phi), anywhere among the keys). Grouped heads are
    read in place: query head h uses key head h // (H / Hkv). The softmax runs over blocks of keys as in FlashAttention
    (arXiv 2205.14135); no T x T matrix exists.

    Args:
        q: (T, H, D) float32, float16 or bfloat16. D is at most 256. Any strides, D contiguous. If D is not a multiple
            of 8, the inputs are copied and padded with zeros.
        k, v: (S, Hkv, D) in q's dtype; Hkv divides H. S is T where packed tokens attend to themselves.
        lo, hi: int32 (T,) with 0 <= lo <= hi <= S. lo == hi is an empty interval.
        plo, phi: int32 (T,) likewise, or both None. A row's two intervals must not overlap.
        scale: positive factor of the scores; None for D**-0.5.
        softcap: scores become softcap * tanh(score / softcap) where it is above 0.
        out: (T, H, D) in q's dtype to write to (D contiguous, no memory in common with the inputs); None for a new one.
        return_lse: also return the log-sum-exp of each row and head.
        backend: "cpp" (CPU tensors) or "triton" (CUDA tensors, or CPU tensors under TRITON_INTERPRET=1); None chooses.

    Returns (T, H, D) in q's dtype, and with `return_lse` the log-sum-exp, float32 (T, H). A row without keys (padding)
    gets zeros and -infinity. Sums are float32 on every device; float32 inputs are not rounded (no tf32). The softmax's
    weights are rounded to 16 bits before they are multiplied with 16-bit values on GPUs and, for bfloat16, on CPUs of
    levels avx512_bf16 and amx. Other levels compute 16-bit inputs in float32.

    Intervals may come in any order; neighbouring rows that see nearly the same keys are fast. The CPU checks the
    intervals. Checking on a GPU would wait for the device, so there they are clamped to [0, S), and a key in both
    intervals of a row counts twice.

    On the CPU a row's bits do not depend on what else is packed, on the place of its segment or on the number of
    threads, if `lo`, `hi`, `plo` and `phi` step by 0 or 1 from row to row of a segment, as they do for all masks above.
    A prefix may be shared, or be repeated before each segment: the bits are the same if all rows of a segment see the
    whole prefix and their segment from its first key on. (One exception: if a segment's first interval begins exactly
    one key after the previous row's and overlaps it, sums of that segment may be grouped differently.) NaN and
    infinities stay in their segment. On a GPU the same call gives the same bits, but other neighbours in a tile of
    rows group the sums differently, which changes last bits, and a value of `v` that is not finite reaches every row
    of a tile that reads it.

    Raises TypeError, ValueError naming the argument; ValueError if a gradient is required: there is none.

    Example:
        >>> import torch
        >>> q = torch.zeros(3, 1, 8); v = torch.arange(3.0).reshape(3, 1, 1).expand(3, 1, 8).contiguous()
        >>> lo, hi = torch.tensor([0, 0, 2], dtype=torch.int32), torch.tensor([2, 2, 3], dtype=torch.int32)
        >>> attention(q, q, v, lo, hi)[:, 0, 0].tolist()
        [0.5, 0.5, 2.0]
    """
    given = (q, k, v)
    if torch.is_grad_enabled() and any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in given):
        raise ValueError("attention has no gradient: call it under torch.inference_mode() or torch.no_grad()")
    if torch.compiler.is_compiling():
        result, lse = torch.ops.fastrerank.attention(q, k, v, lo, hi, plo, phi, scale, softcap, return_lse, backend)
        if out is not None:
            if out.shape != q.shape or out.dtype != q.dtype:
                raise ValueError(f"out must be {q.dtype} of shape {tuple(q.shape)}, got {said(out)}")
            check_out(out)
            result = out.copy_(result)
    else:
        result, lse = _run(q, k, v, lo, hi, plo, phi, scale, softcap, out, return_lse, backend)
    return (result, lse) if return_lse else result


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    plo: torch.Tensor | None,
    phi: torch.Tensor | None,
    scale: float | None,
    softcap: float,
    out: torch.Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v, lo, hi, plo, phi, out)
    backend = choose_backend(q.device, backend, "q")
    head_dim = q.shape[2]
    scale, softcap = positive_scale(scale, head_dim), not_negative("softcap", softcap)
    if head_dim % 8:  # zeros change no score, and the added columns of the output are cut off
        q, k, v = (torch.nn.functional.pad(x, (0, -x.shape[2] % 8)) for x in (q, k, v))
        wide, lse = _run(q, k, v, lo, hi, plo, phi, scale, softcap, None, return_lse, backend)
        result = wide[..., :head_dim]
        return result.contiguous() if out is None else out.copy_(result), lse
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2] if return_lse else (0,), dtype=torch.float32, device=q.device)
    if q.shape[0] == 0:
        return out, lse
    lo, hi = lo.contiguous(), hi.contiguous()
    if plo is not None and phi is not None:
        plo, phi = plo.contiguous(), phi.contiguous()
    if backend == "triton":
        from fastrerank.ops._attention.triton import attention as launch

        with on_device(q, "q"):
            launch(q, k, v, lo, hi, plo, phi, out, lse if return_lse else None, scale, softcap)
    elif q.dtype == torch.float16:
        wide = torch.empty(q.shape, dtype=torch.float32)
        _cpp(q.float(), k.float(), v.float(), lo, hi, plo, phi, wide, lse if return_lse else None, scale, softcap)
        out.copy_(wide)
    else:
        _cpp(q, k, v, lo, hi, plo, phi, out, lse if return_lse else None, scale, softcap)
    return out, lse


def _cpp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    plo: torch.Tensor | None,
    phi: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> None:
    rows, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    strides = [step for tensor in (q, k, v, out) for step in tensor.stride()[:2]]
    _cpu.attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        lo.data_ptr(),
        hi.data_ptr(),
        0 if plo is None else plo.data_ptr(),
        0 if phi is None else phi.data_ptr(),
        rows,
        keys,
        heads,
        kv_heads,
        head_dim,
        strides,
        "bfloat16" if q.dtype == torch.bfloat16 else "float32",
        scale,
        softcap,
        cpu.num_threads(),
        cpu.isa(),
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    plo: torch.Tensor | None,
    phi: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    for name, given in (("q", q), ("k", k), ("v", v), ("out", out)):
        if given is None and name == "out":
            continue
        tensor = check_tensor(name, given)
        if tensor.ndim != 3 or tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16 (rows, heads, D), got {said(tensor)}")
        if tensor.stride(2) != 1 and tensor.numel():
            raise ValueError(f"{name} must be contiguous along D, got strides {tensor.stride()}; call .contiguous()")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {tensor.dtype} on {tensor.device}")
    rows, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    if not 1 <= head_dim <= 256:
        raise ValueError(f"q's head size must be 1 to 256, got {head_dim}")
    if k.shape[2] != head_dim or kv_heads < 1 or heads % kv_heads or heads < 1:
        raise ValueError(f"k must be (S, Hkv, {head_dim}) with Hkv dividing {heads} heads, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if out is not None:
        if out.shape != q.shape:
            raise ValueError(f"out must have q's shape {tuple(q.shape)}, got {tuple(out.shape)}")
        check_out(out)
    if max(rows, keys) >= 2**31:
        raise ValueError(f"q and k must have fewer than 2**31 rows, got {rows} and {keys}")
    if (plo is None) != (phi is None):
        raise ValueError(f"plo and phi must both be given or both be None, got only {'phi' if plo is None else 'plo'}")
    for name, given in (("lo", lo), ("hi", hi), ("plo", plo), ("phi", phi)):
        if given is None and name in ("plo", "phi"):
            continue
        tensor = check_tensor(name, given)
        if tensor.dtype != torch.int32 or tensor.shape != (rows,):
            raise ValueError(f"{name} must be int32 of shape ({rows},), got {said(tensor)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")


def _compiled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    plo: torch.Tensor | None,
    phi: torch.Tensor | None,
    scale: float | None,
    softcap: float,
    return_lse: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(q, k, v, lo, hi, plo, phi, scale, softcap, None, return_lse, backend)


def _fake(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return_lse = others[-2]
    return q.new_empty(q.shape), q.new_empty(q.shape[:2] if return_lse else (0,), dtype=torch.float32)


register_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor? plo, Tensor? phi, float? scale, "
    "float softcap, bool return_lse, str? backend) -> (Tensor, Tensor)",
    _compiled,
    _fake,
)
